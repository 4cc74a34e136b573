//! Weight formats: which kinds exist, the bytes of their blocks, and how floats become blocks and back.
//!
//! The block formats are those of GGML, so that a GGUF file's bytes can be repacked without loss; `Int4`, which GPTQ
//! and AWQ checkpoints become, is ours. The surprise: a Q8_0 byte of -128 never comes from a quantiser but may come
//! from a file, and every kernel here is exact for it.

mod blocks;
mod super_blocks;

pub(crate) use blocks::{Block, MXFP4_OFFSET, MXFP4_VALUES, read_block};
pub(crate) use super_blocks::{SUPER, SuperBlock, read_super_block};

use half::{bf16, f16};

use crate::error::{KernelError, check_len};

/// Weights per quantised block, along the inner dimension; the k-quants gather eight of them into one of 256.
pub const BLOCK: usize = 32;

/// How the elements of a packed weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightKind {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
    /// Blocks of 32 signed bytes with one f16 scale: 8.5 bits per weight.
    Q8_0,
    /// Blocks of 32 nibbles, offset by 8, with one f16 scale: 4.5 bits per weight.
    Q4_0,
    /// Blocks of 32 nibbles with one f16 scale and one f16 minimum: 5 bits per weight.
    Q4_1,
    /// Blocks of 32 five-bit codes, offset by 16, with one f16 scale: 5.5 bits per weight.
    Q5_0,
    /// Blocks of 32 five-bit codes with one f16 scale and one f16 minimum: 6 bits per weight.
    Q5_1,
    /// Blocks of 256 two-bit codes; scales and minima of four bits per sixteen weights: 2.625 bits per weight.
    Q2K,
    /// Blocks of 256 three-bit codes, offset by 4; scales of six bits per sixteen weights: 3.4375 bits per weight.
    Q3K,
    /// Blocks of 256 nibbles; scales and minima of six bits per 32 weights: 4.5 bits per weight.
    Q4K,
    /// Blocks of 256 five-bit codes; scales and minima of six bits per 32 weights: 5.5 bits per weight.
    Q5K,
    /// Blocks of 256 six-bit codes, offset by 32; scales of eight bits per sixteen weights: 6.5625 bits per weight.
    Q6K,
    /// Blocks of 32 four-bit floats (E2M1) with a power of two as scale: 4.25 bits per weight. OCP MX specification.
    Mxfp4,
    /// Blocks of 32 nibbles with one f16 scale and an integer zero point: value = scale * (code - zero). Twenty bytes:
    /// the scale, the zero point, a zero, and nibbles in GGML's order.
    Int4,
}

impl WeightKind {
    /// Every kind.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Mxfp4,
        Self::Int4,
    ];

    /// Weights per block and bytes per block, as stored in a file; a float is a block of one.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (BLOCK, 34),
            Self::Q4_0 => (BLOCK, 18),
            Self::Q4_1 | Self::Int4 => (BLOCK, 20),
            Self::Q5_0 => (BLOCK, 22),
            Self::Q5_1 => (BLOCK, 24),
            Self::Q2K => (SUPER, 84),
            Self::Q3K => (SUPER, 110),
            Self::Q4K => (SUPER, 144),
            Self::Q5K => (SUPER, 176),
            Self::Q6K => (SUPER, 210),
            Self::Mxfp4 => (BLOCK, 17),
        }
    }

    /// Whether floats can be quantised to it here. The others are only read.
    pub fn has_quantizer(self) -> bool {
        !matches!(self, Self::Q2K | Self::Q3K | Self::Mxfp4 | Self::Int4)
    }
}

/// The values of whole blocks of `kind`, exactly as GGML defines them.
///
/// # Errors
/// When `raw` is no whole number of blocks.
pub fn dequantize(kind: WeightKind, raw: &[u8]) -> Result<Vec<f32>, KernelError> {
    let (values, bytes) = kind.block();
    check_len("dequantize", "block bytes", raw.len() / bytes * bytes, raw.len())?;
    let mut out = Vec::with_capacity(raw.len() / bytes * values);
    let halves = raw.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    match kind {
        WeightKind::F32 => out.extend(raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))),
        WeightKind::F16 => out.extend(halves.map(|b| f16::from_bits(b).to_f32())),
        WeightKind::Bf16 => out.extend(halves.map(|b| bf16::from_bits(b).to_f32())),
        _ if values == SUPER => {
            for raw in raw.chunks_exact(bytes) {
                let block = read_super_block(kind, raw);
                out.extend((0..SUPER).map(|i| block.value(i)));
            }
        }
        _ => {
            for raw in raw.chunks_exact(bytes) {
                let block = read_block(kind, raw);
                out.extend((0..BLOCK).map(|i| block.value(kind, i)));
            }
        }
    }
    Ok(out)
}

/// Blocks of `kind` from floats; rounds to nearest, ties to even.
///
/// # Errors
/// When `w` is no whole number of blocks, or the kind has no quantiser ([`WeightKind::has_quantizer`]).
pub fn quantize(kind: WeightKind, w: &[f32]) -> Result<Vec<u8>, KernelError> {
    let (values, bytes) = kind.block();
    if !w.len().is_multiple_of(values) {
        return Err(KernelError::RaggedBlocks { op: "quantize", k: w.len(), block: values });
    }
    if !kind.has_quantizer() {
        return Err(KernelError::NoQuantizer { kind });
    }
    let mut out = Vec::with_capacity(w.len() / values * bytes);
    match kind {
        WeightKind::F32 => out.extend(w.iter().flat_map(|v| v.to_le_bytes())),
        WeightKind::F16 => out.extend(w.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        WeightKind::Bf16 => out.extend(w.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
        _ if values == SUPER => {
            for w in w.as_chunks::<SUPER>().0 {
                super_blocks::quantize(kind, w, &mut out);
            }
        }
        _ => {
            for w in w.as_chunks::<BLOCK>().0 {
                blocks::quantize(kind, w, &mut out);
            }
        }
    }
    Ok(out)
}

/// Checks that `raw` holds `n * k` weights of `kind` in rows of whole blocks; returns blocks per row and bytes per block.
pub(crate) fn check_blocks(
    kind: WeightKind,
    raw_bytes: usize,
    n: usize,
    k: usize,
) -> Result<(usize, usize), KernelError> {
    let (values, bytes) = kind.block();
    if !k.is_multiple_of(values) {
        return Err(KernelError::RaggedBlocks { op: "pack", k, block: values });
    }
    check_len("pack", "block bytes", n * (k / values) * bytes, raw_bytes)?;
    Ok((k / values, bytes))
}

#[cfg(test)]
mod tests;
