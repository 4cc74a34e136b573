//! The vector vocabulary of the kernels: sixteen lanes, whatever the machine's registers hold.
//!
//! A kernel is written once against [`Simd`] and compiled for every level. Since each operation is exactly rounded
//! and the lane count is fixed, every level gives the same bits; the scalar level is the specification.

/// Evaluates a group of value-only intrinsics within a method of a token.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! simd {
    ($e:expr) => {{
        // SAFETY: `self` is only made by `detect`, which saw the features; no intrinsic here touches memory.
        unsafe { $e }
    }};
}

/// One intrinsic that reads or writes memory, within a method of a token.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! memory {
    ($e:expr) => {{
        // SAFETY: `self` proves the feature; the pointer is derived from an array reference and the access, unaligned,
        // stays within that array.
        unsafe { $e }
    }};
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;

/// Lanes of a vector, at every level.
pub(crate) const LANES: usize = 16;

/// Sixteen floats, aligned for the widest load.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [f32; LANES]);

/// The elements of consecutive lines.
#[inline(always)]
pub(crate) fn flat(lines: &[Line]) -> &[f32] {
    const { assert!(size_of::<Line>() == 4 * LANES) };
    // SAFETY: a line is exactly sixteen floats without padding (asserted above), so `lines` is one run of floats.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * LANES) }
}

/// Operations on sixteen lanes. A value of the implementing type proves that the instructions exist.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32.
    type I: Copy;
    /// Four signed bytes for each of sixteen outputs, prepared for [`Simd::dot4`].
    type W: Copy;
    /// As [`Simd::W`], prepared for [`Simd::dot4_wide`].
    type Wide: Copy;
    /// Four unsigned codes (a byte each, at most 63) for each of sixteen outputs, prepared for [`Simd::dot4_nibbles`].
    type N: Copy;
    /// Running sum of code products; see [`Simd::dot4_nibbles`] for how many it holds.
    type Acc: Copy;

    /// Vectors of sixteen sums that fit the registers beside their operands.
    const TILE: usize;
    /// Whether several rows are faster by [`Simd::dot4_wide`] than by [`Simd::dot4`].
    const WIDE: bool;

    /// Asks for `v` to be brought into the cache, where a level has a hint for it.
    #[inline(always)]
    fn prefetch<T>(self, _v: &T) {}
    fn splat(self, v: f32) -> Self::F;
    fn load(self, v: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, to: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: a NaN in `b` stays.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: a NaN in `b` stays.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// 2^n for an integral `n` in -126..=127.
    fn pow2(self, n: Self::F) -> Self::F;
    /// Lanes of f16 bits, widened.
    fn widen_f16(self, v: &[u16; LANES]) -> Self::F;
    /// Lanes of bf16 bits, widened.
    fn widen_bf16(self, v: &[u16; LANES]) -> Self::F;
    /// Sum in the fixed order 8+8, 4+4, 2+2, 1+1.
    fn sum(self, a: Self::F) -> f32;
    /// Maximum in the same order.
    fn max_lane(self, a: Self::F) -> f32;

    /// Largest bit pattern of `|v|` over the lanes, joined with `so_far`; a NaN wins over every number.
    fn max_abs_bits(self, v: Self::F, so_far: u32) -> u32;
    /// Rounds `v` (within i8) to nearest even and writes the bytes; returns their sum.
    fn store_i8(self, v: Self::F, to: &mut [i8; LANES]) -> i32;

    /// The float value of each lane; exact below 2^24.
    fn to_f32(self, v: Self::I) -> Self::F;
    /// Zero in every lane.
    fn zero(self) -> Self::I;
    /// Where a block's integer sum starts, given the sum of the block's activations: at zero, unless weights are raised.
    #[inline(always)]
    fn dot_start(self, _activation_sum: i32) -> Self::I {
        self.zero()
    }
    /// Prepares four weights per output: byte `4 * output + j`.
    fn weights(self, v: &[u8; 4 * LANES]) -> Self::W;
    /// Adds, for each output, the exact product of its four weights with the four signed activations in `x`.
    fn dot4(self, acc: Self::I, w: Self::W, x: i32) -> Self::I;
    /// As [`Simd::weights`], for use with several rows: more work here, less in [`Simd::dot4_wide`].
    fn weights_wide(self, v: &[u8; 4 * LANES]) -> Self::Wide;
    /// As [`Simd::dot4`] at 256 times the scale, with the activations as pairs of 16 bits: (0, 2) and (1, 3).
    fn dot4_wide(self, acc: Self::I, w: Self::Wide, x: [i32; 2]) -> Self::I;
    /// The low and the high nibbles of the bytes.
    #[inline(always)]
    fn nibbles(self, v: &[u8; 4 * LANES]) -> (Self::N, Self::N) {
        let v = self.bytes(v);
        (self.bits(v, 0, 15), self.bits(v, -4, 15))
    }
    /// An empty sum.
    fn acc_zero(self) -> Self::Acc;
    /// Adds four codes times four signed activations per output. Before [`Simd::acc_total`], at most eight times for
    /// codes below 16, four times below 32, twice below 64: the sum of two products must stay within sixteen bits.
    fn dot4_nibbles(self, acc: Self::Acc, w: Self::N, x: i32) -> Self::Acc;
    /// The sixteen totals.
    fn acc_total(self, acc: Self::Acc) -> Self::I;
    /// Unsigned bytes as they are, for [`Simd::bits`] and [`Simd::dot4_nibbles`].
    fn bytes(self, v: &[u8; 4 * LANES]) -> Self::N;
    /// Each byte shifted left by `shift` (right, when negative), then masked. The mask must drop the bits that a shift
    /// moves in from a neighbouring byte.
    fn bits(self, v: Self::N, shift: i32, mask: u8) -> Self::N;
    /// `a | b`.
    fn join(self, a: Self::N, b: Self::N) -> Self::N;
    /// `table[byte]` for bytes below sixteen.
    fn lookup(self, v: Self::N, table: &[u8; 16]) -> Self::N;
    /// Lanes of signed bytes, widened.
    fn widen_i8(self, v: &[i8; LANES]) -> Self::F;
}

/// e^x in every lane: at most 2 units in the last place off, 0 below -104, infinity above 89, NaN kept.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let p = exp_rest(s, x, n);
    // Two factors, so that results below the normal range and above the largest power of two come out right.
    let half = s.round(s.mul(n, s.splat(0.5)));
    s.mul(s.mul(p, s.pow2(half)), s.pow2(s.sub(n, half)))
}

/// e^x in every lane for an `x` of at most 0: as [`exp`] down to 2^-126, 0 below that; NaN kept.
#[inline(always)]
pub(crate) fn exp_below<S: Simd>(s: S, x: S::F) -> S::F {
    // At the bound n is -127, of which pow2 makes 0.
    let x = s.max(s.splat(-88.0), x);
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    s.mul(exp_rest(s, x, n), s.pow2(n))
}

/// e^x / 2^n for the `n` that is nearest to x / ln 2.
#[inline(always)]
fn exp_rest<S: Simd>(s: S, x: S::F, n: S::F) -> S::F {
    // Cody and Waite: ln 2 in two parts, the first with few enough bits that n * part is exact.
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    // Polynomial of Cephes expf (S. Moshier) on |r| <= ln 2 / 2.
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0))
}

/// tanh in every lane, within 2e-7 of it (absolute); NaN kept.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    // Beyond 10 the result is 1 in f32.
    let x = s.min(s.splat(10.0), s.max(s.splat(-10.0), x));
    let (one, e) = (s.splat(1.0), exp(s, s.add(x, x)));
    s.div(s.sub(e, one), s.add(e, one))
}

/// Sixteen elements of `v` from `i` on; lanes past the end are `fill`.
#[inline(always)]
pub(crate) fn read<S: Simd>(s: S, v: &[f32], i: usize, fill: f32) -> S::F {
    let rest = &v[i..];
    match rest.first_chunk::<LANES>() {
        Some(line) => s.load(line),
        None => {
            let mut line = [fill; LANES];
            line[..rest.len()].copy_from_slice(rest);
            s.load(&line)
        }
    }
}

/// Writes sixteen elements of `v` from `i` on; lanes past the end are dropped.
#[inline(always)]
pub(crate) fn write<S: Simd>(s: S, v: &mut [f32], i: usize, lanes: S::F) {
    let rest = &mut v[i..];
    if let Some(line) = rest.first_chunk_mut::<LANES>() {
        s.store(lanes, line);
    } else {
        let mut line = [0.0; LANES];
        s.store(lanes, &mut line);
        rest.copy_from_slice(&line[..rest.len()]);
    }
}

#[cfg(test)]
mod tests;
