//! Quantised weights in tiles of sixteen outputs by 32 inputs: scales first, then the integers, one stream per panel.
//!
//! For one block and one output the product is `integer dot * (weight scale * activation scale)`, where the integer is
//! exact; the blocks of a row are added in order by fused multiply-adds.

use std::marker::PhantomData;

use super::activations::ActivationBlock;
use super::blocks::{Tile, TileKernel, tile_kernel};
use super::codes::{Codes, Five, Floats, GROUPS, Nibbles, group, rolled};
use crate::dtype::{BLOCK, Block, MXFP4_OFFSET, WeightKind, read_block};
use crate::simd::{LANES, Simd};

/// Sixteen outputs by 32 inputs. Byte `4 * output + j` of group `g` is input `4 * g + j`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Q8Tile {
    scales: [u16; LANES],
    groups: [[u8; 4 * LANES]; GROUPS],
}

/// Codes with a scale per output.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Scaled<C> {
    scales: [u16; LANES],
    codes: C,
}

/// Codes with a scale and an `E` per output: a [`Minimum`] or a [`ZeroPoint`].
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Shifted<C, E> {
    scales: [u16; LANES],
    extras: [u16; LANES],
    codes: C,
    extra: PhantomData<E>,
}

/// What is added to scale * code: an f16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Minimum;

/// What is taken from a code: an integer.
#[derive(Debug, Clone, Copy)]
pub(super) struct ZeroPoint;

/// Nibbles around 8.
pub(super) type Q4Tile = Scaled<Nibbles>;
/// Nibbles above a minimum.
pub(super) type Q41Tile = Shifted<Nibbles, Minimum>;
/// Five bits around 16.
pub(super) type Q50Tile = Scaled<Five>;
/// Five bits above a minimum.
pub(super) type Q51Tile = Shifted<Five, Minimum>;
/// Four-bit floats; the scales are bf16.
pub(super) type Mxfp4Tile = Scaled<Floats>;

/// Nibbles around a zero point.
pub(super) type Int4Tile = Shifted<Nibbles, ZeroPoint>;

const _: () = assert!(size_of::<Q8Tile>() == 16 * 34);
const _: () = assert!(size_of::<Q4Tile>() == 16 * 18);
const _: () = assert!(size_of::<Q41Tile>() == 16 * 20);
const _: () = assert!(size_of::<Q50Tile>() == 16 * 22);
const _: () = assert!(size_of::<Q51Tile>() == 16 * 24);
const _: () = assert!(size_of::<Mxfp4Tile>() == 16 * 18);

impl<C: Codes> Scaled<C> {
    const ZERO: Self = Self { scales: [0; LANES], codes: C::ZERO };

    fn put(&mut self, lane: usize, block: &Block) {
        self.scales[lane] = block.scale;
        put_codes(&mut self.codes, lane, block);
    }

    fn block(&self, lane: usize) -> Block {
        Block { scale: self.scales[lane], extra: 0, q: codes_of(&self.codes, lane) }
    }

    /// `acc[r] += scale * (codes - offset) * x[r]`.
    #[inline(always)]
    fn add_centred<S: Simd, const R: usize>(
        &self,
        s: S,
        scale: S::F,
        offset: i32,
        x: [&ActivationBlock; R],
        acc: &mut [S::F; R],
    ) {
        let dot = self.codes.dot_block(s, x);
        let offset = s.splat(-(offset as f32));
        for r in 0..R {
            // Integers below 2^24: exact.
            let centred = s.fma(offset, s.splat(x[r].float_sum), dot[r]);
            acc[r] = s.fma(centred, s.mul(scale, s.splat(x[r].scale)), acc[r]);
        }
    }
}

impl<C: Codes, E> Shifted<C, E> {
    const ZERO: Self = Self { scales: [0; LANES], extras: [0; LANES], codes: C::ZERO, extra: PhantomData };

    fn put(&mut self, lane: usize, block: &Block) {
        self.scales[lane] = block.scale;
        self.extras[lane] = block.extra;
        put_codes(&mut self.codes, lane, block);
    }

    fn block(&self, lane: usize) -> Block {
        Block { scale: self.scales[lane], extra: self.extras[lane], q: codes_of(&self.codes, lane) }
    }
}

impl<C: Codes> Shifted<C, Minimum> {
    /// `acc[r] += (scale * codes + min) * x[r]`.
    #[inline(always)]
    fn add_above<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R], acc: &mut [S::F; R]) {
        let dot = self.codes.dot_block(s, x);
        let (scale, min) = (s.widen_f16(&self.scales), s.widen_f16(&self.extras));
        for r in 0..R {
            acc[r] = s.fma(dot[r], s.mul(scale, s.splat(x[r].scale)), acc[r]);
            acc[r] = s.fma(min, s.splat(x[r].scaled_sum), acc[r]);
        }
    }
}

impl<C: Codes> Shifted<C, ZeroPoint> {
    /// `acc[r] += scale * (codes - zero) * x[r]`.
    #[inline(always)]
    fn add_around<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R], acc: &mut [S::F; R]) {
        let dot = self.codes.dot_block(s, x);
        let scale = s.widen_f16(&self.scales);
        let zero = s.load(&self.extras.map(f32::from));
        for r in 0..R {
            // Products and differences of small integers: exact.
            let centred = s.sub(dot[r], s.mul(zero, s.splat(x[r].float_sum)));
            acc[r] = s.fma(centred, s.mul(scale, s.splat(x[r].scale)), acc[r]);
        }
    }
}

fn put_codes<C: Codes>(codes: &mut C, lane: usize, block: &Block) {
    for (i, q) in block.q.iter().enumerate() {
        codes.set(lane, i, q.cast_unsigned());
    }
}

fn codes_of<C: Codes>(codes: &C, lane: usize) -> [i8; BLOCK] {
    std::array::from_fn(|i| codes.get(lane, i).cast_signed())
}

fn write_values(kind: WeightKind, block: &Block, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = block.value(kind, i);
    }
}

impl Tile for Q8Tile {
    const KIND: WeightKind = WeightKind::Q8_0;
    const ZERO: Self = Self { scales: [0; LANES], groups: [[0; 4 * LANES]; GROUPS] };
    const KERNEL: TileKernel<Self> = blocks_q8;

    fn set(&mut self, lane: usize, raw: &[u8]) {
        let block = read_block(Self::KIND, raw);
        self.scales[lane] = block.scale;
        for (i, q) in block.q.iter().enumerate() {
            self.groups[i / 4][4 * lane + i % 4] = q.cast_unsigned();
        }
    }

    fn values(&self, lane: usize, out: &mut [f32]) {
        let q = std::array::from_fn(|i| self.groups[i / 4][4 * lane + i % 4].cast_signed());
        write_values(Self::KIND, &Block { scale: self.scales[lane], extra: 0, q }, out);
    }

    #[inline(always)]
    fn multiply<S: Simd, const R: usize>(&self, s: S, x: [&[ActivationBlock]; R], acc: &mut [S::F; R]) {
        let x = x.map(|x| &x[0]);
        let scale = s.widen_f16(&self.scales);
        if S::WIDE && R > 1 {
            let mut dot = [s.zero(); R];
            let [first, rest @ ..] = &self.groups;
            let w = s.weights_wide(first);
            for r in 0..R {
                dot[r] = s.dot4_wide(dot[r], w, [x[r].pairs[0][0], x[r].pairs[1][0]]);
            }
            for (g, bytes) in rolled(rest).iter().enumerate() {
                let w = s.weights_wide(bytes);
                let at = (g + 1) % GROUPS;
                for r in 0..R {
                    dot[r] = s.dot4_wide(dot[r], w, [x[r].pairs[0][at], x[r].pairs[1][at]]);
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
}

/// Implements a tile of codes: its kind, and what one tile (`|tile, token, activations, sums|`) adds to the sums.
macro_rules! code_tile {
    ($tile:ty, $kind:ident, $kernel:ident, |$tile_:ident, $s:ident, $x:ident, $acc:ident| $product:expr) => {
        impl Tile for $tile {
            const KIND: WeightKind = WeightKind::$kind;
            const ZERO: Self = Self::ZERO;
            const KERNEL: TileKernel<Self> = $kernel;

            fn set(&mut self, lane: usize, raw: &[u8]) {
                self.put(lane, &read_block(Self::KIND, raw));
            }

            fn values(&self, lane: usize, out: &mut [f32]) {
                write_values(Self::KIND, &self.block(lane), out);
            }

            #[inline(always)]
            fn multiply<S: Simd, const R: usize>(
                &self,
                $s: S,
                x: [&[ActivationBlock]; R],
                $acc: &mut [S::F; R],
            ) {
                let ($tile_, $x) = (self, x.map(|x| &x[0]));
                $product
            }
        }

        tile_kernel! { $kernel, $tile }
    };
}

code_tile! { Q4Tile, Q4_0, blocks_q4, |t, s, x, acc| t.add_centred(s, s.widen_f16(&t.scales), 8, x, acc) }
code_tile! { Q50Tile, Q5_0, blocks_q50, |t, s, x, acc| t.add_centred(s, s.widen_f16(&t.scales), 16, x, acc) }
code_tile! {
    Mxfp4Tile, Mxfp4, blocks_mxfp4,
    |t, s, x, acc| t.add_centred(s, s.widen_bf16(&t.scales), MXFP4_OFFSET, x, acc)
}
code_tile! { Q41Tile, Q4_1, blocks_q41, |t, s, x, acc| t.add_above(s, x, acc) }
code_tile! { Q51Tile, Q5_1, blocks_q51, |t, s, x, acc| t.add_above(s, x, acc) }
code_tile! { Int4Tile, Int4, blocks_int4, |t, s, x, acc| t.add_around(s, x, acc) }

tile_kernel! { blocks_q8, Q8Tile }
