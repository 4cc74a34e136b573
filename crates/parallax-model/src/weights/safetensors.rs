//! Safetensors shards: the header of each file, checked against the file's length.
//!
//! The safetensors crate reads whole files; a node that holds four of thirty layers wants four thirtieths of
//! them, so the header (a JSON map) is read here and tensors by position. Writing uses the crate.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    Source, TensorInfo, WeightIndex, check_disjoint,
    decode::{READABLE, StoredDtype},
};
use crate::error::OpenError;

const MAX_HEADER_BYTES: u64 = 100 << 20;

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// `model.safetensors.index.json`: which file holds which tensor.
#[derive(Default, Deserialize)]
pub(crate) struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
pub(crate) fn open_dir(dir: &Path) -> Result<WeightIndex, OpenError> {
    let (files, map) = shards(dir)?;
    let files = files.iter().map(|file| Source::open(file)).collect::<Result<Vec<_>, _>>()?;
    let built = index(files)?;
    match map.weight_map.keys().find(|name| !built.tensors.contains_key(*name)) {
        Some(name) => Err(OpenError::MissingTensor { name: name.clone(), n_tensors: built.tensors.len() }),
        None => Ok(built),
    }
}

/// The files of a checkpoint: those that its index names, which need not be there, or the only one.
pub(crate) fn shards(dir: &Path) -> Result<(Vec<PathBuf>, ShardIndex), OpenError> {
    let index_path = dir.join("model.safetensors.index.json");
    if !index_path.is_file() {
        return Ok((vec![dir.join("model.safetensors")], ShardIndex::default()));
    }
    let text = std::fs::read_to_string(&index_path)
        .map_err(|source| OpenError::Io { path: index_path.clone(), source })?;
    let map: ShardIndex = serde_json::from_str(&text).map_err(|e| OpenError::Corrupt {
        path: index_path.clone(),
        reason: format!("not a shard index: {e}"),
    })?;
    let names: BTreeSet<&String> = map.weight_map.values().collect();
    // A shard is a file beside its index, nothing else.
    if let Some(name) = names.iter().find(|name| name.contains(['/', '\\']) || name.as_str() == "..") {
        return Err(OpenError::Corrupt {
            path: index_path,
            reason: format!("shard name {name:?} is not a plain file name"),
        });
    }
    Ok((names.into_iter().map(|name| dir.join(name)).collect(), map))
}

/// Reads the headers of all files into one index.
pub(crate) fn index(files: impl IntoIterator<Item = Source>) -> Result<WeightIndex, OpenError> {
    let files: Vec<Source> = files.into_iter().collect();
    let mut tensors = BTreeMap::new();
    for (i, file) in files.iter().enumerate() {
        for (name, info) in header(file, i)? {
            if tensors.insert(name.clone(), info).is_some() {
                return Err(file.corrupt(format!("tensor {name:?} is in two shards")));
            }
        }
    }
    Ok(WeightIndex::new(files, tensors))
}

fn header(file: &Source, file_index: usize) -> Result<BTreeMap<String, TensorInfo>, OpenError> {
    if file.len() < 8 {
        return Err(file.corrupt("shorter than a safetensors header"));
    }
    let mut len = [0; 8];
    len.copy_from_slice(&file.read(0, 8)?);
    let len = u64::from_le_bytes(len);
    if len > MAX_HEADER_BYTES || len > file.len() - 8 {
        return Err(file.corrupt(format!("header of {len} bytes in a file of {}", file.len())));
    }
    let data_start = 8 + len;
    let text = file.read(8, len)?;
    let map: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&text).map_err(|e| file.corrupt(format!("header is not JSON: {e}")))?;
    let mut out = BTreeMap::new();
    for (name, value) in map {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry =
            serde_json::from_value(value).map_err(|e| file.corrupt(format!("tensor {name:?}: {e}")))?;
        let Some(dtype) = StoredDtype::from_safetensors(&entry.dtype) else {
            return Err(OpenError::UnsupportedDtype { name, dtype: entry.dtype, readable: READABLE });
        };
        let (start, end) = entry.data_offsets;
        let wanted = dtype.bytes_of(&entry.shape);
        let fits = end <= file.len() - data_start && end.checked_sub(start) == wanted && wanted.is_some();
        if !fits {
            return Err(file.corrupt(format!(
                "tensor {name:?} of shape {:?} claims bytes {start}..{end} of {}",
                entry.shape,
                file.len() - data_start
            )));
        }
        let info = TensorInfo {
            shape: entry.shape,
            dtype,
            file: file_index,
            offset: data_start + start,
            len: end - start,
            interleaved_heads: None,
        };
        out.insert(name, info);
    }
    check_disjoint(file, &out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use safetensors::tensor::{Dtype, TensorView, serialize};
    use serde_json::json;

    use super::*;

    fn sample() -> Vec<u8> {
        let a: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let b: Vec<u8> = (0..4).flat_map(|i| half::bf16::from_f32(i as f32).to_le_bytes()).collect();
        serialize(
            [
                ("a", TensorView::new(Dtype::F32, vec![2, 3], &a).unwrap()),
                ("b", TensorView::new(Dtype::BF16, vec![4], &b).unwrap()),
            ],
            None,
        )
        .unwrap()
    }

    #[test]
    fn values_match_the_writing_crate() {
        let index = index([Source::memory("m", sample())]).unwrap();
        assert_eq!(index.read_shaped("a", &[2, 3]).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(index.read_f32("b").unwrap(), [0.0, 1.0, 2.0, 3.0]);
        assert!(index.read_shaped("a", &[3, 2]).unwrap_err().to_string().contains("[3, 2]"));
        assert!(index.read_f32("c").unwrap_err().to_string().contains("\"c\""));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = sample();
        for len in 0..whole.len() {
            assert!(index([Source::memory("cut", whole[..len].to_vec())]).is_err(), "{len}");
        }
    }

    #[test]
    fn headers_that_lie_about_the_data_are_refused() {
        let whole = sample();
        let n = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&whole[8..8 + n]).unwrap();
        let lie = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut header = header.clone();
            change(&mut header);
            let text = header.to_string().into_bytes();
            let file = [&(text.len() as u64).to_le_bytes()[..], &text, &whole[8 + n..]].concat();
            index([Source::memory("lie", file)]).unwrap_err().to_string()
        };
        for (field, value) in [
            ("data_offsets", json!([0, 1u64 << 62])),
            ("data_offsets", json!([24, 0])),
            ("data_offsets", json!([-1, 23])),
            ("shape", json!([1u64 << 40, 1u64 << 40])),
            ("shape", json!([2, 4])),
        ] {
            let error = lie(&|h| h["a"][field] = value.clone());
            assert!(error.contains("lie") && error.contains("\"a\""), "{field} = {value}: {error}");
        }
        let error = lie(&|h| h["b"]["data_offsets"] = json!([16, 24]));
        assert!(error.contains("share bytes"), "{error}");
    }

    #[test]
    fn dimensions_beside_an_empty_one_are_refused_where_nothing_could_have_them() {
        for (shape, fine) in [
            (json!([0, 1u64 << 40]), true),
            (json!([0, 1u64 << 62]), false),
            (json!([0, 1u64 << 40, 1u64 << 40]), false),
        ] {
            let header = json!({"e": {"dtype": "I32", "shape": shape, "data_offsets": [0, 0]}}).to_string();
            let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
            assert_eq!(index([Source::memory("empty", file)]).is_ok(), fine, "{shape}");
        }
    }

    #[test]
    fn shards_are_joined_and_path_tricks_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("one.safetensors"), sample()).unwrap();
        let index_path = dir.path().join("model.safetensors.index.json");
        std::fs::write(&index_path, r#"{"weight_map":{"a":"one.safetensors","b":"one.safetensors"}}"#)
            .unwrap();
        assert_eq!(open_dir(dir.path()).unwrap().tensors.len(), 2);
        std::fs::write(&index_path, r#"{"weight_map":{"z":"one.safetensors"}}"#).unwrap();
        assert!(matches!(open_dir(dir.path()), Err(OpenError::MissingTensor { .. })));
        std::fs::write(&index_path, r#"{"weight_map":{"a":"../one.safetensors"}}"#).unwrap();
        assert!(matches!(open_dir(dir.path()), Err(OpenError::Corrupt { .. })));
    }

    proptest! {
        #[test]
        fn mutated_bytes_never_panic(at in 0usize..300, value: u8) {
            let mut f = sample();
            let n = f.len();
            f[at % n] = value;
            if let Ok(index) = index([Source::memory("mutated", f)]) {
                for name in index.tensors.keys() {
                    let _ = index.read_f32(name);
                }
            }
        }
    }
}
