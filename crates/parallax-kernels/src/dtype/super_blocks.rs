//! The k-quants: blocks of 256 weights whose scales are themselves small integers under one f16 scale.

use half::f16;

use super::{BLOCK, WeightKind};

/// Weights of a super-block.
pub(crate) const SUPER: usize = 256;
/// Weights that share a scale; the formats whose scales hold for 32 weights name each twice.
const SUB: usize = 16;

/// One super-block of any k-quant: weight `i` is `d * scales[i / 16] * (q[i] - offset) - dmin * mins[i / 16]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct SuperBlock {
    /// Scale of the scales, as f16 bits.
    pub d: u16,
    /// Scale of the minima, as f16 bits; zero for the formats without.
    pub dmin: u16,
    /// Integer scales.
    pub scales: [i8; SUPER / SUB],
    /// Integer minima; zero for the formats without.
    pub mins: [i8; SUPER / SUB],
    /// Codes.
    pub q: [u8; SUPER],
    /// What the codes are raised by.
    pub offset: i32,
}

impl SuperBlock {
    /// Value of weight `i`. Each product is exact or rounded once, so the grouping is GGML's.
    pub(crate) fn value(&self, i: usize) -> f32 {
        let d = f16::from_bits(self.d).to_f32();
        let dmin = f16::from_bits(self.dmin).to_f32();
        let q = (i32::from(self.q[i]) - self.offset) as f32;
        let scaled = d * f32::from(self.scales[i / SUB]) * q;
        if self.offset != 0 { scaled } else { scaled - dmin * f32::from(self.mins[i / SUB]) }
    }
}

fn half(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([raw[at], raw[at + 1]])
}

/// Reads one super-block; `raw` holds exactly its bytes.
pub(crate) fn read_super_block(kind: WeightKind, raw: &[u8]) -> SuperBlock {
    match kind {
        WeightKind::Q2K => read_q2(raw),
        WeightKind::Q3K => read_q3(raw),
        WeightKind::Q6K => read_q6(raw),
        _ => read_q45(kind, raw),
    }
}

/// Sixteen bytes of scale (low nibble) and minimum (high nibble), 64 of codes, d, dmin.
fn read_q2(raw: &[u8]) -> SuperBlock {
    SuperBlock {
        d: half(raw, 80),
        dmin: half(raw, 82),
        scales: std::array::from_fn(|i| (raw[i] & 15).cast_signed()),
        mins: std::array::from_fn(|i| (raw[i] >> 4).cast_signed()),
        q: std::array::from_fn(|i| raw[16 + i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3),
        offset: 0,
    }
}

/// 32 bytes of third bits, 64 of two-bit codes, 12 of six-bit scales offset by 32, d.
fn read_q3(raw: &[u8]) -> SuperBlock {
    let scales = &raw[96..108];
    SuperBlock {
        d: half(raw, 108),
        dmin: 0,
        scales: std::array::from_fn(|i| {
            let low = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
            let high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
            (low | high << 4).cast_signed() - 32
        }),
        mins: [0; 16],
        q: std::array::from_fn(|i| {
            let low = raw[32 + i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
            low | (raw[i % 32] >> (i / 32) & 1) << 2
        }),
        offset: 4,
    }
}

/// 128 bytes of low nibbles, 64 of high bit pairs, sixteen signed scales, d.
fn read_q6(raw: &[u8]) -> SuperBlock {
    SuperBlock {
        d: half(raw, 208),
        dmin: 0,
        scales: std::array::from_fn(|i| raw[192 + i].cast_signed()),
        mins: [0; 16],
        q: std::array::from_fn(|i| {
            let (part, row) = (i / 128, i / 32 % 4);
            let low = raw[part * 64 + row % 2 * 32 + i % 32] >> (4 * (row / 2)) & 15;
            low | (raw[128 + part * 32 + i % 32] >> (2 * row) & 3) << 4
        }),
        offset: 32,
    }
}

/// d, dmin, twelve bytes of six-bit scales and minima, for Q5K 32 bytes of fifth bits, 128 of nibbles.
fn read_q45(kind: WeightKind, raw: &[u8]) -> SuperBlock {
    let packed = &raw[4..16];
    let scale = |j: usize| if j < 4 { packed[j] & 63 } else { packed[j + 4] & 15 | packed[j - 4] >> 6 << 4 };
    let min = |j: usize| if j < 4 { packed[j + 4] & 63 } else { packed[j + 4] >> 4 | packed[j] >> 6 << 4 };
    let (high, nibbles) =
        if kind == WeightKind::Q5K { (Some(&raw[16..48]), &raw[48..]) } else { (None, &raw[16..]) };
    SuperBlock {
        d: half(raw, 0),
        dmin: half(raw, 2),
        scales: std::array::from_fn(|i| scale(i / 2).cast_signed()),
        mins: std::array::from_fn(|i| min(i / 2).cast_signed()),
        q: std::array::from_fn(|i| {
            let nibble = nibbles[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
            nibble | high.map_or(0, |high| (high[i % 32] >> (i / 32) & 1) << 4)
        }),
        offset: 0,
    }
}

/// Quantises 256 floats to Q4K, Q5K or Q6K. Rounds to nearest, ties to even.
pub(super) fn quantize(kind: WeightKind, w: &[f32; SUPER], out: &mut Vec<u8>) {
    if kind == WeightKind::Q6K { quantize_q6(w, out) } else { quantize_q45(kind, w, out) }
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn rounded(v: f32, low: f32, high: f32) -> f32 {
    v.round_ties_even().clamp(low, high)
}

fn quantize_q6(w: &[f32; SUPER], out: &mut Vec<u8>) {
    // The extreme of each sixteen maps onto the lowest code.
    let wanted: [f32; SUPER / SUB] = std::array::from_fn(|s| {
        let part = &w[s * SUB..(s + 1) * SUB];
        part.iter().fold(0.0f32, |m, v| if v.abs() > m.abs() { *v } else { m }) / -32.0
    });
    let d = f16::from_f32(wanted.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0);
    let by = inverse(d.to_f32());
    let scales = wanted.map(|s| rounded(s * by, -127.0, 127.0));
    let q: [u8; SUPER] = std::array::from_fn(|i| {
        (rounded(w[i] * inverse(d.to_f32() * scales[i / SUB]), -32.0, 31.0) + 32.0) as u8
    });
    let code = |part: usize, row: usize, l: usize| q[part * 128 + row * 32 + l];
    for part in 0..2 {
        for row in 0..2 {
            out.extend((0..32).map(|l| (code(part, row, l) & 15) | (code(part, row + 2, l) & 15) << 4));
        }
    }
    for part in 0..2 {
        out.extend(
            (0..32).map(|l| (0..4).fold(0, |bits, row| bits | (code(part, row, l) >> 4) << (2 * row))),
        );
    }
    out.extend(scales.map(|s| (s as i8).cast_unsigned()));
    out.extend(d.to_le_bytes());
}

fn quantize_q45(kind: WeightKind, w: &[f32; SUPER], out: &mut Vec<u8>) {
    let top = if kind == WeightKind::Q5K { 31.0 } else { 15.0 };
    let mut wanted = [(0.0f32, 0.0f32); SUPER / BLOCK];
    for (w, (scale, min)) in w.as_chunks::<BLOCK>().0.iter().zip(&mut wanted) {
        // A minimum is subtracted, so it cannot be negative: all-positive blocks start at zero.
        let (low, high) = w.iter().fold((0.0f32, 0.0f32), |(lo, hi), &v| (lo.min(v), hi.max(v)));
        (*scale, *min) = ((high - low) / top, -low);
    }
    let largest = |pick: fn(&(f32, f32)) -> f32| wanted.iter().map(pick).fold(0.0f32, f32::max) / 63.0;
    let (d, dmin) = (f16::from_f32(largest(|w| w.0)), f16::from_f32(largest(|w| w.1)));
    let (by, by_min) = (inverse(d.to_f32()), inverse(dmin.to_f32()));
    let steps = wanted
        .map(|(scale, min)| (rounded(scale * by, 0.0, 63.0) as u8, rounded(min * by_min, 0.0, 63.0) as u8));
    let q: [u8; SUPER] = std::array::from_fn(|i| {
        let (scale, min) = steps[i / BLOCK];
        let raised = dmin.to_f32().mul_add(f32::from(min), w[i]);
        rounded(raised * inverse(d.to_f32() * f32::from(scale)), 0.0, top) as u8
    });
    out.extend(d.to_le_bytes());
    out.extend(dmin.to_le_bytes());
    let mut packed = [0u8; 12];
    for (j, (scale, min)) in steps.into_iter().enumerate() {
        if j < 4 {
            packed[j] |= scale;
            packed[j + 4] |= min;
        } else {
            packed[j + 4] = (scale & 15) | (min & 15) << 4;
            packed[j - 4] |= scale >> 4 << 6;
            packed[j] |= min >> 4 << 6;
        }
    }
    out.extend(packed);
    if kind == WeightKind::Q5K {
        out.extend((0..32).map(|l| (0..8).fold(0, |bits, row| bits | (q[row * 32 + l] >> 4) << row)));
    }
    for pair in q.as_chunks::<64>().0 {
        out.extend((0..32).map(|l| (pair[l] & 15) | (pair[l + 32] & 15) << 4));
    }
}
