//! Four-bit floats in blocks of 32 with an exponent (OCP microscaling formats): GPT-OSS keeps the codes of a block apart from
//! its exponent, the low nibble of byte `i` being weight `2 i`, the high one `2 i + 1`.

use std::ops::Range;

use crate::{error::OpenError, weights::WeightIndex};

/// Blocks [.., K / 32, 16] and exponents [.., K / 32].
#[derive(Debug)]
pub(crate) struct Mxfp4 {
    blocks: String,
    exponents: String,
    /// Blocks of a row.
    in_row: usize,
}

impl Mxfp4 {
    pub(super) fn open(index: &WeightIndex, base: &str, k: usize) -> Result<Self, OpenError> {
        let (blocks, exponents) = (format!("{base}_blocks"), format!("{base}_scales"));
        let in_row = k / 32;
        let n = index.get(&blocks)?.len as usize / (in_row * 16).max(1);
        index.check_elements(&exponents, n * in_row)?;
        Ok(Self { blocks, exponents, in_row })
    }

    /// Some rows, as the kernels have them.
    pub(crate) fn rows(&self, index: &WeightIndex, rows: Range<usize>) -> Result<Vec<u8>, OpenError> {
        // The last dimension of the blocks is within a row: `in_row` of their rows make one of ours.
        let codes = index.read_rows(&self.blocks, rows.start * self.in_row..rows.end * self.in_row)?;
        let exponents = index.read_rows(&self.exponents, rows)?;
        let mut bytes = Vec::with_capacity(exponents.len() * 17);
        for (exponent, codes) in exponents.iter().zip(codes.as_chunks::<16>().0) {
            bytes.push(*exponent);
            let code = |i: usize| codes[i / 2] >> (i % 2 * 4) & 15;
            bytes.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
        }
        Ok(bytes)
    }
}
