//! RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), forward and backward.
//!
//! The sum of squares runs over sixteen lanes (element `i` in lane `i % 16`) and a fixed tree, so a row's result depends
//! on nothing but the row.

use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::parallel::{Shared, for_ranges, for_rows};
use crate::simd::{LANES, Simd, read, write};

/// `y [T, H] = x / sqrt(mean(x^2) + eps) * w`, row by row; `w` is `[H]`.
///
/// # Errors
/// When the lengths do not fit together.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) -> Result<(), KernelError> {
    rows_of("rms_norm", "x", x.len(), w.len())?;
    check_len("rms_norm", "y", x.len(), y.len())?;
    let (isa, width) = (dispatch::current(), w.len());
    for_rows(y, width, width * 4, |rows, y| {
        forward(isa, &x[rows.start * width..rows.end * width], w, eps, y)
    });
    Ok(())
}

/// Gradients of [`rms_norm`]: writes `dx` [T, H] and adds to `dw` `[H]` where wanted.
///
/// # Errors
/// When the lengths do not fit together.
pub fn rms_norm_backward(
    x: &[f32],
    w: &[f32],
    eps: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) -> Result<(), KernelError> {
    let (op, width) = ("rms_norm_backward", w.len());
    let rows = rows_of(op, "x", x.len(), width)?;
    check_len(op, "dy", x.len(), dy.len())?;
    check_len(op, "dx", x.len(), dx.len())?;
    let isa = dispatch::current();
    let mut inverse = vec![0.0; rows];
    {
        let inverse = Shared::new(&mut inverse);
        for_rows(dx, width, width * 8, |rows, dx| {
            // SAFETY: the row ranges of different tasks are disjoint.
            let inverse = unsafe { inverse.slice(rows.clone()) };
            let span = rows.start * width..rows.end * width;
            backward(isa, &x[span.clone()], w, eps, &dy[span], dx, inverse);
        });
    }
    if let Some(dw) = dw {
        check_len(op, "dw", width, dw.len())?;
        let dw = Shared::new(dw);
        // Columns are shared out in whole lines; the rows are added in order.
        for_ranges(width.div_ceil(LANES), rows * LANES, |lines| {
            let columns = lines.start * LANES..(lines.end * LANES).min(width);
            // SAFETY: the column ranges of different tasks are disjoint.
            let dw = unsafe { dw.slice(columns.clone()) };
            weight_gradient(isa, x, dy, &inverse, width, columns.start, dw);
        });
    }
    Ok(())
}

/// 1 / sqrt(mean square + eps) of a row.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut squares = s.splat(0.0);
    for i in (0..x.len()).step_by(LANES) {
        let v = read(s, x, i, 0.0);
        squares = s.fma(v, v, squares);
    }
    1.0 / (s.sum(squares) / x.len() as f32 + eps).sqrt()
}

simd_kernel! {
    /// [`rms_norm`] of a few rows.
    pub(crate) fn forward(s; x: &[f32], w: &[f32], eps: f32, y: &mut [f32]) {
        for (x, y) in x.chunks_exact(w.len()).zip(y.chunks_exact_mut(w.len())) {
            let inverse = s.splat(inverse_rms(s, x, eps));
            for i in (0..w.len()).step_by(LANES) {
                let scaled = s.mul(read(s, x, i, 0.0), inverse);
                write(s, y, i, s.mul(scaled, read(s, w, i, 0.0)));
            }
        }
    }
}

simd_kernel! {
    fn backward(s; x: &[f32], w: &[f32], eps: f32, dy: &[f32], dx: &mut [f32], inverse_out: &mut [f32]) {
        let width = w.len();
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for (((x, dy), dx), inverse_out) in rows.zip(inverse_out) {
            let inverse = inverse_rms(s, x, eps);
            *inverse_out = inverse;
            // With n = x * inverse and g = dy * w: dx = inverse * (g - n * mean(g * n)).
            let mut dot = s.splat(0.0);
            for i in (0..width).step_by(LANES) {
                let g = s.mul(read(s, dy, i, 0.0), read(s, w, i, 0.0));
                dot = s.fma(g, read(s, x, i, 0.0), dot);
            }
            let mean = s.splat(s.sum(dot) * inverse / width as f32);
            let inverse = s.splat(inverse);
            for i in (0..width).step_by(LANES) {
                let g = s.mul(read(s, dy, i, 0.0), read(s, w, i, 0.0));
                let n = s.mul(read(s, x, i, 0.0), inverse);
                write(s, dx, i, s.mul(inverse, s.sub(g, s.mul(n, mean))));
            }
        }
    }
}

simd_kernel! {
    /// Adds `sum over rows of dy * x * inverse` to the columns `first..first + dw.len()`.
    fn weight_gradient(s; x: &[f32], dy: &[f32], inverse: &[f32], width: usize, first: usize, dw: &mut [f32]) {
        for i in (0..dw.len()).step_by(LANES) {
            let mut sum = read(s, dw, i, 0.0);
            for (row, &inverse) in inverse.iter().enumerate() {
                let row = row * width..(row + 1) * width;
                let n = s.mul(read(s, &x[row.clone()], first + i, 0.0), s.splat(inverse));
                sum = s.fma(read(s, &dy[row], first + i, 0.0), n, sum);
            }
            write(s, dw, i, sum);
        }
    }
}

#[cfg(test)]
mod tests;
