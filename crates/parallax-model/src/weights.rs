//! Weights on disk: one index of tensors under their HF names, whatever container they come from.
//!
//! Files are read by position, never mapped: packing copies every byte into the kernels' layout anyway, a
//! file that shrinks under us is an error instead of a signal, and no unsafe code is needed. Only the byte
//! ranges that are asked for are read (docs/decisions/0010).

mod decode;
pub mod gguf;
mod names;
pub(crate) mod pack;
pub(crate) mod quantized;
mod reader;
pub(crate) mod safetensors;
mod source;

use std::{collections::BTreeMap, ops::Range, path::PathBuf};

pub use decode::StoredDtype;
pub(crate) use decode::to_f32;
pub(crate) use names::{LATENT_PARTS, LONG_ROPE_FACTORS, NEGATED_RATES, ROPE_FACTORS, is_rope_factors};
#[cfg(any(feature = "cpu", test))]
pub(crate) use pack::Rows;
#[cfg(feature = "gpu")]
pub(crate) use pack::Stacked;
#[cfg(feature = "cpu")]
pub(crate) use reader::RowReader;
pub(crate) use source::Source;

use self::quantized::Derived;
use crate::error::OpenError;

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorInfo {
    /// Row-major shape, PyTorch order: [out, in] for a linear weight.
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: StoredDtype,
    /// Index into the files.
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Rows are stored in llama.cpp's interleaved rotary order for this many heads; undone on reading.
    pub(crate) interleaved_heads: Option<usize>,
}

impl TensorInfo {
    /// Rows over the last dimension.
    fn n_rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }
}

/// Tensors of one file that share bytes are a broken header: one of them would be read as something that it is not.
pub(crate) fn check_disjoint(file: &Source, tensors: &BTreeMap<String, TensorInfo>) -> Result<(), OpenError> {
    let mut spans: Vec<(u64, u64, &str)> = tensors
        .iter()
        .map(|(name, t)| (t.offset, t.len, name.as_str()))
        .filter(|(_, len, _)| *len > 0)
        .collect();
    spans.sort_unstable();
    match spans.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        Some(pair) => Err(file.corrupt(format!("tensors {:?} and {:?} share bytes", pair[0].2, pair[1].2))),
        None => Ok(()),
    }
}

/// All tensors of a checkpoint.
#[derive(Debug)]
pub(crate) struct WeightIndex {
    pub(crate) files: Vec<Source>,
    /// As stored.
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
    /// Weights that several stored tensors make up, by plain name. They hide stored tensors of the same name.
    pub(crate) derived: BTreeMap<String, Derived>,
}

impl WeightIndex {
    pub(crate) fn new(files: Vec<Source>, tensors: BTreeMap<String, TensorInfo>) -> Self {
        Self { files, tensors, derived: BTreeMap::new() }
    }

    /// Whether there is a weight of this name, stored or derived.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.derived.contains_key(name)
    }

    /// The shape of a weight, stored or derived.
    pub(crate) fn shape(&self, name: &str) -> Result<&[usize], OpenError> {
        match self.derived.get(name) {
            Some(derived) => Ok(&derived.shape),
            None => Ok(&self.get(name)?.shape),
        }
    }

    /// A stored tensor.
    pub(crate) fn get(&self, name: &str) -> Result<&TensorInfo, OpenError> {
        self.tensors
            .get(name)
            .ok_or_else(|| OpenError::MissingTensor { name: name.to_owned(), n_tensors: self.tensors.len() })
    }

    /// Gives tensors other names where `new` has one.
    pub(crate) fn rename(&mut self, new: impl Fn(&str) -> Option<String>) {
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors = tensors.into_iter().map(|(name, info)| (new(&name).unwrap_or(name), info)).collect();
    }

    /// Paths of the files, empty for embedded ones.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|f| f.path().to_owned()).collect()
    }

    /// Bytes read from all files so far.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.files.iter().map(Source::bytes_read).sum()
    }

    /// The bytes of a stored tensor, rows in HF order.
    pub(crate) fn read_bytes(&self, name: &str) -> Result<(TensorInfo, Vec<u8>), OpenError> {
        let info = self.get(name)?.clone();
        let mut bytes = self.files[info.file].read(info.offset, info.len)?;
        if let Some(heads) = info.interleaved_heads {
            bytes = names::half_split_rows(&bytes, info.shape[0], heads);
        }
        Ok((info, bytes))
    }

    /// The bytes of some rows of a stored tensor, rows in HF order; the rows were compared with the shape.
    fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<u8>, OpenError> {
        let info = self.get(name)?;
        let n = info.n_rows();
        if rows == (0..n) {
            return Ok(self.read_bytes(name)?.1);
        }
        let row = info.len / n.max(1) as u64;
        if info.interleaved_heads.is_some() {
            let (_, bytes) = self.read_bytes(name)?;
            let row = row as usize;
            return bytes.get(rows.start * row..rows.end * row).map(<[u8]>::to_vec).ok_or_else(|| {
                self.files[info.file].corrupt(format!("rows {rows:?} of tensor {name:?} are not there"))
            });
        }
        if rows.end > n {
            return Err(self.files[info.file].corrupt(format!("tensor {name:?} has {n} rows, not {rows:?}")));
        }
        self.files[info.file].read(info.offset + rows.start as u64 * row, rows.len() as u64 * row)
    }

    /// The values as f32, rows in HF order.
    pub(crate) fn read_f32(&self, name: &str) -> Result<Vec<f32>, OpenError> {
        if self.derived.contains_key(name) {
            let n = self.shape(name)?.iter().rev().skip(1).product();
            return self.read_rows_f32(name, 0..n);
        }
        let (info, bytes) = self.read_bytes(name)?;
        Ok(to_f32(info.dtype, &bytes))
    }

    /// The values of some rows, the tensor being seen as a matrix over its last dimension.
    pub(crate) fn read_rows_f32(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>, OpenError> {
        self.reader(name)?.rows_f32(rows)
    }

    /// As [`Self::read_f32`], with the shape the configuration asks for.
    pub(crate) fn read_shaped(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>, OpenError> {
        self.check_shape(name, expected)?;
        self.read_f32(name)
    }

    /// That a weight has this shape; dimensions of one before the last say nothing about where its values lie, and GGUF
    /// files leave them out.
    pub(crate) fn check_shape(&self, name: &str, expected: &[usize]) -> Result<(), OpenError> {
        let found = self.shape(name)?;
        let larger = |shape: &[usize]| shape.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
        if found.last() == expected.last() && larger(found) == larger(expected) {
            return Ok(());
        }
        Err(OpenError::Shape { name: name.to_owned(), found: found.to_vec(), expected: expected.to_vec() })
    }
}
