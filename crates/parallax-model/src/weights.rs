//! Weights on disk: one index of tensors under their HF names, whatever container they come from.
//!
//! Files are read by position, never mapped: packing copies every byte into the kernels' layout anyway, a
//! file that shrinks under us is an error instead of a signal, and no unsafe code is needed. Only the byte
//! ranges that are asked for are read.

mod decode;
pub mod gguf;
mod names;
pub(crate) mod safetensors;
mod source;

use std::{collections::BTreeMap, path::PathBuf};

pub use decode::StoredDtype;
pub(crate) use decode::to_f32;
pub(crate) use names::{LONG_ROPE_FACTORS, ROPE_FACTORS, is_rope_factors};
pub(crate) use source::Source;

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

/// All tensors of a checkpoint.
#[derive(Debug)]
pub(crate) struct WeightIndex {
    pub(crate) files: Vec<Source>,
    pub(crate) tensors: BTreeMap<String, TensorInfo>,
}

impl WeightIndex {
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

    /// The stored bytes, rows in HF order.
    pub(crate) fn read_bytes(&self, name: &str) -> Result<(TensorInfo, Vec<u8>), OpenError> {
        let info = self.get(name)?.clone();
        let mut bytes = self.files[info.file].read(info.offset, info.len)?;
        if let Some(heads) = info.interleaved_heads {
            bytes = names::half_split_rows(&bytes, info.shape[0], heads);
        }
        Ok((info, bytes))
    }

    /// The values as f32, rows in HF order.
    pub(crate) fn read_f32(&self, name: &str) -> Result<(TensorInfo, Vec<f32>), OpenError> {
        let (info, bytes) = self.read_bytes(name)?;
        let values = to_f32(info.dtype, &bytes);
        Ok((info, values))
    }

    /// As [`Self::read_f32`], with the shape the configuration asks for.
    pub(crate) fn read_shaped(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>, OpenError> {
        self.check_shape(name, expected)?;
        Ok(self.read_f32(name)?.1)
    }

    pub(crate) fn check_shape(&self, name: &str, expected: &[usize]) -> Result<(), OpenError> {
        let info = self.get(name)?;
        if info.shape == expected {
            return Ok(());
        }
        Err(OpenError::Shape {
            name: name.to_owned(),
            found: info.shape.clone(),
            expected: expected.to_vec(),
        })
    }
}
