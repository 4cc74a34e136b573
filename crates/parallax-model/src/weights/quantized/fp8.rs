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
    /// Rows and columns of the blocks that share a scale.
    block: [usize; 2],
    scales: Vec<f32>,
}

impl Scaled {
    /// Reads the scales, whose bytes may be `exponents` without being called so.
    pub(super) fn open(
        index: &WeightIndex,
        codes: &str,
        scale: &str,
        exponents: bool,
        block: [usize; 2],
        [n, k]: [usize; 2],
    ) -> Result<Self, OpenError> {
        let dtype = index.get(codes)?.dtype;
        let (info, bytes) = index.read_bytes(scale)?;
        let scales = to_f32(if exponents { StoredDtype::Exponent } else { info.dtype }, &bytes);
        let blocks = [n.div_ceil(block[0]), k.div_ceil(block[1])];
        let block = match info.shape.as_slice() {
            [] | [1] | [1, 1] => [n, k],
            [rows] | [rows, 1] if *rows == n => [1, k],
            shape if *shape == blocks => block,
            other => {
                return Err(OpenError::Shape {
                    name: scale.to_owned(),
                    found: other.to_vec(),
                    expected: blocks.to_vec(),
                });
            }
        };
        Ok(Self { codes: codes.to_owned(), dtype, k, block, scales })
    }

    /// The values of some rows, as bytes.
    pub(crate) fn rows(&self, index: &WeightIndex, rows: Range<usize>) -> Result<Vec<u8>, OpenError> {
        let mut values = to_f32(self.dtype, &index.read_rows(&self.codes, rows.clone())?);
        for (row, values) in rows.zip(values.chunks_exact_mut(self.k)) {
            let of_row = &self.scales[row / self.block[0] * self.k.div_ceil(self.block[1])..];
            for (values, scale) in values.chunks_mut(self.block[1]).zip(of_row) {
                values.iter_mut().for_each(|value| *value *= scale);
            }
        }
        Ok(floats(&values))
    }
}
