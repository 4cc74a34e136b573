//! Log-probabilities of tokens: the one definition that sampler, trainer and verifier share.
//!
//! `log p(t) = (logit_t - m) - ln(s)`, where `m` is the row's maximum and `s` the sum of `e^(logit - m)`. The sum is taken in
//! blocks of [`VOCAB_BLOCK`] logits, each relative to its own maximum, which are then joined in order; so the route through
//! whole logits and the one that never holds a row of them give the same bits.

mod head;

pub use self::head::{head_logprob, head_logprob_backward, head_logprob_gradient};
use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::math;
use crate::parallel::for_rows;
use crate::simd::{LANES, Simd, exp, read, write};

/// Logits that are summed relative to one maximum. Part of the definition: changing it changes bits.
pub const VOCAB_BLOCK: usize = 1024;

/// Log-probabilities of all entries of one row of logits `[V]`. Entries of -infinity (masked) stay so.
///
/// # Errors
/// When the lengths differ.
pub fn log_softmax_row(logits: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
    check_len("log_softmax", "out", logits.len(), out.len())?;
    subtract(dispatch::current(), logits, normalizer(logits), out);
    Ok(())
}

/// Log-probability of `targets[t]` under row `t` of `logits` [T, V], into `out` `[T]`.
///
/// # Errors
/// When the lengths do not fit together or a target is not below `vocab`.
pub fn token_logprobs(
    logits: &[f32],
    vocab: usize,
    targets: &[u32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let op = "token_logprobs";
    let rows = rows_of(op, "logits", logits.len(), vocab)?;
    check_len(op, "out", rows, out.len())?;
    check_targets(op, targets, rows, vocab)?;
    let isa = dispatch::current();
    for_rows(out, 1, vocab * 8, |rows, out| {
        for (row, out) in rows.zip(out) {
            let logits = &logits[row * vocab..(row + 1) * vocab];
            *out = whole_row(isa, logits).log_p(logits[targets[row] as usize]);
        }
    });
    Ok(())
}

/// Index of the largest element; the first of equals. NaN is never chosen unless nothing else is there; 0 for an empty slice.
pub fn argmax(v: &[f32]) -> usize {
    let largest = maximum(dispatch::current(), v);
    v.iter().position(|&x| x == largest).unwrap_or(0)
}

/// Maximum and sum over (a part of) a row: all that a log-probability needs besides the logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Normalizer {
    pub max: f32,
    /// Sum of e^(logit - max).
    pub sum: f32,
}

impl Normalizer {
    /// Of nothing.
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    /// ln(sum), from which and the maximum every log-probability of the row follows.
    pub(crate) fn ln_sum(self) -> f32 {
        math::ln(f64::from(self.sum)) as f32
    }

    pub(crate) fn log_p(self, logit: f32) -> f32 {
        (logit - self.max) - self.ln_sum()
    }
}

pub(crate) fn check_targets(
    op: &'static str,
    targets: &[u32],
    rows: usize,
    vocab: usize,
) -> Result<(), KernelError> {
    check_len(op, "targets", rows, targets.len())?;
    match targets.iter().find(|&&t| t as usize >= vocab) {
        Some(&t) => Err(KernelError::OutOfRange { op, what: "target", limit: vocab, got: t as usize }),
        None => Ok(()),
    }
}

fn normalizer(logits: &[f32]) -> Normalizer {
    whole_row(dispatch::current(), logits)
}

simd_kernel! {
    /// The blocks of a row, joined.
    fn whole_row(s; logits: &[f32]) -> Normalizer {
        logits.chunks(VOCAB_BLOCK).fold(Normalizer::EMPTY, |row, block| join(s, row, of_block(s, block)))
    }
}

simd_kernel! {
    /// Of at most one block of logits.
    pub(crate) fn block_normalizer(s; logits: &[f32]) -> Normalizer {
        of_block(s, logits)
    }
}

simd_kernel! {
    /// The blocks of a row, in order, joined.
    pub(crate) fn join_blocks(s; blocks: &mut dyn Iterator<Item = Normalizer>) -> Normalizer {
        blocks.fold(Normalizer::EMPTY, |row, block| join(s, row, block))
    }
}

#[inline(always)]
fn of_block<S: Simd>(s: S, logits: &[f32]) -> Normalizer {
    let mut max = s.splat(f32::NEG_INFINITY);
    for i in (0..logits.len()).step_by(LANES) {
        max = s.max(read(s, logits, i, f32::NEG_INFINITY), max);
    }
    let max = s.max_lane(max);
    // A block of masked logits has no finite maximum to be relative to.
    let shift = s.splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
    let mut sum = s.splat(0.0);
    for i in (0..logits.len()).step_by(LANES) {
        sum = s.add(sum, exp(s, s.sub(read(s, logits, i, f32::NEG_INFINITY), shift)));
    }
    Normalizer { max, sum: s.sum(sum) }
}

#[inline(always)]
fn join<S: Simd>(s: S, a: Normalizer, b: Normalizer) -> Normalizer {
    let (high, low) = if b.max > a.max { (b, a) } else { (a, b) };
    if low.max == f32::NEG_INFINITY {
        // Nothing, or only masked logits: its sum is zero, or NaN when a NaN was among them.
        return Normalizer { max: high.max, sum: high.sum + low.sum };
    }
    let mut factor = [0.0; LANES];
    s.store(exp(s, s.splat(low.max - high.max)), &mut factor);
    Normalizer { max: high.max, sum: low.sum.mul_add(factor[0], high.sum) }
}

simd_kernel! {
    fn subtract(s; logits: &[f32], row: Normalizer, out: &mut [f32]) {
        let (max, ln_sum) = (s.splat(row.max), s.splat(row.ln_sum()));
        for i in (0..logits.len()).step_by(LANES) {
            write(s, out, i, s.sub(s.sub(read(s, logits, i, 0.0), max), ln_sum));
        }
    }
}

simd_kernel! {
    fn maximum(s; v: &[f32]) -> f32 {
        let mut max = s.splat(f32::NEG_INFINITY);
        for i in (0..v.len()).step_by(LANES) {
            max = s.max(read(s, v, i, f32::NEG_INFINITY), max);
        }
        s.max_lane(max)
    }
}

#[cfg(test)]
mod tests;
