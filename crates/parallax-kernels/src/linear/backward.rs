//! The gradient of a linear layer's input, from the very weights that the layer packed for its forward pass.

use super::PackedWeight;
use crate::error::{KernelError, check_len, rows_of};
use crate::matmul::gemm_nn;
use crate::simd::LANES;

/// Bytes of weights that are held as f32 at a time, unless sixteen outputs take more.
const WIDENED_BYTES: usize = 4 << 20;

/// `dx [T, K] = dy [T, N] * W`, the gradient of the rows of [`super::linear_multi`]: W stacks the outputs of `ws`. The weights are
/// widened to f32 a few outputs at a time and never kept so.
///
/// Each element is one chain of fused multiply-adds over the outputs, in order: the bits of a product with the widened weights,
/// whatever the threads. Formats whose product rounds its activations to eight bits get the gradient by their dequantised
/// weights, as if nothing had been rounded (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).
///
/// # Errors
/// When the lengths do not fit together, or the weights differ in K.
pub fn linear_backward(dy: &[f32], ws: &[&PackedWeight], dx: &mut [f32]) -> Result<(), KernelError> {
    in_pieces(dy, ws, dx, WIDENED_BYTES)
}

/// The same, holding about so many bytes of f32 weights.
pub(super) fn in_pieces(
    dy: &[f32],
    ws: &[&PackedWeight],
    dx: &mut [f32],
    widened_bytes: usize,
) -> Result<(), KernelError> {
    let op = "linear_backward";
    let n: usize = ws.iter().map(|w| w.n()).sum();
    let rows = rows_of(op, "dy", dy.len(), n)?;
    for w in ws {
        check_len(op, "dx", rows * w.k(), dx.len())?;
    }
    let Some(k) = dx.len().checked_div(rows) else { return Ok(()) };
    // Whole panels, each of which is then read once.
    let at_once = (widened_bytes / (4 * k.max(1)) / LANES).max(1) * LANES;
    let mut widened = Vec::new();
    let mut done = 0;
    for w in ws {
        for first in (0..w.n()).step_by(at_once) {
            let outputs = at_once.min(w.n() - first);
            widened.resize(outputs * k, 0.0);
            w.widen(first, &mut widened);
            gemm_nn(rows, k, outputs, &dy[done..], n, &widened, k, dx, k, done > 0)?;
            done += outputs;
        }
    }
    Ok(())
}
