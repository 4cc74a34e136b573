//! The portable level: sixteen-element arrays. It is the specification that the other levels must equal bit for bit.

use half::{bf16, f16};

use super::{LANES, Simd};

/// The portable level; always available.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn fold(a: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let a8: [f32; 8] = std::array::from_fn(|i| f(a[i], a[i + 8]));
    let a4: [f32; 4] = std::array::from_fn(|i| f(a8[i], a8[i + 4]));
    f(f(a4[0], a4[2]), f(a4[1], a4[3]))
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type W = [i8; 4 * LANES];
    type Wide = [i8; 4 * LANES];
    type N = [i8; 4 * LANES];
    type Acc = [i32; LANES];

    const TILE: usize = 6;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; LANES]
    }
    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        *v
    }
    #[inline(always)]
    fn store(self, v: Self::F, to: &mut [f32; LANES]) {
        *to = v;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    fn widen_f16(self, v: &[u16; LANES]) -> Self::F {
        v.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    fn widen_bf16(self, v: &[u16; LANES]) -> Self::F {
        v.map(|b| bf16::from_bits(b).to_f32())
    }
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        fold(a, |a, b| a + b)
    }
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        fold(a, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn max_abs_bits(self, v: Self::F, so_far: u32) -> u32 {
        v.iter().fold(so_far, |m, v| m.max(v.to_bits() & 0x7fff_ffff))
    }
    #[inline(always)]
    fn store_i8(self, v: Self::F, to: &mut [i8; LANES]) -> i32 {
        *to = v.map(|v| v.round_ties_even() as i8);
        to.iter().map(|&q| i32::from(q)).sum()
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    fn zero(self) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    fn weights(self, v: &[u8; 4 * LANES]) -> Self::W {
        v.map(u8::cast_signed)
    }
    #[inline(always)]
    fn dot4(self, acc: Self::I, w: Self::W, x: i32) -> Self::I {
        let x = x.to_le_bytes().map(|b| i32::from(b.cast_signed()));
        std::array::from_fn(|o| (0..4).fold(acc[o], |sum, j| sum + i32::from(w[4 * o + j]) * x[j]))
    }
    #[inline(always)]
    fn weights_wide(self, v: &[u8; 4 * LANES]) -> Self::Wide {
        v.map(u8::cast_signed)
    }
    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, w: Self::Wide, x: [i32; 2]) -> Self::I {
        // Low and high halves of the even pair, then of the odd pair.
        let [even, odd] = x.map(|pair| [i32::from(pair as i16), pair >> 16]);
        let x = [even[0], odd[0], even[1], odd[1]];
        std::array::from_fn(|o| (0..4).fold(acc[o], |sum, j| sum + 256 * i32::from(w[4 * o + j]) * x[j]))
    }
    #[inline(always)]
    fn acc_zero(self) -> Self::Acc {
        [0; LANES]
    }
    #[inline(always)]
    fn dot4_nibbles(self, acc: Self::Acc, w: Self::N, x: i32) -> Self::Acc {
        self.dot4(acc, w, x)
    }
    #[inline(always)]
    fn acc_total(self, acc: Self::Acc) -> Self::I {
        acc
    }
    #[inline(always)]
    fn bytes(self, v: &[u8; 4 * LANES]) -> Self::N {
        v.map(u8::cast_signed)
    }
    #[inline(always)]
    fn bits(self, v: Self::N, shift: i32, mask: u8) -> Self::N {
        v.map(|b| {
            let b = b.cast_unsigned();
            let moved = if shift >= 0 { b << shift } else { b >> -shift };
            (moved & mask).cast_signed()
        })
    }
    #[inline(always)]
    fn join(self, a: Self::N, b: Self::N) -> Self::N {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn lookup(self, v: Self::N, table: &[u8; 16]) -> Self::N {
        v.map(|b| table[usize::from(b.cast_unsigned() & 15)].cast_signed())
    }
    #[inline(always)]
    fn widen_i8(self, v: &[i8; LANES]) -> Self::F {
        v.map(f32::from)
    }
}
