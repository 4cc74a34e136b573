//! From stored rows to weights packed for the kernels: kept as they are where the kernels can run them, else
//! quantised or rounded to what was asked for.

use std::ops::Range;

use parallax_kernels::{PackedWeight, WeightKind, dtype::BLOCK};

use super::{WeightIndex, reader::RowReader};
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

/// The kind that rows of `k` get under `dtype`, `native` where that asks for none. Rows that are no whole number of blocks
/// take the next format that fits: k-quants one with blocks of 32, those bf16.
pub(crate) fn target(dtype: WeightDtype, native: WeightKind, k: usize) -> WeightKind {
    let wanted = dtype.kind().unwrap_or(native);
    let wanted = match wanted {
        _ if k.is_multiple_of(wanted.block().0) => wanted,
        WeightKind::Q4K => WeightKind::Q4_1,
        WeightKind::Q5K => WeightKind::Q5_1,
        WeightKind::Q6K => WeightKind::Q8_0,
        other => other,
    };
    if wanted.block().0 > 1 && !k.is_multiple_of(BLOCK) { WeightKind::Bf16 } else { wanted }
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
        let mut opened: Option<RowReader<'_>> = None;
        for piece in pieces {
            // Pieces of one weight follow each other: what its rows share is read once.
            let reader = match opened.take().filter(|reader| reader.name() == piece.name) {
                Some(reader) => reader,
                None => self.reader(&piece.name)?,
            };
            if reader.k() != k {
                return Err(LoadError::Open(OpenError::Shape {
                    name: piece.name.clone(),
                    found: self.shape(&piece.name)?.to_vec(),
                    expected: vec![piece.n, k],
                }));
            }
            let kind = target(dtype, reader.native(), k);
            match stacks.last_mut() {
                Some(last) if last.kind == kind => {
                    reader.append(piece.range(), kind, &mut last.bytes)?;
                    last.n += piece.n;
                }
                _ => {
                    let mut bytes = Vec::new();
                    reader.append(piece.range(), kind, &mut bytes)?;
                    stacks.push(Stacked { kind, bytes, n: piece.n });
                }
            }
            opened = Some(reader);
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
        let reader = self.reader(&piece.name)?;
        let kind = target(dtype, reader.native(), k);
        let mut stored = Vec::new();
        reader.append(piece.range(), kind, &mut stored)?;
        // Blocks never cross a row.
        let row = stored.len() / piece.n.max(1);
        let bytes: Vec<u8> = order.flat_map(|i| &stored[i * row..(i + 1) * row]).copied().collect();
        drop(stored);
        PackedWeight::from_bytes(kind, &bytes, piece.n, k)
            .map_err(|e| LoadError::Pack { name: piece.name.clone(), reason: e.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ragged_rows_take_the_next_format_that_fits() {
        let kind = |dtype, k| target(dtype, WeightKind::F32, k);
        assert_eq!(kind(WeightDtype::Q4K, 512), WeightKind::Q4K);
        assert_eq!(kind(WeightDtype::Q4K, 96), WeightKind::Q4_1);
        assert_eq!(kind(WeightDtype::Q6K, 96), WeightKind::Q8_0);
        assert_eq!(kind(WeightDtype::Q6K, 90), WeightKind::Bf16);
        assert_eq!(kind(WeightDtype::Native, 90), WeightKind::F32);
    }
}
