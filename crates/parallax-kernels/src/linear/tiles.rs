//! Quantised weights in tiles of sixteen outputs by 32 inputs: scales first, then the integers, one stream per panel.
//!
//! For one block and one output the product is `integer dot * (weight scale * activation scale)`, where the integer is
//! exact; the blocks of a row are added in order by fused multiply-adds.

use std::ops::Range;

use super::Output;
use super::activations::ActivationBlock;
use crate::dispatch::{Isa, simd_kernel};
use crate::dtype::{BLOCK, Block, WeightKind, blocks_per_row, check_blocks, quantize_block, read_block};
use crate::error::KernelError;
use crate::simd::{LANES, Simd};

/// Tiles between the one in use and the one that is asked for.
const AHEAD: usize = 8;

/// Groups of four inputs in a block.
const GROUPS: usize = BLOCK / 4;

/// A quantised weight: `tiles[panel * k / 32 + block]`.
#[derive(Debug, Clone)]
pub(super) struct PackedBlocks<T> {
    tiles: Vec<T>,
    n: usize,
    k: usize,
}

/// Sixteen outputs by 32 inputs. Byte `4 * output + j` of group `g` is input `4 * g + j`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Q8Tile {
    scales: [u16; LANES],
    groups: [[u8; 4 * LANES]; GROUPS],
}

/// As [`Q8Tile`] with two inputs per byte: the low nibble is input `4 * g + j`, the high one sixteen further.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Q4Tile {
    scales: [u16; LANES],
    groups: [[u8; 4 * LANES]; GROUPS / 2],
}

/// As [`Q4Tile`], with a minimum per output.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Q41Tile {
    scales: [u16; LANES],
    mins: [u16; LANES],
    groups: [[u8; 4 * LANES]; GROUPS / 2],
}

const _: () = assert!(size_of::<Q8Tile>() == 16 * 34);
const _: () = assert!(size_of::<Q4Tile>() == 16 * 18);
const _: () = assert!(size_of::<Q41Tile>() == 16 * 20);

/// What a tile must do: hold blocks, and multiply.
pub(super) trait Tile: Copy {
    const KIND: WeightKind;
    const ZERO: Self;
    fn set(&mut self, lane: usize, block: &Block);
    fn get(&self, lane: usize) -> Block;
    /// `acc[r] += tile * x[r]` for one block.
    fn multiply<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R], acc: &mut [S::F; R]);
    fn kernel(
        isa: Isa,
        x: &[ActivationBlock],
        per_row: usize,
        tiles: &[Self],
        rows: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    );
}

/// The four activations of group `g`, as one word.
#[inline(always)]
fn group(x: &ActivationBlock, g: usize) -> i32 {
    let [a, b, c, d] = x.q.as_chunks::<4>().0[g];
    i32::from_ne_bytes([a.cast_unsigned(), b.cast_unsigned(), c.cast_unsigned(), d.cast_unsigned()])
}

fn set_nibbles(groups: &mut [[u8; 4 * LANES]; GROUPS / 2], lane: usize, q: &[i8; BLOCK]) {
    for i in 0..BLOCK / 2 {
        groups[i / 4][4 * lane + i % 4] =
            (q[i].cast_unsigned() & 15) | (q[i + BLOCK / 2].cast_unsigned() << 4);
    }
}

fn get_nibbles(groups: &[[u8; 4 * LANES]; GROUPS / 2], lane: usize) -> [i8; BLOCK] {
    std::array::from_fn(|i| {
        let byte = groups[i % 16 / 4][4 * lane + i % 4];
        (if i < 16 { byte & 15 } else { byte >> 4 }).cast_signed()
    })
}

/// The exact dot products of a tile of nibbles with each row's block.
#[inline(always)]
fn dot_nibbles<S: Simd, const R: usize>(
    s: S,
    groups: &[[u8; 4 * LANES]; GROUPS / 2],
    x: [&ActivationBlock; R],
) -> [S::F; R] {
    let mut dot = [s.acc_zero(); R];
    for (g, bytes) in groups.iter().enumerate() {
        let (low, high) = s.nibbles(bytes);
        for r in 0..R {
            dot[r] = s.dot4_nibbles(dot[r], low, group(x[r], g));
            dot[r] = s.dot4_nibbles(dot[r], high, group(x[r], g + GROUPS / 2));
        }
    }
    let mut total = [s.splat(0.0); R];
    for r in 0..R {
        total[r] = s.to_f32(s.acc_total(dot[r]));
    }
    total
}

impl Tile for Q8Tile {
    const KIND: WeightKind = WeightKind::Q8_0;
    const ZERO: Self = Self { scales: [0; LANES], groups: [[0; 4 * LANES]; GROUPS] };

    fn set(&mut self, lane: usize, block: &Block) {
        self.scales[lane] = block.scale;
        for (i, q) in block.q.iter().enumerate() {
            self.groups[i / 4][4 * lane + i % 4] = q.cast_unsigned();
        }
    }

    fn get(&self, lane: usize) -> Block {
        let q = std::array::from_fn(|i| self.groups[i / 4][4 * lane + i % 4].cast_signed());
        Block { scale: self.scales[lane], min: 0, q }
    }

    #[inline(always)]
    fn multiply<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R], acc: &mut [S::F; R]) {
        let scale = s.widen_f16(&self.scales);
        if S::WIDE && R > 1 {
            let mut dot = [s.zero(); R];
            for (g, bytes) in self.groups.iter().enumerate() {
                let w = s.weights_wide(bytes);
                for r in 0..R {
                    dot[r] = s.dot4_wide(dot[r], w, [x[r].pairs[0][g], x[r].pairs[1][g]]);
                }
            }
            // The sums are 256 times too large. That is a power of two, and the scales are far from the subnormals, so
            // taking it out of the scale changes no bit.
            let scale = s.mul(scale, s.splat(1.0 / 256.0));
            for r in 0..R {
                acc[r] = s.fma(s.to_f32(dot[r]), s.mul(scale, s.splat(x[r].scale)), acc[r]);
            }
            return;
        }
        let mut dot = [s.zero(); R];
        for r in 0..R {
            dot[r] = s.dot_start(x[r].sum);
        }
        for (g, bytes) in self.groups.iter().enumerate() {
            let w = s.weights(bytes);
            for r in 0..R {
                dot[r] = s.dot4(dot[r], w, group(x[r], g));
            }
        }
        for r in 0..R {
            acc[r] = s.fma(s.to_f32(dot[r]), s.mul(scale, s.splat(x[r].scale)), acc[r]);
        }
    }

    fn kernel(
        isa: Isa,
        x: &[ActivationBlock],
        per_row: usize,
        tiles: &[Self],
        rows: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    ) {
        blocks_q8(isa, x, per_row, tiles, rows, panels, out);
    }
}

impl Tile for Q4Tile {
    const KIND: WeightKind = WeightKind::Q4_0;
    const ZERO: Self = Self { scales: [0; LANES], groups: [[0; 4 * LANES]; GROUPS / 2] };

    fn set(&mut self, lane: usize, block: &Block) {
        self.scales[lane] = block.scale;
        set_nibbles(&mut self.groups, lane, &block.q);
    }

    fn get(&self, lane: usize) -> Block {
        Block { scale: self.scales[lane], min: 0, q: get_nibbles(&self.groups, lane) }
    }

    #[inline(always)]
    fn multiply<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R], acc: &mut [S::F; R]) {
        let dot = dot_nibbles(s, &self.groups, x);
        let scale = s.widen_f16(&self.scales);
        for r in 0..R {
            // Nibbles are offset by eight; both terms are integers below 2^24, so the difference is exact.
            let centred = s.sub(dot[r], s.splat((8 * x[r].sum) as f32));
            acc[r] = s.fma(centred, s.mul(scale, s.splat(x[r].scale)), acc[r]);
        }
    }

    fn kernel(
        isa: Isa,
        x: &[ActivationBlock],
        per_row: usize,
        tiles: &[Self],
        rows: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    ) {
        blocks_q4(isa, x, per_row, tiles, rows, panels, out);
    }
}

impl Tile for Q41Tile {
    const KIND: WeightKind = WeightKind::Q4_1;
    const ZERO: Self = Self { scales: [0; LANES], mins: [0; LANES], groups: [[0; 4 * LANES]; GROUPS / 2] };

    fn set(&mut self, lane: usize, block: &Block) {
        self.scales[lane] = block.scale;
        self.mins[lane] = block.min;
        set_nibbles(&mut self.groups, lane, &block.q);
    }

    fn get(&self, lane: usize) -> Block {
        Block { scale: self.scales[lane], min: self.mins[lane], q: get_nibbles(&self.groups, lane) }
    }

    #[inline(always)]
    fn multiply<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R], acc: &mut [S::F; R]) {
        let dot = dot_nibbles(s, &self.groups, x);
        let (scale, min) = (s.widen_f16(&self.scales), s.widen_f16(&self.mins));
        for r in 0..R {
            acc[r] = s.fma(dot[r], s.mul(scale, s.splat(x[r].scale)), acc[r]);
            acc[r] = s.fma(min, s.splat(x[r].sum as f32 * x[r].scale), acc[r]);
        }
    }

    fn kernel(
        isa: Isa,
        x: &[ActivationBlock],
        per_row: usize,
        tiles: &[Self],
        rows: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    ) {
        blocks_q41(isa, x, per_row, tiles, rows, panels, out);
    }
}

impl<T: Tile> PackedBlocks<T> {
    /// Quantises and packs `w` [N, K]; the caller has checked its length.
    pub(super) fn quantize(w: &[f32], n: usize, k: usize) -> Result<Self, KernelError> {
        let per_row = blocks_per_row(k)?;
        let blocks = w.as_chunks::<BLOCK>().0;
        Ok(Self::from_blocks(n, k, |o, b| quantize_block(T::KIND, &blocks[o * per_row + b])))
    }

    /// Repacks GGML blocks.
    pub(super) fn from_ggml(raw: &[u8], n: usize, k: usize) -> Result<Self, KernelError> {
        let (per_row, block_bytes) = check_blocks(T::KIND, raw.len(), n, k)?;
        Ok(Self::from_blocks(n, k, |o, b| {
            let start = (o * per_row + b) * block_bytes;
            read_block(T::KIND, &raw[start..start + block_bytes])
        }))
    }

    fn from_blocks(n: usize, k: usize, block: impl Fn(usize, usize) -> Block) -> Self {
        let per_row = k / BLOCK;
        let mut tiles = vec![T::ZERO; n.div_ceil(LANES) * per_row];
        for o in 0..n {
            let panel = o / LANES * per_row;
            for (b, tile) in tiles[panel..panel + per_row].iter_mut().enumerate() {
                tile.set(o % LANES, &block(o, b));
            }
        }
        Self { tiles, n, k }
    }

    pub(super) fn n(&self) -> usize {
        self.n
    }

    pub(super) fn k(&self) -> usize {
        self.k
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.tiles.as_slice())
    }

    pub(super) fn row(&self, i: usize, out: &mut [f32]) {
        let per_row = self.k / BLOCK;
        let panel = i / LANES * per_row;
        for (v, tile) in out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(&self.tiles[panel..panel + per_row]) {
            let block = tile.get(i % LANES);
            *v = std::array::from_fn(|j| block.value(T::KIND, j));
        }
    }

    /// Computes the outputs of `panels` for `rows` of `x`. Different tasks must be given different panels.
    pub(super) fn multiply(
        &self,
        isa: Isa,
        x: &[ActivationBlock],
        rows: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    ) {
        T::kernel(isa, x, self.k / BLOCK, &self.tiles, rows, panels, out);
    }
}

simd_kernel! {
    fn blocks_q8(s; x: &[ActivationBlock], per_row: usize, tiles: &[Q8Tile], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        walk(s, x, per_row, tiles, rows, panels, out);
    }
}

simd_kernel! {
    fn blocks_q4(s; x: &[ActivationBlock], per_row: usize, tiles: &[Q4Tile], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        walk(s, x, per_row, tiles, rows, panels, out);
    }
}

simd_kernel! {
    fn blocks_q41(s; x: &[ActivationBlock], per_row: usize, tiles: &[Q41Tile], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        walk(s, x, per_row, tiles, rows, panels, out);
    }
}

/// Panel by panel, with groups of rows inside, so that a panel's bytes are read from memory once.
#[inline(always)]
fn walk<S: Simd, T: Tile>(
    s: S,
    x: &[ActivationBlock],
    per_row: usize,
    tiles: &[T],
    rows: Range<usize>,
    panels: Range<usize>,
    out: &Output<'_>,
) {
    for panel in panels {
        let ahead = &tiles[panel * per_row..];
        let (this, rest) = ahead.split_at(per_row);
        // The hardware fetches too little ahead while the arithmetic keeps it busy. A single group of rows asks for the
        // tiles that it will need soon. With several groups the memory would idle while the later ones run from the
        // cache, so each asks for its share of the next panel.
        let next = &rest[..per_row.min(rest.len())];
        let mut row = rows.start;
        while row < rows.end {
            let left = rows.end - row;
            let group = if S::TILE >= 24 && left >= 8 { 8 } else { left.min(4) };
            let done = row - rows.start;
            let wanted = if group == rows.len() {
                &ahead[ahead.len().min(AHEAD)..]
            } else {
                &next[next.len() * done / rows.len()..next.len() * (done + group) / rows.len()]
            };
            row += if group == 8 {
                rows_by_panel::<S, T, 8>(s, x, this, wanted, row, panel, out)
            } else if left >= 4 {
                rows_by_panel::<S, T, 4>(s, x, this, wanted, row, panel, out)
            } else if left >= 3 {
                rows_by_panel::<S, T, 3>(s, x, this, wanted, row, panel, out)
            } else if left >= 2 {
                rows_by_panel::<S, T, 2>(s, x, this, wanted, row, panel, out)
            } else {
                rows_by_panel::<S, T, 1>(s, x, this, wanted, row, panel, out)
            };
        }
    }
}

/// `R` rows against one panel, while `wanted` is fetched; returns `R`.
#[inline(always)]
fn rows_by_panel<S: Simd, T: Tile, const R: usize>(
    s: S,
    x: &[ActivationBlock],
    tiles: &[T],
    wanted: &[T],
    row: usize,
    panel: usize,
    out: &Output<'_>,
) -> usize {
    let per_row = tiles.len();
    let x: [&[ActivationBlock]; R] = std::array::from_fn(|r| &x[(row + r) * per_row..][..per_row]);
    let mut acc = [s.splat(0.0); R];
    for (b, tile) in tiles.iter().enumerate() {
        // One row alone is bound by memory; the hardware does it best.
        if R > 1
            && let Some(tile) = wanted.get(b)
        {
            s.prefetch(tile);
        }
        tile.multiply(s, std::array::from_fn(|r| &x[r][b]), &mut acc);
    }
    for (r, acc) in acc.into_iter().enumerate() {
        // SAFETY: the panels of this call belong to this task alone.
        unsafe { out.write(s, row + r, panel, acc) };
    }
    R
}
