//! The gated activation of the feed-forward layer (SwiGLU, Shazeer 2020, arXiv:2002.05202), and the residual sum.

use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::parallel::for_rows;
use crate::simd::{LANES, Simd, exp, read, write};

/// `y [T, F] = silu(gate) * up`, where `gate_up` [T, 2F] holds the gate in its first F columns.
///
/// # Errors
/// When the lengths do not fit together.
pub fn silu_mul(gate_up: &[f32], ffn: usize, y: &mut [f32]) -> Result<(), KernelError> {
    let rows = rows_of("silu_mul", "gate_up", gate_up.len(), 2 * ffn)?;
    check_len("silu_mul", "y", rows * ffn, y.len())?;
    let isa = dispatch::current();
    for_rows(y, ffn, ffn * 16, |rows, y| {
        forward(isa, &gate_up[rows.start * 2 * ffn..rows.end * 2 * ffn], ffn, y);
    });
    Ok(())
}

/// Gradient of [`silu_mul`]: writes `d_gate_up` [T, 2F] for `dy` [T, F].
///
/// # Errors
/// When the lengths do not fit together.
pub fn silu_mul_backward(
    gate_up: &[f32],
    ffn: usize,
    dy: &[f32],
    d_gate_up: &mut [f32],
) -> Result<(), KernelError> {
    let op = "silu_mul_backward";
    let rows = rows_of(op, "gate_up", gate_up.len(), 2 * ffn)?;
    check_len(op, "dy", rows * ffn, dy.len())?;
    check_len(op, "d_gate_up", gate_up.len(), d_gate_up.len())?;
    let isa = dispatch::current();
    for_rows(d_gate_up, 2 * ffn, ffn * 24, |rows, d| {
        let span = rows.start * 2 * ffn..rows.end * 2 * ffn;
        backward(isa, &gate_up[span], ffn, &dy[rows.start * ffn..rows.end * ffn], d);
    });
    Ok(())
}

/// `y += x`, element by element.
///
/// # Errors
/// When the lengths differ.
pub fn add_assign(y: &mut [f32], x: &[f32]) -> Result<(), KernelError> {
    check_len("add_assign", "x", y.len(), x.len())?;
    let isa = dispatch::current();
    for_rows(y, 1, 1, |range, y| add(isa, &x[range], y));
    Ok(())
}

/// 1 / (1 + e^-x).
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

simd_kernel! {
    fn forward(s; gate_up: &[f32], ffn: usize, y: &mut [f32]) {
        for (gate_up, y) in gate_up.chunks_exact(2 * ffn).zip(y.chunks_exact_mut(ffn)) {
            let (gate, up) = gate_up.split_at(ffn);
            for i in (0..ffn).step_by(LANES) {
                let g = read(s, gate, i, 0.0);
                let silu = s.mul(g, sigmoid(s, g));
                write(s, y, i, s.mul(silu, read(s, up, i, 0.0)));
            }
        }
    }
}

simd_kernel! {
    fn backward(s; gate_up: &[f32], ffn: usize, dy: &[f32], d_gate_up: &mut [f32]) {
        let rows = gate_up.chunks_exact(2 * ffn).zip(dy.chunks_exact(ffn));
        for ((gate_up, dy), d) in rows.zip(d_gate_up.chunks_exact_mut(2 * ffn)) {
            let (gate, up) = gate_up.split_at(ffn);
            let (d_gate, d_up) = d.split_at_mut(ffn);
            for i in (0..ffn).step_by(LANES) {
                let (g, u, dy) = (read(s, gate, i, 0.0), read(s, up, i, 0.0), read(s, dy, i, 0.0));
                let sig = sigmoid(s, g);
                let silu = s.mul(g, sig);
                write(s, d_up, i, s.mul(dy, silu));
                // d silu / dg = sig + silu * (1 - sig).
                let slope = s.fma(silu, s.sub(s.splat(1.0), sig), sig);
                write(s, d_gate, i, s.mul(s.mul(dy, u), slope));
            }
        }
    }
}

simd_kernel! {
    fn add(s; x: &[f32], y: &mut [f32]) {
        for i in (0..y.len()).step_by(LANES) {
            let sum = s.add(read(s, y, i, 0.0), read(s, x, i, 0.0));
            write(s, y, i, sum);
        }
    }
}

#[cfg(test)]
mod tests;
