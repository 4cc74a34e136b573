//! GGUF container: metadata and tensor index, versions 2 and 3, little endian; in one file or in several parts.
//!
//! Specification: the ggml project's docs/gguf.md. Every count and length in the file is hostile until it was
//! compared with the bytes that are left; a broken file is an error that names the offset.

pub(crate) mod split;

use std::{collections::BTreeMap, path::Path};

use super::{
    Source, TensorInfo, WeightIndex, check_disjoint,
    decode::{READABLE, StoredDtype, to_f32},
    names,
};
use crate::{config::ModelConfig, error::OpenError};

/// A metadata value. Numbers of all widths are widened.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MetaValue {
    /// Unsigned integer.
    Unsigned(u64),
    /// Signed integer.
    Signed(i64),
    /// Float.
    Float(f64),
    /// Boolean.
    Bool(bool),
    /// Text; bytes that are not UTF-8 are replaced.
    String(String),
    /// Array.
    Array(Vec<MetaValue>),
}

/// An opened GGUF file, with all its parts where it has several.
#[derive(Debug)]
pub struct GgufFile {
    /// In the order that the tensors count.
    sources: Vec<Source>,
    metadata: BTreeMap<String, MetaValue>,
    tensors: BTreeMap<String, TensorInfo>,
}

const MAGIC: &[u8; 4] = b"GGUF";
const MAX_ARRAY_DEPTH: usize = 4;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const CHUNK: u64 = 1 << 18;

/// Reads forward through the header in chunks.
struct Cursor<'a> {
    source: &'a Source,
    buffer: Vec<u8>,
    buffer_start: u64,
    at: u64,
}

impl Cursor<'_> {
    fn left(&self) -> u64 {
        self.source.len() - self.at
    }

    fn take(&mut self, n: u64) -> Result<&[u8], OpenError> {
        if n > self.left() {
            return Err(self.source.corrupt(format!(
                "the header ends early: {n} bytes wanted at offset {}, {} left",
                self.at,
                self.left()
            )));
        }
        let end = self.at + n;
        if self.at < self.buffer_start || end > self.buffer_start + self.buffer.len() as u64 {
            let len = n.max(CHUNK).min(self.left());
            self.buffer = self.source.read(self.at, len)?;
            self.buffer_start = self.at;
        }
        let start = (self.at - self.buffer_start) as usize;
        self.at = end;
        Ok(&self.buffer[start..start + n as usize])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], OpenError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, OpenError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, OpenError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn string(&mut self) -> Result<String, OpenError> {
        let len = self.u64()?;
        Ok(String::from_utf8_lossy(self.take(len)?).into_owned())
    }

    /// A count of things that take at least `min_bytes` each.
    fn count(&mut self, what: &str, min_bytes: u64) -> Result<usize, OpenError> {
        let at = self.at;
        let n = self.u64()?;
        if n > self.left() / min_bytes {
            return Err(self.source.corrupt(format!("{n} {what} at offset {at} do not fit into the file")));
        }
        Ok(n as usize)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<MetaValue, OpenError> {
        Ok(match kind {
            0 => MetaValue::Unsigned(self.array::<1>()?[0].into()),
            1 => MetaValue::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => MetaValue::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => MetaValue::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => MetaValue::Unsigned(self.u32()?.into()),
            5 => MetaValue::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => MetaValue::Float(f32::from_le_bytes(self.array()?).into()),
            7 => MetaValue::Bool(self.array::<1>()?[0] != 0),
            8 => MetaValue::String(self.string()?),
            9 if depth < MAX_ARRAY_DEPTH => {
                let kind = self.u32()?;
                let min_bytes = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    _ => 8,
                };
                let n = self.count("array elements", min_bytes)?;
                let mut items = Vec::with_capacity(n);
                for _ in 0..n {
                    items.push(self.value(kind, depth + 1)?);
                }
                MetaValue::Array(items)
            }
            10 => MetaValue::Unsigned(self.u64()?),
            11 => MetaValue::Signed(i64::from_le_bytes(self.array()?)),
            12 => MetaValue::Float(f64::from_le_bytes(self.array()?)),
            other => {
                return Err(self
                    .source
                    .corrupt(format!("metadata value of unknown kind {other} before offset {}", self.at)));
            }
        })
    }
}

fn stored_dtype(name: &str, kind: u32) -> Result<StoredDtype, OpenError> {
    StoredDtype::from_gguf(kind).ok_or_else(|| OpenError::UnsupportedDtype {
        name: name.to_owned(),
        dtype: format!("GGUF type {kind}"),
        readable: READABLE,
    })
}

impl GgufFile {
    /// Reads the header of a file; of all parts, where the file is one of several.
    ///
    /// # Errors
    /// The file cannot be read, is not GGUF, or its header does not fit its length; a part is missing, or is part of
    /// something else.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::read(path)?.with_other_parts(path)
    }

    /// Reads the header of this one file.
    fn read(path: &Path) -> Result<Self, OpenError> {
        Self::parse(Source::open(path)?)
    }

    /// Reads the header of a file in memory; `name` is for messages.
    ///
    /// # Errors
    /// As [`Self::open`]; and one of several parts, which are read from files only.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self, OpenError> {
        let file = Self::parse(Source::memory(name, bytes))?;
        match file.part() {
            None => Ok(file),
            Some(_) => {
                Err(file.sources[0].corrupt("it is one of several parts, which are read from files only"))
            }
        }
    }

    fn parse(source: Source) -> Result<Self, OpenError> {
        let mut c = Cursor { source: &source, buffer: Vec::new(), buffer_start: 0, at: 0 };
        if c.take(4)? != MAGIC {
            return Err(source.corrupt("it does not start with GGUF"));
        }
        let version = c.u32()?;
        if !(2..=3).contains(&version) {
            return Err(source.corrupt(format!("GGUF version {version}, readable are 2 and 3")));
        }
        let n_tensors = c.count("tensors", 24)?;
        let n_meta = c.count("metadata entries", 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..n_meta {
            let key = c.string()?;
            let kind = c.u32()?;
            let value = c.value(kind, 0)?;
            metadata.insert(key, value);
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..n_tensors {
            let name = c.string()?;
            let n_dims = c.u32()?;
            if n_dims > MAX_DIMS {
                return Err(source.corrupt(format!("tensor {name:?} has {n_dims} dimensions")));
            }
            let mut shape = Vec::new();
            for _ in 0..n_dims {
                shape.push(usize::try_from(c.u64()?).unwrap_or(usize::MAX));
            }
            shape.reverse();
            let dtype = stored_dtype(&name, c.u32()?)?;
            let offset = c.u64()?;
            let row = shape.last().copied().unwrap_or(1) as u64;
            let len = dtype.bytes(row).and_then(|_| dtype.bytes_of(&shape)).ok_or_else(|| {
                source.corrupt(format!(
                    "tensor {name:?} of shape {shape:?} is no whole number of {} blocks",
                    dtype.name()
                ))
            })?;
            let info = TensorInfo { shape, dtype, file: 0, offset, len, interleaved_heads: None };
            if tensors.insert(name.clone(), info).is_some() {
                return Err(source.corrupt(format!("tensor {name:?} appears twice")));
            }
        }
        let header_end = c.at;
        let alignment = match metadata.get("general.alignment") {
            Some(MetaValue::Unsigned(a)) if a.is_power_of_two() && *a <= 1 << 20 => *a,
            None => DEFAULT_ALIGNMENT,
            Some(other) => return Err(source.corrupt(format!("alignment {other:?}"))),
        };
        let data_start = header_end.next_multiple_of(alignment);
        for (name, info) in &mut tensors {
            let end = info
                .offset
                .checked_add(data_start)
                .and_then(|start| start.checked_add(info.len).map(|end| (start, end)))
                .filter(|(_, end)| *end <= source.len());
            let Some((start, _)) = end else {
                return Err(source.corrupt(format!(
                    "tensor {name:?} reaches past the end of the file ({} bytes)",
                    source.len()
                )));
            };
            if !info.offset.is_multiple_of(alignment) {
                let offset = info.offset;
                return Err(source.corrupt(format!(
                    "tensor {name:?} at offset {offset} is not aligned to {alignment} bytes"
                )));
            }
            info.offset = start;
        }
        check_disjoint(&source, &tensors)?;
        Ok(Self { sources: vec![source], metadata, tensors })
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.metadata.get(key)
    }

    /// A text value.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            MetaValue::String(s) => Some(s),
            _ => None,
        }
    }

    /// A non-negative integer.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            MetaValue::Unsigned(v) => Some(*v),
            MetaValue::Signed(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// A float, or an integer as one.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            MetaValue::Float(v) => Some(*v),
            MetaValue::Unsigned(v) => Some(*v as f64),
            MetaValue::Signed(v) => Some(*v as f64),
            _ => None,
        }
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            MetaValue::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// The strings of an array; entries of another kind are left out.
    pub fn strings(&self, key: &str) -> Option<Vec<&str>> {
        match self.get(key)? {
            MetaValue::Array(items) => Some(
                items
                    .iter()
                    .filter_map(|v| if let MetaValue::String(s) = v { Some(s.as_str()) } else { None })
                    .collect(),
            ),
            _ => None,
        }
    }

    /// The numbers of an array.
    pub fn floats(&self, key: &str) -> Option<Vec<f32>> {
        match self.get(key)? {
            MetaValue::Array(items) => Some(
                items
                    .iter()
                    .filter_map(|v| if let MetaValue::Float(v) = v { Some(*v as f32) } else { None })
                    .collect(),
            ),
            _ => None,
        }
    }

    /// The integers of an array.
    pub fn integers(&self, key: &str) -> Option<Vec<i64>> {
        match self.get(key)? {
            MetaValue::Array(items) => Some(
                items
                    .iter()
                    .filter_map(|v| match v {
                        MetaValue::Unsigned(v) => i64::try_from(*v).ok(),
                        MetaValue::Signed(v) => Some(*v),
                        _ => None,
                    })
                    .collect(),
            ),
            _ => None,
        }
    }

    /// Number of entries of an array.
    pub fn string_count(&self, key: &str) -> Option<usize> {
        match self.get(key)? {
            MetaValue::Array(items) => Some(items.len()),
            _ => None,
        }
    }

    /// Whether a tensor of this (GGUF) name exists.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Values of a tensor by its GGUF name, in stored order.
    ///
    /// # Errors
    /// No such tensor, or the file cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, OpenError> {
        let info = self.tensors.get(name).ok_or_else(|| OpenError::MissingTensor {
            name: name.to_owned(),
            n_tensors: self.tensors.len(),
        })?;
        Ok(to_f32(info.dtype, &self.sources[info.file].read(info.offset, info.len)?))
    }

    /// The index under HF names; what is not a weight of the forward pass is left out.
    pub(crate) fn into_index(self, config: &ModelConfig) -> Result<WeightIndex, OpenError> {
        let architecture = crate::arch::of(config.family);
        let mut tensors = BTreeMap::new();
        for (name, mut info) in self.tensors {
            let Some(name) = names::canonical(&name, architecture) else { continue };
            if let Some((heads, rows)) = names::interleaved_heads(architecture, config, &name) {
                if info.shape.first() != Some(&rows) {
                    let expected = vec![rows, config.hidden];
                    return Err(OpenError::Shape { name, found: info.shape, expected });
                }
                info.interleaved_heads = Some(heads);
            }
            tensors.insert(name, info);
        }
        Ok(WeightIndex::new(self.sources, tensors))
    }
}

#[cfg(test)]
mod tests;
