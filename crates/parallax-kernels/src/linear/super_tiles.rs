//! The k-quants in tiles of sixteen outputs by 256 inputs.
//!
//! Scales and minima are small integers, so they multiply the integer dot products exactly; what is rounded is one
//! fused multiply-add per block of 32 with the f16 scales, and one more with the minima.

use super::activations::ActivationBlock;
use super::blocks::{Tile, TileKernel, tile_kernel};
use super::codes::{Codes, Five, Nibbles, Six, Three, Two, dot};
use crate::dtype::{BLOCK, SUPER, SuperBlock, WeightKind, read_super_block};
use crate::simd::{LANES, Simd};

/// Activation blocks of a tile.
const BLOCKS: usize = SUPER / BLOCK;

/// Codes with `SCALES` integer scales (8 or 16) and `MINS` minima (as many, or none) per output.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct SuperTile<C, const SCALES: usize, const MINS: usize> {
    d: [u16; LANES],
    dmin: [u16; LANES],
    scales: [[i8; LANES]; SCALES],
    mins: [[i8; LANES]; MINS],
    codes: [C; BLOCKS],
}

pub(super) type Q2KTile = SuperTile<Two, 16, 16>;
pub(super) type Q3KTile = SuperTile<Three, 16, 0>;
pub(super) type Q4KTile = SuperTile<Nibbles, 8, 8>;
pub(super) type Q5KTile = SuperTile<Five, 8, 8>;
pub(super) type Q6KTile = SuperTile<Six, 16, 0>;

impl<C: Codes, const SCALES: usize, const MINS: usize> SuperTile<C, SCALES, MINS> {
    const ZERO: Self = Self {
        d: [0; LANES],
        dmin: [0; LANES],
        scales: [[0; LANES]; SCALES],
        mins: [[0; LANES]; MINS],
        codes: [C::ZERO; BLOCKS],
    };

    fn put(&mut self, lane: usize, block: &SuperBlock) {
        self.d[lane] = block.d;
        self.dmin[lane] = block.dmin;
        for (i, scales) in self.scales.iter_mut().enumerate() {
            scales[lane] = block.scales[i * (16 / SCALES)];
        }
        for (i, mins) in self.mins.iter_mut().enumerate() {
            mins[lane] = block.mins[i * (16 / MINS)];
        }
        for (i, q) in block.q.iter().enumerate() {
            self.codes[i / BLOCK].set(lane, i % BLOCK, *q);
        }
    }

    fn block(&self, lane: usize, offset: i32) -> SuperBlock {
        SuperBlock {
            d: self.d[lane],
            dmin: self.dmin[lane],
            scales: std::array::from_fn(|i| self.scales[i * SCALES / 16][lane]),
            mins: std::array::from_fn(|i| if MINS == 0 { 0 } else { self.mins[i * MINS / 16][lane] }),
            q: std::array::from_fn(|i| self.codes[i / BLOCK].get(lane, i % BLOCK)),
            offset,
        }
    }

    /// The exact sum over the scales of block `b`: scale * (codes - offset) * activations.
    #[inline(always)]
    fn scaled<S: Simd, const R: usize>(
        &self,
        s: S,
        b: usize,
        offset: i32,
        x: [&ActivationBlock; R],
    ) -> [S::F; R] {
        if SCALES == 8 {
            let scale = s.widen_i8(&self.scales[b]);
            let mut total = self.codes[b].dot_block(s, x);
            for total in &mut total {
                *total = s.mul(scale, *total);
            }
            return total;
        }
        let mut total = [s.splat(0.0); R];
        for half in 0..2 {
            let scale = s.widen_i8(&self.scales[2 * b + half]);
            let dots = dot::<S, C, 4, R>(s, &self.codes[b], x, 4 * half);
            for r in 0..R {
                let centred = s.fma(s.splat(-(offset as f32)), s.splat(x[r].halves[half]), dots[r]);
                // At most 2 * 128 * 16 * 32 * 127 in magnitude, below 2^24: exact.
                total[r] = s.fma(scale, centred, total[r]);
            }
        }
        total
    }

    /// The exact sum over the minima of block `b`: minimum * activations.
    #[inline(always)]
    fn lowered<S: Simd, const R: usize>(&self, s: S, b: usize, x: [&ActivationBlock; R]) -> [S::F; R] {
        let mut total = [s.splat(0.0); R];
        if MINS == 8 {
            let min = s.widen_i8(&self.mins[b]);
            for r in 0..R {
                total[r] = s.mul(min, s.splat(x[r].float_sum));
            }
        } else {
            let mins = [s.widen_i8(&self.mins[2 * b]), s.widen_i8(&self.mins[2 * b + 1])];
            for r in 0..R {
                let [first, last] = x[r].halves;
                total[r] = s.fma(mins[1], s.splat(last), s.mul(mins[0], s.splat(first)));
            }
        }
        total
    }

    #[inline(always)]
    fn add<S: Simd, const R: usize>(
        &self,
        s: S,
        offset: i32,
        x: [&[ActivationBlock]; R],
        acc: &mut [S::F; R],
    ) {
        let d = s.widen_f16(&self.d);
        let negative = s.sub(s.splat(0.0), s.widen_f16(&self.dmin));
        for b in 0..BLOCKS {
            let mut block = [&x[0][0]; R];
            for r in 0..R {
                block[r] = &x[r][b];
            }
            let total = self.scaled(s, b, offset, block);
            for r in 0..R {
                acc[r] = s.fma(total[r], s.mul(d, s.splat(block[r].scale)), acc[r]);
            }
            if MINS > 0 {
                let total = self.lowered(s, b, block);
                for r in 0..R {
                    acc[r] = s.fma(total[r], s.mul(negative, s.splat(block[r].scale)), acc[r]);
                }
            }
        }
    }
}

/// Implements a k-quant's tile: kind, and what its codes are raised by.
macro_rules! super_tile {
    ($tile:ty, $kind:ident, $offset:expr, $kernel:ident) => {
        impl Tile for $tile {
            const KIND: WeightKind = WeightKind::$kind;
            const ZERO: Self = Self::ZERO;
            const BLOCKS: usize = BLOCKS;
            const KERNEL: TileKernel<Self> = $kernel;

            fn set(&mut self, lane: usize, raw: &[u8]) {
                self.put(lane, &read_super_block(Self::KIND, raw));
            }

            fn values(&self, lane: usize, out: &mut [f32]) {
                let block = self.block(lane, $offset);
                for (i, out) in out.iter_mut().enumerate() {
                    *out = block.value(i);
                }
            }

            #[inline(always)]
            fn multiply<S: Simd, const R: usize>(
                &self,
                s: S,
                x: [&[ActivationBlock]; R],
                acc: &mut [S::F; R],
            ) {
                self.add(s, $offset, x, acc);
            }
        }

        tile_kernel! { $kernel, $tile }
    };
}

super_tile! { Q2KTile, Q2K, 0, blocks_q2k }
super_tile! { Q3KTile, Q3K, 4, blocks_q3k }
super_tile! { Q4KTile, Q4K, 0, blocks_q4k }
super_tile! { Q5KTile, Q5K, 0, blocks_q5k }
super_tile! { Q6KTile, Q6K, 32, blocks_q6k }
