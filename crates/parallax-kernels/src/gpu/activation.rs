//! The gated activation of the feed-forward layer.

use cubecl::{client::Client, prelude::*};

use super::{Values, grid};
use crate::activation::Activation;
use crate::error::{KernelError, rows_of};

const UNITS: u32 = 64;

/// `y [T, F] = activation(gate) * up`, where `gate_up` [T, 2F] holds the gate in its first F columns.
///
/// # Errors
/// When `gate_up` is no whole number of rows.
pub fn gated_mul(
    client: &Client,
    activation: Activation,
    gate_up: &Values,
    ffn: usize,
) -> Result<Values, KernelError> {
    let rows = rows_of("gated_mul", "gate_up", gate_up.len(), 2 * ffn)?;
    let y = Values::empty(client, rows * ffn);
    // SAFETY: gate_up is [rows, 2F] and y [rows, F]; units beyond its end write nothing.
    unsafe {
        gated_elements::launch_unchecked(
            client,
            grid((rows * ffn).div_ceil(UNITS as usize)),
            CubeDim::new_1d(UNITS),
            gate_up.arg(),
            y.arg(),
            (rows * ffn) as u32,
            ffn as u32,
            activation,
        );
    }
    Ok(y)
}

#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn gated_elements(
    gate_up: &[f32],
    y: &mut [f32],
    total: u32,
    ffn: u32,
    #[comptime] activation: Activation,
) {
    if ABSOLUTE_POS < total as usize {
        let ffn = ffn as usize;
        let at = ABSOLUTE_POS / ffn * 2 * ffn + ABSOLUTE_POS % ffn;
        let gate = gate_up[at];
        // Both are gate times a logistic: tanh-GELU by (1 + tanh(z)) / 2 = 1 / (1 + e^-2z).
        let z = if comptime!(activation == Activation::Silu) {
            gate
        } else {
            1.595_769 * (gate + 0.044_715 * gate * gate * gate)
        };
        y[ABSOLUTE_POS] = gate / (1.0 + (-z).exp()) * gate_up[at + ffn];
    }
}
