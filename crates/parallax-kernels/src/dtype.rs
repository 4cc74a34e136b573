//! Weight formats: which kinds exist, their block sizes, and how a row of f32 becomes blocks.
//!
//! The block formats are those of GGML, so that a GGUF file's bytes can be repacked without loss. The surprise: a
//! Q8_0 byte of -128 never comes from a quantiser but may come from a file, and every kernel here is exact for it.

use half::f16;

use crate::error::{KernelError, check_len};

/// Weights per quantised block, along the inner dimension.
pub const BLOCK: usize = 32;

/// How the elements of a packed weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightKind {
    /// 32-bit floats.
    F32,
    /// The upper half of a 32-bit float.
    Bf16,
    /// Blocks of 32 signed bytes with one f16 scale: 8.5 bits per weight.
    Q8_0,
    /// Blocks of 32 nibbles, offset by 8, with one f16 scale: 4.5 bits per weight.
    Q4_0,
    /// Blocks of 32 nibbles with one f16 scale and one f16 minimum: 5 bits per weight.
    Q4_1,
}

impl WeightKind {
    /// Bytes of one GGML block of 32 weights; `None` for the kinds without blocks.
    pub fn block_bytes(self) -> Option<usize> {
        match self {
            Self::F32 | Self::Bf16 => None,
            Self::Q8_0 => Some(34),
            Self::Q4_0 => Some(18),
            Self::Q4_1 => Some(20),
        }
    }
}

/// One block of up to eight bits per weight: value = `scale * q + min`, with `q` already centred.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Block {
    /// Scale, as f16 bits.
    pub scale: u16,
    /// Minimum, as f16 bits; zero unless the kind is Q4_1.
    pub min: u16,
    /// The stored integers: -128..=127 for Q8_0, 0..=15 for the four-bit kinds.
    pub q: [i8; BLOCK],
}

impl Block {
    /// Value of weight `i` of this block under `kind`.
    pub(crate) fn value(&self, kind: WeightKind, i: usize) -> f32 {
        let scale = f16::from_bits(self.scale).to_f32();
        let q = f32::from(self.q[i]);
        match kind {
            WeightKind::Q4_0 => scale * (q - 8.0),
            WeightKind::Q4_1 => scale.mul_add(q, f16::from_bits(self.min).to_f32()),
            _ => scale * q,
        }
    }
}

/// Quantises 32 floats to `kind`, which must be a block kind. Rounds to nearest, ties to even.
pub(crate) fn quantize_block(kind: WeightKind, w: &[f32; BLOCK]) -> Block {
    let (low, high) =
        w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)));
    let mut q = [0i8; BLOCK];
    match kind {
        WeightKind::Q4_1 => {
            let scale = (high - low) / 15.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            for (q, &v) in q.iter_mut().zip(w) {
                *q = ((v - low) * inverse).round_ties_even().clamp(0.0, 15.0) as i8;
            }
            Block { scale: f16::from_f32(scale).to_bits(), min: f16::from_f32(low).to_bits(), q }
        }
        WeightKind::Q4_0 => {
            // The extreme of larger magnitude maps onto -8, so that all sixteen values are used.
            let extreme = if high > -low { high } else { low };
            let scale = extreme / -8.0;
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            for (q, &v) in q.iter_mut().zip(w) {
                *q = (v.mul_add(inverse, 8.0)).round_ties_even().clamp(0.0, 15.0) as i8;
            }
            Block { scale: f16::from_f32(scale).to_bits(), min: 0, q }
        }
        _ => {
            let scale = high.max(-low) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            for (q, &v) in q.iter_mut().zip(w) {
                *q = (v * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
            }
            Block { scale: f16::from_f32(scale).to_bits(), min: 0, q }
        }
    }
}

/// Reads one GGML block of `kind` from its bytes; `raw` holds exactly `kind.block_bytes()` bytes.
pub(crate) fn read_block(kind: WeightKind, raw: &[u8]) -> Block {
    let scale = u16::from_le_bytes([raw[0], raw[1]]);
    let mut q = [0i8; BLOCK];
    let (min, body) = match kind {
        WeightKind::Q4_1 => (u16::from_le_bytes([raw[2], raw[3]]), &raw[4..]),
        _ => (0, &raw[2..]),
    };
    if kind == WeightKind::Q8_0 {
        for (q, &b) in q.iter_mut().zip(body) {
            *q = b.cast_signed();
        }
    } else {
        // Low nibbles are weights 0..16, high nibbles weights 16..32.
        for (i, &b) in body.iter().enumerate() {
            q[i] = (b & 15).cast_signed();
            q[i + 16] = (b >> 4).cast_signed();
        }
    }
    Block { scale, min, q }
}

/// Checks that `raw` holds `n * k` weights of `kind` in GGML blocks; returns the blocks per row and bytes per block.
pub(crate) fn check_blocks(
    kind: WeightKind,
    raw_bytes: usize,
    n: usize,
    k: usize,
) -> Result<(usize, usize), KernelError> {
    let per_row = blocks_per_row(k)?;
    let block_bytes = kind.block_bytes().unwrap_or(4 * BLOCK);
    check_len("pack", "block bytes", n * per_row * block_bytes, raw_bytes)?;
    Ok((per_row, block_bytes))
}

/// Blocks in a row of `k` weights.
pub(crate) fn blocks_per_row(k: usize) -> Result<usize, KernelError> {
    if !k.is_multiple_of(BLOCK) {
        return Err(KernelError::RaggedBlocks { op: "pack", k, block: BLOCK });
    }
    Ok(k / BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp() -> [f32; BLOCK] {
        std::array::from_fn(|i| (i as f32 - 13.0) * 0.37)
    }

    #[test]
    fn quantised_values_stay_within_half_a_step() {
        for (kind, steps) in [(WeightKind::Q8_0, 127.0), (WeightKind::Q4_0, 8.0), (WeightKind::Q4_1, 7.5)] {
            let w = ramp();
            let block = quantize_block(kind, &w);
            let amax = w.iter().fold(0f32, |a, v| a.max(v.abs()));
            for (i, v) in w.iter().enumerate() {
                let error = (block.value(kind, i) - v).abs();
                // Q4_0 may clip the extreme of the other sign by one step.
                assert!(error <= 1.01 * amax / steps, "{kind:?} weight {i} off by {error}");
            }
        }
    }

    #[test]
    fn constant_and_zero_blocks_survive() {
        for kind in [WeightKind::Q8_0, WeightKind::Q4_0, WeightKind::Q4_1] {
            for value in [0.0f32, 1.0] {
                let block = quantize_block(kind, &[value; BLOCK]);
                assert!((block.value(kind, 5) - value).abs() < 0.01, "{kind:?} {value}");
            }
        }
    }

    #[test]
    fn nibbles_are_read_low_half_first() {
        let mut raw = [0u8; 18];
        raw[..2].copy_from_slice(&f16::from_f32(2.0).to_bits().to_le_bytes());
        raw[2] = 0x9F;
        let block = read_block(WeightKind::Q4_0, &raw);
        assert_eq!(block.value(WeightKind::Q4_0, 0), 14.0);
        assert_eq!(block.value(WeightKind::Q4_0, 16), 2.0);
    }

    #[test]
    fn ragged_rows_are_refused() {
        assert_eq!(blocks_per_row(33), Err(KernelError::RaggedBlocks { op: "pack", k: 33, block: 32 }));
    }
}
