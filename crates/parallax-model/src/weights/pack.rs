//! From stored rows to weights packed for the kernels: kept as they are where the kernels can run them, else
//! quantised or rounded to what was asked for.

use std::ops::Range;

use parallax_kernels::{
    KernelError, PackedWeight, WeightKind,
    dtype::{BLOCK, dequantize, quantize},
};

use super::{WeightIndex, quantized::StoredRows};
use crate::{
    error::{LoadError, OpenError},
    options::WeightDtype,
};

/// Rows `first..first + n` of a tensor that is seen as a matrix [rows, K]: a whole linear weight, one expert of
/// [E, N, K], or one part of a fused weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) name: String,
    pub(crate) first: usize,
    pub(crate) n: usize,
}

impl Rows {
    pub(crate) fn range(&self) -> Range<usize> {
        self.first..self.first + self.n
    }
}

/// Rows converted at a time, to bound the memory of floats in between.
const ROWS_AT_ONCE: usize = 256;

/// The kind that rows of `k` stored as `stored` get under `dtype`. Rows that are no whole number of blocks take the
/// next format that fits: k-quants one with blocks of 32, those bf16.
pub(crate) fn target(dtype: WeightDtype, stored: &StoredRows, k: usize) -> WeightKind {
    let wanted = dtype.kind().unwrap_or(stored.native);
    let wanted = match wanted {
        _ if k.is_multiple_of(wanted.block().0) => wanted,
        WeightKind::Q4K => WeightKind::Q4_1,
        WeightKind::Q5K => WeightKind::Q5_1,
        WeightKind::Q6K => WeightKind::Q8_0,
        other => other,
    };
    if wanted.block().0 > 1 && !k.is_multiple_of(BLOCK) { WeightKind::Bf16 } else { wanted }
}

/// The same rows in another format.
fn convert(stored: &StoredRows, to: WeightKind, k: usize) -> Result<Vec<u8>, KernelError> {
    let (values, bytes) = stored.kind.block();
    let row = k / values * bytes;
    let mut out = Vec::with_capacity(stored.bytes.len() / row.max(1) * (k / to.block().0 * to.block().1));
    for rows in stored.bytes.chunks(row.max(1) * ROWS_AT_ONCE) {
        out.extend(quantize(to, &dequantize(stored.kind, rows)?)?);
    }
    Ok(out)
}

/// Rows of one format, one below the other, as they are stored.
#[derive(Debug)]
pub(crate) struct Stacked {
    pub(crate) kind: WeightKind,
    pub(crate) bytes: Vec<u8>,
    pub(crate) n: usize,
}

impl WeightIndex {
    /// The rows in the formats that `dtype` asks for; neighbours of one format are stacked.
    pub(crate) fn stack(
        &self,
        pieces: &[Rows],
        k: usize,
        dtype: WeightDtype,
    ) -> Result<Vec<Stacked>, LoadError> {
        let mut stacks: Vec<Stacked> = Vec::new();
        for piece in pieces {
            let error = |e: KernelError| LoadError::Pack { name: piece.name.clone(), reason: e.to_string() };
            let shape = self.shape(&piece.name)?;
            if shape.last() != Some(&k) {
                return Err(LoadError::Open(OpenError::Shape {
                    name: piece.name.clone(),
                    found: shape.to_vec(),
                    expected: vec![piece.n, k],
                }));
            }
            let stored = self.stored_rows(&piece.name, piece.range())?;
            let kind = target(dtype, &stored, k);
            let bytes =
                if kind == stored.kind { stored.bytes } else { convert(&stored, kind, k).map_err(error)? };
            match stacks.last_mut() {
                Some(last) if last.kind == kind => {
                    last.bytes.extend(bytes);
                    last.n += piece.n;
                }
                _ => stacks.push(Stacked { kind, bytes, n: piece.n }),
            }
        }
        Ok(stacks)
    }

    /// The same as packed weights, one for each stack.
    pub(crate) fn pack(
        &self,
        pieces: &[Rows],
        k: usize,
        dtype: WeightDtype,
    ) -> Result<Vec<PackedWeight>, LoadError> {
        let name = pieces.first().map_or_else(String::new, |p| p.name.clone());
        self.stack(pieces, k, dtype)?
            .into_iter()
            .map(|stack| PackedWeight::from_bytes(stack.kind, &stack.bytes, stack.n, k))
            .collect::<Result<_, _>>()
            .map_err(|e| LoadError::Pack { name, reason: e.to_string() })
    }

    /// The rows in another order: number `order[i]` of them becomes row `i`.
    pub(crate) fn pack_ordered(
        &self,
        piece: &Rows,
        order: impl Iterator<Item = usize>,
        k: usize,
        dtype: WeightDtype,
    ) -> Result<PackedWeight, LoadError> {
        let error = |e: KernelError| LoadError::Pack { name: piece.name.clone(), reason: e.to_string() };
        let stored = self.stored_rows(&piece.name, piece.range())?;
        // Blocks never cross a row.
        let row = stored.bytes.len() / piece.n.max(1);
        let bytes = order.flat_map(|i| &stored.bytes[i * row..(i + 1) * row]).copied().collect();
        let stored = StoredRows { bytes, ..stored };
        let kind = target(dtype, &stored, k);
        let bytes =
            if kind == stored.kind { stored.bytes } else { convert(&stored, kind, k).map_err(error)? };
        PackedWeight::from_bytes(kind, &bytes, piece.n, k).map_err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ragged_rows_take_the_next_format_that_fits() {
        let stored = StoredRows { kind: WeightKind::F32, native: WeightKind::F32, bytes: Vec::new() };
        let kind = |dtype, k| target(dtype, &stored, k);
        assert_eq!(kind(WeightDtype::Q4K, 512), WeightKind::Q4K);
        assert_eq!(kind(WeightDtype::Q4K, 96), WeightKind::Q4_1);
        assert_eq!(kind(WeightDtype::Q6K, 96), WeightKind::Q8_0);
        assert_eq!(kind(WeightDtype::Q6K, 90), WeightKind::Bf16);
        assert_eq!(kind(WeightDtype::Native, 90), WeightKind::F32);
    }
}
