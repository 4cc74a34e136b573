//! The operations composed of Burn's own: the specification, and what has no kernel on GPUs.
//!
//! Every function here is differentiable by Burn and compared with its kernel in `stage/tests.rs` and `train/tests.rs`.

use burn::tensor::{Bool, Int, Tensor, TensorData, activation};

use parallax_kernels::activation::Activation;

use super::{
    attention::{Geometry, KvStore, PagedRows},
    head::Targets,
};
use crate::layer::LoraPart;

/// x·Wᵀ.
pub(crate) fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// y with the adapter's product added to the modules' columns, of the chosen rows or of all.
pub(crate) fn lora_add(y: Tensor<2>, x: &Tensor<2>, part: &LoraPart, chosen: Option<&Vec<u32>>) -> Tensor<2> {
    let rows = y.dims()[0];
    let added = part.modules.iter().fold(y.clone(), |y, m| {
        let a = part.a.clone().narrow(0, m.first, m.rank);
        let b = part.b.clone().narrow(0, m.from, m.outputs * m.rank).reshape([m.outputs, m.rank]);
        let delta = linear(linear(x.clone(), a), b).mul_scalar(m.scale);
        let columns = [0..rows, m.offset..m.offset + m.outputs];
        let sum = y.clone().slice(columns.clone()) + delta;
        y.slice_assign(columns, sum)
    });
    let Some(chosen) = chosen else { return added };
    let mut mask = vec![false; rows];
    chosen.iter().for_each(|row| mask[*row as usize] = true);
    let mask = Tensor::<1, Bool>::from_data(TensorData::new(mask, [rows]), &y.device());
    let shape = y.dims();
    y.mask_where(mask.reshape([rows, 1]).expand(shape), added)
}

/// x / sqrt(mean(x²) + eps) · w, by rows.
pub(crate) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let mean = x.clone().powi_scalar(2).mean_dim(1);
    x * mean.add_scalar(eps).sqrt().recip() * weight.unsqueeze()
}

/// activation(gate) · up.
pub(crate) fn gated_mul(activation: Activation, gate_up: Tensor<2>) -> Tensor<2> {
    let [gate, up]: [Tensor<2>; 2] =
        gate_up.chunk(2, 1).try_into().unwrap_or_else(|_| unreachable!("two chunks were asked for"));
    match activation {
        Activation::Silu => activation::silu(gate) * up,
        Activation::GeluTanh => activation::gelu_approximate(gate) * up,
        other => unreachable!("{other:?} has no composed form"),
    }
}

fn parts(qkv: &Tensor<2>, g: &Geometry) -> [Tensor<2>; 3] {
    let [rows, _] = qkv.dims();
    let (q, kv) = (g.n_heads * g.head_dim, g.n_kv_heads * g.head_dim);
    [0..q, q..q + kv, q + kv..q + 2 * kv].map(|columns| qkv.clone().slice([0..rows, columns]))
}

/// cap · tanh(x / cap).
pub(crate) fn softcap<const D: usize>(x: Tensor<D>, cap: Option<f32>) -> Tensor<D> {
    match cap {
        None => x,
        Some(cap) => x.div_scalar(cap).tanh().mul_scalar(cap),
    }
}

/// RMS norm of every query and key head, or of all of them together, as the weights are long.
pub(crate) fn head_norms(
    qkv: &Tensor<2>,
    q_norm: &Tensor<1>,
    k_norm: &Tensor<1>,
    g: &Geometry,
    eps: [f32; 2],
) -> Tensor<2> {
    let [rows, _] = qkv.dims();
    let [q, k, v] = parts(qkv, g);
    let heads = |x: Tensor<2>, weight: &Tensor<1>, eps| {
        let ([_, width], [span]) = (x.dims(), weight.dims());
        rms_norm(x.reshape([rows * width / span, span]), weight.clone(), eps).reshape([rows, width])
    };
    Tensor::cat(vec![heads(q, q_norm, eps[0]), heads(k, k_norm, eps[1]), v], 1)
}

/// Rotates [T, heads·D] by position: pairs of a head are complex numbers.
fn rotate(x: Tensor<2>, positions: &[u32], g: &Geometry) -> Tensor<3> {
    let rows = positions.len();
    let heads = x.dims()[1] / g.head_dim;
    let x = x.reshape([rows, heads, g.head_dim]);
    let Some(rope) = &g.rope else { return x };
    let half = rope.frequencies.len();
    let angles: Vec<f32> =
        positions.iter().flat_map(|p| rope.frequencies.iter().map(move |f| *p as f32 * f)).collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|a| f(f64::from(*a)) as f32 * rope.magnitude).collect();
        Tensor::<4>::from_data(TensorData::new(values, [rows, 1, half, 1]), &x.device())
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    // [T, heads, half, 2], whichever elements are a pair.
    let turned = x.clone().slice([0..rows, 0..heads, 0..2 * half]);
    let pairs = if rope.interleaved {
        turned.reshape([rows, heads, half, 2])
    } else {
        turned.reshape([rows, heads, 2, half]).swap_dims(2, 3)
    };
    let part = |i: usize| pairs.clone().slice([0..rows, 0..heads, 0..half, i..i + 1]);
    let (a, b) = (part(0), part(1));
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let turned = Tensor::cat(vec![first, b * cos + a * sin], 3);
    let turned = if rope.interleaved { turned } else { turned.swap_dims(2, 3) };
    let turned = turned.reshape([rows, heads, 2 * half]);
    Tensor::cat(vec![turned, x.slice([0..rows, 0..heads, 2 * half..g.head_dim])], 2)
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
    let scores = q.swap_dims(0, 1).matmul(k.swap_dims(1, 2)).mul_scalar(g.scale);
    let scores = softcap(scores, g.softcap);
    let sees = |i: usize, j: usize| j <= i + m - n && g.window.is_none_or(|w| j + w > i + m - n);
    let mask: Vec<f32> =
        (0..n).flat_map(|i| (0..m).map(move |j| if sees(i, j) { 0.0 } else { f32::NEG_INFINITY })).collect();
    let mask = Tensor::<3>::from_data(TensorData::new(mask, [1, n, m]), &scores.device());
    let mut scores = scores + mask;
    if let Some(sinks) = &g.sinks {
        // One more column, which has no value.
        let sinks = TensorData::new(sinks.clone(), [heads, 1, 1]);
        let sinks = Tensor::<3>::from_data(sinks, &scores.device()).repeat_dim(1, n);
        scores = Tensor::cat(vec![scores, sinks], 2);
    }
    let weights = activation::softmax(scores, 2).slice([0..heads, 0..n, 0..m]);
    weights.matmul(v).swap_dims(0, 1).reshape([n, heads * d])
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
pub(crate) fn token_logprobs(x: &Tensor<2>, weight: Tensor<2>, targets: &Targets) -> Tensor<1> {
    logprobs(linear(select(x, &targets.rows), weight), targets)
}

/// Rows of a matrix.
pub(crate) fn select(x: &Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let ids: Vec<i32> = rows.iter().map(|id| id.cast_signed()).collect();
    let n = ids.len();
    x.clone().select(0, Tensor::<1, Int>::from_data(TensorData::new(ids, [n]), &x.device()))
}

/// Log-probability of each target under its row of logits.
pub(crate) fn logprobs(logits: Tensor<2>, targets: &Targets) -> Tensor<1> {
    let n = targets.tokens.len();
    let ids: Vec<i32> = targets.tokens.iter().map(|id| id.cast_signed()).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, 1]), &logits.device());
    activation::log_softmax(logits, 1).gather(1, tokens).reshape([n])
}
