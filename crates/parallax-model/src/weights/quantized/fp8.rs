//! Eight-bit floats with scales: DeepSeek's blocks of 128 by 128 (`weight_scale_inv`), and the scales per tensor or per
//! output row of compressed-tensors and fbgemm (`weight_scale`). In all of them weight = code * scale.

use std::ops::Range;

use crate::{
    error::OpenError,
    weights::{StoredDtype, WeightIndex, reader::floats, to_f32},
};

/// Eight-bit floats [N, K] and their scales.
#[derive(Debug)]
pub(crate) struct Scaled {
    codes: String,
    dtype: StoredDtype,
    k: usize,
    scales: Vec<f32>,
    share: Share,
}

/// What shares a scale.
#[derive(Debug)]
enum Share {
    Tensor,
    Row,
    /// Blocks of these sizes, so many in a row.
    Block {
        sizes: [usize; 2],
        in_row: usize,
    },
}

impl Scaled {
    /// Reads the scales, whose bytes may be `exponents` without being called so.
    pub(super) fn open(
        index: &WeightIndex,
        codes: &str,
        scale: &str,
        exponents: bool,
        sizes: [usize; 2],
        [n, k]: [usize; 2],
    ) -> Result<Self, OpenError> {
        let dtype = index.get(codes)?.dtype;
        let (info, bytes) = index.read_bytes(scale)?;
        let scales = to_f32(if exponents { StoredDtype::Exponent } else { info.dtype }, &bytes);
        let blocks = [n.div_ceil(sizes[0]), k.div_ceil(sizes[1])];
        let share = match info.shape.as_slice() {
            [] | [1] | [1, 1] => Share::Tensor,
            [rows] | [rows, 1] if *rows == n => Share::Row,
            shape if *shape == blocks => Share::Block { sizes, in_row: blocks[1] },
            other => {
                return Err(OpenError::Shape {
                    name: scale.to_owned(),
                    found: other.to_vec(),
                    expected: blocks.to_vec(),
                });
            }
        };
        Ok(Self { codes: codes.to_owned(), dtype, k, scales, share })
    }

    /// The values of some rows, as bytes.
    pub(crate) fn rows(&self, index: &WeightIndex, rows: Range<usize>) -> Result<Vec<u8>, OpenError> {
        let mut values = to_f32(self.dtype, &index.read_rows(&self.codes, rows.clone())?);
        for (row, values) in rows.zip(values.chunks_exact_mut(self.k.max(1))) {
            for (column, value) in values.iter_mut().enumerate() {
                *value *= self.scales[match &self.share {
                    Share::Tensor => 0,
                    Share::Row => row,
                    Share::Block { sizes, in_row } => row / sizes[0] * in_row + column / sizes[1],
                }];
            }
        }
        Ok(floats(&values))
    }
}
