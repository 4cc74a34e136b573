//! Tensor headers: dtype and shape in front of little-endian payload bytes. Layout in docs/WIRE.md.
//!
//! ```text
//! byte 0      magic 0x54 ('T')
//! byte 1      dtype
//! byte 2      number of dimensions n
//! byte 3      zero
//! 4..4+4n     dimensions, u32 little endian
//! then        payload, row-major, little endian
//! ```

use serde::{Deserialize, Serialize};

use crate::DecodeError;
use crate::limits::{TENSOR_MAX_BYTES, TENSOR_MAX_DIMS};

const MAGIC: u8 = 0x54;

/// Element types that travel between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    Bf16,
    /// 32-bit unsigned integer: token ids.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
            Self::U32 => 4,
        }
    }

    fn from_code(code: u8) -> Result<Self, DecodeError> {
        Ok(match code {
            1 => Self::F32,
            2 => Self::F16,
            3 => Self::Bf16,
            4 => Self::U32,
            _ => return Err(DecodeError::invalid("tensor dtype", code)),
        })
    }
}

/// Dtype and shape of a tensor whose payload fits [`TENSOR_MAX_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHeader {
    dtype: DType,
    shape: Vec<usize>,
    payload_bytes: usize,
}

impl TensorHeader {
    /// A header for a tensor of `shape`.
    ///
    /// # Errors
    /// When there are too many dimensions or the payload would exceed [`TENSOR_MAX_BYTES`].
    pub fn new(dtype: DType, shape: &[usize]) -> Result<Self, DecodeError> {
        if shape.len() > TENSOR_MAX_DIMS {
            return Err(DecodeError::invalid("number of tensor dimensions", shape.len()));
        }
        let mut payload_bytes = dtype.size_bytes();
        for &dim in shape {
            payload_bytes = payload_bytes.saturating_mul(dim);
            if u32::try_from(dim).is_err() {
                return Err(DecodeError::invalid("tensor dimension", dim));
            }
        }
        if payload_bytes > TENSOR_MAX_BYTES {
            return Err(DecodeError::TooLarge {
                what: "tensor",
                limit_bytes: TENSOR_MAX_BYTES,
                got_bytes: payload_bytes,
            });
        }
        Ok(Self { dtype, shape: shape.to_vec(), payload_bytes })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bytes of the payload that follows the header.
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Bytes of the encoded header.
    pub fn header_bytes(&self) -> usize {
        4 + 4 * self.shape.len()
    }

    /// The encoded header, without payload.
    pub fn encode(&self) -> Vec<u8> {
        let n_dims = u8::try_from(self.shape.len()).expect("at most TENSOR_MAX_DIMS");
        let mut bytes = vec![MAGIC, self.dtype.code(), n_dims, 0];
        for &dim in &self.shape {
            bytes.extend_from_slice(&u32::try_from(dim).expect("checked in new").to_le_bytes());
        }
        bytes
    }

    /// Reads a header from the front of `bytes`; returns it and what follows. The payload's presence is not checked.
    ///
    /// # Errors
    /// When the bytes are too short, not a tensor header, or announce more than [`TENSOR_MAX_BYTES`].
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let truncated = |needed_bytes| DecodeError::Truncated {
            what: "tensor header",
            needed_bytes,
            got_bytes: bytes.len(),
        };
        let [magic, dtype, n_dims, zero, rest @ ..] = bytes else { return Err(truncated(4)) };
        if *magic != MAGIC || *zero != 0 {
            return Err(DecodeError::invalid("tensor magic", format!("{magic:#04x} {zero:#04x}")));
        }
        let n_dims = usize::from(*n_dims);
        if n_dims > TENSOR_MAX_DIMS {
            return Err(DecodeError::invalid("number of tensor dimensions", n_dims));
        }
        let (dims, payload) = rest.split_at_checked(4 * n_dims).ok_or_else(|| truncated(4 + 4 * n_dims))?;
        let shape: Vec<usize> =
            dims.chunks_exact(4).map(|d| u32::from_le_bytes([d[0], d[1], d[2], d[3]]) as usize).collect();
        Ok((Self::new(DType::from_code(*dtype)?, &shape)?, payload))
    }

    /// Reads a header and exactly its payload.
    ///
    /// # Errors
    /// As [`TensorHeader::decode`], and when the payload's length is not what the header says.
    pub fn decode_with_payload(bytes: &[u8]) -> Result<(Self, &[u8]), DecodeError> {
        let (header, payload) = Self::decode(bytes)?;
        if payload.len() != header.payload_bytes {
            return Err(DecodeError::Truncated {
                what: "tensor payload",
                needed_bytes: header.payload_bytes,
                got_bytes: payload.len(),
            });
        }
        Ok((header, payload))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wire_bytes_are_pinned() {
        let header = TensorHeader::new(DType::Bf16, &[1, 576]).unwrap();
        assert_eq!(header.encode(), [0x54, 3, 2, 0, 1, 0, 0, 0, 0x40, 2, 0, 0]);
    }

    #[test]
    fn huge_and_overflowing_shapes_are_refused_before_allocation() {
        assert!(TensorHeader::new(DType::F32, &[usize::MAX / 2, 8]).is_err());
        let mut bytes = vec![MAGIC, 1, 8, 0];
        bytes.extend([0xff; 32]);
        assert!(matches!(TensorHeader::decode(&bytes), Err(DecodeError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok((header, rest)) = TensorHeader::decode(&bytes) {
                prop_assert_eq!(header.encode().len() + rest.len(), bytes.len());
            }
        }

        #[test]
        fn headers_round_trip(shape in proptest::collection::vec(0usize..64, 0..4)) {
            let header = TensorHeader::new(DType::F32, &shape).unwrap();
            let bytes = header.encode();
            let (back, rest) = TensorHeader::decode(&bytes).unwrap();
            prop_assert_eq!(back, header);
            prop_assert!(rest.is_empty());
        }
    }
}
