//! Stored number formats, and their values as f32.

use half::{bf16, f16};

/// A number format that can be read. Block formats hold 32 values per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoredDtype {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    Bf16,
    /// f16 scale, 32 signed bytes.
    Q8_0,
    /// f16 scale, 32 four-bit values around 8.
    Q4_0,
    /// f16 scale and f16 minimum, 32 four-bit values.
    Q4_1,
}

/// What an error message lists.
pub(crate) const READABLE: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1";

impl StoredDtype {
    /// Values per block and bytes per block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
        }
    }

    /// Bytes of `n` values whose rows are whole blocks; `None` when they are not, or on overflow.
    pub fn bytes(self, n: u64) -> Option<u64> {
        let (values, bytes) = self.block();
        n.is_multiple_of(values as u64).then(|| (n / values as u64).checked_mul(bytes as u64)).flatten()
    }

    /// Name as in GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Values of whole blocks; a partial block at the end is left out.
pub(crate) fn to_f32(dtype: StoredDtype, bytes: &[u8]) -> Vec<f32> {
    let (values, size) = dtype.block();
    let blocks = bytes.chunks_exact(size);
    let mut out = Vec::with_capacity(blocks.len() * values);
    match dtype {
        StoredDtype::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        StoredDtype::F16 => out.extend(blocks.map(|b| half_at(b, 0))),
        StoredDtype::Bf16 => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        StoredDtype::Q8_0 => {
            for b in blocks {
                let d = half_at(b, 0);
                out.extend(b[2..34].iter().map(|q| f32::from(q.cast_signed()) * d));
            }
        }
        StoredDtype::Q4_0 => {
            for b in blocks {
                let d = half_at(b, 0);
                out.extend(b[2..18].iter().map(|q| (f32::from(q & 15) - 8.0) * d));
                out.extend(b[2..18].iter().map(|q| (f32::from(q >> 4) - 8.0) * d));
            }
        }
        StoredDtype::Q4_1 => {
            for b in blocks {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                out.extend(b[4..20].iter().map(|q| f32::from(q & 15) * d + m));
                out.extend(b[4..20].iter().map(|q| f32::from(q >> 4) * d + m));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_decode_to_hand_computed_values() {
        let mut q8 = f16::from_f32(0.5).to_le_bytes().to_vec();
        q8.extend((0..32u8).map(|i| i.wrapping_sub(16)));
        let v = to_f32(StoredDtype::Q8_0, &q8);
        assert_eq!((v.len(), v[0], v[31]), (32, -8.0, 7.5));

        let mut q4 = f16::from_f32(2.0).to_le_bytes().to_vec();
        q4.extend([0xF0u8; 16]);
        let v = to_f32(StoredDtype::Q4_0, &q4);
        assert_eq!((v[0], v[15], v[16], v[31]), (-16.0, -16.0, 14.0, 14.0));

        let mut q41 = f16::from_f32(0.25).to_le_bytes().to_vec();
        q41.extend(f16::from_f32(-1.0).to_le_bytes());
        q41.extend([0x4Fu8; 16]);
        let v = to_f32(StoredDtype::Q4_1, &q41);
        assert_eq!((v[0], v[16]), (2.75, 0.0));
    }

    #[test]
    fn sizes_refuse_partial_blocks() {
        assert_eq!(StoredDtype::Q4_1.bytes(64), Some(40));
        assert_eq!(StoredDtype::Q4_1.bytes(63), None);
        assert_eq!(StoredDtype::F32.bytes(u64::MAX), None);
    }
}
