//! Causal grouped-query attention in f64, forward; its gradient is checked by finite differences.

use crate::attention::Scoring;

/// Shape of a packed batch: Q query heads, K key-value heads, D elements per head.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Query heads.
    pub n_heads: usize,
    /// Key-value heads.
    pub n_kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
}

/// Attention within each sequence: `q` [T, Q, D], `k` and `v` [T, K, D] give [T, Q, D].
pub fn causal(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    shape: Shape,
    cu_seqlens: &[u32],
    scoring: &Scoring<'_>,
) -> Vec<f64> {
    let Shape { n_heads, n_kv_heads, head_dim } = shape;
    let at = |v: &[f32], t: usize, heads: usize, head: usize, d: usize| {
        f64::from(v[(t * heads + head) * head_dim + d])
    };
    let mut out = Vec::with_capacity(q.len());
    for bounds in cu_seqlens.windows(2) {
        let (from, to) = (bounds[0] as usize, bounds[1] as usize);
        for t in from..to {
            for head in 0..n_heads {
                let kv_head = head / (n_heads / n_kv_heads);
                let first = from.max((t + 1).saturating_sub(scoring.window.unwrap_or(usize::MAX)));
                let scores: Vec<f64> = (first..=t)
                    .map(|j| {
                        let dot: f64 = (0..head_dim)
                            .map(|d| at(q, t, n_heads, head, d) * at(k, j, n_kv_heads, kv_head, d))
                            .sum();
                        let score = dot * f64::from(scoring.scale);
                        scoring.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    })
                    .collect();
                let sink = scoring.sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let max = scores.iter().fold(sink, |m, &s| m.max(s));
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum::<f64>() + (sink - max).exp();
                for d in 0..head_dim {
                    let sum: f64 = scores
                        .iter()
                        .enumerate()
                        .map(|(j, s)| (s - max).exp() * at(v, first + j, n_kv_heads, kv_head, d))
                        .sum();
                    out.push(sum / total);
                }
            }
        }
    }
    out
}
