//! Linear layers: packed weights, and `y = x * W^T` for a handful of rows (decode) or many (prefill).
//!
//! Weights are packed in panels of sixteen outputs, so lanes are outputs and the inner dimension is walked in order:
//! no horizontal sums, one sequential stream of weight bytes, and each output is the same chain of fused multiply-adds
//! whatever the number of rows, the tile it falls in, the thread or the instruction set. For quantised weights the
//! chain runs over blocks of 32, whose integer dot products are exact.

mod activations;
mod backward;
mod blocks;
mod codes;
pub(crate) mod panels;
mod super_tiles;
mod tiles;

use std::ops::Range;

use half::{bf16, f16};

pub(crate) use self::activations::with_left;
use self::activations::{Left, with_made};
pub use self::backward::linear_backward;
use self::blocks::PackedBlocks;
use self::panels::{Bf16Line, F16Line, PackedDense};
use self::super_tiles::{Q2KTile, Q3KTile, Q4KTile, Q5KTile, Q6KTile};
use self::tiles::{Int4Tile, Mxfp4Tile, Q4Tile, Q8Tile, Q41Tile, Q50Tile, Q51Tile};
use crate::activation::{self, Activation};
use crate::dispatch;
use crate::dtype::{WeightKind, check_blocks};
use crate::error::{KernelError, check_len, rows_of};
use crate::norm;
use crate::parallel::{Shared, for_rows, share, task_count};
use crate::pool;
use crate::simd::{LANES, Line, Simd};

/// Bytes of activations in a block of rows: half a small second-level cache.
const ROW_BLOCK_BYTES: usize = 256 << 10;
/// Rows of a block are a multiple of this, which every register tile divides.
const ROW_MULTIPLE: usize = 24;

/// A weight matrix [N, K] (outputs by inputs, PyTorch's order) in the layout that [`linear`] reads.
#[derive(Debug, Clone)]
pub struct PackedWeight(Packed);

/// The packings, by kind.
#[derive(Debug, Clone)]
enum Packed {
    F32(PackedDense<Line>),
    F16(PackedDense<F16Line>),
    Bf16(PackedDense<Bf16Line>),
    Q8_0(PackedBlocks<Q8Tile>),
    Q4_0(PackedBlocks<Q4Tile>),
    Q4_1(PackedBlocks<Q41Tile>),
    Q5_0(PackedBlocks<Q50Tile>),
    Q5_1(PackedBlocks<Q51Tile>),
    Q2K(PackedBlocks<Q2KTile>),
    Q3K(PackedBlocks<Q3KTile>),
    Q4K(PackedBlocks<Q4KTile>),
    Q5K(PackedBlocks<Q5KTile>),
    Q6K(PackedBlocks<Q6KTile>),
    Mxfp4(PackedBlocks<Mxfp4Tile>),
    Int4(PackedBlocks<Int4Tile>),
}

/// Calls `$dense` or `$blocks` with `$w` bound to whichever packing the weight holds.
macro_rules! each_kind {
    ($weight:expr, $w:ident => $body:expr) => {
        each_kind!($weight, $w => $body, $w => $body)
    };
    ($weight:expr, $d:ident => $dense:expr, $w:ident => $blocks:expr) => {
        match &$weight.0 {
            Packed::F32($d) => $dense,
            Packed::F16($d) => $dense,
            Packed::Bf16($d) => $dense,
            Packed::Q8_0($w) => $blocks,
            Packed::Q4_0($w) => $blocks,
            Packed::Q4_1($w) => $blocks,
            Packed::Q5_0($w) => $blocks,
            Packed::Q5_1($w) => $blocks,
            Packed::Q2K($w) => $blocks,
            Packed::Q3K($w) => $blocks,
            Packed::Q4K($w) => $blocks,
            Packed::Q5K($w) => $blocks,
            Packed::Q6K($w) => $blocks,
            Packed::Mxfp4($w) => $blocks,
            Packed::Int4($w) => $blocks,
        }
    };
}

/// Builds the packing of `$kind` by `PackedBlocks::$make(..)`, for the kinds with blocks; else evaluates `$other`.
macro_rules! pack_blocks {
    ($kind:expr, $make:ident($($arg:expr),*), $other:expr) => {
        match $kind {
            WeightKind::Q8_0 => Packed::Q8_0(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q4_0 => Packed::Q4_0(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q4_1 => Packed::Q4_1(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q5_0 => Packed::Q5_0(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q5_1 => Packed::Q5_1(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q2K => Packed::Q2K(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q3K => Packed::Q3K(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q4K => Packed::Q4K(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q5K => Packed::Q5K(PackedBlocks::$make($($arg),*)?),
            WeightKind::Q6K => Packed::Q6K(PackedBlocks::$make($($arg),*)?),
            WeightKind::Mxfp4 => Packed::Mxfp4(PackedBlocks::$make($($arg),*)?),
            WeightKind::Int4 => Packed::Int4(PackedBlocks::$make($($arg),*)?),
            WeightKind::F32 | WeightKind::F16 | WeightKind::Bf16 => $other,
        }
    };
}

impl PackedWeight {
    /// Packs `w` [N, K] row-major, quantising or rounding to `kind`.
    ///
    /// # Errors
    /// When `w` is not n * k long, `kind` has blocks and `k` is no multiple of them, or the kind has no quantiser.
    pub fn pack_f32(kind: WeightKind, w: &[f32], n: usize, k: usize) -> Result<Self, KernelError> {
        check_len("pack", "weight", n * k, w.len())?;
        Ok(Self(pack_blocks!(
            kind,
            quantize(w, n, k),
            match kind {
                WeightKind::F16 => Packed::F16(PackedDense::pack(n, k, |i| f16::from_f32(w[i]))),
                WeightKind::Bf16 => Packed::Bf16(PackedDense::pack(n, k, |i| bf16::from_f32(w[i]))),
                _ => Packed::F32(PackedDense::pack(n, k, |i| w[i])),
            }
        )))
    }

    /// Packs the transpose of `w` [K, N] row-major, in f32.
    ///
    /// # Errors
    /// When `w` is not n * k long.
    pub fn pack_transposed(w: &[f32], n: usize, k: usize) -> Result<Self, KernelError> {
        check_len("pack", "weight", n * k, w.len())?;
        Ok(Self(Packed::F32(PackedDense::pack(n, k, |i| w[i % k * n + i / k]))))
    }

    /// Repacks the stored bytes of a weight [N, K] of `kind`, bit for bit: rows of little-endian floats, or of blocks.
    ///
    /// # Errors
    /// When the bytes are not those of n * k weights, or `k` is no multiple of the kind's blocks.
    pub fn from_bytes(kind: WeightKind, raw: &[u8], n: usize, k: usize) -> Result<Self, KernelError> {
        check_blocks(kind, raw.len(), n, k)?;
        let half = |i: usize| [raw[2 * i], raw[2 * i + 1]];
        let single = |i: usize| [raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]];
        Ok(Self(pack_blocks!(
            kind,
            from_bytes(raw, n, k),
            match kind {
                WeightKind::F16 => Packed::F16(PackedDense::pack(n, k, |i| f16::from_le_bytes(half(i)))),
                WeightKind::Bf16 => Packed::Bf16(PackedDense::pack(n, k, |i| bf16::from_le_bytes(half(i)))),
                _ => Packed::F32(PackedDense::pack(n, k, |i| f32::from_le_bytes(single(i)))),
            }
        )))
    }

    /// How the elements are stored.
    pub fn kind(&self) -> WeightKind {
        each_kind!(self, w => w.kind())
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        each_kind!(self, w => w.n())
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        each_kind!(self, w => w.k())
    }

    /// Bytes of memory held, padding included; what one decode step reads.
    pub fn bytes(&self) -> usize {
        each_kind!(self, w => w.bytes())
    }

    /// Writes row `i` `[K]` as f32: the embedding look-up when the embedding and the head share one weight.
    ///
    /// # Errors
    /// When there is no row `i` or `out` is not K long.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) -> Result<(), KernelError> {
        let op = "dequantize_row";
        if i >= self.n() {
            return Err(KernelError::OutOfRange { op, what: "row", limit: self.n(), got: i });
        }
        check_len(op, "out", self.k(), out.len())?;
        each_kind!(self, w => w.row(i, out));
        Ok(())
    }

    /// Writes the rows from `first` on as f32, in parallel: as many as `out` has room for. They must exist.
    pub(crate) fn widen(&self, first: usize, out: &mut [f32]) {
        let k = self.k();
        for_rows(out, k, k, |mine, out| {
            for (row, out) in mine.zip(out.chunks_exact_mut(k)) {
                each_kind!(self, w => w.row(first + row, out));
            }
        });
    }

    /// Whether the product quantises its activations to eight bits.
    pub(crate) fn wants_quantized(&self) -> bool {
        !matches!(self.0, Packed::F32(_) | Packed::F16(_) | Packed::Bf16(_))
    }
}

/// `y [T, N] = x [T, K] * W^T`. T is `x.len() / K`.
///
/// # Errors
/// When the lengths do not fit together.
pub fn linear(x: &[f32], w: &PackedWeight, y: &mut [f32]) -> Result<(), KernelError> {
    linear_multi(x, std::slice::from_ref(w), y)
}

/// Several products of the same rows, side by side: in `y` [T, sum of all N] the columns of a weight are `x [T, K] * W^T`.
/// One activation quantisation and one fork-join for all of them. Bit-equal to separate calls of [`linear`].
///
/// # Errors
/// When the lengths do not fit together, the weights differ in K, or there is none.
pub fn linear_multi(x: &[f32], ws: &[PackedWeight], y: &mut [f32]) -> Result<(), KernelError> {
    let (rows, k) = shape(x.len(), ws, y.len())?;
    with_left(dispatch::current(), x, k, any_quantized(ws), |left| run(left, rows, k, side_by_side(ws, y)));
    Ok(())
}

/// [`linear_multi`] of the RMS norm of the rows ([`norm::rms_norm`]), which is left in `normed` [T, K]. A row is quantised right
/// after it was normed, while it is in the cache. Bit-equal to both calls.
///
/// # Errors
/// When the lengths do not fit together, the weights differ in K, or there is none.
pub fn norm_linear(
    x: &[f32],
    norm: &[f32],
    eps: f32,
    normed: &mut [f32],
    ws: &[PackedWeight],
    y: &mut [f32],
) -> Result<(), KernelError> {
    let (rows, k) = shape(x.len(), ws, y.len())?;
    check_len("norm_linear", "norm", k, norm.len())?;
    check_len("norm_linear", "normed", x.len(), normed.len())?;
    let isa = dispatch::current();
    let make = |row: usize, to: &mut [f32]| norm::forward(isa, &x[row * k..(row + 1) * k], norm, eps, to);
    with_made(isa, normed, k, k * 8, any_quantized(ws), make, |left| {
        run(left, rows, k, side_by_side(ws, y));
    });
    Ok(())
}

/// [`linear_multi`] of the gated activation of the rows of `gate_up` [T, 2K] ([`activation::gated_mul`]), which is left in
/// `inner` [T, K]. A row is quantised right after it was made, while it is in the cache. Bit-equal to both calls.
///
/// # Errors
/// When the lengths do not fit together, the weights differ in K, or there is none.
pub fn gated_linear(
    activation: Activation,
    gate_up: &[f32],
    inner: &mut [f32],
    ws: &[PackedWeight],
    y: &mut [f32],
) -> Result<(), KernelError> {
    let (rows, k) = shape(inner.len(), ws, y.len())?;
    check_len("gated_linear", "gate_up", 2 * inner.len(), gate_up.len())?;
    let isa = dispatch::current();
    let make = |row: usize, to: &mut [f32]| {
        activation::forward(isa, activation, &gate_up[row * 2 * k..(row + 1) * 2 * k], k, to);
    };
    with_made(isa, inner, k, k * 20, any_quantized(ws), make, |left| {
        run(left, rows, k, side_by_side(ws, y));
    });
    Ok(())
}

/// Only the outputs in `rows`: `y [T, rows.len()] = x [T, K] * W[rows]^T`. Bit-equal to those columns of [`linear`].
///
/// # Errors
/// When the lengths do not fit together or `rows` leaves 0..N.
pub fn linear_rows(
    x: &[f32],
    w: &PackedWeight,
    rows: Range<usize>,
    y: &mut [f32],
) -> Result<(), KernelError> {
    if rows.end > w.n() || rows.start > rows.end {
        return Err(KernelError::OutOfRange {
            op: "linear",
            what: "end of rows",
            limit: w.n() + 1,
            got: rows.end,
        });
    }
    let (k, stride) = (w.k(), rows.len());
    let n_rows = rows_of("linear", "x", x.len(), k)?;
    check_len("linear", "y", n_rows * stride, y.len())?;
    let product = Product { weight: w, out: Output::new(y, stride, 0, rows) };
    with_left(dispatch::current(), x, k, w.wants_quantized(), |left| {
        run(left, n_rows, k, std::iter::once(product));
    });
    Ok(())
}

/// T and K of the products of `x_len` elements with `ws`, after a look at all lengths.
fn shape(x_len: usize, ws: &[PackedWeight], y_len: usize) -> Result<(usize, usize), KernelError> {
    let op = "linear";
    let k = ws.first().map_or(0, PackedWeight::k);
    let rows = rows_of(op, "x", x_len, k)?;
    for w in ws {
        check_len(op, "a row of a weight", k, w.k())?;
    }
    check_len(op, "y", rows * ws.iter().map(PackedWeight::n).sum::<usize>(), y_len)?;
    Ok((rows, k))
}

fn any_quantized(ws: &[PackedWeight]) -> bool {
    ws.iter().any(PackedWeight::wants_quantized)
}

/// One weight, the outputs wanted of it, and where they go.
#[derive(Clone)]
struct Product<'a> {
    weight: &'a PackedWeight,
    out: Output<'a>,
}

/// All outputs of `ws`, those of each row one after the other in `y`.
fn side_by_side<'a>(
    ws: &'a [PackedWeight],
    y: &'a mut [f32],
) -> impl Iterator<Item = Product<'a>> + Clone + Sync {
    let stride: usize = ws.iter().map(PackedWeight::n).sum();
    let y = Shared::new(y);
    ws.iter().scan(0usize, move |next, weight| {
        let (first_column, columns) = (*next, 0..weight.n());
        *next += weight.n();
        Some(Product { weight, out: Output { y, stride, first_row: 0, first_column, columns } })
    })
}

/// Destination of a product, written panel by panel from several threads.
#[derive(Clone)]
pub(crate) struct Output<'a> {
    y: Shared<'a, f32>,
    /// Elements from one row of `y` to the next.
    stride: usize,
    /// The row of the left operand that row 0 of `y` belongs to.
    first_row: usize,
    /// The column of `y` that `columns.start` goes to.
    first_column: usize,
    /// Outputs of the weight that are wanted.
    columns: Range<usize>,
}

impl Product<'_> {
    fn panels(&self) -> Range<usize> {
        self.out.columns.start / LANES..self.out.columns.end.div_ceil(LANES)
    }
}

impl<'a> Output<'a> {
    pub(crate) fn new(y: &'a mut [f32], stride: usize, first_row: usize, columns: Range<usize>) -> Self {
        Self { y: Shared::new(y), stride, first_row, first_column: 0, columns }
    }

    /// The part of `y` that holds the outputs of `panel` for one row, and the lanes they come from.
    ///
    /// # Safety
    /// No two threads may ask for the same row and panel of the same output at the same time.
    #[expect(
        clippy::mut_from_ref,
        reason = "several threads write disjoint parts of one output; see the contract"
    )]
    #[inline(always)]
    pub(crate) unsafe fn segment(&self, row: usize, panel: usize) -> (&mut [f32], Range<usize>) {
        let first = panel * LANES;
        let from = self.columns.start.max(first);
        let to = self.columns.end.min(first + LANES);
        let start = (row - self.first_row) * self.stride + self.first_column + (from - self.columns.start);
        // SAFETY: the segment belongs to this panel and row, which by contract nobody else holds.
        let segment = unsafe { self.y.slice(start..start + (to - from)) };
        (segment, from - first..to - first)
    }

    /// Writes the sixteen outputs of `panel` for one row, as far as they are wanted.
    ///
    /// # Safety
    /// As for [`Output::segment`].
    #[inline(always)]
    pub(crate) unsafe fn write<S: Simd>(&self, s: S, row: usize, panel: usize, value: S::F) {
        // SAFETY: the caller's promise is the one required.
        let (segment, lanes) = unsafe { self.segment(row, panel) };
        if let Ok(line) = <&mut [f32; LANES]>::try_from(&mut *segment) {
            s.store(value, line);
        } else {
            let mut line = [0.0; LANES];
            s.store(value, &mut line);
            segment.copy_from_slice(&line[lanes]);
        }
    }

    /// Reads what [`Output::write`] would write; lanes that are not wanted are zero.
    ///
    /// # Safety
    /// As for [`Output::segment`].
    #[inline(always)]
    pub(crate) unsafe fn read<S: Simd>(&self, s: S, row: usize, panel: usize) -> S::F {
        // SAFETY: the caller's promise is the one required.
        let (segment, lanes) = unsafe { self.segment(row, panel) };
        if let Ok(line) = <&[f32; LANES]>::try_from(&*segment) {
            return s.load(line);
        }
        let mut line = [0.0; LANES];
        line[lanes].copy_from_slice(segment);
        s.load(&line)
    }
}

/// Computes all products of `rows` rows of `k` elements, panels shared out.
fn run<'a>(
    left: Left<'_>,
    rows: usize,
    k: usize,
    products: impl Iterator<Item = Product<'a>> + Clone + Sync,
) {
    let total: usize = products.clone().map(|product| product.panels().len()).sum();
    let tasks = task_count(total, rows * k * LANES);
    pool::run(tasks, move |task| {
        let mine = share(total, tasks, task);
        let mut before = 0;
        for product in products.clone() {
            let panels = product.panels();
            let from = mine.start.clamp(before, before + panels.len()) - before;
            let to = mine.end.clamp(before, before + panels.len()) - before;
            before += panels.len();
            let panels = panels.start + from..panels.start + to;
            product.weight.multiply(left, 0..rows, panels, &product.out);
        }
    });
}

impl PackedWeight {
    /// Computes the outputs of `panels` for `rows`. Different tasks must be given different panels of one output.
    pub(crate) fn multiply(
        &self,
        left: Left<'_>,
        rows: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    ) {
        if panels.is_empty() {
            return;
        }
        for rows in row_blocks(rows, self.k()) {
            each_kind!(
                self,
                w => w.multiply(left.isa, left.x, rows, panels.clone(), out),
                w => w.multiply(left.isa, left.blocks, rows, panels.clone(), out)
            )
        }
    }
}

/// Splits the rows so that a block's activations stay in the second-level cache while the weights stream past.
pub(crate) fn row_blocks(rows: Range<usize>, k: usize) -> impl Iterator<Item = Range<usize>> {
    let size = (ROW_BLOCK_BYTES / (4 * k.max(1)) / ROW_MULTIPLE).max(1) * ROW_MULTIPLE;
    rows.clone().step_by(size).map(move |from| from..(from + size).min(rows.end))
}

#[cfg(test)]
pub(crate) mod tests;
