//! Stored number formats, and their values as f32.

use half::f16;
use parallax_kernels::{WeightKind, dtype::dequantize};

/// A number format that can be read. Block formats hold 32 or 256 values per block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoredDtype {
    /// A format that the kernels know, in the layout of GGML.
    Kind(WeightKind),
    /// Eight-bit float with four exponent bits, no infinities (OCP E4M3).
    Fp8E4m3,
    /// Eight-bit float with five exponent bits (OCP E5M2).
    Fp8E5m2,
    /// 64-bit float.
    F64,
    /// Signed integer of this many bytes: 1, 2, 4 or 8.
    Signed(u8),
    /// Power of two between 2^-127 and 2^127, without sign: a scale (OCP E8M0).
    Exponent,
    /// Unsigned byte; also packed codes and booleans, and exponents in files that do not call them so.
    Byte,
}

/// More elements than any tensor has, and few enough to multiply: a word holds up to eight codes, a block 32.
const MAX_ELEMENTS: u64 = 1 << 56;

impl StoredDtype {
    /// 32-bit float.
    pub const F32: Self = Self::Kind(WeightKind::F32);
    /// 16-bit IEEE float.
    pub const F16: Self = Self::Kind(WeightKind::F16);
    /// 16-bit brain float.
    pub const BF16: Self = Self::Kind(WeightKind::Bf16);

    /// The format with this number in a GGUF file.
    pub(crate) fn from_gguf(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Kind(WeightKind::Q4_0),
            3 => Self::Kind(WeightKind::Q4_1),
            6 => Self::Kind(WeightKind::Q5_0),
            7 => Self::Kind(WeightKind::Q5_1),
            8 => Self::Kind(WeightKind::Q8_0),
            10 => Self::Kind(WeightKind::Q2K),
            11 => Self::Kind(WeightKind::Q3K),
            12 => Self::Kind(WeightKind::Q4K),
            13 => Self::Kind(WeightKind::Q5K),
            14 => Self::Kind(WeightKind::Q6K),
            24 => Self::Signed(1),
            25 => Self::Signed(2),
            26 => Self::Signed(4),
            27 => Self::Signed(8),
            28 => Self::F64,
            30 => Self::BF16,
            39 => Self::Kind(WeightKind::Mxfp4),
            _ => return None,
        })
    }

    /// The format with this name in a safetensors file.
    pub(crate) fn from_safetensors(name: &str) -> Option<Self> {
        Some(match name {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            "F64" => Self::F64,
            "F8_E4M3" => Self::Fp8E4m3,
            "F8_E5M2" => Self::Fp8E5m2,
            "I8" => Self::Signed(1),
            "I16" => Self::Signed(2),
            "I32" => Self::Signed(4),
            "I64" => Self::Signed(8),
            "F8_E8M0" => Self::Exponent,
            "U8" | "BOOL" => Self::Byte,
            _ => return None,
        })
    }

    /// Values per block and bytes per block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Kind(kind) => kind.block(),
            Self::Fp8E4m3 | Self::Fp8E5m2 | Self::Exponent | Self::Byte => (1, 1),
            Self::F64 => (1, 8),
            Self::Signed(bytes) => (1, bytes.into()),
        }
    }

    /// Bytes of `n` values whose rows are whole blocks; `None` when they are not, or on overflow.
    pub fn bytes(self, n: u64) -> Option<u64> {
        let (values, bytes) = self.block();
        n.is_multiple_of(values as u64).then(|| (n / values as u64).checked_mul(bytes as u64)).flatten()
    }

    /// As [`Self::bytes`], of a tensor of this shape. Dimensions beside an empty one count too: parts of their product are
    /// taken later.
    pub(crate) fn bytes_of(self, shape: &[usize]) -> Option<u64> {
        let n = shape.iter().try_fold(1u64, |n, d| n.checked_mul((*d as u64).max(1)))?;
        if n > MAX_ELEMENTS {
            return None;
        }
        self.bytes(if shape.contains(&0) { 0 } else { n })
    }

    /// Name as in GGUF, or as in safetensors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kind(kind) => match kind {
                WeightKind::F32 => "F32",
                WeightKind::F16 => "F16",
                WeightKind::Bf16 => "BF16",
                WeightKind::Q8_0 => "Q8_0",
                WeightKind::Q4_0 => "Q4_0",
                WeightKind::Q4_1 => "Q4_1",
                WeightKind::Q5_0 => "Q5_0",
                WeightKind::Q5_1 => "Q5_1",
                WeightKind::Q2K => "Q2_K",
                WeightKind::Q3K => "Q3_K",
                WeightKind::Q4K => "Q4_K",
                WeightKind::Q5K => "Q5_K",
                WeightKind::Q6K => "Q6_K",
                WeightKind::Mxfp4 => "MXFP4",
                _ => "INT4",
            },
            Self::Fp8E4m3 => "F8_E4M3",
            Self::Fp8E5m2 => "F8_E5M2",
            Self::F64 => "F64",
            Self::Signed(1) => "I8",
            Self::Signed(2) => "I16",
            Self::Signed(4) => "I32",
            Self::Signed(_) => "I64",
            Self::Exponent => "F8_E8M0",
            Self::Byte => "U8",
        }
    }

    /// Whether it is a float of eight bits, which means something only together with its scales.
    pub(crate) fn is_fp8(self) -> bool {
        matches!(self, Self::Fp8E4m3 | Self::Fp8E5m2)
    }
}

/// What an error message lists.
pub(crate) const READABLE: &str =
    "F32, F16, BF16, FP8, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, MXFP4";

/// OCP 8-bit floating point specification, E4M3: bias 7, no infinities, one NaN per sign.
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

/// OCP microscaling formats specification 1.0, E8M0: an exponent with bias 127, and one NaN.
fn e8m0(bits: u8) -> f32 {
    match bits {
        // 2^-127 is below the normal numbers of an f32.
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(bits) << 23),
    }
}

/// Values of whole blocks; a partial block at the end is left out.
pub(crate) fn to_f32(dtype: StoredDtype, bytes: &[u8]) -> Vec<f32> {
    let (_, size) = dtype.block();
    let bytes = &bytes[..bytes.len() / size * size];
    match dtype {
        StoredDtype::Kind(kind) => dequantize(kind, bytes).expect("whole blocks"),
        StoredDtype::Fp8E4m3 => {
            let table: [f32; 256] = std::array::from_fn(|i| e4m3(i as u8));
            bytes.iter().map(|b| table[usize::from(*b)]).collect()
        }
        // The upper half of an f16.
        StoredDtype::Fp8E5m2 => bytes.iter().map(|b| f16::from_bits(u16::from(*b) << 8).to_f32()).collect(),
        StoredDtype::F64 => bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        StoredDtype::Exponent => bytes.iter().map(|b| e8m0(*b)).collect(),
        StoredDtype::Byte => bytes.iter().map(|b| f32::from(*b)).collect(),
        StoredDtype::Signed(_) => integers(dtype, bytes).map(|v| v as f32).collect(),
    }
}

/// Integers of a stored integer format; nothing for the others.
pub(crate) fn integers(dtype: StoredDtype, bytes: &[u8]) -> impl Iterator<Item = i64> + '_ {
    let size = match dtype {
        StoredDtype::Signed(size) => usize::from(size),
        StoredDtype::Byte => 1,
        _ => usize::MAX,
    };
    bytes.chunks_exact(size).map(move |b| {
        let mut wide = [0; 8];
        wide[8 - size..].copy_from_slice(b);
        let value = i64::from_le_bytes(wide);
        // The bytes are the upper ones: an arithmetic shift brings the sign down.
        if dtype == StoredDtype::Byte { i64::from(b[0]) } else { value >> (8 * (8 - size)) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_decode_to_hand_computed_values() {
        let v = to_f32(StoredDtype::Fp8E4m3, &[0x00, 0x01, 0x08, 0x38, 0x7e, 0xb8, 0x7f]);
        assert_eq!(v[..6], [0.0, 2f32.powi(-9), 2f32.powi(-6), 1.0, 448.0, -1.0]);
        assert!(v[6].is_nan());
        assert_eq!(to_f32(StoredDtype::Fp8E5m2, &[0x3c, 0xc0, 0x7b]), [1.0, -2.0, 57344.0]);
    }

    #[test]
    fn exponents_are_powers_of_two_and_bytes_are_not() {
        let dtype = StoredDtype::from_safetensors("F8_E8M0").unwrap();
        assert_eq!((dtype.name(), dtype.bytes(3)), ("F8_E8M0", Some(3)));
        let v = to_f32(dtype, &[127, 128, 120, 1, 254, 0, 255]);
        assert_eq!(v[..4], [1.0, 2.0, 0.007_812_5, f32::MIN_POSITIVE]);
        assert_eq!(v[4..6], [2f32.powi(127), f32::MIN_POSITIVE / 2.0]);
        assert!(v[6].is_nan());
        assert_eq!(to_f32(StoredDtype::from_safetensors("U8").unwrap(), &[127]), [127.0]);
    }

    #[test]
    fn integers_keep_their_sign() {
        let bytes = (-2i32).to_le_bytes();
        assert_eq!(integers(StoredDtype::Signed(4), &bytes).collect::<Vec<_>>(), [-2]);
        assert_eq!(integers(StoredDtype::Signed(2), &bytes).collect::<Vec<_>>(), [-2, -1]);
        assert_eq!(integers(StoredDtype::Byte, &[200]).collect::<Vec<_>>(), [200]);
        assert_eq!(integers(StoredDtype::Signed(8), &7i64.to_le_bytes()).collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn sizes_refuse_partial_blocks() {
        assert_eq!(StoredDtype::Kind(WeightKind::Q4_1).bytes(64), Some(40));
        assert_eq!(StoredDtype::Kind(WeightKind::Q4_1).bytes(63), None);
        assert_eq!(StoredDtype::Kind(WeightKind::Q4K).bytes(128), None);
        assert_eq!(StoredDtype::F32.bytes(u64::MAX), None);
    }
}
