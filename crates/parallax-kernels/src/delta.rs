//! The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464) and the short causal convolution before it:
//! the layers whose memory of a sequence is one state of fixed size instead of a key and a value per token.
//!
//! S ← a·S;  S ← S + k (β (v − Sᵀk))ᵀ;  o = Sᵀq, with S [Dk, Dv] per head. A column of S (one element of v) never looks at
//! another column, so sixteen columns are the lanes, a block of them stays in the first-level cache for all rows of a
//! call, and every sum is one chain over Dk. Rows are taken one after the other whatever the call holds: cutting a
//! prompt elsewhere cannot change a bit. That is why the chunked form, which re-associates sums within its chunks, is
//! not used.

use std::ops::Range;

use crate::activation::sigmoid;
use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len};
use crate::math;
use crate::parallel::{Shared, for_rows, share, task_count};
use crate::pool;
use crate::simd::{LANES, read, write};

/// Heads and their sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaShape {
    /// Heads of q and k (Hk); each serves `n_heads / n_key_heads` value heads.
    pub n_key_heads: usize,
    /// Heads of v, of the state and of the result (Hv).
    pub n_heads: usize,
    /// Elements of a key head (Dk).
    pub key_dim: usize,
    /// Elements of a value head (Dv).
    pub value_dim: usize,
    /// Value head `i` belongs to key head `i % Hk`, as llama.cpp stores Qwen3.5; otherwise the value heads of a key head
    /// are neighbours.
    pub tiled: bool,
}

impl DeltaShape {
    /// Elements of one sequence's state. Its layout is private: a fresh state is all zeros.
    pub fn state_len(&self) -> usize {
        self.n_heads * self.head_len()
    }

    /// The key head that a value head belongs to.
    fn key_head(&self, head: usize) -> usize {
        if self.tiled { head % self.n_key_heads } else { head / (self.n_heads / self.n_key_heads) }
    }

    fn head_len(&self) -> usize {
        self.value_dim.next_multiple_of(LANES) * self.key_dim
    }
}

/// The rows of a call.
#[derive(Debug, Clone, Copy)]
pub struct DeltaRows<'a> {
    /// [T, Hk, Dk]
    pub q: &'a [f32],
    /// [T, Hk, Dk]
    pub k: &'a [f32],
    /// [T, Hv, Dv]
    pub v: &'a [f32],
    /// Factor of the state before each row. [T, Hv]
    pub decay: &'a [f32],
    /// Strength of each row's correction. [T, Hv]
    pub beta: &'a [f32],
    /// Rows of each sequence, in order.
    pub sequences: &'a [Range<usize>],
}

/// Walks the rows of every sequence from its state in `states`, which it leaves behind the last row, and writes the
/// results to `out` [T, Hv, Dv].
///
/// # Errors
/// When the lengths do not fit together.
pub fn gated_delta_rule(
    shape: DeltaShape,
    rows: &DeltaRows<'_>,
    states: &mut [&mut [f32]],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let op = "gated_delta_rule";
    let DeltaShape { n_key_heads, n_heads, key_dim, value_dim, .. } = shape;
    if n_key_heads == 0 || !n_heads.is_multiple_of(n_key_heads) || key_dim == 0 || value_dim == 0 {
        let rule = "value heads must be a multiple of the key heads, sizes positive";
        return Err(KernelError::BadDimension { op, what: "heads", got: n_heads, rule });
    }
    let total = check_sequences(op, rows.sequences, states.len())?;
    for (what, width, got) in [
        ("q", n_key_heads * key_dim, rows.q.len()),
        ("k", n_key_heads * key_dim, rows.k.len()),
        ("v", n_heads * value_dim, rows.v.len()),
        ("decay", n_heads, rows.decay.len()),
        ("beta", n_heads, rows.beta.len()),
        ("out", n_heads * value_dim, out.len()),
    ] {
        check_len(op, what, total * width, got)?;
    }
    for state in states.iter() {
        check_len(op, "state", shape.state_len(), state.len())?;
    }
    let blocks = value_dim.div_ceil(LANES);
    let items = rows.sequences.len() * n_heads * blocks;
    let tasks = task_count(items, total / rows.sequences.len().max(1) * key_dim * LANES * 3);
    let (out, isa) = (Shared::new(out), dispatch::current());
    let states: Vec<Shared<'_, f32>> = states.iter_mut().map(|state| Shared::new(state)).collect();
    pool::run(tasks, |task| {
        for item in share(items, tasks, task) {
            let (sequence, head, block) = (item / (n_heads * blocks), item / blocks % n_heads, item % blocks);
            let start = head * shape.head_len() + block * key_dim * LANES;
            // SAFETY: one task owns a block of columns of a sequence's head.
            let state = unsafe { states[sequence].slice(start..start + key_dim * LANES) };
            walk(isa, shape, rows, rows.sequences[sequence].clone(), head, block * LANES, state, &out);
        }
    });
    Ok(())
}

/// T, after checking that the sequences follow each other and there is a state for each.
fn check_sequences(
    op: &'static str,
    sequences: &[Range<usize>],
    n_states: usize,
) -> Result<usize, KernelError> {
    check_len(op, "states", sequences.len(), n_states)?;
    sequences.iter().try_fold(0, |next, rows| {
        if rows.start != next || rows.end < rows.start {
            let rule = "rows of sequences must follow each other without gaps";
            return Err(KernelError::BadDimension { op, what: "sequence start", got: rows.start, rule });
        }
        Ok(rows.end)
    })
}

simd_kernel! {
    /// Sixteen columns from `column` on of one head of one sequence.
    fn walk(
        s;
        shape: DeltaShape,
        rows: &DeltaRows<'_>,
        sequence: Range<usize>,
        head: usize,
        column: usize,
        state: &mut [f32],
        out: &Shared<'_, f32>,
    ) {
        let DeltaShape { n_key_heads, n_heads, key_dim, value_dim, .. } = shape;
        let key_head = shape.key_head(head);
        let width = (value_dim - column).min(LANES);
        let state = state.as_chunks_mut::<LANES>().0;
        for t in sequence {
            let keys = (t * n_key_heads + key_head) * key_dim;
            let (q, k) = (&rows.q[keys..][..key_dim], &rows.k[keys..][..key_dim]);
            let at = (t * n_heads + head) * value_dim + column;
            let (decay, beta) = (rows.decay[t * n_heads + head], rows.beta[t * n_heads + head]);
            let mut known = s.splat(0.0);
            for (cell, &k) in state.iter_mut().zip(k) {
                let kept = s.mul(s.load(cell), s.splat(decay));
                s.store(kept, cell);
                known = s.fma(s.splat(k), kept, known);
            }
            let v = read(s, &rows.v[at..at + width], 0, 0.0);
            let correction = s.mul(s.sub(v, known), s.splat(beta));
            let mut result = s.splat(0.0);
            for (cell, (&k, &q)) in state.iter_mut().zip(k.iter().zip(q)) {
                let new = s.fma(s.splat(k), correction, s.load(cell));
                s.store(new, cell);
                result = s.fma(s.splat(q), new, result);
            }
            // SAFETY: one task owns these columns of a row.
            let row = unsafe { out.slice(at..at + width) };
            write(s, row, 0, result);
        }
    }
}

/// How fast each head forgets: exp(`a_log`).
pub fn decay_rates(a_log: &[f32]) -> Vec<f64> {
    a_log.iter().map(|&a_log| math::exp(f64::from(a_log))).collect()
}

/// Decay and strength of every row and head, each [T, Hv]: decay = exp(−rate·softplus(a + `dt_bias`)), as in Mamba 2
/// (arXiv:2405.21060), and beta = sigmoid(b). `a` and `b` are [T, Hv], the rest `[Hv]`.
///
/// # Errors
/// When the lengths do not fit together.
pub fn delta_gates(
    a: &[f32],
    b: &[f32],
    rates: &[f64],
    dt_bias: &[f32],
) -> Result<[Vec<f32>; 2], KernelError> {
    let op = "delta_gates";
    check_len(op, "b", a.len(), b.len())?;
    check_len(op, "dt_bias", rates.len(), dt_bias.len())?;
    if rates.is_empty() || !a.len().is_multiple_of(rates.len()) {
        let rule = "must be whole rows";
        return Err(KernelError::BadDimension { op, what: "a", got: a.len(), rule });
    }
    let decay = a.iter().zip(rates.iter().zip(dt_bias).cycle()).map(|(&a, (&rate, &dt))| {
        let x = f64::from(a + dt);
        let softplus = if x > 20.0 { x } else { math::ln(1.0 + math::exp(x)) };
        math::exp(-rate * softplus) as f32
    });
    let beta = b.iter().map(|&b| (1.0 / (1.0 + math::exp(-f64::from(b)))) as f32);
    Ok([decay.collect(), beta.collect()])
}

/// Depthwise causal convolution with SiLU: `y [T, C] = silu(Σ_i weight[i] * x[t - K + 1 + i])` for `weight` [K, C], the
/// newest tap last. Inputs before a sequence's first row come from its state [K - 1, C], oldest first, which then takes
/// the last inputs; zeros for a fresh one.
///
/// # Errors
/// When the lengths do not fit together.
pub fn causal_conv_silu(
    x: &[f32],
    weight: &[f32],
    channels: usize,
    sequences: &[Range<usize>],
    states: &mut [&mut [f32]],
    y: &mut [f32],
) -> Result<(), KernelError> {
    let op = "causal_conv";
    let total = check_sequences(op, sequences, states.len())?;
    check_len(op, "x", total * channels, x.len())?;
    check_len(op, "y", total * channels, y.len())?;
    if channels == 0 || weight.is_empty() || !weight.len().is_multiple_of(channels) {
        let rule = "must be whole taps of all channels";
        return Err(KernelError::BadDimension { op, what: "weight", got: weight.len(), rule });
    }
    let before = weight.len() / channels - 1;
    for state in states.iter() {
        check_len(op, "state", before * channels, state.len())?;
    }
    let sequence_of: Vec<usize> =
        sequences.iter().enumerate().flat_map(|(i, rows)| rows.clone().map(move |_| i)).collect();
    let isa = dispatch::current();
    let (old, sequence_of) = (&*states, &sequence_of);
    for_rows(y, channels, channels * (before + 8), |rows, y| {
        for (t, y) in rows.zip(y.chunks_exact_mut(channels)) {
            let (first, state) = (sequences[sequence_of[t]].start, &*old[sequence_of[t]]);
            let taps = (0..=before).map(|i| match (t + i).checked_sub(first + before) {
                Some(behind) => &x[(first + behind) * channels..][..channels],
                None => &state[(t + i - first) * channels..][..channels],
            });
            convolve(isa, &taps.collect::<Vec<_>>(), weight, y);
        }
    });
    for (rows, state) in sequences.iter().zip(states) {
        let new = &x[rows.start * channels..rows.end * channels];
        let kept = new.len().min(state.len());
        state.copy_within(kept.., 0);
        let at = state.len() - kept;
        state[at..].copy_from_slice(&new[new.len() - kept..]);
    }
    Ok(())
}

simd_kernel! {
    fn convolve(s; taps: &[&[f32]], weight: &[f32], y: &mut [f32]) {
        let channels = y.len();
        for i in (0..channels).step_by(LANES) {
            let mut sum = s.splat(0.0);
            for (tap, weight) in taps.iter().zip(weight.chunks_exact(channels)) {
                sum = s.fma(read(s, weight, i, 0.0), read(s, tap, i, 0.0), sum);
            }
            write(s, y, i, s.mul(sum, sigmoid(s, sum)));
        }
    }
}

#[cfg(test)]
mod tests;
