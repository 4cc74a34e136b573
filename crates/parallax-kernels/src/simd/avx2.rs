//! AVX2 with FMA and F16C: sixteen lanes are two registers.
//!
//! The byte products use `vpmaddubsw` on |w| and x carrying w's sign. Two such products are at most
//! 2 * 128 * 127 = 32512, so the saturating 16-bit sum never saturates and the result is exact. With several rows the
//! weights are spread to 16 bits once (times 256, which costs no extra instruction) and `vpmaddwd` does the rest.

#[cfg_attr(
    not(test),
    expect(clippy::wildcard_imports, reason = "dozens of intrinsics, all with the prefix _mm")
)]
use std::arch::x86_64::*;

use super::{LANES, Simd};

/// Proof that AVX2, FMA and F16C exist here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, where the machine has the features.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }
}

/// Applies an intrinsic to both halves.
macro_rules! halves {
    ($f:ident($($a:expr),*)) => { simd!([$f($($a[0]),*), $f($($a[1]),*)]) };
}

/// Evaluates an expression for each half of a vector. `array::map` would leave calls in the inner loops: what it calls
/// is compiled without the features.
macro_rules! each {
    ($v:ident => $e:expr) => {
        [
            {
                let $v = $v[0];
                $e
            },
            {
                let $v = $v[1];
                $e
            },
        ]
    };
}

impl Avx2 {
    #[inline(always)]
    fn load_u16(self, v: &[u16; LANES]) -> [__m128i; 2] {
        let p: *const __m128i = v.as_ptr().cast();
        memory!([_mm_loadu_si128(p), _mm_loadu_si128(p.add(1))])
    }
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    /// The weights, and their absolute values as unsigned bytes.
    type W = ([__m256i; 2], [__m256i; 2]);
    /// Sixteen-bit lanes of 256 times the even bytes, and of 256 times the odd bytes.
    type Wide = ([__m256i; 2], [__m256i; 2]);
    type N = [__m256i; 2];
    /// Sixteen-bit pair sums: eight additions of at most 2 * 15 * 127 stay below 32767.
    type Acc = [__m256i; 2];

    const TILE: usize = 6;
    const WIDE: bool = true;

    #[inline(always)]
    fn prefetch<T>(self, v: &T) {
        let p: *const i8 = std::ptr::from_ref(v).cast();
        for line in (0..size_of::<T>()).step_by(64) {
            // A prefetch reads nothing that the program can see, and `line` lies within `v`.
            memory!(_mm_prefetch::<_MM_HINT_T0>(p.add(line)));
        }
    }
    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        simd!([_mm256_set1_ps(v); 2])
    }
    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        let p = v.as_ptr();
        memory!([_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))])
    }
    #[inline(always)]
    fn store(self, v: Self::F, to: &mut [f32; LANES]) {
        let p = to.as_mut_ptr();
        memory!({
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        });
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        halves!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        const MODE: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        simd!([_mm256_round_ps::<MODE>(a[0]), _mm256_round_ps::<MODE>(a[1])])
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        simd!(each!(n => {
            let biased = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }))
    }
    #[inline(always)]
    fn widen_f16(self, v: &[u16; LANES]) -> Self::F {
        let v = self.load_u16(v);
        halves!(_mm256_cvtph_ps(v))
    }
    #[inline(always)]
    fn widen_bf16(self, v: &[u16; LANES]) -> Self::F {
        let v = self.load_u16(v);
        simd!(each!(v => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v)))))
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        simd!({
            let a8 = _mm256_add_ps(a[0], a[1]);
            let a4 = _mm_add_ps(_mm256_castps256_ps128(a8), _mm256_extractf128_ps::<1>(a8));
            let a2 = _mm_add_ps(a4, _mm_movehl_ps(a4, a4));
            _mm_cvtss_f32(_mm_add_ss(a2, _mm_movehdup_ps(a2)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        simd!({
            let a8 = _mm256_max_ps(a[0], a[1]);
            let a4 = _mm_max_ps(_mm256_castps256_ps128(a8), _mm256_extractf128_ps::<1>(a8));
            let a2 = _mm_max_ps(a4, _mm_movehl_ps(a4, a4));
            _mm_cvtss_f32(_mm_max_ss(a2, _mm_movehdup_ps(a2)))
        })
    }
    #[inline(always)]
    fn max_abs_bits(self, v: Self::F, so_far: u32) -> u32 {
        simd!({
            let mask = _mm256_set1_epi32(0x7fff_ffff);
            let bits = each!(v => _mm256_and_si256(_mm256_castps_si256(v), mask));
            let m8 = _mm256_max_epu32(bits[0], bits[1]);
            let m4 = _mm_max_epu32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256::<1>(m8));
            let m2 = _mm_max_epu32(m4, _mm_shuffle_epi32::<0b1110>(m4));
            let m1 = _mm_max_epu32(m2, _mm_shuffle_epi32::<0b01>(m2));
            _mm_cvtsi128_si32(m1).cast_unsigned().max(so_far)
        })
    }
    #[inline(always)]
    fn store_i8(self, v: Self::F, to: &mut [i8; LANES]) -> i32 {
        let q = simd!({
            let q = each!(v => _mm256_cvtps_epi32(v));
            // Packing works within 128-bit halves; the permutation restores the order.
            let q16 = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(q[0], q[1]));
            _mm_packs_epi16(_mm256_castsi256_si128(q16), _mm256_extracti128_si256::<1>(q16))
        });
        memory!(_mm_storeu_si128(to.as_mut_ptr().cast(), q));
        simd!({
            let pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), q);
            let quads = _mm_madd_epi16(pairs, _mm_set1_epi16(1));
            let two = _mm_add_epi32(quads, _mm_shuffle_epi32::<0b1110>(quads));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b01>(two)))
        })
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        halves!(_mm256_cvtepi32_ps(v))
    }
    #[inline(always)]
    fn zero(self) -> Self::I {
        simd!([_mm256_setzero_si256(); 2])
    }
    #[inline(always)]
    fn weights(self, v: &[u8; 4 * LANES]) -> Self::W {
        let w = self.bytes(v);
        (w, halves!(_mm256_abs_epi8(w)))
    }
    #[inline(always)]
    fn dot4(self, acc: Self::I, w: Self::W, x: i32) -> Self::I {
        let (w, magnitude) = w;
        simd!({
            let x = _mm256_set1_epi32(x);
            let ones = _mm256_set1_epi16(1);
            let signed = [_mm256_sign_epi8(x, w[0]), _mm256_sign_epi8(x, w[1])];
            let pairs = [
                _mm256_maddubs_epi16(magnitude[0], signed[0]),
                _mm256_maddubs_epi16(magnitude[1], signed[1]),
            ];
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(pairs[0], ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(pairs[1], ones)),
            ]
        })
    }
    #[inline(always)]
    fn weights_wide(self, v: &[u8; 4 * LANES]) -> Self::Wide {
        let v = self.bytes(v);
        simd!({
            let high = _mm256_set1_epi16(i16::MIN >> 7);
            (each!(v => _mm256_slli_epi16::<8>(v)), each!(v => _mm256_and_si256(v, high)))
        })
    }
    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, w: Self::Wide, x: [i32; 2]) -> Self::I {
        let (even, odd) = w;
        simd!({
            let x = [_mm256_set1_epi32(x[0]), _mm256_set1_epi32(x[1])];
            let acc = [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(even[0], x[0])),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(even[1], x[0])),
            ];
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(odd[0], x[1])),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(odd[1], x[1])),
            ]
        })
    }
    #[inline(always)]
    fn acc_zero(self) -> Self::Acc {
        simd!([_mm256_setzero_si256(); 2])
    }
    #[inline(always)]
    fn dot4_nibbles(self, acc: Self::Acc, w: Self::N, x: i32) -> Self::Acc {
        simd!({
            let x = _mm256_set1_epi32(x);
            [
                _mm256_add_epi16(acc[0], _mm256_maddubs_epi16(w[0], x)),
                _mm256_add_epi16(acc[1], _mm256_maddubs_epi16(w[1], x)),
            ]
        })
    }
    #[inline(always)]
    fn acc_total(self, acc: Self::Acc) -> Self::I {
        simd!(each!(acc => _mm256_madd_epi16(acc, _mm256_set1_epi16(1))))
    }
    #[inline(always)]
    fn bytes(self, v: &[u8; 4 * LANES]) -> Self::N {
        let p: *const __m256i = v.as_ptr().cast();
        memory!([_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1))])
    }
    #[inline(always)]
    fn bits(self, v: Self::N, shift: i32, mask: u8) -> Self::N {
        simd!({
            let mask = _mm256_set1_epi8(mask.cast_signed());
            let count = _mm_cvtsi32_si128(shift.abs());
            if shift >= 0 {
                each!(v => _mm256_and_si256(_mm256_sll_epi16(v, count), mask))
            } else {
                each!(v => _mm256_and_si256(_mm256_srl_epi16(v, count), mask))
            }
        })
    }
    #[inline(always)]
    fn join(self, a: Self::N, b: Self::N) -> Self::N {
        halves!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn lookup(self, v: Self::N, table: &[u8; 16]) -> Self::N {
        let table = memory!(_mm_loadu_si128(table.as_ptr().cast()));
        simd!({
            let table = _mm256_broadcastsi128_si256(table);
            each!(v => _mm256_shuffle_epi8(table, v))
        })
    }
    #[inline(always)]
    fn widen_i8(self, v: &[i8; LANES]) -> Self::F {
        let v = memory!(_mm_loadu_si128(v.as_ptr().cast()));
        simd!([
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(v, v))),
        ])
    }
}
