//! Eight-bit floats with scales: DeepSeek's blocks of 128 by 128 (`weight_scale_inv`), and the scales per tensor or per
//! output row of compressed-tensors and fbgemm (`weight_scale`). In all of them weight = code * scale.

use std::ops::Range;

use parallax_kernels::WeightKind;

use super::{StoredRows, floats};
use crate::{
    error::OpenError,
    weights::{WeightIndex, to_f32},
};

impl WeightIndex {
    pub(super) fn fp8_rows(
        &self,
        codes: &str,
        scale: &str,
        block: [usize; 2],
        rows: Range<usize>,
        [n, k]: [usize; 2],
    ) -> Result<StoredRows, OpenError> {
        let info = self.get(codes)?;
        let mut values = to_f32(info.dtype, &self.read_rows(codes, rows.clone())?);
        let (scale_info, scale_bytes) = self.read_bytes(scale)?;
        let scales = to_f32(scale_info.dtype, &scale_bytes);
        let blocks = [n.div_ceil(block[0]), k.div_ceil(block[1])];
        // Which scale holds for a row and a column.
        let at: Box<dyn Fn(usize, usize) -> usize> = match scale_info.shape.as_slice() {
            [] | [1] | [1, 1] => Box::new(|_, _| 0),
            [rows] | [rows, 1] if *rows == n => Box::new(|row, _| row),
            shape if *shape == blocks => {
                Box::new(|row, column| row / block[0] * blocks[1] + column / block[1])
            }
            other => {
                return Err(OpenError::Shape {
                    name: scale.to_owned(),
                    found: other.to_vec(),
                    expected: blocks.to_vec(),
                });
            }
        };
        for (row, values) in rows.zip(values.chunks_exact_mut(k.max(1))) {
            for (column, value) in values.iter_mut().enumerate() {
                *value *= scales[at(row, column)];
            }
        }
        Ok(floats(&values, WeightKind::Bf16))
    }
}
