//! Small unsigned codes of a tile, sixteen outputs by 32 inputs, and their exact dot products with activations.
//!
//! Byte `4 * output + j` of a plane belongs to input `4 * g + j` of group `g`. Nibbles hold two groups per byte, sixteen
//! inputs apart; a plane of single bits holds bit `g` for group `g`, and a plane of bit pairs holds four groups.

use super::activations::ActivationBlock;
use crate::dtype::{BLOCK, MXFP4_VALUES};
use crate::simd::{LANES, Simd};

/// Groups of four inputs in a block.
pub(super) const GROUPS: usize = BLOCK / 4;

/// Four bytes or bits for each of sixteen outputs.
type Plane = [u8; 4 * LANES];

/// How the codes of a tile are stored.
pub(super) trait Codes: Copy {
    const ZERO: Self;
    /// Groups that may be added up in sixteen bits; see [`Simd::dot4_nibbles`].
    const GROUPS_PER_SUM: usize;
    /// Puts code `q` of input `i`, which must not have been set before.
    fn set(&mut self, lane: usize, i: usize, q: u8);
    /// The code of input `i`.
    fn get(&self, lane: usize, i: usize) -> u8;
    /// The codes of group `g`.
    fn group<S: Simd>(&self, s: S, g: usize) -> S::N;
    /// The exact dot products of all codes with each row's block.
    #[inline(always)]
    fn dot_block<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R]) -> [S::F; R] {
        dot::<S, Self, GROUPS, R>(s, self, x, 0)
    }
}

/// Four bits.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Nibbles([Plane; GROUPS / 2]);

/// Five bits: nibbles, and a plane of the fifth.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Five(Nibbles, Plane);

/// Six bits: nibbles, and two planes of the upper pairs.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Six(Nibbles, Two);

/// Two bits.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Two([Plane; 2]);

/// Three bits: pairs, and a plane of the third.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Three(Two, Plane);

/// Codes of four-bit floats: stored as nibbles, multiplied as [`MXFP4_VALUES`].
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Floats(Nibbles);

/// Byte of input `i` of output `lane` within a plane.
#[inline(always)]
fn at(lane: usize, i: usize) -> usize {
    4 * lane + i % 4
}

impl Codes for Nibbles {
    const ZERO: Self = Self([[0; 4 * LANES]; GROUPS / 2]);
    const GROUPS_PER_SUM: usize = 8;

    fn set(&mut self, lane: usize, i: usize, q: u8) {
        self.0[i % 16 / 4][at(lane, i)] |= (q & 15) << (i / 16 * 4);
    }
    fn get(&self, lane: usize, i: usize) -> u8 {
        self.0[i % 16 / 4][at(lane, i)] >> (i / 16 * 4) & 15
    }
    #[inline(always)]
    fn group<S: Simd>(&self, s: S, g: usize) -> S::N {
        s.bits(s.bytes(&self.0[g % 4]), if g < 4 { 0 } else { -4 }, 15)
    }
    #[inline(always)]
    fn dot_block<S: Simd, const R: usize>(&self, s: S, x: [&ActivationBlock; R]) -> [S::F; R] {
        let mut dot = [s.acc_zero(); R];
        let [first, rest @ ..] = &self.0;
        // Both nibbles of a byte while it is in a register.
        let (low, high) = s.nibbles(first);
        for r in 0..R {
            dot[r] = s.dot4_nibbles(dot[r], low, group(x[r], 0));
            dot[r] = s.dot4_nibbles(dot[r], high, group(x[r], GROUPS / 2));
        }
        for (g, plane) in rolled(rest).iter().enumerate() {
            let at = (g + 1) % (GROUPS / 2);
            let (low, high) = s.nibbles(plane);
            for r in 0..R {
                dot[r] = s.dot4_nibbles(dot[r], low, group(x[r], at));
                dot[r] = s.dot4_nibbles(dot[r], high, group(x[r], at + GROUPS / 2));
            }
        }
        let mut total = [s.splat(0.0); R];
        for r in 0..R {
            total[r] = s.to_f32(s.acc_total(dot[r]));
        }
        total
    }
}

/// All of `parts`, their number unknown to the compiler. Unrolled, a block's additions would be sorted row by row, and its
/// prepared weights would not fit the registers. Two things more would unroll a loop over them, and are avoided: a sum
/// that starts at zero in it (hence the first part is multiplied before it), and an index whose check bounds the turns.
#[inline(always)]
pub(super) fn rolled<T>(parts: &[T]) -> &[T] {
    std::hint::black_box(parts)
}

/// The plane's bits for group `g`, moved to bit `to`.
#[inline(always)]
fn single_bits<S: Simd>(s: S, plane: &Plane, g: usize, to: usize) -> S::N {
    s.bits(s.bytes(plane), to as i32 - g as i32, 1 << to)
}

impl Codes for Five {
    const ZERO: Self = Self(Nibbles::ZERO, [0; 4 * LANES]);
    const GROUPS_PER_SUM: usize = 4;

    fn set(&mut self, lane: usize, i: usize, q: u8) {
        self.0.set(lane, i, q);
        self.1[at(lane, i)] |= (q >> 4) << (i / 4);
    }
    fn get(&self, lane: usize, i: usize) -> u8 {
        self.0.get(lane, i) | (self.1[at(lane, i)] >> (i / 4) & 1) << 4
    }
    #[inline(always)]
    fn group<S: Simd>(&self, s: S, g: usize) -> S::N {
        s.join(self.0.group(s, g), single_bits(s, &self.1, g, 4))
    }
}

impl Two {
    /// The pairs of group `g`, moved to bit `to`.
    #[inline(always)]
    fn pairs<S: Simd>(&self, s: S, g: usize, to: usize) -> S::N {
        s.bits(s.bytes(&self.0[g / 4]), to as i32 - 2 * (g % 4) as i32, 3 << to)
    }
}

impl Codes for Two {
    const ZERO: Self = Self([[0; 4 * LANES]; 2]);
    const GROUPS_PER_SUM: usize = 8;

    fn set(&mut self, lane: usize, i: usize, q: u8) {
        self.0[i / 16][at(lane, i)] |= (q & 3) << (i % 16 / 4 * 2);
    }
    fn get(&self, lane: usize, i: usize) -> u8 {
        self.0[i / 16][at(lane, i)] >> (i % 16 / 4 * 2) & 3
    }
    #[inline(always)]
    fn group<S: Simd>(&self, s: S, g: usize) -> S::N {
        self.pairs(s, g, 0)
    }
}

impl Codes for Six {
    const ZERO: Self = Self(Nibbles::ZERO, Two::ZERO);
    const GROUPS_PER_SUM: usize = 2;

    fn set(&mut self, lane: usize, i: usize, q: u8) {
        self.0.set(lane, i, q);
        self.1.set(lane, i, q >> 4);
    }
    fn get(&self, lane: usize, i: usize) -> u8 {
        self.0.get(lane, i) | self.1.get(lane, i) << 4
    }
    #[inline(always)]
    fn group<S: Simd>(&self, s: S, g: usize) -> S::N {
        s.join(self.0.group(s, g), self.1.pairs(s, g, 4))
    }
}

impl Codes for Three {
    const ZERO: Self = Self(Two::ZERO, [0; 4 * LANES]);
    const GROUPS_PER_SUM: usize = 8;

    fn set(&mut self, lane: usize, i: usize, q: u8) {
        self.0.set(lane, i, q);
        self.1[at(lane, i)] |= (q >> 2) << (i / 4);
    }
    fn get(&self, lane: usize, i: usize) -> u8 {
        self.0.get(lane, i) | (self.1[at(lane, i)] >> (i / 4) & 1) << 2
    }
    #[inline(always)]
    fn group<S: Simd>(&self, s: S, g: usize) -> S::N {
        s.join(self.0.group(s, g), single_bits(s, &self.1, g, 2))
    }
}

impl Codes for Floats {
    const ZERO: Self = Self(Nibbles::ZERO);
    const GROUPS_PER_SUM: usize = 4;

    fn set(&mut self, lane: usize, i: usize, q: u8) {
        self.0.set(lane, i, q);
    }
    fn get(&self, lane: usize, i: usize) -> u8 {
        self.0.get(lane, i)
    }
    #[inline(always)]
    fn group<S: Simd>(&self, s: S, g: usize) -> S::N {
        s.lookup(self.0.group(s, g), &MXFP4_VALUES)
    }
}

/// The four activations of group `g`, as one word.
#[inline(always)]
pub(super) fn group(x: &ActivationBlock, g: usize) -> i32 {
    let [a, b, c, d] = x.q.as_chunks::<4>().0[g];
    i32::from_ne_bytes([a.cast_unsigned(), b.cast_unsigned(), c.cast_unsigned(), d.cast_unsigned()])
}

/// The exact dot products of `N` groups from `first` on with each row's block.
#[inline(always)]
pub(super) fn dot<S: Simd, C: Codes, const N: usize, const R: usize>(
    s: S,
    codes: &C,
    x: [&ActivationBlock; R],
    first: usize,
) -> [S::F; R] {
    let mut total = [s.splat(0.0); R];
    for from in (0..N).step_by(C::GROUPS_PER_SUM) {
        let mut sum = [s.acc_zero(); R];
        for g in 0..C::GROUPS_PER_SUM {
            if from + g < N {
                let codes = codes.group(s, first + from + g);
                for r in 0..R {
                    sum[r] = s.dot4_nibbles(sum[r], codes, group(x[r], first + from + g));
                }
            }
        }
        for r in 0..R {
            let sum = s.to_f32(s.acc_total(sum[r]));
            total[r] = if from == 0 { sum } else { s.add(total[r], sum) };
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps_every_code<C: Codes>(bits: u32) {
        let mut codes = C::ZERO;
        let q = |lane: usize, i: usize| ((lane * 37 + i * 11) % (1 << bits)) as u8;
        for lane in 0..LANES {
            for i in 0..BLOCK {
                codes.set(lane, i, q(lane, i));
            }
        }
        for lane in 0..LANES {
            for i in 0..BLOCK {
                assert_eq!(codes.get(lane, i), q(lane, i), "{bits} bits, lane {lane}, input {i}");
            }
        }
    }

    #[test]
    fn codes_are_kept() {
        keeps_every_code::<Two>(2);
        keeps_every_code::<Three>(3);
        keeps_every_code::<Nibbles>(4);
        keeps_every_code::<Floats>(4);
        keeps_every_code::<Five>(5);
        keeps_every_code::<Six>(6);
    }
}
