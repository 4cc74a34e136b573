//! The seeded models of `tests/golden/arch` as checkpoints, what is recorded of them, and how far apart numbers are.
//!
//! The weights are not stored: `make.py` there and this file make the same ones from names and counters.

use std::path::{Path, PathBuf};

use parallax_model::Checkpoint;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::Value;
use tempfile::TempDir;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/arch")
}

/// Of all recordings.
pub(crate) fn names() -> Vec<String> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    paths.sort();
    paths.iter().map(|p| p.file_stem().unwrap().to_string_lossy().into_owned()).collect()
}

/// The recording of this name.
pub(crate) fn recorded(name: &str) -> Value {
    let text = std::fs::read_to_string(folder().join(format!("{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| u32::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

/// The longest prompt of a recording.
pub(crate) fn longest_prompt(golden: &Value) -> Vec<u32> {
    ids(&golden["prompts"].as_array().unwrap().last().unwrap()["tokens"])
}

/// Row-major, in PyTorch's order.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// Values of a tensor: SplitMix64 of the FNV-1a hash of its name plus a counter, multiples of 2^-23 in -1..1.
pub(crate) fn uniform(name: &str, n: usize) -> impl Iterator<Item = f32> {
    let hash = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    (1..=n as u64).map(move |i| {
        let mut z = hash.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// The tensors of a recording under their Hugging Face names.
pub(crate) fn hf_tensors(golden: &Value) -> Vec<Tensor> {
    let tensor = |entry: &Value| {
        let name = entry[0].as_str().unwrap();
        let shape: Vec<usize> = ids(&entry[1]).iter().map(|n| *n as usize).collect();
        let (offset, scale) = (entry[2].as_f64().unwrap() as f32, entry[3].as_f64().unwrap() as f32);
        let values = uniform(name, shape.iter().product()).map(|v| offset + scale * v).collect();
        Tensor { name: name.to_owned(), shape, values }
    };
    golden["tensors"].as_array().unwrap().iter().map(tensor).collect()
}

/// In f32.
pub(crate) fn write_safetensors(tensors: &[Tensor], path: &Path) {
    let of_values = |t: &Tensor| t.values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let bytes: Vec<Vec<u8>> = tensors.iter().map(of_values).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, bytes)| (&t.name, TensorView::new(Dtype::F32, t.shape.clone(), bytes).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// A directory with the recording's config.json and these tensors.
pub(crate) fn checkpoint_of(golden: &Value, tensors: &[Tensor]) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), golden["config"].to_string()).unwrap();
    write_safetensors(tensors, &dir.path().join("model.safetensors"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// With the long factors, where the recording has them.
pub(crate) fn as_recorded(golden: &Value, checkpoint: Checkpoint) -> Checkpoint {
    if golden["long_context"] == true { checkpoint.with_long_context().unwrap() } else { checkpoint }
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// At least 0, and not a number where one of them is none, which `f32::max` would leave out.
pub(crate) fn largest(values: impl IntoIterator<Item = f32>) -> f32 {
    values.into_iter().fold(0.0, |m, v| if v > m || v.is_nan() { v } else { m })
}

/// The largest difference.
pub(crate) fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    largest(got.iter().zip(expected).map(|(a, b)| (a - b).abs()))
}

/// The largest difference, relative to the largest expected number where that is above 1.
pub(crate) fn worst_of_largest(got: &[f32], expected: &[f32]) -> f32 {
    worst(got, expected) / largest(expected.iter().map(|v| v.abs())).max(1.0)
}

/// The difference of a row of `width` numbers by root mean square, relative to its numbers: the middle one of the rows, and the
/// largest. Infinite where a number is none.
pub(crate) fn relative(got: &[f32], expected: &[f32], width: usize) -> [f64; 2] {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let of_row = |(a, b): (&[f32], &[f32])| {
        let error: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
        let size: f64 = b.iter().map(|v| square(*v)).sum();
        if error.is_nan() { f64::INFINITY } else { (error / size).sqrt() }
    };
    assert_eq!(got.len(), expected.len());
    let rows = got.chunks_exact(width).zip(expected.chunks_exact(width));
    let mut rows: Vec<f64> = rows.map(of_row).collect();
    rows.sort_by(f64::total_cmp);
    [rows[rows.len() / 2], rows[rows.len() - 1]]
}
