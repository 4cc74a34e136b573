//! Rows of a weight, some at a time. What all rows share (scales, the groups of the inputs) is read once; as floats, no more
//! rows are held than are converted at a time.

use std::ops::Range;

use parallax_kernels::{
    KernelError, WeightKind,
    dtype::{dequantize, quantize},
};

use super::{
    StoredDtype, WeightIndex,
    quantized::{Coded, Mxfp4, Scaled},
    to_f32,
};
use crate::error::{LoadError, OpenError};

/// Rows converted at a time, to bound the memory of what is in between.
pub(super) const ROWS_AT_ONCE: usize = 256;

/// A weight, seen as a matrix [N, K] over its last dimension, whose rows have one format of the kernels.
#[derive(Debug)]
pub(crate) struct RowReader<'a> {
    index: &'a WeightIndex,
    name: &'a str,
    n: usize,
    k: usize,
    form: Form,
    /// Rows read at a time: all of those that are sorted on reading.
    at_once: usize,
}

/// Where rows come from.
#[derive(Debug)]
pub(super) enum Form {
    /// A tensor as it is stored.
    Plain(StoredDtype),
    /// Eight-bit floats.
    Scaled(Scaled),
    /// Integers.
    Coded(Coded),
    /// Four-bit floats.
    Mxfp4(Mxfp4),
}

impl WeightIndex {
    /// Opens a weight, stored or derived, for its rows.
    pub(crate) fn reader<'a>(&'a self, name: &'a str) -> Result<RowReader<'a>, OpenError> {
        let shape = self.shape(name)?;
        let k = shape.last().copied().unwrap_or(1);
        let n: usize = shape.iter().rev().skip(1).product();
        let (form, at_once) = match self.derived.get(name) {
            Some(_) if n == 0 || k == 0 => {
                let (found, expected) = (shape.to_vec(), vec![1, 1]);
                return Err(OpenError::Shape { name: name.to_owned(), found, expected });
            }
            Some(derived) => (self.open_derived(derived, [n, k])?, ROWS_AT_ONCE),
            None => {
                let info = self.get(name)?;
                let at_once = if info.interleaved_heads.is_some() { n.max(1) } else { ROWS_AT_ONCE };
                (Form::Plain(info.dtype), at_once)
            }
        };
        Ok(RowReader { index: self, name, n, k, form, at_once })
    }
}

impl RowReader<'_> {
    pub(crate) fn name(&self) -> &str {
        self.name
    }

    pub(crate) fn k(&self) -> usize {
        self.k
    }

    /// What the rows are read as.
    pub(crate) fn kind(&self) -> WeightKind {
        match &self.form {
            Form::Plain(StoredDtype::Kind(kind)) => *kind,
            Form::Plain(_) | Form::Scaled(_) => WeightKind::F32,
            Form::Coded(coded) => coded.blocks().unwrap_or(WeightKind::F32),
            Form::Mxfp4(_) => WeightKind::Mxfp4,
        }
    }

    /// What "native" makes of them: bf16 of what is no format of the kernels.
    pub(crate) fn native(&self) -> WeightKind {
        match &self.form {
            Form::Scaled(_) => WeightKind::Bf16,
            Form::Coded(coded) => coded.blocks().unwrap_or(WeightKind::Bf16),
            Form::Plain(_) | Form::Mxfp4(_) => self.kind(),
        }
    }

    fn check(&self, rows: &Range<usize>) -> Result<(), OpenError> {
        if rows.start <= rows.end && rows.end <= self.n {
            return Ok(());
        }
        Err(OpenError::Shape {
            name: self.name.to_owned(),
            found: vec![self.n, self.k],
            expected: vec![rows.end, self.k],
        })
    }

    /// Some rows as [`Self::kind`] says.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Result<Vec<u8>, OpenError> {
        self.check(&rows)?;
        match &self.form {
            Form::Plain(dtype) => {
                let bytes = self.index.read_rows(self.name, rows)?;
                Ok(match dtype {
                    StoredDtype::Kind(_) => bytes,
                    other => floats(&to_f32(*other, &bytes)),
                })
            }
            Form::Scaled(scaled) => scaled.rows(self.index, rows),
            Form::Coded(coded) => coded.rows(self.index, rows),
            Form::Mxfp4(blocks) => blocks.rows(self.index, rows),
        }
    }

    /// The values of some rows.
    pub(crate) fn rows_f32(&self, rows: Range<usize>) -> Result<Vec<f32>, OpenError> {
        self.check(&rows)?;
        let mut values = Vec::with_capacity(rows.len() * self.k);
        for part in self.parts(rows) {
            values.extend(to_f32(StoredDtype::Kind(self.kind()), &self.rows(part)?));
        }
        Ok(values)
    }

    /// Puts some rows behind others of the same format.
    pub(crate) fn append(
        &self,
        rows: Range<usize>,
        kind: WeightKind,
        out: &mut Vec<u8>,
    ) -> Result<(), LoadError> {
        self.check(&rows)?;
        let from = self.kind();
        if kind == from && matches!(self.form, Form::Plain(_)) {
            let bytes = self.rows(rows)?;
            if out.is_empty() {
                *out = bytes;
            } else {
                out.extend_from_slice(&bytes);
            }
            return Ok(());
        }
        let failed = |e: KernelError| LoadError::Pack { name: self.name.to_owned(), reason: e.to_string() };
        let bytes_of_row = |kind: WeightKind| {
            let (values, bytes) = kind.block();
            self.k / values * bytes
        };
        out.reserve(rows.len() * bytes_of_row(kind));
        for part in self.parts(rows) {
            let bytes = self.rows(part)?;
            if kind == from {
                out.extend_from_slice(&bytes);
                continue;
            }
            for some in bytes.chunks((ROWS_AT_ONCE * bytes_of_row(from)).max(1)) {
                let values = dequantize(from, some).map_err(failed)?;
                out.extend(quantize(kind, &values).map_err(failed)?);
            }
        }
        Ok(())
    }

    /// The rows as they are read.
    fn parts(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (step, end) = (self.at_once, rows.end);
        rows.step_by(step).map(move |first| first..end.min(first + step))
    }
}

/// Values as bytes.
pub(super) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Source, TensorInfo};

    /// Two tensors of 600 rows of 32 values, one sorted on reading.
    fn index() -> WeightIndex {
        let (n, k) = (600, 32);
        let bytes = floats(&(0..2 * n * k).map(|i| i as f32).collect::<Vec<_>>());
        let info = |i: usize, interleaved_heads| TensorInfo {
            shape: vec![n, k],
            dtype: StoredDtype::F32,
            file: 0,
            offset: (i * n * k * 4) as u64,
            len: (n * k * 4) as u64,
            interleaved_heads,
        };
        let tensors = [("plain".to_owned(), info(0, None)), ("pairs".to_owned(), info(1, Some(6)))];
        WeightIndex::new(vec![Source::memory("m", bytes)], tensors.into())
    }

    #[test]
    fn parts_put_together_are_the_rows_and_every_byte_is_read_once() {
        for name in ["plain", "pairs"] {
            let index = index();
            let all = index.read_f32(name).unwrap();
            let before = index.bytes_read();
            let reader = index.reader(name).unwrap();
            assert_eq!(reader.rows_f32(0..600).unwrap(), all, "{name}");
            assert_eq!(index.bytes_read() - before, 600 * 32 * 4, "{name}");
            assert_eq!(reader.rows_f32(250..520).unwrap(), all[250 * 32..520 * 32], "{name}");
            let mut out = Vec::new();
            reader.append(10..300, WeightKind::Bf16, &mut out).unwrap();
            reader.append(300..311, WeightKind::Bf16, &mut out).unwrap();
            let rounded = quantize(WeightKind::Bf16, &all[10 * 32..311 * 32]).unwrap();
            assert!(out == rounded, "{name}");
            assert!(
                reader.rows(599..601).is_err() && reader.append(0..601, WeightKind::F32, &mut out).is_err()
            );
            assert_eq!(reader.rows(600..600).unwrap(), [0u8; 0]);
        }
    }

    #[test]
    fn few_rows_are_read_at_a_time() {
        let index = index();
        let parts = |name: &str| index.reader(name).unwrap().parts(3..600).collect::<Vec<_>>();
        assert_eq!(parts("plain"), [3..259, 259..515, 515..600]);
        assert_eq!(parts("pairs").len(), 1, "sorting needs all rows of the tensor");
    }
}
