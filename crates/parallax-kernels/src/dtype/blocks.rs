//! Blocks of 32 weights with one scale.

use half::{bf16, f16};

use super::{BLOCK, WeightKind};

/// Twice the values of the sixteen E2M1 codes, plus [`MXFP4_OFFSET`], so that they are small unsigned integers.
pub(crate) const MXFP4_VALUES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
/// What [`MXFP4_VALUES`] are raised by.
pub(crate) const MXFP4_OFFSET: i32 = 12;

/// One block of up to eight bits per weight, read from its bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Block {
    /// Scale, as f16 bits; as bf16 bits for Mxfp4, whose powers of two leave f16's range.
    pub scale: u16,
    /// Minimum, as f16 bits, for Q4_1 and Q5_1; the zero point, as an integer, for Int4; else zero.
    pub extra: u16,
    /// The stored integers: -128..=127 for Q8_0, else codes from 0.
    pub q: [i8; BLOCK],
}

impl Block {
    /// Value of weight `i` of this block under `kind`.
    pub(crate) fn value(&self, kind: WeightKind, i: usize) -> f32 {
        let scale = f16::from_bits(self.scale).to_f32();
        let q = f32::from(self.q[i]);
        match kind {
            WeightKind::Q4_0 => scale * (q - 8.0),
            WeightKind::Q5_0 => scale * (q - 16.0),
            WeightKind::Q4_1 | WeightKind::Q5_1 => scale.mul_add(q, f16::from_bits(self.extra).to_f32()),
            WeightKind::Int4 => scale * (q - f32::from(self.extra)),
            WeightKind::Mxfp4 => {
                let doubled =
                    i32::from(MXFP4_VALUES[usize::from(self.q[i].cast_unsigned() & 15)]) - MXFP4_OFFSET;
                bf16::from_bits(self.scale).to_f32() * doubled as f32
            }
            _ => scale * q,
        }
    }
}

/// Low nibbles are weights 0..16, high nibbles weights 16..32; bit `i` of `high` is the fifth bit of weight `i`.
fn codes(nibbles: &[u8], high: u32) -> [i8; BLOCK] {
    std::array::from_fn(|i| {
        let nibble = if i < 16 { nibbles[i] & 15 } else { nibbles[i - 16] >> 4 };
        (nibble | ((high >> i & 1) as u8) << 4).cast_signed()
    })
}

/// Reads one block of `kind` from its bytes; `raw` holds exactly the bytes of one.
pub(crate) fn read_block(kind: WeightKind, raw: &[u8]) -> Block {
    let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
    let high = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    match kind {
        WeightKind::Q4_0 => Block { scale: half(0), extra: 0, q: codes(&raw[2..], 0) },
        WeightKind::Q4_1 => Block { scale: half(0), extra: half(2), q: codes(&raw[4..], 0) },
        WeightKind::Q5_0 => Block { scale: half(0), extra: 0, q: codes(&raw[6..], high(2)) },
        WeightKind::Q5_1 => Block { scale: half(0), extra: half(2), q: codes(&raw[8..], high(4)) },
        WeightKind::Int4 => Block { scale: half(0), extra: u16::from(raw[2]), q: codes(&raw[4..], 0) },
        WeightKind::Mxfp4 => {
            // Half of 2^(e - 127), since the values are doubled; the two smallest are subnormal.
            let scale = match raw[0] {
                0 => 0x20,
                1 => 0x40,
                e => u16::from(e - 1) << 7,
            };
            Block { scale, extra: 0, q: codes(&raw[1..], 0) }
        }
        _ => Block { scale: half(0), extra: 0, q: std::array::from_fn(|i| raw[2 + i].cast_signed()) },
    }
}

/// Appends the bytes of a block; the codes are in 0..32, or signed bytes for Q8_0.
fn write(kind: WeightKind, scale: f32, min: f32, q: &[i8; BLOCK], out: &mut Vec<u8>) {
    out.extend(f16::from_f32(scale).to_le_bytes());
    if matches!(kind, WeightKind::Q4_1 | WeightKind::Q5_1) {
        out.extend(f16::from_f32(min).to_le_bytes());
    }
    let q = q.map(i8::cast_unsigned);
    if kind == WeightKind::Q8_0 {
        out.extend(q);
        return;
    }
    if matches!(kind, WeightKind::Q5_0 | WeightKind::Q5_1) {
        let high = q.iter().enumerate().fold(0u32, |high, (i, q)| high | u32::from(q >> 4) << i);
        out.extend(high.to_le_bytes());
    }
    out.extend((0..16).map(|i| (q[i] & 15) | (q[i + 16] << 4)));
}

/// Quantises 32 floats. Rounds to nearest, ties to even.
pub(super) fn quantize(kind: WeightKind, w: &[f32; BLOCK], out: &mut Vec<u8>) {
    let (low, high) =
        w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)));
    let inverse = |scale: f32| if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let top = if matches!(kind, WeightKind::Q5_0 | WeightKind::Q5_1) { 31.0 } else { 15.0 };
    match kind {
        WeightKind::Q4_1 | WeightKind::Q5_1 => {
            let scale = (high - low) / top;
            let by = inverse(scale);
            let q = w.map(|v| ((v - low) * by).round_ties_even().clamp(0.0, top) as i8);
            write(kind, scale, low, &q, out);
        }
        WeightKind::Q4_0 | WeightKind::Q5_0 => {
            // The extreme of larger magnitude maps onto the lowest code, so that all of them are used.
            let middle = (top + 1.0) / 2.0;
            let extreme = if high > -low { high } else { low };
            let scale = extreme / -middle;
            let by = inverse(scale);
            let q = w.map(|v| v.mul_add(by, middle).round_ties_even().clamp(0.0, top) as i8);
            write(kind, scale, 0.0, &q, out);
        }
        _ => {
            let scale = high.max(-low) / 127.0;
            let by = inverse(scale);
            let q = w.map(|v| (v * by).round_ties_even().clamp(-127.0, 127.0) as i8);
            write(kind, scale, 0.0, &q, out);
        }
    }
}
