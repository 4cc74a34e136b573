//! The operations composed of Burn's own: the specification, and what devices without our kernels run.
//!
//! Every function here is differentiable by Burn and compared with its kernel in `ops/tests.rs`.

use burn::tensor::{Int, Tensor, TensorData, activation};

use super::{
    attention::{Geometry, KvStore, PagedRows},
    head::Targets,
};
use crate::layer::LoraPart;

/// x·Wᵀ.
pub(crate) fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// y with the adapter's product added to the module's columns.
pub(crate) fn lora_add(y: Tensor<2>, x: Tensor<2>, part: &LoraPart) -> Tensor<2> {
    let delta = linear(linear(x, part.a.clone()), part.b.clone()).mul_scalar(part.scale);
    let ([rows, _], [outputs, _]) = (y.dims(), part.b.dims());
    let columns = [0..rows, part.offset..part.offset + outputs];
    let sum = y.clone().slice(columns.clone()) + delta;
    y.slice_assign(columns, sum)
}

/// x / sqrt(mean(x²) + eps) · w, by rows.
pub(crate) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let mean = x.clone().powi_scalar(2).mean_dim(1);
    x * mean.add_scalar(eps).sqrt().recip() * weight.unsqueeze()
}

/// SiLU(gate) · up.
pub(crate) fn silu_mul(gate_up: Tensor<2>) -> Tensor<2> {
    let [gate, up]: [Tensor<2>; 2] =
        gate_up.chunk(2, 1).try_into().unwrap_or_else(|_| unreachable!("two chunks were asked for"));
    activation::silu(gate) * up
}

fn parts(qkv: &Tensor<2>, g: &Geometry) -> [Tensor<2>; 3] {
    let [rows, _] = qkv.dims();
    let (q, kv) = (g.n_heads * g.head_dim, g.n_kv_heads * g.head_dim);
    [0..q, q..q + kv, q + kv..q + 2 * kv].map(|columns| qkv.clone().slice([0..rows, columns]))
}

/// RMS norm of every query and key head.
pub(crate) fn head_norms(
    qkv: &Tensor<2>,
    q_norm: &Tensor<1>,
    k_norm: &Tensor<1>,
    g: &Geometry,
    eps: f32,
) -> Tensor<2> {
    let [rows, _] = qkv.dims();
    let [q, k, v] = parts(qkv, g);
    let heads = |x: Tensor<2>, weight: &Tensor<1>| {
        let [_, width] = x.dims();
        let by_head = x.reshape([rows * width / g.head_dim, g.head_dim]);
        rms_norm(by_head, weight.clone(), eps).reshape([rows, width])
    };
    Tensor::cat(vec![heads(q, q_norm), heads(k, k_norm), v], 1)
}

/// Rotates [T, heads·D] by position: halves of a head are the parts of complex numbers.
fn rotate(x: Tensor<2>, positions: &[u32], g: &Geometry) -> Tensor<3> {
    let (rows, half) = (positions.len(), g.head_dim / 2);
    let heads = x.dims()[1] / g.head_dim;
    let angles: Vec<f32> =
        positions.iter().flat_map(|p| g.frequencies.iter().map(move |f| *p as f32 * f)).collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|a| f(f64::from(*a)) as f32).collect();
        Tensor::<3>::from_data(TensorData::new(values, [rows, 1, half]), &x.device())
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let x = x.reshape([rows, heads, g.head_dim]);
    let a = x.clone().slice([0..rows, 0..heads, 0..half]);
    let b = x.slice([0..rows, 0..heads, half..g.head_dim]);
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    Tensor::cat(vec![first, b * cos + a * sin], 2)
}

/// Queries [n, Q, D] at the last n of m positions, over keys and values [m, K, D].
fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, g: &Geometry) -> Tensor<2> {
    let ([n, heads, d], [m, kv_heads, _]) = (q.dims(), k.dims());
    // Each key head serves heads / kv_heads query heads.
    let expand = |x: Tensor<3>| {
        let group = heads / kv_heads;
        x.swap_dims(0, 1).unsqueeze_dim::<4>(1).repeat_dim(1, group).reshape([heads, m, d])
    };
    let (k, v) = (expand(k), expand(v));
    let scores = q.swap_dims(0, 1).matmul(k.swap_dims(1, 2)).mul_scalar((g.head_dim as f32).sqrt().recip());
    let mask: Vec<f32> = (0..n)
        .flat_map(|i| (0..m).map(move |j| if j <= i + m - n { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    let mask = Tensor::<3>::from_data(TensorData::new(mask, [1, n, m]), &scores.device());
    let out = activation::softmax(scores + mask, 2).matmul(v);
    out.swap_dims(0, 1).reshape([n, heads * d])
}

/// Causal attention inside each packed sequence.
pub(crate) fn packed_attention(
    qkv: &Tensor<2>,
    g: &Geometry,
    positions: &[u32],
    cu_seqlens: &[u32],
) -> Tensor<2> {
    let [q, k, v] = parts(qkv, g);
    let (q, k) = (rotate(q, positions, g), rotate(k, positions, g));
    let v = v.reshape([positions.len(), g.n_kv_heads, g.head_dim]);
    let sequences = cu_seqlens.windows(2).map(|w| {
        let rows = w[0] as usize..w[1] as usize;
        let pick = |x: &Tensor<3>| x.clone().narrow(0, rows.start, rows.len());
        attend(pick(&q), pick(&k), pick(&v), g)
    });
    Tensor::cat(sequences.collect(), 0)
}

/// Appends the rows' keys and values to the store, then attends over it.
pub(crate) fn paged_attention(
    qkv: &Tensor<2>,
    g: &Geometry,
    store: &KvStore,
    layer: usize,
    rows: &PagedRows,
) -> Tensor<2> {
    let [q, k, v] = parts(qkv, g);
    let q = rotate(q, &rows.positions, g);
    let n_rows = rows.positions.len();
    let k = rotate(k, &rows.positions, g).reshape([n_rows, g.n_kv_heads * g.head_dim]);
    let slot = |sequence: usize, position: usize| {
        rows.tables[sequence][position / store.page_tokens] as usize * store.page_tokens
            + position % store.page_tokens
    };
    store.with_tensors(layer, |keys, values| {
        for (row, (r, position)) in rows.rows.iter().zip(&rows.positions).enumerate() {
            let at = slot(r.seq, *position as usize);
            let width = k.dims()[1];
            let put = |store: Tensor<2>, new: &Tensor<2>| {
                store.slice_assign([at..at + 1, 0..width], new.clone().narrow(0, row, 1))
            };
            keys.inplace(|store| put(store, &k));
            values.inplace(|store| put(store, &v));
        }
        let mut outputs = Vec::new();
        let mut first = 0;
        while first < n_rows {
            let sequence = rows.rows[first].seq;
            let n = rows.rows[first..].iter().take_while(|r| r.seq == sequence).count();
            let n_keys = rows.rows[first + n - 1].n_keys;
            let slots: Vec<i32> = (0..n_keys).map(|p| slot(sequence, p) as i32).collect();
            let slots = Tensor::<1, Int>::from_data(TensorData::new(slots, [n_keys]), &q.device());
            let pick = |store: &Tensor<2>| {
                store.clone().select(0, slots.clone()).reshape([n_keys, g.n_kv_heads, g.head_dim])
            };
            outputs.push(attend(q.clone().narrow(0, first, n), pick(keys), pick(values), g));
            first += n;
        }
        Tensor::cat(outputs, 0)
    })
}

/// Log-probability of each target.
pub(crate) fn token_logprobs(x: Tensor<2>, weight: Tensor<2>, targets: &Targets) -> Tensor<1> {
    let n = targets.rows.len();
    let ids = |ids: &[u32]| {
        let ids: Vec<i32> = ids.iter().map(|id| id.cast_signed()).collect();
        Tensor::<1, Int>::from_data(TensorData::new(ids, [n]), &x.device())
    };
    let (rows, tokens) = (ids(&targets.rows), ids(&targets.tokens));
    let logits = linear(x.select(0, rows), weight);
    activation::log_softmax(logits, 1).gather(1, tokens.reshape([n, 1])).reshape([n])
}
