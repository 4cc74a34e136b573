//! How packed weights lie on a device, and their widening to f32 in a kernel's registers.
//!
//! Every format of [`WeightKind`] becomes one of a few forms, without a change of value: a weight is `scale * code` or
//! `scale * code + min`, with codes of four or eight bits and a scale, or both, per group of 16 or 32; floats stay floats.

use cubecl::prelude::*;

use crate::dtype::{
    BLOCK, MXFP4_OFFSET, MXFP4_VALUES, SUPER, WeightKind, check_blocks, read_block, read_super_block,
};
use crate::error::KernelError;

/// What a weight is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Codes {
    /// Four bits, from which `zero` is subtracted; eight per word, the first in the lowest bits.
    Nibbles { zero: u32 },
    /// Signed bytes, four per word.
    Bytes,
    /// Two per word.
    F16,
    /// Two per word.
    Bf16,
    /// One per word.
    F32,
}

/// What a group of weights has in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Scales {
    /// Nothing: floats.
    None,
    /// An f16 scale; two groups per word.
    Half,
    /// An f16 scale in the low half of a word, an f16 minimum in the high one.
    HalfMin,
    /// An f32 scale.
    Full,
    /// An f32 scale and an f32 minimum.
    FullMin,
}

/// The form of a weight: a kernel is compiled for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    pub(super) codes: Codes,
    pub(super) scales: Scales,
    /// Weights per group; a multiple of what is read at a time.
    pub(super) group: usize,
}

impl Form {
    pub(super) fn of(kind: WeightKind) -> Self {
        let (codes, scales, group) = match kind {
            WeightKind::F32 => (Codes::F32, Scales::None, BLOCK),
            WeightKind::F16 => (Codes::F16, Scales::None, BLOCK),
            WeightKind::Bf16 => (Codes::Bf16, Scales::None, BLOCK),
            WeightKind::Q8_0 | WeightKind::Q5_0 => (Codes::Bytes, Scales::Half, BLOCK),
            WeightKind::Q4_0 => (Codes::Nibbles { zero: 8 }, Scales::Half, BLOCK),
            WeightKind::Q4_1 => (Codes::Nibbles { zero: 0 }, Scales::HalfMin, BLOCK),
            WeightKind::Q5_1 => (Codes::Bytes, Scales::HalfMin, BLOCK),
            WeightKind::Int4 | WeightKind::Q4K => (Codes::Nibbles { zero: 0 }, Scales::FullMin, BLOCK),
            WeightKind::Q5K => (Codes::Bytes, Scales::FullMin, BLOCK),
            WeightKind::Mxfp4 => (Codes::Bytes, Scales::Full, BLOCK),
            WeightKind::Q2K => (Codes::Nibbles { zero: 0 }, Scales::FullMin, 16),
            WeightKind::Q3K => (Codes::Nibbles { zero: 4 }, Scales::Full, 16),
            WeightKind::Q6K => (Codes::Bytes, Scales::Full, 16),
        };
        Self { codes, scales, group }
    }

    /// Words that are read at a time.
    pub(super) fn words(self) -> usize {
        match self.codes {
            Codes::Nibbles { .. } => 1,
            Codes::Bytes => 2,
            Codes::F16 | Codes::Bf16 | Codes::F32 => 4,
        }
    }

    /// Weights in them.
    pub(super) fn step(self) -> usize {
        match self.codes {
            Codes::F32 => 4,
            _ => 8,
        }
    }

    fn has_min(self) -> bool {
        matches!(self.scales, Scales::HalfMin | Scales::FullMin)
    }
}

/// Words of codes and of scales of a weight [N, K].
pub(super) struct Words {
    pub(super) codes: Vec<u32>,
    pub(super) scales: Vec<u32>,
}

/// One group's scale and minimum.
enum Shared {
    Half { scale: u16, min: u16 },
    Full { scale: f32, min: f32 },
}

/// Codes and scales of the stored bytes.
pub(super) fn split(kind: WeightKind, raw: &[u8], n: usize, k: usize) -> Result<Words, KernelError> {
    let (_, bytes) = check_blocks(kind, raw.len(), n, k)?;
    let form = Form::of(kind);
    let mut words = Words { codes: Vec::with_capacity(n * k / 4), scales: Vec::new() };
    if form.scales == Scales::None {
        words.codes.extend(raw.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)));
        return Ok(words);
    }
    let mut halves: Vec<u16> = Vec::new();
    let mut put = |words: &mut Words, shared: Shared| match shared {
        Shared::Half { scale, .. } if form.scales == Scales::Half => halves.push(scale),
        Shared::Half { scale, min } => words.scales.push(u32::from(scale) | u32::from(min) << 16),
        Shared::Full { scale, min } => {
            words.scales.push(scale.to_bits());
            if form.has_min() {
                words.scales.push(min.to_bits());
            }
        }
    };
    for raw in raw.chunks_exact(bytes) {
        if kind.block().0 == SUPER {
            let block = read_super_block(kind, raw);
            let half = |bits| half::f16::from_bits(bits).to_f32();
            let bytewise = form.codes == Codes::Bytes;
            let code = |q: u8| if bytewise { (i32::from(q) - block.offset) as u8 } else { q };
            let codes: Vec<u8> = block.q.iter().map(|q| code(*q)).collect();
            pack(form, &codes, &mut words.codes);
            for group in (0..SUPER / 16).step_by(form.group / 16) {
                let scale = half(block.d) * f32::from(block.scales[group]);
                let min = -(half(block.dmin) * f32::from(block.mins[group]));
                put(&mut words, Shared::Full { scale, min });
            }
            continue;
        }
        let block = read_block(kind, raw);
        let code = |q: i8| match kind {
            WeightKind::Q5_0 => (q - 16).cast_unsigned(),
            WeightKind::Mxfp4 => {
                (i32::from(MXFP4_VALUES[usize::from(q.cast_unsigned() & 15)]) - MXFP4_OFFSET) as u8
            }
            _ => q.cast_unsigned(),
        };
        pack(form, &block.q.map(code), &mut words.codes);
        let scale = half::f16::from_bits(block.scale).to_f32();
        put(
            &mut words,
            match kind {
                WeightKind::Mxfp4 => {
                    Shared::Full { scale: half::bf16::from_bits(block.scale).to_f32(), min: 0.0 }
                }
                // The zero point as a minimum: the products and their difference are exact.
                WeightKind::Int4 => Shared::Full { scale, min: -(scale * f32::from(block.extra)) },
                _ => Shared::Half { scale: block.scale, min: block.extra },
            },
        );
    }
    let pairs = halves.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(*pair.get(1).unwrap_or(&0)) << 16);
    words.scales.extend(pairs);
    Ok(words)
}

/// Codes as words.
fn pack(form: Form, codes: &[u8], words: &mut Vec<u32>) {
    let (per_word, bits) = if form.codes == Codes::Bytes { (4, 8) } else { (8, 4) };
    let word = |codes: &[u8]| codes.iter().rev().fold(0u32, |word, code| word << bits | u32::from(*code));
    words.extend(codes.chunks_exact(per_word).map(word));
}

/// The f32 of f16 bits that are no infinity and no NaN; subnormal ones too, which a device may flush to zero as f32.
#[cube]
fn half_to_float(bits: u32) -> f32 {
    let magnitude = bits & 0x7fff;
    let normal = f32::reinterpret((magnitude << 13) + 0x3800_0000);
    let subnormal = f32::cast_from(magnitude) * 5.960_464_5e-8;
    let positive = select(magnitude < 0x400, subnormal, normal);
    select(bits & 0x8000 == 0, positive, -positive)
}

/// Code number `i` of the words that are read at a time.
#[cube]
pub(super) fn code<W: Size>(words: Vector<u32, W>, #[comptime] i: usize, #[comptime] form: Form) -> f32 {
    if comptime!(matches!(form.codes, Codes::Nibbles { .. })) {
        let zero = comptime!(match form.codes {
            Codes::Nibbles { zero } => zero as i32,
            _ => 0,
        });
        let shift = comptime!(4 * i as u32);
        let nibble = (words.extract(0usize) >> shift) & 15;
        f32::cast_from(i32::cast_from(nibble) - zero)
    } else if comptime!(form.codes == Codes::Bytes) {
        let at = comptime!(i / 4);
        let up = comptime!(24 - 8 * (i as u32 % 4));
        f32::cast_from(i32::reinterpret(words.extract(at) << up) >> 24)
    } else if comptime!(form.codes == Codes::F32) {
        f32::reinterpret(words.extract(i))
    } else {
        let at = comptime!(i / 2);
        let shift = comptime!(16 * (i as u32 % 2));
        let bits = words.extract(at) >> shift;
        if comptime!(form.codes == Codes::F16) {
            half_to_float(bits & 0xffff)
        } else {
            f32::reinterpret(bits << 16)
        }
    }
}

/// Scale of group number `group`; 1 for floats.
#[cube]
pub(super) fn scale_of(scales: &[u32], group: usize, #[comptime] form: Form) -> f32 {
    if comptime!(form.scales == Scales::None) {
        1.0f32.runtime()
    } else if comptime!(form.scales == Scales::Half) {
        let word = scales[group / 2];
        half_to_float((word >> (16 * (group as u32 % 2))) & 0xffff)
    } else if comptime!(form.scales == Scales::HalfMin) {
        half_to_float(scales[group] & 0xffff)
    } else if comptime!(form.scales == Scales::Full) {
        f32::reinterpret(scales[group])
    } else {
        f32::reinterpret(scales[2 * group])
    }
}

/// Minimum of group number `group`; 0 for forms without.
#[cube]
pub(super) fn min_of(scales: &[u32], group: usize, #[comptime] form: Form) -> f32 {
    if comptime!(form.scales == Scales::HalfMin) {
        half_to_float(scales[group] >> 16)
    } else if comptime!(form.scales == Scales::FullMin) {
        f32::reinterpret(scales[2 * group + 1])
    } else {
        0.0f32.runtime()
    }
}
