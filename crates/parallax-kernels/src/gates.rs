//! Gates beside the gated feed-forward layer: an output multiplied by a function of another projection, and the clamped
//! SwiGLU of GPT-OSS.

use crate::activation::sigmoid;
use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::parallel::for_rows;
use crate::simd::{LANES, read, write};

/// What becomes of the gate before it multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// sigmoid(gate): gated attention.
    Sigmoid,
    /// gate * sigmoid(gate): the gated norm of the delta net.
    Silu,
}

/// `y [n] *= f(gate) [n]`, element by element.
///
/// # Errors
/// When the lengths differ.
pub fn apply_gate(kind: Gate, gate: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    check_len("gate", "gate", y.len(), gate.len())?;
    let isa = dispatch::current();
    for_rows(y, 1, 16, |range, y| multiply(isa, kind, &gate[range], y));
    Ok(())
}

/// `y [T, F] = (up' + 1) * gate' * sigmoid(1.702 gate')` with gate' = min(gate, limit) and up' = clamp(up, -limit,
/// limit), where `gate_up` [T, 2F] holds the gate in its first F columns (GPT-OSS, arXiv:2508.10925).
///
/// # Errors
/// When the lengths do not fit together.
pub fn clamped_swiglu(gate_up: &[f32], ffn: usize, limit: f32, y: &mut [f32]) -> Result<(), KernelError> {
    let rows = rows_of("clamped_swiglu", "gate_up", gate_up.len(), 2 * ffn)?;
    check_len("clamped_swiglu", "y", rows * ffn, y.len())?;
    let isa = dispatch::current();
    for_rows(y, ffn, ffn * 16, |rows, y| {
        clamped(isa, &gate_up[rows.start * 2 * ffn..rows.end * 2 * ffn], ffn, limit, y);
    });
    Ok(())
}

simd_kernel! {
    fn multiply(s; kind: Gate, gate: &[f32], y: &mut [f32]) {
        for i in (0..y.len()).step_by(LANES) {
            let g = read(s, gate, i, 0.0);
            let factor = match kind {
                Gate::Sigmoid => sigmoid(s, g),
                Gate::Silu => s.mul(g, sigmoid(s, g)),
            };
            let product = s.mul(read(s, y, i, 0.0), factor);
            write(s, y, i, product);
        }
    }
}

simd_kernel! {
    fn clamped(s; gate_up: &[f32], ffn: usize, limit: f32, y: &mut [f32]) {
        let (high, low, one) = (s.splat(limit), s.splat(-limit), s.splat(1.0));
        for (gate_up, y) in gate_up.chunks_exact(2 * ffn).zip(y.chunks_exact_mut(ffn)) {
            let (gates, ups) = gate_up.split_at(ffn);
            for i in (0..ffn).step_by(LANES) {
                // The bound is the first operand: a NaN stays.
                let gate = s.min(high, read(s, gates, i, 0.0));
                let up = s.max(low, s.min(high, read(s, ups, i, 0.0)));
                let active = s.mul(gate, sigmoid(s, s.mul(gate, s.splat(1.702))));
                write(s, y, i, s.mul(s.add(up, one), active));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, noise, same_at_every_level};

    #[test]
    fn gates_agree_with_their_formulas() {
        for n in [1, 16, 37] {
            let gate: Vec<f32> = noise(n, 1).iter().map(|v| v * 8.0).collect();
            let x = noise(n, 2);
            for kind in [Gate::Sigmoid, Gate::Silu] {
                let y = same_at_every_level(|| {
                    let mut y = x.clone();
                    apply_gate(kind, &gate, &mut y).unwrap();
                    y
                });
                let expected: Vec<f64> = x
                    .iter()
                    .zip(&gate)
                    .map(|(&x, &g)| {
                        let (x, g) = (f64::from(x), f64::from(g));
                        let sigmoid = 1.0 / (1.0 + (-g).exp());
                        x * if kind == Gate::Silu { g * sigmoid } else { sigmoid }
                    })
                    .collect();
                assert_close(&y, &expected, 1e-6);
            }
        }
        assert!(apply_gate(Gate::Silu, &[0.0; 2], &mut [0.0; 3]).is_err());
    }

    #[test]
    fn clamped_swiglu_agrees_with_its_formula() {
        for ffn in [1, 16, 21] {
            let x: Vec<f32> = noise(3 * 2 * ffn, 3).iter().map(|v| v * 20.0).collect();
            let y = same_at_every_level(|| {
                let mut y = vec![0.0; 3 * ffn];
                clamped_swiglu(&x, ffn, 7.0, &mut y).unwrap();
                y
            });
            let expected: Vec<f64> = x
                .chunks_exact(2 * ffn)
                .flat_map(|row| {
                    (0..ffn).map(|i| {
                        let gate = f64::from(row[i]).min(7.0);
                        let up = f64::from(row[ffn + i]).clamp(-7.0, 7.0);
                        (up + 1.0) * gate / (1.0 + (-1.702 * gate).exp())
                    })
                })
                .collect();
            assert_close(&y, &expected, 1e-6);
        }
        let mut y = [0.0];
        clamped_swiglu(&[f32::NAN, 1.0], 1, 7.0, &mut y).unwrap();
        assert!(y[0].is_nan());
    }
}
