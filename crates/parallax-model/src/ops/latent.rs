//! Multi-head latent attention over the paged store, in absorbed form: what is stored per token is one normed latent
//! row and one rotated key, shared by all heads, and queries meet it in the latent space.
//!
//! Expanding keys and values instead would cost less in long prompts and more in decoding; one form for both is what
//! keeps a row's bits the same however a prompt was cut.

use std::sync::Arc;

use parallax_kernels::{
    attention::{
        Paging,
        latent::{append_latent, latent_attention},
    },
    norm::rms_norm,
    rope::rope_apply,
};

use super::{
    BackwardArgs, CpuOp, Output,
    attention::{KvStore, PagedRows, Rotation},
    linear::{FrozenLinear, pick},
    matrix,
    norm::columns,
    share,
};

const SHAPES: &str = "the batch was checked against the store before the first layer";

/// What latent attention knows beside its linear layers.
#[derive(Debug)]
pub(crate) struct LatentWeights {
    /// Q.
    pub(crate) n_heads: usize,
    /// Elements of a query that meet the latent row (N).
    pub(crate) nope_dim: usize,
    /// Rotated elements (P).
    pub(crate) rope_dim: usize,
    /// Elements of a head's value (V).
    pub(crate) value_dim: usize,
    /// Elements of a latent row (R).
    pub(crate) rank: usize,
    /// Norm of latent rows. [R]
    pub(crate) norm: Vec<f32>,
    pub(crate) eps: f32,
    pub(crate) rope: Arc<Rotation>,
    pub(crate) scale: f32,
    /// Per head, from queries into the latent space: [R, N].
    pub(crate) to_latent: Vec<FrozenLinear>,
    /// Per head, from the latent space to values: [V, R].
    pub(crate) to_value: Vec<FrozenLinear>,
}

impl LatentWeights {
    /// Elements that a token stores.
    pub(crate) fn width(&self) -> usize {
        self.rank + self.rope_dim
    }

    /// Queries [T, Q, R + P] as the latent rows meet them, of q [T, Q, N + P].
    fn queries(&self, q: &[f32], positions: &[u32], adapters: &[LatentLora]) -> Vec<f32> {
        let (head, width) = (self.nope_dim + self.rope_dim, self.width());
        let all = self.n_heads * head;
        let mut rotated: Vec<f32> =
            q.chunks_exact(head).flat_map(|head| head[self.nope_dim..].iter().copied()).collect();
        rope_apply(&mut rotated, self.n_heads, positions, &self.rope.table).expect(SHAPES);
        let absorbed = share::map(self.n_heads, |h| {
            let part = columns(q, all, &(h * head..h * head + self.nope_dim));
            let mut y = self.to_latent[h].apply(&part);
            adapters.iter().for_each(|adapter| adapter.to_latent(h, &part, &mut y));
            y
        });
        let mut out = Vec::with_capacity(positions.len() * self.n_heads * width);
        for (t, h) in (0..positions.len()).flat_map(|t| (0..self.n_heads).map(move |h| (t, h))) {
            out.extend_from_slice(&absorbed[h][t * self.rank..(t + 1) * self.rank]);
            let at = (t * self.n_heads + h) * self.rope_dim;
            out.extend_from_slice(&rotated[at..at + self.rope_dim]);
        }
        out
    }

    /// Rows to store [T, R + P], of the compressed rows [T, R + P].
    fn latents(&self, compressed: &[f32], positions: &[u32]) -> Vec<f32> {
        let width = self.width();
        let latent = columns(compressed, width, &(0..self.rank));
        let mut normed = vec![0.0; latent.len()];
        rms_norm(&latent, &self.norm, self.eps, &mut normed).expect(SHAPES);
        let mut key = columns(compressed, width, &(self.rank..width));
        rope_apply(&mut key, 1, positions, &self.rope.table).expect(SHAPES);
        let rows = normed.chunks_exact(self.rank).zip(key.chunks_exact(self.rope_dim));
        rows.flat_map(|(latent, key)| latent.iter().chain(key).copied()).collect()
    }

    /// Values [T, Q, V] of weighted latent rows [T, Q, R].
    fn values(&self, mixed: &[f32], adapters: &[LatentLora]) -> Vec<f32> {
        let all = self.n_heads * self.rank;
        let heads = share::map(self.n_heads, |h| {
            let part = columns(mixed, all, &(h * self.rank..(h + 1) * self.rank));
            let mut y = self.to_value[h].apply(&part);
            adapters.iter().for_each(|adapter| adapter.to_value(h, &part, &mut y));
            y
        });
        let rows = mixed.len() / all;
        let mut out = Vec::with_capacity(rows * self.n_heads * self.value_dim);
        for t in 0..rows {
            for head in &heads {
                out.extend_from_slice(&head[t * self.value_dim..(t + 1) * self.value_dim]);
            }
        }
        out
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.to_latent.iter().chain(&self.to_value).map(FrozenLinear::bytes).sum()
    }
}

/// An adapter of the matrix out of compressed rows: s·B·A is added to it, and so, per head, s·Aᵀ·B_keysᵀ to what takes
/// queries into the latent space and s·B_values·A to what takes latent rows to values.
#[derive(Clone, Debug)]
pub(crate) struct LatentLora {
    rank: usize,
    scale: f32,
    factors: Arc<LatentFactors>,
    /// The rows to which it is added; `None` is all of them.
    rows: Option<Arc<Vec<u32>>>,
}

/// r is the adapter's rank. All products are with transposed right sides, whose rows never look at each other.
#[derive(Debug)]
struct LatentFactors {
    /// [r, R]
    a: Vec<f32>,
    /// [R, r]
    a_transposed: Vec<f32>,
    /// Per head: [r, N].
    keys: Vec<Vec<f32>>,
    /// Per head: [V, r].
    values: Vec<Vec<f32>>,
}

impl LatentLora {
    /// Of A [r, R] and B [Q·(N + V), r]; `dims` are Q, N and V.
    pub(crate) fn new(
        [n_heads, nope, value]: [usize; 3],
        a: &[f32],
        b: &[f32],
        rank: usize,
        scale: f32,
    ) -> Self {
        let transposed = |values: &[f32], width: usize| -> Vec<f32> {
            (0..width).flat_map(|i| values.iter().skip(i).step_by(width).copied()).collect()
        };
        let heads: Vec<&[f32]> = b.chunks_exact((nope + value) * rank).take(n_heads).collect();
        let factors = LatentFactors {
            a: a.to_vec(),
            a_transposed: transposed(a, a.len() / rank),
            keys: heads.iter().map(|head| transposed(&head[..nope * rank], rank)).collect(),
            values: heads.iter().map(|head| head[nope * rank..].to_vec()).collect(),
        };
        Self { rank, scale, factors: Arc::new(factors), rows: None }
    }

    /// The same for these rows.
    pub(crate) fn for_rows(&self, rows: Option<Arc<Vec<u32>>>) -> Self {
        Self { rows, ..self.clone() }
    }

    /// Adds scale · (x·downᵀ)·upᵀ to the rows of y that the adapter applies to; down is [r, K], up [N, r].
    fn add(&self, x: &[f32], down: &[f32], up: &[f32], y: &mut [f32]) {
        let (k, n) = (down.len() / self.rank, up.len() / self.rank);
        let all = || (0..(x.len() / k) as u32).collect();
        let chosen: Vec<u32> = self.rows.as_ref().map_or_else(all, |rows| rows.to_vec());
        let mut inner = matrix::nt(&pick(x, k, &chosen), down, chosen.len(), self.rank, k);
        inner.iter_mut().for_each(|v| *v *= self.scale);
        let more = matrix::nt(&inner, up, chosen.len(), n, self.rank);
        for (row, more) in chosen.iter().zip(more.chunks_exact(n)) {
            let y = &mut y[*row as usize * n..][..n];
            y.iter_mut().zip(more).for_each(|(y, more)| *y += more);
        }
    }

    fn to_latent(&self, head: usize, q: &[f32], y: &mut [f32]) {
        self.add(q, &self.factors.keys[head], &self.factors.a_transposed, y);
    }

    fn to_value(&self, head: usize, mixed: &[f32], y: &mut [f32]) {
        self.add(mixed, &self.factors.a, &self.factors.values[head], y);
    }
}

/// Inputs: q [T, Q·(N + P)], compressed rows [T, R + P]; result [T, Q·V]. Appends the latent rows to the store.
#[derive(Debug)]
pub(crate) struct LatentAttention {
    pub(crate) weights: Arc<LatentWeights>,
    pub(crate) adapters: Vec<LatentLora>,
    pub(crate) store: Arc<KvStore>,
    /// Index within the stage.
    pub(crate) layer: usize,
    pub(crate) rows: Arc<PagedRows>,
}

impl CpuOp for LatentAttention {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let (w, rows) = (&self.weights, &self.rows);
        let q = w.queries(inputs[0], &rows.positions, &self.adapters);
        let new = w.latents(inputs[1], &rows.positions);
        let mut mixed = vec![0.0; rows.positions.len() * w.n_heads * w.rank];
        self.store.with_latents(self.layer, |latents| {
            let paging = Paging { rows: &rows.rows, tables: &rows.tables };
            append_latent(latents, &paging, &new).expect(SHAPES);
            latent_attention(&q, w.n_heads, w.rank, &paging, latents, w.scale, &mut mixed).expect(SHAPES);
        });
        Output::matrix(w.values(&mixed, &self.adapters), w.n_heads * w.value_dim)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("models with latent attention are refused where gradients are asked for")
    }
}

#[cfg(test)]
mod tests {
    use parallax_kernels::{
        PackedWeight, WeightKind,
        attention::RowRef,
        rope::{RopeLayout, RopeTable, frequencies},
    };

    use super::*;
    use parallax_kernels::reference::noise;

    const HEADS: usize = 3;
    const NOPE: usize = 8;
    const ROPE: usize = 4;
    const VALUE: usize = 6;
    const RANK: usize = 16;

    fn weights(kv_b: &[f32]) -> LatentWeights {
        let frozen = |values: &[f32], n, k| FrozenLinear {
            parts: vec![PackedWeight::pack_f32(WeightKind::F32, values, n, k).unwrap()],
            transposed: None,
        };
        let head = |h: usize| &kv_b[h * (NOPE + VALUE) * RANK..][..(NOPE + VALUE) * RANK];
        let transposed = |h: usize| -> Vec<f32> {
            (0..RANK).flat_map(|r| (0..NOPE).map(move |n| head(h)[n * RANK + r])).collect()
        };
        let frequencies = frequencies(ROPE, 100.0);
        let layout = RopeLayout { head_dim: ROPE, interleaved: true, magnitude: 1.0 };
        let table = RopeTable::new(layout, &frequencies, 64).unwrap();
        LatentWeights {
            n_heads: HEADS,
            nope_dim: NOPE,
            rope_dim: ROPE,
            value_dim: VALUE,
            rank: RANK,
            norm: vec![1.0; RANK],
            eps: 1e-6,
            rope: Arc::new(Rotation { table, interleaved: true, magnitude: 1.0, frequencies }),
            scale: 0.25,
            to_latent: (0..HEADS).map(|h| frozen(&transposed(h), RANK, NOPE)).collect(),
            to_value: (0..HEADS).map(|h| frozen(&head(h)[NOPE * RANK..], VALUE, RANK)).collect(),
        }
    }

    /// Keys and values expanded per head and token, in f64, as the paper's equations read.
    fn reference(q: &[f32], compressed: &[f32], kv_b: &[f32], rows: usize) -> Vec<f64> {
        let rotate = |x: &[f32], position: usize| -> Vec<f64> {
            (0..ROPE / 2)
                .flat_map(|i| {
                    let angle = position as f64 * 100f64.powf(-2.0 * i as f64 / ROPE as f64);
                    let (a, b) = (f64::from(x[2 * i]), f64::from(x[2 * i + 1]));
                    [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
                })
                .collect()
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let latents: Vec<Vec<f64>> = compressed
            .chunks_exact(RANK + ROPE)
            .map(|row| {
                let row: Vec<f64> = row[..RANK].iter().map(|v| f64::from(*v)).collect();
                let rms = (dot(&row, &row) / RANK as f64 + 1e-6).sqrt();
                row.iter().map(|v| v / rms).collect()
            })
            .collect();
        let mut out = Vec::new();
        for (t, h) in (0..rows).flat_map(|t| (0..HEADS).map(move |h| (t, h))) {
            let head = &kv_b[h * (NOPE + VALUE) * RANK..][..(NOPE + VALUE) * RANK];
            let expand = |row: usize, latent: &[f64]| -> f64 {
                let weights: Vec<f64> = head[row * RANK..][..RANK].iter().map(|v| f64::from(*v)).collect();
                dot(&weights, latent)
            };
            let q = &q[(t * HEADS + h) * (NOPE + ROPE)..][..NOPE + ROPE];
            let scores: Vec<f64> = (0..=t)
                .map(|j| {
                    let nope: f64 = (0..NOPE).map(|n| f64::from(q[n]) * expand(n, &latents[j])).sum();
                    let key = rotate(&compressed[j * (RANK + ROPE) + RANK..][..ROPE], j);
                    (0.25 * (nope + dot(&rotate(&q[NOPE..], t), &key))).exp()
                })
                .collect();
            let total: f64 = scores.iter().sum();
            for v in 0..VALUE {
                let sum: f64 = scores.iter().zip(&latents).map(|(s, c)| s * expand(NOPE + v, c)).sum();
                out.push(sum / total);
            }
        }
        out
    }

    #[test]
    fn absorbed_attention_is_attention_over_expanded_keys() {
        let rows = 21;
        let kv_b = noise(HEADS * (NOPE + VALUE) * RANK, 1);
        let (q, compressed) = (noise(rows * HEADS * (NOPE + ROPE), 2), noise(rows * (RANK + ROPE), 3));
        let weights = Arc::new(weights(&kv_b));
        let run = |chunk: usize| -> Vec<f32> {
            let store = Arc::new(KvStore::latents(16, 3, RANK + ROPE));
            let mut out = Vec::new();
            for from in (0..rows).step_by(chunk) {
                let to = (from + chunk).min(rows);
                let paged = PagedRows {
                    positions: (from as u32..to as u32).collect(),
                    rows: (from..to).map(|p| RowRef { seq: 0, n_keys: p + 1 }).collect(),
                    tables: vec![vec![2, 0]],
                    ..PagedRows::default()
                };
                let (store, weights) = (Arc::clone(&store), Arc::clone(&weights));
                let op =
                    LatentAttention { weights, adapters: Vec::new(), store, layer: 0, rows: Arc::new(paged) };
                let q = &q[from * HEADS * (NOPE + ROPE)..to * HEADS * (NOPE + ROPE)];
                let c = &compressed[from * (RANK + ROPE)..to * (RANK + ROPE)];
                out.extend(op.forward(&[q, c], false).values);
            }
            out
        };
        let got = run(rows);
        for (got, expected) in got.iter().zip(reference(&q, &compressed, &kv_b, rows)) {
            assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} against {expected}");
        }
        for chunk in [1, 4] {
            assert!(run(chunk).iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}
