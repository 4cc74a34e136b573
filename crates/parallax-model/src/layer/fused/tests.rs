//! Fused parts against the same layer operation by operation, bit for bit.

use burn::tensor::{Device, TensorData};
use parallax_kernels::{
    PackedWeight, WeightKind,
    activation::Activation,
    attention::RowRef,
    reference::noise,
    rope::{RopeLayout, RopeTable, frequencies},
};

use super::*;
use crate::{
    layer::{self, AdapterSlot},
    ops::{
        attention::{Geometry, KvStore, PagedRows, Rotation},
        delta::StateStore,
        linear::FrozenLinear,
    },
};

/// H and F; as Q·D they are whole blocks of every format.
const WIDTH: usize = 256;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const KV: usize = KV_HEADS * DIM;

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}

fn values(x: Tensor<2>) -> Vec<u32> {
    let values: Vec<f32> = x.try_into_data().unwrap().try_to_vec().unwrap();
    values.iter().map(|v| v.to_bits()).collect()
}

/// Outputs in parts of these formats and sizes, 256 inputs.
fn linear(parts: &[(WeightKind, usize)], bias: bool, seed: u64) -> Linear {
    let part = |(kind, n): &(WeightKind, usize)| {
        let w: Vec<f32> = noise(n * WIDTH, seed + *n as u64).iter().map(|v| v * 0.2).collect();
        PackedWeight::pack_f32(*kind, &w, *n, WIDTH).unwrap()
    };
    let n: usize = parts.iter().map(|(_, n)| n).sum();
    let parts = parts.iter().map(part).collect();
    let weight = LinearWeight::Packed(Arc::new(FrozenLinear { parts, transposed: None }));
    Linear { bias: bias.then(|| tensor(noise(n, seed + 1), [n])), ..Linear::bare(weight) }
}

fn norm(n: usize, seed: u64) -> NormWeights {
    let weight = noise(n, seed).iter().map(|v| 1.0 + 0.3 * v).collect();
    NormWeights { weight: tensor(weight, [n]), eps: 1e-5 }
}

fn around(before: bool, after: bool, seed: u64) -> AroundWeights {
    AroundWeights { before: before.then(|| norm(WIDTH, seed)), after: after.then(|| norm(WIDTH, seed + 1)) }
}

fn geometry() -> Arc<Geometry> {
    let frequencies = frequencies(DIM, 10_000.0);
    let layout = RopeLayout { head_dim: DIM, interleaved: false, magnitude: 1.0 };
    let table = RopeTable::new(layout, &frequencies, 64).unwrap();
    Arc::new(Geometry {
        n_heads: HEADS,
        n_kv_heads: KV_HEADS,
        head_dim: DIM,
        rope: Some(Arc::new(Rotation { table, interleaved: false, magnitude: 1.0, frequencies })),
        scale: 0.125,
        window: Some(9),
        softcap: Some(20.0),
        sinks: Some(noise(HEADS, 5)),
    })
}

/// A layer with norms `before` its parts and, if `more`, with everything that a trainable one may have besides.
fn weights(kind: WeightKind, before: bool, more: bool) -> LayerWeights {
    let attention = AttentionWeights {
        geometry: geometry(),
        qkv: linear(&[(kind, WIDTH), (WeightKind::F32, KV), (kind, KV)], more, 10),
        head_norms: more.then(|| [norm(DIM, 20), norm(DIM, 21)]),
        o: linear(&[(kind, WIDTH)], more, 30),
        gate: None,
    };
    let mlp = DenseMlpWeights {
        gate_up: linear(&[(kind, WIDTH), (kind, WIDTH)], more, 40),
        down: linear(&[(kind, WIDTH)], more, 50),
        activation: if more { Activation::GeluTanh } else { Activation::Silu },
    };
    LayerWeights {
        mixer_norms: around(before, more || !before, 60),
        mixer: MixerWeights::Attention(attention),
        mlp_norms: around(before, more || !before, 70),
        mlp: MlpWeights::Dense(mlp),
        residual_scale: if more { 0.7 } else { 1.0 },
    }
}

/// Two adapters on every linear layer: one for all rows, one for these.
fn adapt(weights: &mut LayerWeights, rows: Vec<u32>) {
    let chosen = AdapterSlot { id: Some(7), ..AdapterSlot::default() };
    chosen.rows.set(Some(rows));
    for (slot, rank) in [(AdapterSlot::default(), 3), (chosen, 5)] {
        for linear in weights.linears_mut() {
            // Two modules, with columns between them that get nothing.
            for (offset, outputs) in [(0, 64), (192, 64)] {
                let a = tensor(noise(rank * WIDTH, 80 + offset as u64), [rank, WIDTH]);
                let b = tensor(noise(outputs * rank, 90 + offset as u64), [outputs, rank]);
                linear.add_module(&slot, a, b, offset, 0.3);
            }
        }
    }
}

/// Bits of the layer's result for two sequences, a third of the rows being the second's, fused and operation by operation.
fn both(weights: &LayerWeights, x: &[f32]) -> [Vec<u32>; 2] {
    let n = x.len() / WIDTH;
    let x = tensor(x.to_vec(), [n, WIDTH]);
    let parts = Arc::new(weights.fused());
    assert!(parts.attention.is_some() && parts.mlp.is_some());
    let lens = [n - n / 3, n / 3];
    let rows: Vec<RowRef> =
        (0..2).flat_map(|seq| (1..=lens[seq]).map(move |n_keys| RowRef { seq, n_keys })).collect();
    let positions: Vec<u32> = rows.iter().map(|row| row.n_keys as u32 - 1).collect();
    let packed = Attend::packed(positions.clone(), &[0, lens[0] as u32, n as u32]);
    let tables = vec![vec![2, 0], vec![1]];
    let rows = PagedRows { positions, rows, tables, ..PagedRows::default() };
    let attend = Attend::Paged {
        store: Arc::new(KvStore::pages(16, 3, KV_HEADS, DIM)),
        states: Arc::new(StateStore::new(0)),
        rows: Arc::new(rows),
    };
    let fused = forward_fused(weights, &parts, x.clone(), 0, &attend, Route::Kernels);
    [fused, layer::forward(weights, x, 0, &packed, Route::Kernels)].map(values)
}

#[test]
fn fused_parts_have_the_bits_of_their_operations() {
    for kind in WeightKind::ALL.into_iter().filter(|kind| kind.has_quantizer()) {
        for (before, more) in [(true, false), (false, false), (true, true)] {
            let weights = weights(kind, before, more);
            for n in [1, 3, 8, 33] {
                let x = noise(n * WIDTH, n as u64);
                let [fused, single] = both(&weights, &x);
                assert_eq!(fused, single, "{kind:?}, norms before {before}, more {more}, {n} rows");
                let untouched: Vec<u32> = x.iter().map(|v| v.to_bits()).collect();
                assert_ne!(fused, untouched);
            }
        }
    }
}

#[test]
fn adapters_are_added_inside_with_the_bits_of_their_operations() {
    for kind in [WeightKind::F32, WeightKind::Q8_0] {
        for more in [false, true] {
            let x = noise(8 * WIDTH, 1);
            let bare = weights(kind, true, more);
            let mut adapted = bare.clone();
            adapt(&mut adapted, vec![2, 3, 6]);
            let [fused, single] = both(&adapted, &x);
            assert_eq!(fused, single, "{kind:?} {more}");
            // The second has no rows: the first alone.
            let mut first = bare.clone();
            adapt(&mut first, Vec::new());
            let [without, single] = both(&first, &x);
            assert_eq!(without, single, "{kind:?} {more}");
            assert_eq!(fused[..2 * WIDTH], without[..2 * WIDTH], "rows before the first chosen one");
            assert_ne!(fused[2 * WIDTH..], without[2 * WIDTH..]);
            assert_ne!(without, both(&bare, &x)[0]);
        }
    }
}
