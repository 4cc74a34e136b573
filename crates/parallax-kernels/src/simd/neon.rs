//! NEON, with the dot product instructions where the processor has them: sixteen lanes are four registers.
//!
//! With them, four weights by four activations of four outputs are one `sdot`. Without, products of weights are added in
//! pairs, at most 2 * 128 * 127 = 32512, before they are widened; and codes are loaded with each output's four bytes in
//! four registers, so that a multiply-add of sixteen-bit lanes does the rest. Both sums are exact.
//!
//! There is no hint for the cache: nobody has measured one yet.

#[cfg_attr(
    not(test),
    expect(clippy::wildcard_imports, reason = "dozens of intrinsics, all with the prefix v")
)]
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::{LANES, Simd};

/// Proof that NEON exists here and, if `DOT`, the dot product instructions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon<const DOT: bool>(());

impl<const DOT: bool> Neon<DOT> {
    /// The token, where the machine has the features.
    pub(crate) fn detect() -> Option<Self> {
        let dot = !DOT || is_aarch64_feature_detected!("dotprod");
        (is_aarch64_feature_detected!("neon") && dot).then_some(Self(()))
    }
}

/// Evaluates an expression for each quarter `i` of a vector, without closures, as for AVX2.
macro_rules! quarters {
    ($i:ident => $e:expr) => {
        [
            {
                let $i = 0;
                $e
            },
            {
                let $i = 1;
                $e
            },
            {
                let $i = 2;
                $e
            },
            {
                let $i = 3;
                $e
            },
        ]
    };
}

/// Adds, for each of four outputs, the product of four bytes of `w` with four of `x`. The intrinsic for the instruction
/// is not stable yet.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the function's features include the instruction, which touches nothing but its three registers.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {w:v}.16b, {x:v}.16b",
            acc = inout(vreg) acc,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    acc
}

impl<const DOT: bool> Neon<DOT> {
    #[inline(always)]
    fn load_u16(self, v: &[u16; LANES]) -> [uint16x8_t; 2] {
        let p = v.as_ptr();
        memory!([vld1q_u16(p), vld1q_u16(p.add(8))])
    }
}

impl<const DOT: bool> Simd for Neon<DOT> {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type W = [int8x16_t; 4];
    type Wide = [int8x16_t; 4];
    /// If `DOT`, four outputs each; otherwise byte `j` of all outputs in register `j`.
    type N = [uint8x16_t; 4];
    /// If `DOT`, the totals. Otherwise sums of sixteen bits for outputs 0 to 7 and 8 to 15 of the bytes 0 and 1, then the
    /// same of the bytes 2 and 3: eight additions of at most 2 * 15 * 127 stay below 32767.
    type Acc = [int32x4_t; 4];

    const TILE: usize = 6;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        simd!([vdupq_n_f32(v); 4])
    }
    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        let p = v.as_ptr();
        memory!([vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))])
    }
    #[inline(always)]
    fn store(self, v: Self::F, to: &mut [f32; LANES]) {
        let p = to.as_mut_ptr();
        memory!({
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
            vst1q_f32(p.add(8), v[2]);
            vst1q_f32(p.add(12), v[3]);
        });
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(quarters!(i => vaddq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(quarters!(i => vsubq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(quarters!(i => vmulq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(quarters!(i => vdivq_f32(a[i], b[i])))
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        simd!(quarters!(i => vfmaq_f32(c[i], a[i], b[i])))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // The instruction for maxima treats NaN and zeros of both signs in another way.
        simd!(quarters!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        simd!(quarters!(i => vbslq_f32(vcltq_f32(a[i], b[i]), a[i], b[i])))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        simd!(quarters!(i => vrndnq_f32(a[i])))
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        simd!(quarters!(i => {
            let biased = vaddq_s32(vcvtq_s32_f32(n[i]), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
        }))
    }
    #[inline(always)]
    fn widen_f16(self, v: &[u16; LANES]) -> Self::F {
        let [low, high] = self.load_u16(v);
        simd!({
            let (low, high) = (vreinterpretq_f16_u16(low), vreinterpretq_f16_u16(high));
            [
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ]
        })
    }
    #[inline(always)]
    fn widen_bf16(self, v: &[u16; LANES]) -> Self::F {
        let [low, high] = self.load_u16(v);
        simd!([
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
            vreinterpretq_f32_u32(vshll_high_n_u16::<16>(low)),
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
            vreinterpretq_f32_u32(vshll_high_n_u16::<16>(high)),
        ])
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        simd!({
            let a4 = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            vpadds_f32(vadd_f32(vget_low_f32(a4), vget_high_f32(a4)))
        })
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        simd!({
            let low = vbslq_f32(vcgtq_f32(a[0], a[2]), a[0], a[2]);
            let high = vbslq_f32(vcgtq_f32(a[1], a[3]), a[1], a[3]);
            let a4 = vbslq_f32(vcgtq_f32(low, high), low, high);
            let (low, high) = (vget_low_f32(a4), vget_high_f32(a4));
            let a2 = vbsl_f32(vcgt_f32(low, high), low, high);
            let (first, last) = (vget_lane_f32::<0>(a2), vget_lane_f32::<1>(a2));
            if first > last { first } else { last }
        })
    }
    #[inline(always)]
    fn max_abs_bits(self, v: Self::F, so_far: u32) -> u32 {
        simd!({
            let bits = quarters!(i => vreinterpretq_u32_f32(vabsq_f32(v[i])));
            let m4 = vmaxq_u32(vmaxq_u32(bits[0], bits[1]), vmaxq_u32(bits[2], bits[3]));
            vmaxvq_u32(m4).max(so_far)
        })
    }
    #[inline(always)]
    fn store_i8(self, v: Self::F, to: &mut [i8; LANES]) -> i32 {
        let q = simd!({
            let q = quarters!(i => vcvtnq_s32_f32(v[i]));
            let low = vqmovn_high_s32(vqmovn_s32(q[0]), q[1]);
            let high = vqmovn_high_s32(vqmovn_s32(q[2]), q[3]);
            vqmovn_high_s16(vqmovn_s16(low), high)
        });
        memory!(vst1q_s8(to.as_mut_ptr(), q));
        i32::from(simd!(vaddlvq_s8(q)))
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        simd!(quarters!(i => vcvtq_f32_s32(v[i])))
    }
    #[inline(always)]
    fn zero(self) -> Self::I {
        simd!([vdupq_n_s32(0); 4])
    }
    #[inline(always)]
    fn weights(self, v: &[u8; 4 * LANES]) -> Self::W {
        let p: *const i8 = v.as_ptr().cast();
        memory!([vld1q_s8(p), vld1q_s8(p.add(16)), vld1q_s8(p.add(32)), vld1q_s8(p.add(48))])
    }
    #[inline(always)]
    fn dot4(self, acc: Self::I, w: Self::W, x: i32) -> Self::I {
        let x = simd!(vreinterpretq_s8_s32(vdupq_n_s32(x)));
        if DOT {
            return simd!(quarters!(i => sdot(acc[i], w[i], x)));
        }
        simd!(quarters!(i => {
            let low = vmull_s8(vget_low_s8(w[i]), vget_low_s8(x));
            vpadalq_s16(acc[i], vpaddq_s16(low, vmull_high_s8(w[i], x)))
        }))
    }
    #[inline(always)]
    fn weights_wide(self, v: &[u8; 4 * LANES]) -> Self::Wide {
        self.weights(v)
    }
    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, w: Self::Wide, x: [i32; 2]) -> Self::I {
        // Bytes again: sixteen bits would gain nothing here.
        let [even, odd] = x.map(|pair| pair & 0x00ff_00ff);
        let dot = self.dot4(self.zero(), w, even | odd << 8);
        simd!(quarters!(i => vaddq_s32(acc[i], vshlq_n_s32::<8>(dot[i]))))
    }
    #[inline(always)]
    fn acc_zero(self) -> Self::Acc {
        self.zero()
    }
    #[inline(always)]
    fn dot4_nibbles(self, acc: Self::Acc, w: Self::N, x: i32) -> Self::Acc {
        // Codes are at most 63, so they are signed bytes too.
        let w = simd!(quarters!(i => vreinterpretq_s8_u8(w[i])));
        if DOT {
            return self.dot4(acc, w, x);
        }
        simd!({
            let x = vreinterpret_s8_s32(vdup_n_s32(x));
            let x =
                [vdupq_lane_s8::<0>(x), vdupq_lane_s8::<1>(x), vdupq_lane_s8::<2>(x), vdupq_lane_s8::<3>(x)];
            let acc = quarters!(i => vreinterpretq_s16_s32(acc[i]));
            let acc = [
                vmlal_s8(acc[0], vget_low_s8(w[0]), vget_low_s8(x[0])),
                vmlal_high_s8(acc[1], w[0], x[0]),
                vmlal_s8(acc[2], vget_low_s8(w[2]), vget_low_s8(x[2])),
                vmlal_high_s8(acc[3], w[2], x[2]),
            ];
            let acc = [
                vmlal_s8(acc[0], vget_low_s8(w[1]), vget_low_s8(x[1])),
                vmlal_high_s8(acc[1], w[1], x[1]),
                vmlal_s8(acc[2], vget_low_s8(w[3]), vget_low_s8(x[3])),
                vmlal_high_s8(acc[3], w[3], x[3]),
            ];
            quarters!(i => vreinterpretq_s32_s16(acc[i]))
        })
    }
    #[inline(always)]
    fn acc_total(self, acc: Self::Acc) -> Self::I {
        if DOT {
            return acc;
        }
        simd!({
            let acc = quarters!(i => vreinterpretq_s16_s32(acc[i]));
            [
                vaddl_s16(vget_low_s16(acc[0]), vget_low_s16(acc[2])),
                vaddl_high_s16(acc[0], acc[2]),
                vaddl_s16(vget_low_s16(acc[1]), vget_low_s16(acc[3])),
                vaddl_high_s16(acc[1], acc[3]),
            ]
        })
    }
    #[inline(always)]
    fn bytes(self, v: &[u8; 4 * LANES]) -> Self::N {
        let p = v.as_ptr();
        if DOT {
            return memory!([vld1q_u8(p), vld1q_u8(p.add(16)), vld1q_u8(p.add(32)), vld1q_u8(p.add(48))]);
        }
        let by_byte = memory!(vld4q_u8(p));
        [by_byte.0, by_byte.1, by_byte.2, by_byte.3]
    }
    #[inline(always)]
    fn bits(self, v: Self::N, shift: i32, mask: u8) -> Self::N {
        simd!({
            let (count, mask) = (vdupq_n_s8(shift as i8), vdupq_n_u8(mask));
            quarters!(i => vandq_u8(vshlq_u8(v[i], count), mask))
        })
    }
    #[inline(always)]
    fn join(self, a: Self::N, b: Self::N) -> Self::N {
        simd!(quarters!(i => vorrq_u8(a[i], b[i])))
    }
    #[inline(always)]
    fn lookup(self, v: Self::N, table: &[u8; 16]) -> Self::N {
        let table = memory!(vld1q_u8(table.as_ptr()));
        simd!(quarters!(i => vqtbl1q_u8(table, v[i])))
    }
    #[inline(always)]
    fn widen_i8(self, v: &[i8; LANES]) -> Self::F {
        let v = memory!(vld1q_s8(v.as_ptr()));
        simd!({
            let (low, high) = (vmovl_s8(vget_low_s8(v)), vmovl_high_s8(v));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        })
    }
}
