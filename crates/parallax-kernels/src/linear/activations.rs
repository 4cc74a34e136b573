//! Activations quantised to eight bits, per row and block of 32: the left operand of every quantised product.
//!
//! A block with a NaN or an infinity gets the scale NaN, so that it poisons the row's outputs instead of vanishing.

use std::cell::RefCell;

use crate::dispatch::{Isa, simd_kernel};
use crate::dtype::BLOCK;
use crate::parallel::{Shared, for_ranges, for_rows};
use crate::simd::{LANES, Simd};

/// Thirty-two activations: `scale * q`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ActivationBlock {
    /// Integers in -127..=127.
    pub q: [i8; BLOCK],
    /// Sum of `q`.
    pub sum: i32,
    /// The same as a float, which is exact; kept so that it is one broadcast load.
    pub float_sum: f32,
    /// Sums of the first and the last sixteen of `q`, for formats whose scales change there.
    pub halves: [f32; 2],
    /// Largest magnitude / 127.
    pub scale: f32,
    /// `float_sum * scale`.
    pub scaled_sum: f32,
    /// `q` as 16-bit pairs for [`Simd::dot4_wide`], the even pairs and the odd ones apart, so that each is one broadcast
    /// load; filled when there are several rows and the level wants it.
    pub pairs: [[i32; BLOCK / 4]; 2],
}

impl ActivationBlock {
    const EMPTY: Self = Self {
        q: [0; BLOCK],
        sum: 0,
        float_sum: 0.0,
        halves: [0.0; 2],
        scale: 0.0,
        scaled_sum: 0.0,
        pairs: [[0; BLOCK / 4]; 2],
    };

    #[inline(always)]
    fn fill_pairs(&mut self) {
        let pair = |a: i8, b: i8| i32::from(a) & 0xffff | i32::from(b) << 16;
        let [even, odd] = &mut self.pairs;
        for ((even, odd), q) in even.iter_mut().zip(odd).zip(self.q.as_chunks::<4>().0) {
            *even = pair(q[0], q[2]);
            *odd = pair(q[1], q[3]);
        }
    }
}

/// A block without any magnitude above this counts as zero, which keeps every product of scales a normal number.
const SMALLEST: f32 = 1e-25;

thread_local! {
    static SCRATCH: RefCell<Vec<ActivationBlock>> = const { RefCell::new(Vec::new()) };
}

/// The left operand of a product: plain, and quantised where a weight wants it so.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub isa: Isa,
    pub x: &'a [f32],
    pub blocks: &'a [ActivationBlock],
}

/// Prepares `x` [T, K] for products, with its quantised form if `quantized`.
pub(crate) fn with_left<R>(
    isa: Isa,
    x: &[f32],
    k: usize,
    quantized: bool,
    f: impl FnOnce(Left<'_>) -> R,
) -> R {
    with_blocks(if quantized { x.len() / BLOCK } else { 0 }, |blocks| {
        let several = x.len() > k;
        for_rows(blocks, k / BLOCK, k * 4, |rows, chunk| {
            quantize(isa, &x[rows.start * k..rows.end * k], several, chunk)
        });
        f(Left { isa, x, blocks })
    })
}

/// The same of rows that `make` writes into `x` [T, K], given their number: each is quantised right after it was made. Both
/// are `work` operations.
pub(crate) fn with_made<R>(
    isa: Isa,
    x: &mut [f32],
    k: usize,
    work: usize,
    quantized: bool,
    make: impl Fn(usize, &mut [f32]) + Sync,
    f: impl FnOnce(Left<'_>) -> R,
) -> R {
    with_blocks(if quantized { x.len() / BLOCK } else { 0 }, |blocks| {
        let rows = x.len() / k;
        let (several, per_row) = (rows > 1, blocks.len() / rows.max(1));
        let (all, all_blocks) = (Shared::new(&mut *x), Shared::new(&mut *blocks));
        for_ranges(rows, work, |mine| {
            for row in mine {
                // SAFETY: a row, and with it its blocks, belongs to one task.
                let (x, blocks) = unsafe {
                    (all.slice(row * k..(row + 1) * k), all_blocks.slice(row * per_row..(row + 1) * per_row))
                };
                make(row, &mut *x);
                quantize(isa, x, several, blocks);
            }
        });
        f(Left { isa, x, blocks })
    })
}

/// Calls `f` with `n` blocks that hold anything.
fn with_blocks<R>(n: usize, f: impl FnOnce(&mut [ActivationBlock]) -> R) -> R {
    if n == 0 {
        return f(&mut []);
    }
    // Taken out, not borrowed: a nested product on this thread then simply allocates its own.
    let mut blocks = SCRATCH.with(|s| std::mem::take(&mut *s.borrow_mut()));
    if blocks.len() < n {
        blocks.resize(n, ActivationBlock::EMPTY);
    }
    let result = f(&mut blocks[..n]);
    SCRATCH.with(|s| *s.borrow_mut() = blocks);
    result
}

/// Whether the level uses the pairs.
#[inline(always)]
fn is_wide<S: Simd>(_: S) -> bool {
    S::WIDE
}

simd_kernel! {
    /// Quantises whole blocks of `x`.
    pub(crate) fn quantize(s; x: &[f32], several: bool, blocks: &mut [ActivationBlock]) {
        for (x, block) in x.as_chunks::<BLOCK>().0.iter().zip(blocks) {
            let (halves, _) = x.as_chunks::<LANES>();
            let v = [s.load(&halves[0]), s.load(&halves[1])];
            let largest = f32::from_bits(s.max_abs_bits(v[1], s.max_abs_bits(v[0], 0)));
            if !largest.is_finite() {
                *block = ActivationBlock { scale: f32::NAN, scaled_sum: f32::NAN, ..ActivationBlock::EMPTY };
                continue;
            }
            let inverse = if largest > SMALLEST { 127.0 / largest } else { 0.0 };
            let (q, _) = block.q.as_chunks_mut::<LANES>();
            block.sum = 0;
            for ((v, q), half) in v.into_iter().zip(q).zip(&mut block.halves) {
                let sum = s.store_i8(s.mul(v, s.splat(inverse)), q);
                *half = sum as f32;
                block.sum += sum;
            }
            block.float_sum = block.sum as f32;
            block.scale = largest / 127.0;
            block.scaled_sum = block.float_sum * block.scale;
            if several && is_wide(s) {
                block.fill_pairs();
            }
        }
    }
}
