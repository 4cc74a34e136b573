//! The gated activation of the feed-forward layer (SwiGLU, Shazeer 2020, arXiv:2002.05202), and the residual sum.

use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::parallel::for_rows;
use crate::simd::{LANES, Simd, exp, read, tanh, write};

/// What is done to the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// x / (1 + e^-x): SwiGLU.
    Silu,
    /// The tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): GeGLU.
    GeluTanh,
}

/// `y [T, F] = activation(gate) * up`, where `gate_up` [T, 2F] holds the gate in its first F columns.
///
/// # Errors
/// When the lengths do not fit together.
pub fn gated_mul(
    activation: Activation,
    gate_up: &[f32],
    ffn: usize,
    y: &mut [f32],
) -> Result<(), KernelError> {
    let rows = rows_of("gated_mul", "gate_up", gate_up.len(), 2 * ffn)?;
    check_len("gated_mul", "y", rows * ffn, y.len())?;
    let isa = dispatch::current();
    for_rows(y, ffn, ffn * 16, |rows, y| {
        forward(isa, activation, &gate_up[rows.start * 2 * ffn..rows.end * 2 * ffn], ffn, y);
    });
    Ok(())
}

/// Gradient of [`gated_mul`]: writes `d_gate_up` [T, 2F] for `dy` [T, F].
///
/// # Errors
/// When the lengths do not fit together.
pub fn gated_mul_backward(
    activation: Activation,
    gate_up: &[f32],
    ffn: usize,
    dy: &[f32],
    d_gate_up: &mut [f32],
) -> Result<(), KernelError> {
    let op = "gated_mul_backward";
    let rows = rows_of(op, "gate_up", gate_up.len(), 2 * ffn)?;
    check_len(op, "dy", rows * ffn, dy.len())?;
    check_len(op, "d_gate_up", gate_up.len(), d_gate_up.len())?;
    let isa = dispatch::current();
    for_rows(d_gate_up, 2 * ffn, ffn * 24, |rows, d| {
        let span = rows.start * 2 * ffn..rows.end * 2 * ffn;
        backward(isa, activation, &gate_up[span], ffn, &dy[rows.start * ffn..rows.end * ffn], d);
    });
    Ok(())
}

/// `x = cap * tanh(x / cap)`, element by element: logits of Gemma 2 (arXiv:2408.00118).
pub fn softcap(x: &mut [f32], cap: f32) {
    let isa = dispatch::current();
    for_rows(x, 1, 12, |_, x| bend(isa, x, cap));
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
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), x))))
}

/// How much of `x` the activation keeps: both are `x * sigmoid(z)`; returns the sigmoid and dz / dx.
#[inline(always)]
fn gate<S: Simd>(s: S, activation: Activation, x: S::F) -> (S::F, S::F) {
    let one = s.splat(1.0);
    match activation {
        Activation::Silu => (sigmoid(s, x), one),
        Activation::GeluTanh => {
            // 0.5 * (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
            const TWO_ROOT: f32 = 1.595_769;
            let square = s.mul(x, x);
            let z = s.mul(s.mul(s.splat(TWO_ROOT), x), s.fma(square, s.splat(0.044_715), one));
            let slope = s.mul(s.splat(TWO_ROOT), s.fma(square, s.splat(3.0 * 0.044_715), one));
            (sigmoid(s, z), slope)
        }
    }
}

simd_kernel! {
    /// [`gated_mul`] of a few rows.
    pub(crate) fn forward(s; activation: Activation, gate_up: &[f32], ffn: usize, y: &mut [f32]) {
        for (gate_up, y) in gate_up.chunks_exact(2 * ffn).zip(y.chunks_exact_mut(ffn)) {
            let (gates, up) = gate_up.split_at(ffn);
            for i in (0..ffn).step_by(LANES) {
                let g = read(s, gates, i, 0.0);
                let active = s.mul(g, gate(s, activation, g).0);
                write(s, y, i, s.mul(active, read(s, up, i, 0.0)));
            }
        }
    }
}

simd_kernel! {
    fn backward(s; activation: Activation, gate_up: &[f32], ffn: usize, dy: &[f32], d_gate_up: &mut [f32]) {
        let rows = gate_up.chunks_exact(2 * ffn).zip(dy.chunks_exact(ffn));
        for ((gate_up, dy), d) in rows.zip(d_gate_up.chunks_exact_mut(2 * ffn)) {
            let (gates, up) = gate_up.split_at(ffn);
            let (d_gate, d_up) = d.split_at_mut(ffn);
            for i in (0..ffn).step_by(LANES) {
                let (g, u, dy) = (read(s, gates, i, 0.0), read(s, up, i, 0.0), read(s, dy, i, 0.0));
                let (sig, dz) = gate(s, activation, g);
                let active = s.mul(g, sig);
                write(s, d_up, i, s.mul(dy, active));
                // d (x sigmoid(z)) / dx = sig + x sig (1 - sig) dz/dx.
                let slope = s.fma(s.mul(active, dz), s.sub(s.splat(1.0), sig), sig);
                write(s, d_gate, i, s.mul(s.mul(dy, u), slope));
            }
        }
    }
}

simd_kernel! {
    fn bend(s; x: &mut [f32], cap: f32) {
        let cap = s.splat(cap);
        for i in (0..x.len()).step_by(LANES) {
            let bent = s.mul(cap, tanh(s, s.div(read(s, x, i, 0.0), cap)));
            write(s, x, i, bent);
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
