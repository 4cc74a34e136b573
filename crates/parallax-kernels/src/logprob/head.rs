//! Log-probabilities straight from the last hidden states, without a [T, V] matrix, and their gradient.

use std::ops::Range;

use super::{Normalizer, VOCAB_BLOCK, block_normalizer, check_targets, join_blocks};
use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::linear::{Output, PackedWeight, linear_rows, with_left};
use crate::matmul::{gemm_nn, gemm_tn};
use crate::parallel::{Shared, for_rows};
use crate::pool;
use crate::simd::{LANES, exp, read, write};

/// Rows whose block of logits is held at a time, by each thread.
const ROW_BLOCK: usize = 48;

/// Log-probability of `targets[t]` given the hidden row `x[t]` of [T, H] and the output head [V, H], into `out` `[T]`; the
/// log-sum-exp of each row's logits, which the backward pass needs, into `lse` `[T]`.
///
/// Bit-equal to [`super::token_logprobs`] over the logits of [`crate::linear::linear`].
///
/// # Errors
/// When the lengths do not fit together or a target is not below V.
pub fn head_logprob(
    x: &[f32],
    head: &PackedWeight,
    targets: &[u32],
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<(), KernelError> {
    let op = "head_logprob";
    let rows = checked(op, x, head, targets, ("out", out))?;
    check_len(op, "lse", rows, lse.len())?;
    if rows == 0 {
        return Ok(());
    }
    let isa = dispatch::current();
    let blocks = head.n().div_ceil(VOCAB_BLOCK);
    let mut parts = vec![Normalizer::EMPTY; blocks * rows];
    {
        let (parts, picked) = (Shared::new(&mut parts), Shared::new(&mut *out));
        with_left(isa, x, head.k(), head.wants_quantized(), |left| {
            pool::run(blocks, |block| {
                let columns = block * VOCAB_BLOCK..((block + 1) * VOCAB_BLOCK).min(head.n());
                let width = columns.len();
                let panels = columns.start / LANES..columns.end.div_ceil(LANES);
                let mut logits = vec![0.0; ROW_BLOCK.min(rows) * width];
                // SAFETY: each task has its own block of parts.
                let parts = unsafe { parts.slice(block * rows..(block + 1) * rows) };
                for first in (0..rows).step_by(ROW_BLOCK) {
                    let mine = first..(first + ROW_BLOCK).min(rows);
                    let logits = &mut logits[..mine.len() * width];
                    let to = Output::new(&mut *logits, width, first, columns.clone());
                    head.multiply(left, mine.clone(), panels.clone(), &to);
                    for (row, logits) in mine.zip(logits.chunks_exact(width)) {
                        parts[row] = block_normalizer(isa, logits);
                        let target = targets[row] as usize;
                        if columns.contains(&target) {
                            // SAFETY: a row's target lies in one block, whose task alone writes here.
                            let picked = unsafe { picked.slice(row..row + 1) };
                            picked[0] = logits[target - columns.start];
                        }
                    }
                }
            });
        });
    }
    for (row, (out, lse)) in out.iter_mut().zip(lse).enumerate() {
        let whole = join_blocks(isa, &mut (0..blocks).map(|b| parts[b * rows + row]));
        *out = whole.log_p(*out);
        *lse = whole.max + whole.ln_sum();
    }
    Ok(())
}

/// [`head_logprob`] and its gradient in one walk over the head: `dx` [T, H] becomes `W[target] - sum_v p_v W_v` with
/// p = softmax(logits), the gradient of a row's log-probability by that row. As in FlashAttention (Dao et al. 2022,
/// arXiv:2205.14135) the sum is kept relative to the largest logit so far, so that the logits need not be computed again.
///
/// # Errors
/// When the lengths do not fit together or a target is not below V.
pub fn head_logprob_gradient(
    x: &[f32],
    head: &PackedWeight,
    targets: &[u32],
    out: &mut [f32],
    dx: &mut [f32],
) -> Result<(), KernelError> {
    let (op, width) = ("head_logprob_gradient", head.k());
    let rows = checked(op, x, head, targets, ("out", out))?;
    check_len(op, "dx", x.len(), dx.len())?;
    let isa = dispatch::current();
    let mut whole = vec![Normalizer::EMPTY; rows];
    let mut logits = vec![0.0; rows * VOCAB_BLOCK.min(head.n())];
    dx.fill(0.0);
    for_blocks(head, |columns, weights| {
        let (first, n) = (columns.start, columns.len());
        let logits = &mut logits[..rows * n];
        linear_rows(x, head, columns, logits)?;
        let (whole, picked, sums) = (Shared::new(&mut whole), Shared::new(&mut *out), Shared::new(&mut *dx));
        for_rows(logits, n, n * 16, |mine, logits| {
            for (row, logits) in mine.zip(logits.chunks_exact_mut(n)) {
                // SAFETY: a row belongs to one task.
                let (whole, picked, sums) = unsafe {
                    (
                        whole.slice(row..row + 1),
                        picked.slice(row..row + 1),
                        sums.slice(row * width..(row + 1) * width),
                    )
                };
                if let Some(logit) = (targets[row] as usize).checked_sub(first).and_then(|t| logits.get(t)) {
                    picked[0] = *logit;
                }
                let before = whole[0];
                whole[0] = join_blocks(isa, &mut [before, block_normalizer(isa, logits)].into_iter());
                if before.max < whole[0].max {
                    rescale(isa, sums, before.max - whole[0].max);
                }
                exponentials(isa, logits, whole[0].max);
            }
        });
        gemm_nn(rows, width, n, logits, n, weights, width, dx, width, true)
    })?;
    let mut row_of_target = vec![0.0; width];
    for (row, dx) in dx.chunks_exact_mut(width).enumerate() {
        head.dequantize_row(targets[row] as usize, &mut row_of_target)?;
        dx.iter_mut().zip(&row_of_target).for_each(|(dx, w)| *dx = w - *dx / whole[row].sum);
        out[row] = whole[row].log_p(out[row]);
    }
    Ok(())
}

/// Rows of `x`, when each has a target and a place in what is named.
fn checked(
    op: &'static str,
    x: &[f32],
    head: &PackedWeight,
    targets: &[u32],
    (what, each): (&'static str, &[f32]),
) -> Result<usize, KernelError> {
    let rows = rows_of(op, "x", x.len(), head.k())?;
    check_targets(op, targets, rows, head.n())?;
    check_len(op, what, rows, each.len())?;
    Ok(rows)
}

/// Calls `f` with the columns of each block of the vocabulary and their weights [columns, H].
fn for_blocks(
    head: &PackedWeight,
    mut f: impl FnMut(Range<usize>, &[f32]) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    let width = head.k();
    let mut weights = vec![0.0; VOCAB_BLOCK.min(head.n()) * width];
    for first in (0..head.n()).step_by(VOCAB_BLOCK) {
        let columns = first..(first + VOCAB_BLOCK).min(head.n());
        let weights = &mut weights[..columns.len() * width];
        head.widen(first, weights);
        f(columns, weights)?;
    }
    Ok(())
}

/// Gradient of [`head_logprob`]: overwrites `dx` [T, H] and adds to `dw` [V, H] where wanted, given `lse` `[T]` of the forward
/// pass and `dout` `[T]`. With p = softmax(logits): `dx = dout * (W[target] - sum_v p_v W_v)`.
///
/// # Errors
/// When the lengths do not fit together or a target is not below V.
pub fn head_logprob_backward(
    x: &[f32],
    head: &PackedWeight,
    targets: &[u32],
    lse: &[f32],
    dout: &[f32],
    dx: &mut [f32],
    mut dw: Option<&mut [f32]>,
) -> Result<(), KernelError> {
    let (op, width) = ("head_logprob_backward", head.k());
    let rows = checked(op, x, head, targets, ("lse", lse))?;
    check_len(op, "dout", rows, dout.len())?;
    check_len(op, "dx", x.len(), dx.len())?;
    if let Some(dw) = &dw {
        check_len(op, "dw", head.n() * width, dw.len())?;
    }
    let isa = dispatch::current();
    let mut logits = vec![0.0; rows * VOCAB_BLOCK.min(head.n())];
    dx.fill(0.0);
    for_blocks(head, |columns, weights| {
        let (first, n) = (columns.start, columns.len());
        let logits = &mut logits[..rows * n];
        linear_rows(x, head, columns, logits)?;
        for_rows(logits, n, n * 8, |mine, logits| {
            for (row, logits) in mine.zip(logits.chunks_exact_mut(n)) {
                let target = (targets[row] as usize).checked_sub(first).filter(|&t| t < n);
                logit_gradient(isa, logits, lse[row], dout[row]);
                if let Some(target) = target {
                    logits[target] += dout[row];
                }
            }
        });
        gemm_nn(rows, width, n, logits, n, weights, width, dx, width, true)?;
        let Some(dw) = dw.as_deref_mut() else { return Ok(()) };
        let dw = &mut dw[first * width..(first + n) * width];
        gemm_tn(n, width, rows, logits, n, x, width, dw, width, true)
    })
}

simd_kernel! {
    /// `v *= e^power`.
    fn rescale(s; v: &mut [f32], power: f32) {
        let factor = exp(s, s.splat(power));
        for i in (0..v.len()).step_by(LANES) {
            let scaled = s.mul(read(s, v, i, 0.0), factor);
            write(s, v, i, scaled);
        }
    }
}

simd_kernel! {
    /// `logits = e^(logits - max)`.
    fn exponentials(s; logits: &mut [f32], max: f32) {
        let max = s.splat(max);
        for i in (0..logits.len()).step_by(LANES) {
            let power = s.sub(read(s, logits, i, 0.0), max);
            write(s, logits, i, exp(s, power));
        }
    }
}

simd_kernel! {
    /// `logits = -dout * e^(logits - lse)`.
    fn logit_gradient(s; logits: &mut [f32], lse: f32, dout: f32) {
        let (lse, negative) = (s.splat(lse), s.splat(-dout));
        for i in (0..logits.len()).step_by(LANES) {
            let p = exp(s, s.sub(read(s, logits, i, 0.0), lse));
            write(s, logits, i, s.mul(p, negative));
        }
    }
}
