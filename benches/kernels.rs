//! Kernel benches on the shapes of SmolLM2-135M: linear layers against the memory bandwidth, one product in every format, and the
//! small kernels.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use parallax_kernels::attention::{KvFormat, KvPages, Paging, RowRef, Scoring, append_kv, paged_attention};
use parallax_kernels::linear::{PackedWeight, linear, linear_multi};
use parallax_kernels::reference::noise;
use parallax_kernels::{WeightKind, activation, logprob, matmul, norm, pool};

const HIDDEN: usize = 576;
const FFN: usize = 1536;
const KV: usize = 192;
const VOCAB: usize = 49152;
const LAYERS: usize = 30;

struct Layer {
    qkv: [PackedWeight; 3],
    o: PackedWeight,
    gate_up: PackedWeight,
    down: PackedWeight,
}

/// The linear layers of the whole model, so that a sweep streams all of its bytes from memory.
struct Model {
    layers: Vec<Layer>,
    head: PackedWeight,
}

impl Model {
    fn new(kind: WeightKind) -> Self {
        let pack = |n: usize, k: usize| {
            PackedWeight::pack_f32(kind, &noise(n * k, (n + k) as u64), n, k).expect("shapes fit")
        };
        let layer = || Layer {
            qkv: [pack(HIDDEN, HIDDEN), pack(KV, HIDDEN), pack(KV, HIDDEN)],
            o: pack(HIDDEN, HIDDEN),
            gate_up: pack(2 * FFN, HIDDEN),
            down: pack(HIDDEN, FFN),
        };
        Self { layers: (0..LAYERS).map(|_| layer()).collect(), head: pack(VOCAB, HIDDEN) }
    }

    fn bytes(&self) -> usize {
        let layer = |l: &Layer| {
            l.qkv.iter().map(PackedWeight::bytes).sum::<usize>()
                + l.o.bytes()
                + l.gate_up.bytes()
                + l.down.bytes()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.head.bytes()
    }

    /// All linear layers of one step; `head_rows` rows need logits.
    fn sweep(&self, x: &[f32], wide: &[f32], rows: usize, head_rows: usize, y: &mut [Vec<f32>; 4]) {
        let [qkv, a, d, logits] = y;
        for layer in &self.layers {
            linear_multi(x, &layer.qkv, &mut qkv[..rows * (HIDDEN + 2 * KV)]).expect("shapes fit");
            linear(x, &layer.o, &mut a[..rows * HIDDEN]).expect("shapes fit");
            linear(x, &layer.gate_up, &mut d[..rows * 2 * FFN]).expect("shapes fit");
            linear(wide, &layer.down, &mut a[..rows * HIDDEN]).expect("shapes fit");
        }
        linear(&x[..head_rows * HIDDEN], &self.head, &mut logits[..head_rows * VOCAB]).expect("shapes fit");
    }
}

fn sweeps(c: &mut Criterion) {
    let kinds = [WeightKind::Q8_0, WeightKind::Q4_0, WeightKind::Q4_1, WeightKind::Bf16, WeightKind::F32];
    for kind in kinds {
        let model = Model::new(kind);
        let mut group = c.benchmark_group(format!("sweep_{kind:?}"));
        group.sample_size(10).measurement_time(Duration::from_secs(2));
        for rows in [1, 4, 8, 32, 128] {
            let head_rows = if rows <= 32 { rows } else { 1 };
            let (x, wide) = (noise(rows * HIDDEN, 1), noise(rows * FFN, 2));
            let mut y = [rows * (HIDDEN + 2 * KV), rows * HIDDEN, rows * 2 * FFN, head_rows * VOCAB]
                .map(|n| vec![0.0; n]);
            group.throughput(Throughput::Bytes(model.bytes() as u64));
            group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                b.iter(|| model.sweep(black_box(&x), &wide, rows, head_rows, &mut y));
            });
        }
    }
}

/// One large matrix in every format that can be made here: what leaves the memory at one row, what the units can do at 32.
fn formats(c: &mut Criterion) {
    let (n, k) = (8192, 2048);
    let matrix = noise(n * k, 1);
    for kind in WeightKind::ALL.into_iter().filter(|kind| kind.has_quantizer()) {
        let weight = PackedWeight::pack_f32(kind, &matrix, n, k).expect("shapes fit");
        let mut group = c.benchmark_group(format!("linear_{n}x{k}_{kind:?}"));
        group.sample_size(10).measurement_time(Duration::from_secs(1));
        for rows in [1, 32] {
            let (x, mut y) = (noise(rows * k, 2), vec![0.0; rows * n]);
            group.throughput(Throughput::Elements((2 * rows * n * k) as u64));
            group.bench_function(BenchmarkId::from_parameter(rows), |b| {
                b.iter(|| linear(black_box(&x), &weight, &mut y).expect("shapes fit"));
            });
        }
    }
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm_512x1536x576");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    let (m, n, k) = (512, FFN, HIDDEN);
    let (a, b, mut out) = (noise(m * k, 1), noise(n * k, 2), vec![0.0; m * n]);
    group.throughput(Throughput::Elements((2 * m * n * k) as u64));
    group.bench_function("nt", |bench| {
        bench.iter(|| matmul::gemm_nt(m, n, k, black_box(&a), k, &b, k, &mut out, n, false));
    });
    group.bench_function("nn", |bench| {
        bench.iter(|| matmul::gemm_nn(m, n, k, black_box(&a), k, &b, n, &mut out, n, false));
    });
    group.bench_function("tn", |bench| {
        bench.iter(|| matmul::gemm_tn(m, n, k, black_box(&a), m, &b, n, &mut out, n, false));
    });
}

fn small(c: &mut Criterion) {
    let mut group = c.benchmark_group("small");
    group.sample_size(20).measurement_time(Duration::from_secs(1));
    let x = noise(512 * 2 * FFN, 1);
    let w = noise(HIDDEN, 2);
    let mut y = vec![0.0; 512 * FFN];
    group.bench_function("rms_norm_512", |b| {
        b.iter(|| norm::rms_norm(black_box(&x[..512 * HIDDEN]), &w, 1e-5, &mut y[..512 * HIDDEN]));
    });
    group.bench_function("silu_mul_512", |b| {
        b.iter(|| activation::gated_mul(activation::Activation::Silu, black_box(&x), FFN, &mut y))
    });
    let logits = noise(16 * VOCAB, 3);
    let mut out = vec![0.0; 16];
    group.bench_function("token_logprobs_16x49152", |b| {
        b.iter(|| logprob::token_logprobs(black_box(&logits), VOCAB, &[7; 16], &mut out));
    });
    group.bench_function("pool_run_2", |b| b.iter(|| pool::run(2, |i| _ = black_box(i))));
    for format in KvFormat::ALL {
        let mut kv = KvPages::new(format, 512 / 16, 16, 3, 64).expect("a store of these sizes");
        let tables = [(0..512 / 16).collect::<Vec<u32>>()];
        let all: Vec<RowRef> = (1..=512).map(|n_keys| RowRef { seq: 0, n_keys }).collect();
        let (k, v) = (noise(512 * 3 * 64, 4), noise(512 * 3 * 64, 6));
        append_kv(&mut kv, &Paging { rows: &all, tables: &tables }, &k, &v).expect("the rows fit the store");
        for (name, rows) in [("prefill_512", &all[..]), ("decode_at_512", &all[511..])] {
            let paging = Paging { rows, tables: &tables };
            let q = noise(rows.len() * HIDDEN, 5);
            let mut out = vec![0.0; q.len()];
            group.bench_function(format!("attention_{name}_{format}"), |b| {
                b.iter(|| paged_attention(black_box(&q), 9, &paging, &kv, &Scoring::scaled(0.125), &mut out));
            });
        }
    }
}

criterion_group!(benches, sweeps, formats, products, small);
criterion_main!(benches);
