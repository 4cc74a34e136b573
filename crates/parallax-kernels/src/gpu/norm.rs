//! RMS norms of rows, and of the heads inside a fused row.

use cubecl::{client::Client, prelude::*};

use super::{
    Values,
    fold::{Fold, fold},
    grid,
};
use crate::error::{KernelError, rows_of};

/// Units that share a row.
const UNITS: usize = 128;

/// `x / sqrt(mean(x²) + eps) * w`, by rows of `w`'s length.
///
/// # Errors
/// When `x` is no whole number of rows.
pub fn rms_norm(client: &Client, x: &Values, w: &Values, eps: f32) -> Result<Values, KernelError> {
    let rows = rows_of("rms_norm", "x", x.len(), w.len())?;
    let y = Values::empty(client, x.len());
    if rows > 0 {
        // SAFETY: x and y are [rows, w.len()]; cubes beyond the last row stop.
        unsafe {
            norm_rows::launch_unchecked(
                client,
                grid(rows),
                CubeDim::new_1d(UNITS as u32),
                x.arg(),
                w.arg(),
                y.arg(),
                rows as u32,
                w.len() as u32,
                eps,
            );
        }
    }
    Ok(y)
}

/// Normalises in place, by spans of `w`'s length, columns `first..first + spans * w.len()` of rows of `width`.
///
/// # Errors
/// When `data` is no whole number of rows, or the columns leave them.
pub fn rms_norm_spans(
    client: &Client,
    data: &Values,
    width: usize,
    first: usize,
    spans: usize,
    w: &Values,
    eps: f32,
) -> Result<(), KernelError> {
    let op = "rms_norm_spans";
    let rows = rows_of(op, "data", data.len(), width)?;
    if w.len() == 0 || first + spans * w.len() > width {
        let rule = "must end inside the row";
        return Err(KernelError::BadDimension {
            op,
            what: "last column",
            got: first + spans * w.len(),
            rule,
        });
    }
    if rows * spans > 0 {
        // SAFETY: the spans were compared with the rows' width; cubes beyond the last span stop.
        unsafe {
            norm_spans::launch_unchecked(
                client,
                grid(rows * spans),
                CubeDim::new_1d(UNITS as u32),
                data.arg(),
                w.arg(),
                (rows * spans) as u32,
                spans as u32,
                w.len() as u32,
                width as u32,
                first as u32,
                eps,
            );
        }
    }
    Ok(())
}

/// `1 / sqrt(mean(x²) + eps)` of `span` values from number `from` on, for all units of the cube.
#[cube]
fn inverse_rms(x: &[f32], from: usize, span: usize, eps: f32) -> f32 {
    let unit = UNIT_POS as usize;
    let mut squares = 0.0f32;
    let mut i = unit;
    while i < span {
        let v = x[from + i];
        squares += v * v;
        i += UNITS;
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    shared[unit] = squares;
    fold(&mut shared, unit, unit, UNITS, comptime!(1usize), UNITS, comptime!(Fold::Sum));
    (shared[0] / f32::cast_from(span) + eps).inverse_sqrt()
}

#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn norm_rows(x: &[f32], w: &[f32], y: &mut [f32], rows: u32, span: u32, eps: f32) {
    let row = CUBE_POS;
    if row >= rows as usize {
        terminate!();
    }
    let span = span as usize;
    let inverse = inverse_rms(x, row * span, span, eps);
    let mut i = UNIT_POS as usize;
    while i < span {
        y[row * span + i] = x[row * span + i] * inverse * w[i];
        i += UNITS;
    }
}

#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn norm_spans(
    data: &mut [f32],
    w: &[f32],
    total: u32,
    spans: u32,
    span: u32,
    width: u32,
    first: u32,
    eps: f32,
) {
    let number = CUBE_POS as u32;
    if number >= total {
        terminate!();
    }
    let from = ((number / spans) * width + first + (number % spans) * span) as usize;
    let span = span as usize;
    let inverse = inverse_rms(&*data, from, span, eps);
    let mut i = UNIT_POS as usize;
    while i < span {
        data[from + i] = data[from + i] * inverse * w[i];
        i += UNITS;
    }
}
