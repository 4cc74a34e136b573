//! Quantised weights: panels of tiles, and the walk of rows over panels that every format shares.

use std::ops::Range;

use super::Output;
use super::activations::ActivationBlock;
use crate::dispatch::Isa;
use crate::dtype::{self, BLOCK, WeightKind, check_blocks};
use crate::error::KernelError;
use crate::parallel::for_rows;
use crate::simd::{LANES, Simd};

/// Tiles between the one in use and the one that is asked for.
const AHEAD: usize = 8;

/// A quantised weight: `tiles[panel * k / (32 * T::BLOCKS) + tile]`.
#[derive(Debug, Clone)]
pub(super) struct PackedBlocks<T> {
    tiles: Vec<T>,
    n: usize,
    k: usize,
}

/// Sixteen outputs by one block of the format. What a tile must do: hold blocks, and multiply.
pub(super) trait Tile: Copy + Send + Sync {
    const KIND: WeightKind;
    const ZERO: Self;
    /// Activation blocks that a tile multiplies.
    const BLOCKS: usize = 1;
    /// Puts a block, given its bytes, into an output that is still zero.
    fn set(&mut self, lane: usize, raw: &[u8]);
    /// The values of an output's weights: 32 for each of `BLOCKS`.
    fn values(&self, lane: usize, out: &mut [f32]);
    /// `acc[r] += tile * x[r]`, where each of `x` has `BLOCKS` blocks.
    fn multiply<S: Simd, const R: usize>(&self, s: S, x: [&[ActivationBlock]; R], acc: &mut [S::F; R]);
    /// Products with panels of such tiles, defined by [`tile_kernel`].
    const KERNEL: TileKernel<Self>;
}

/// Computes rows (of activation blocks) by panels (of so many tiles each). Different tasks must be given different panels.
pub(super) type TileKernel<T> =
    fn(Isa, &[ActivationBlock], usize, &[T], Range<usize>, Range<usize>, &Output<'_>);

/// Defines the kernel of a type of tile.
macro_rules! tile_kernel {
    ($name:ident, $tile:ty) => {
        crate::dispatch::simd_kernel! {
            fn $name(
                s;
                x: &[crate::linear::activations::ActivationBlock],
                per_row: usize,
                tiles: &[$tile],
                rows: std::ops::Range<usize>,
                panels: std::ops::Range<usize>,
                out: &crate::linear::Output<'_>,
            ) {
                crate::linear::blocks::walk(s, x, per_row, tiles, rows, panels, out);
            }
        }
    };
}
pub(super) use tile_kernel;

impl<T: Tile> PackedBlocks<T> {
    /// Quantises and packs `w` [N, K]; the caller has checked its length.
    pub(super) fn quantize(w: &[f32], n: usize, k: usize) -> Result<Self, KernelError> {
        let raw_bytes = n * k / T::KIND.block().0 * T::KIND.block().1;
        let (per_row, _) = check_blocks(T::KIND, raw_bytes, n, k)?;
        let mut packed = Self::empty(n, k, per_row);
        if k > 0 {
            for (o, row) in w.chunks_exact(k).enumerate() {
                let panel = &mut packed.tiles[o / LANES * per_row..][..per_row];
                set_row(panel, o % LANES, &dtype::quantize(T::KIND, row)?);
            }
        }
        Ok(packed)
    }

    /// Repacks blocks as files have them.
    pub(super) fn from_bytes(raw: &[u8], n: usize, k: usize) -> Result<Self, KernelError> {
        let (per_row, block_bytes) = check_blocks(T::KIND, raw.len(), n, k)?;
        let mut packed = Self::empty(n, k, per_row);
        let row_bytes = per_row * block_bytes;
        for_rows(&mut packed.tiles, per_row, LANES * row_bytes, |panels, tiles| {
            for (panel, tiles) in panels.zip(tiles.chunks_exact_mut(per_row)) {
                let rows = raw[panel * LANES * row_bytes..].chunks_exact(row_bytes);
                for (lane, row) in rows.take(LANES).enumerate() {
                    set_row(tiles, lane, row);
                }
            }
        });
        Ok(packed)
    }

    fn empty(n: usize, k: usize, per_row: usize) -> Self {
        Self { tiles: vec![T::ZERO; n.div_ceil(LANES) * per_row], n, k }
    }

    /// Tiles of a panel.
    fn per_row(&self) -> usize {
        self.k / (BLOCK * T::BLOCKS)
    }

    #[expect(clippy::unused_self, reason = "as the dense packing, for one call over all packings")]
    pub(super) fn kind(&self) -> WeightKind {
        T::KIND
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
        let panel = i / LANES * self.per_row();
        for (out, tile) in out.chunks_exact_mut(BLOCK * T::BLOCKS).zip(&self.tiles[panel..]) {
            tile.values(i % LANES, out);
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
        (T::KERNEL)(isa, x, self.per_row(), &self.tiles, rows, panels, out);
    }
}

/// Puts a row of blocks into an output, still zero, of a panel.
fn set_row<T: Tile>(panel: &mut [T], lane: usize, raw: &[u8]) {
    for (tile, raw) in panel.iter_mut().zip(raw.chunks_exact(T::KIND.block().1)) {
        tile.set(lane, raw);
    }
}

/// Panel by panel, with groups of rows inside, so that a panel's bytes are read from memory once.
#[inline(always)]
pub(super) fn walk<S: Simd, T: Tile>(
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
                &ahead[ahead.len().min(AHEAD.div_ceil(T::BLOCKS))..]
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
    let blocks = tiles.len() * T::BLOCKS;
    let x: [&[ActivationBlock]; R] = std::array::from_fn(|r| &x[(row + r) * blocks..][..blocks]);
    let mut acc = [s.splat(0.0); R];
    for (b, tile) in tiles.iter().enumerate() {
        // One row alone is bound by memory; the hardware does it best.
        if R > 1
            && let Some(tile) = wanted.get(b)
        {
            s.prefetch(tile);
        }
        tile.multiply(s, std::array::from_fn(|r| &x[r][b * T::BLOCKS..][..T::BLOCKS]), &mut acc);
    }
    for (r, acc) in acc.into_iter().enumerate() {
        // SAFETY: the panels of this call belong to this task alone.
        unsafe { out.write(s, row + r, panel, acc) };
    }
    R
}
