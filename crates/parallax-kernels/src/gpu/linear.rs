//! `y = x * W^T` with packed weights, and rows of a packed table.
//!
//! Up to four rows are bound by the bytes of the weights: a cube takes four outputs, the lanes of a line share out their
//! inputs and fold their sums at the end. More rows are bound by arithmetic: a cube takes a tile of rows by 64 outputs
//! and widens each weight once for all of its rows.

use cubecl::{client::Client, prelude::*};

use super::{
    Ids, Values, check_indices,
    fold::{Fold, fold},
    grid,
    widen::{Form, Words, code, min_of, scale_of, split},
};
use crate::dtype::{BLOCK, WeightKind};
use crate::error::{KernelError, check_len, rows_of};

/// Lanes that share an output of few rows.
const LANES: usize = 32;
/// Outputs of a cube, for few rows.
const FEW_OUTPUTS: usize = 4;
/// Most rows for which the bytes of the weights are what counts.
const FEW_ROWS: usize = 4;
/// Outputs of a tile.
const TILE: usize = 64;
/// Units along each side of a tile.
const SIDE: usize = 16;

/// A weight [N, K] on a device, packed.
#[derive(Clone, Debug)]
pub struct DeviceWeight {
    form: Form,
    codes: Ids,
    scales: Ids,
    n: usize,
    k: usize,
}

impl DeviceWeight {
    /// Uploads the stored bytes of a weight [N, K] of `kind`: rows of little-endian floats, or of blocks. No value changes.
    ///
    /// # Errors
    /// When the bytes are not those of n * k weights, `k` is no multiple of 32 and of the kind's blocks, or there are more
    /// weights than 32 bits count.
    pub fn from_bytes(
        client: &Client,
        kind: WeightKind,
        raw: &[u8],
        n: usize,
        k: usize,
    ) -> Result<Self, KernelError> {
        if n == 0 || k == 0 || !k.is_multiple_of(BLOCK) {
            return Err(KernelError::RaggedBlocks { op: "device weight", k, block: BLOCK });
        }
        check_indices("device weight", "weights", n.saturating_mul(k))?;
        let Words { codes, scales } = split(kind, raw, n, k)?;
        let (codes, scales) = (Ids::upload(client, &codes), Ids::upload(client, &scales));
        Ok(Self { form: Form::of(kind), codes, scales, n, k })
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        4 * (self.codes.len() + self.scales.len())
    }
}

/// `y [T, N]` for `x` [T, K] and weights that together have N outputs, in their order.
///
/// # Errors
/// When the lengths do not fit together.
pub fn linear(client: &Client, x: &Values, parts: &[DeviceWeight]) -> Result<Values, KernelError> {
    let k = parts.first().map_or(0, |part| part.k);
    let rows = rows_of("linear", "x", x.len(), k)?;
    let n = parts.iter().map(|part| part.n).sum();
    check_indices("linear", "results", rows.saturating_mul(n))?;
    let y = Values::empty(client, rows * n);
    let mut first = 0;
    for part in parts {
        check_len("linear", "inputs of a part", k, part.k)?;
        if rows > 0 {
            product(client, x, part, rows, &y, n, first);
        }
        first += part.n;
    }
    Ok(y)
}

/// Writes columns `first..first + weight.n` of `y` [rows, stride].
fn product(
    client: &Client,
    x: &Values,
    weight: &DeviceWeight,
    rows: usize,
    y: &Values,
    stride: usize,
    first: usize,
) {
    let DeviceWeight { form, codes, scales, n, k } = weight;
    let (x, codes, scales) = (x.vectors(4), codes.vectors(form.words()), scales.arg());
    let (n, k) = (*n, *k as u32);
    let (count, stride, first) = (n as u32, stride as u32, first as u32);
    if rows <= FEW_ROWS {
        let at_once = rows.next_power_of_two();
        // SAFETY: the kernel reads [rows, k], [n, k] and its scales, and writes below [rows, stride], which are the lengths.
        unsafe {
            few_rows::launch_unchecked(
                client,
                grid(n.div_ceil(FEW_OUTPUTS)),
                CubeDim::new_2d(LANES as u32, FEW_OUTPUTS as u32),
                form.words(),
                x,
                codes,
                scales,
                y.arg(),
                rows as u32,
                count,
                k,
                stride,
                first,
                at_once,
                *form,
            );
        }
        return;
    }
    let rows_per_unit = rows.div_ceil(SIDE).next_power_of_two().min(4);
    let count_of = CubeCount::Static(n.div_ceil(TILE) as u32, rows.div_ceil(SIDE * rows_per_unit) as u32, 1);
    // SAFETY: as above; rows and outputs beyond the ends are clamped when read and not written.
    unsafe {
        many_rows::launch_unchecked(
            client,
            count_of,
            CubeDim::new_2d(SIDE as u32, SIDE as u32),
            form.words(),
            x,
            codes,
            scales,
            y.arg(),
            rows as u32,
            count,
            k,
            stride,
            first,
            rows_per_unit,
            *form,
        );
    }
}

/// A cube of `LANES` by `FEW_OUTPUTS` units; `at_once` is at least the number of rows.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn few_rows<W: Size>(
    x: &[Vector<f32, Const<4>>],
    codes: &[Vector<u32, W>],
    scales: &[u32],
    y: &mut [f32],
    rows: u32,
    n: u32,
    k: u32,
    stride: u32,
    first: u32,
    #[comptime] at_once: usize,
    #[comptime] form: Form,
) {
    let step = comptime!(form.step());
    let lane = UNIT_POS_X as usize;
    let line = UNIT_POS_Y as usize;
    let output = CUBE_POS * FEW_OUTPUTS + line;
    // Units beyond the last output repeat it and write nothing: all meet at the barriers.
    let row = output.min(n as usize - 1);
    let steps = k as usize / step;
    let quads = k as usize / 4;
    let mut sums = Array::<f32>::new(at_once);
    #[unroll]
    for r in 0..at_once {
        sums[r] = 0.0;
    }
    let mut at = lane;
    while at < steps {
        let group = (row * steps + at) * step / comptime!(form.group);
        let words = codes[row * steps + at];
        let scale = scale_of(scales, group, form);
        let min = min_of(scales, group, form);
        #[unroll]
        for r in 0..at_once {
            let x_row = (r as u32).min(rows - 1) as usize;
            let mut dot = 0.0f32;
            let mut sum = 0.0f32;
            #[unroll]
            for quad in 0..comptime!(step / 4) {
                let inputs = x[x_row * quads + at * comptime!(step / 4) + quad];
                #[unroll]
                for i in 0..4usize {
                    dot += code::<W>(words, comptime!(4 * quad + i), form) * inputs.extract(i);
                    sum += inputs.extract(i);
                }
            }
            sums[r] += scale * dot + min * sum;
        }
        at += LANES;
    }
    let units = comptime!(LANES * FEW_OUTPUTS);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(LANES * FEW_OUTPUTS * at_once));
    let own = line * LANES + lane;
    #[unroll]
    for r in 0..at_once {
        shared[r * units + own] = sums[r];
    }
    fold(&mut shared, own, lane, LANES, at_once, units, comptime!(Fold::Sum));
    if lane == 0 && output < n as usize {
        #[unroll]
        for r in 0..at_once {
            if (r as u32) < rows {
                y[r * stride as usize + first as usize + output] = shared[r * units + own];
            }
        }
    }
}

/// Where column `column` of row `k` of a shared tile of 64 columns lies, so that neither a group of writers nor one of
/// readers meets in a bank.
#[cube]
fn spread(k: usize, column: usize, #[comptime] width: usize) -> usize {
    if comptime!(width == TILE) {
        k * width + (column ^ ((k >> 3usize) << 3usize))
    } else {
        k * width + column
    }
}

/// A cube of `SIDE` by `SIDE` units makes `SIDE * per_unit` rows by `TILE` outputs.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn many_rows<W: Size>(
    x: &[Vector<f32, Const<4>>],
    codes: &[Vector<u32, W>],
    scales: &[u32],
    y: &mut [f32],
    rows: u32,
    n: u32,
    k: u32,
    stride: u32,
    first: u32,
    #[comptime] per_unit: usize,
    #[comptime] form: Form,
) {
    let step = comptime!(form.step());
    let height = comptime!(SIDE * per_unit);
    let units = comptime!(SIDE * SIDE);
    let unit = UNIT_POS as usize;
    let row_0 = CUBE_POS_Y as usize * height;
    let output_0 = CUBE_POS_X as usize * TILE;
    let steps = k as usize / step;
    let quads = k as usize / 4;
    let mut inputs = Shared::<[f32]>::new_slice(comptime!(BLOCK * height));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(BLOCK * TILE));
    let mut sums = Array::<f32>::new(comptime!(per_unit * 4));
    #[unroll]
    for i in 0..comptime!(per_unit * 4) {
        sums[i] = 0.0;
    }
    for block in 0..k as usize / BLOCK {
        #[unroll]
        for turn in 0..comptime!(TILE * BLOCK / step / units) {
            let part = unit + turn * units;
            let line = part / comptime!(BLOCK / step);
            let at = part % comptime!(BLOCK / step);
            let row = (output_0 + line).min(n as usize - 1);
            let from = row * steps + block * comptime!(BLOCK / step) + at;
            let words = codes[from];
            let group = from * step / comptime!(form.group);
            let scale = scale_of(scales, group, form);
            let min = min_of(scales, group, form);
            #[unroll]
            for i in 0..step {
                weights[spread(at * step + i, line, TILE)] = code::<W>(words, i, form) * scale + min;
            }
        }
        #[unroll]
        for turn in 0..comptime!((height * 8).div_ceil(units)) {
            let part = unit + turn * units;
            let line = part / 8;
            let at = part % 8;
            if line < height {
                let row = (row_0 + line).min(rows as usize - 1);
                let quad = x[row * quads + block * 8 + at];
                #[unroll]
                for i in 0..4usize {
                    inputs[spread(at * 4 + i, line, height)] = quad.extract(i);
                }
            }
        }
        sync_cube();
        for at in 0..BLOCK {
            #[unroll]
            for j in 0..4usize {
                let w = weights[spread(at, UNIT_POS_X as usize + j * SIDE, TILE)];
                #[unroll]
                for i in 0..per_unit {
                    sums[i * 4 + j] += inputs[spread(at, UNIT_POS_Y as usize + i * SIDE, height)] * w;
                }
            }
        }
        sync_cube();
    }
    #[unroll]
    for i in 0..per_unit {
        #[unroll]
        for j in 0..4usize {
            let row = row_0 + UNIT_POS_Y as usize + i * SIDE;
            let output = output_0 + UNIT_POS_X as usize + j * SIDE;
            if row < rows as usize && output < n as usize {
                y[row * stride as usize + first as usize + output] = sums[i * 4 + j];
            }
        }
    }
}

/// Rows `ids` of a packed table [N, K], as f32 [T, K].
///
/// # Errors
/// An id that the table does not have, or more results than a kernel can index.
pub fn rows(client: &Client, table: &DeviceWeight, ids: &[u32]) -> Result<Values, KernelError> {
    if let Some(id) = ids.iter().find(|id| **id as usize >= table.n) {
        return Err(KernelError::OutOfRange { op: "rows", what: "id", limit: table.n, got: *id as usize });
    }
    check_indices("rows", "results", ids.len().saturating_mul(table.k))?;
    let y = Values::empty(client, ids.len() * table.k);
    let steps = ids.len() * table.k / table.form.step();
    let uploaded = Ids::upload(client, ids);
    // SAFETY: the ids were compared with the table's rows; units beyond the last step write nothing.
    unsafe {
        table_rows::launch_unchecked(
            client,
            grid(steps.div_ceil(64)),
            CubeDim::new_1d(64),
            table.form.words(),
            table.codes.vectors(table.form.words()),
            table.scales.arg(),
            uploaded.arg(),
            y.arg(),
            steps as u32,
            table.k as u32,
            table.form,
        );
    }
    Ok(y)
}

#[cube(launch_unchecked, create_dummy_kernel)]
pub(super) fn table_rows<W: Size>(
    codes: &[Vector<u32, W>],
    scales: &[u32],
    ids: &[u32],
    y: &mut [f32],
    total: u32,
    k: u32,
    #[comptime] form: Form,
) {
    if ABSOLUTE_POS < total as usize {
        let step = comptime!(form.step());
        let steps = k as usize / step;
        let from = ids[ABSOLUTE_POS / steps] as usize * steps + ABSOLUTE_POS % steps;
        let words = codes[from];
        let group = from * step / comptime!(form.group);
        let scale = scale_of(scales, group, form);
        let min = min_of(scales, group, form);
        #[unroll]
        for i in 0..step {
            y[ABSOLUTE_POS * step + i] = code::<W>(words, i, form) * scale + min;
        }
    }
}
