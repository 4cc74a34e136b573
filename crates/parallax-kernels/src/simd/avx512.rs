//! AVX-512 with VNNI: sixteen lanes are one register.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes, so the weights are stored offset by 128 (their sign bit flipped) and
//! the sum starts at -128 times the sum of the activations: the total is the same exact integer as everywhere else.

#[cfg_attr(
    not(test),
    expect(clippy::wildcard_imports, reason = "dozens of intrinsics, all with the prefix _mm")
)]
use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::{LANES, Simd};

/// Proof that AVX-512 F, BW, DQ, VL and VNNI exist here, and the AVX2 level.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512(Avx2);

impl Avx512 {
    /// The token, where the machine has the features.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        Avx2::detect().filter(|_| all).map(Self)
    }
}

impl Avx512 {
    #[inline(always)]
    fn load_u16(self, v: &[u16; LANES]) -> __m256i {
        memory!(_mm256_loadu_si256(v.as_ptr().cast()))
    }

    /// The lower and the upper eight lanes.
    #[inline(always)]
    fn halves(self, a: __m512) -> [__m256; 2] {
        simd!([_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a)])
    }
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type W = __m512i;
    type Wide = (__m512i, __m512i);
    type N = __m512i;
    type Acc = __m512i;

    const TILE: usize = 24;
    const WIDE: bool = false;

    #[inline(always)]
    fn prefetch<T>(self, v: &T) {
        self.0.prefetch(v);
    }
    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        simd!(_mm512_set1_ps(v))
    }
    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        memory!(_mm512_loadu_ps(v.as_ptr()))
    }
    #[inline(always)]
    fn store(self, v: Self::F, to: &mut [f32; LANES]) {
        memory!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        simd!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        simd!(_mm512_roundscale_ps::<MODE>(a))
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        simd!({
            let biased = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn widen_f16(self, v: &[u16; LANES]) -> Self::F {
        let v = self.load_u16(v);
        simd!(_mm512_cvtph_ps(v))
    }
    #[inline(always)]
    fn widen_bf16(self, v: &[u16; LANES]) -> Self::F {
        let v = self.load_u16(v);
        simd!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v))))
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        self.0.sum(self.halves(a))
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        self.0.max_lane(self.halves(a))
    }
    #[inline(always)]
    fn max_abs_bits(self, v: Self::F, so_far: u32) -> u32 {
        simd!({
            let bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff_ffff));
            _mm512_reduce_max_epu32(bits).max(so_far)
        })
    }
    #[inline(always)]
    fn store_i8(self, v: Self::F, to: &mut [i8; LANES]) -> i32 {
        let q = simd!(_mm512_cvtps_epi32(v));
        let bytes = simd!(_mm512_cvtsepi32_epi8(q));
        memory!(_mm_storeu_si128(to.as_mut_ptr().cast(), bytes));
        simd!(_mm512_reduce_add_epi32(q))
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        simd!(_mm512_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn zero(self) -> Self::I {
        simd!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn dot_start(self, activation_sum: i32) -> Self::I {
        simd!(_mm512_set1_epi32(-128 * activation_sum))
    }
    #[inline(always)]
    fn weights(self, v: &[u8; 4 * LANES]) -> Self::W {
        let v = self.bytes(v);
        simd!(_mm512_xor_si512(v, _mm512_set1_epi8(i8::MIN)))
    }
    #[inline(always)]
    fn dot4(self, acc: Self::I, w: Self::W, x: i32) -> Self::I {
        simd!(_mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)))
    }
    #[inline(always)]
    fn weights_wide(self, v: &[u8; 4 * LANES]) -> Self::Wide {
        let v = self.bytes(v);
        simd!((_mm512_slli_epi16::<8>(v), _mm512_and_si512(v, _mm512_set1_epi16(i16::MIN >> 7))))
    }
    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, w: Self::Wide, x: [i32; 2]) -> Self::I {
        simd!({
            let acc = _mm512_add_epi32(acc, _mm512_madd_epi16(w.0, _mm512_set1_epi32(x[0])));
            _mm512_add_epi32(acc, _mm512_madd_epi16(w.1, _mm512_set1_epi32(x[1])))
        })
    }
    #[inline(always)]
    fn acc_zero(self) -> Self::Acc {
        simd!(_mm512_setzero_si512())
    }
    #[inline(always)]
    fn dot4_nibbles(self, acc: Self::Acc, w: Self::N, x: i32) -> Self::Acc {
        simd!(_mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)))
    }
    #[inline(always)]
    fn acc_total(self, acc: Self::Acc) -> Self::I {
        acc
    }
    #[inline(always)]
    fn bytes(self, v: &[u8; 4 * LANES]) -> Self::N {
        memory!(_mm512_loadu_si512(v.as_ptr().cast()))
    }
    #[inline(always)]
    fn bits(self, v: Self::N, shift: i32, mask: u8) -> Self::N {
        simd!({
            let mask = _mm512_set1_epi8(mask.cast_signed());
            let count = _mm_cvtsi32_si128(shift.abs());
            if shift >= 0 {
                _mm512_and_si512(_mm512_sll_epi16(v, count), mask)
            } else {
                _mm512_and_si512(_mm512_srl_epi16(v, count), mask)
            }
        })
    }
    #[inline(always)]
    fn join(self, a: Self::N, b: Self::N) -> Self::N {
        simd!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn lookup(self, v: Self::N, table: &[u8; 16]) -> Self::N {
        let table = memory!(_mm_loadu_si128(table.as_ptr().cast()));
        simd!(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), v))
    }
    #[inline(always)]
    fn widen_i8(self, v: &[i8; LANES]) -> Self::F {
        let v = memory!(_mm_loadu_si128(v.as_ptr().cast()));
        simd!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)))
    }
}
