//! The recordings in `tests/golden/arch`, their checkpoints, and what is run of each.
//!
//! The weights are not stored: `make.py` there and this file make the same ones from names and counters.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use parallax_model::{
    Checkpoint, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, Want, WeightDtype,
    logprob::argmax,
};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/arch")
}

/// FNV-1a, 64 bits.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3))
}

/// The `i`-th of a tensor's values in -1..1 (SplitMix64 over a counter).
fn uniform(hash: u64, i: u64) -> f32 {
    let mut z = hash.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// One recording and its checkpoint.
pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) golden: Value,
    pub(crate) checkpoint: Checkpoint,
    _dir: TempDir,
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| u32::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

pub(crate) fn floats(value: &Value) -> Vec<f32> {
    let bytes = BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn write_weights(golden: &Value, path: &Path, round: impl Fn(&str, &[usize], Vec<f32>) -> Vec<f32>) {
    let mut tensors = Vec::new();
    for entry in golden["tensors"].as_array().unwrap() {
        let name = entry[0].as_str().unwrap();
        let shape: Vec<usize> = ids(&entry[1]).iter().map(|n| *n as usize).collect();
        let (offset, scale) = (entry[2].as_f64().unwrap() as f32, entry[3].as_f64().unwrap() as f32);
        let (n, hash) = (shape.iter().product::<usize>() as u64, fnv1a(name));
        let values = round(name, &shape, (0..n).map(|i| offset + scale * uniform(hash, i)).collect());
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push((name, shape, bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

pub(crate) fn fixtures() -> Vec<Fixture> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    paths.sort();
    paths.iter().map(|path| open(path)).collect()
}

pub(crate) fn open(path: &Path) -> Fixture {
    rounded(path, |_, _, values| values)
}

/// With weights that `round` made of the recorded ones, by name and shape.
pub(crate) fn rounded(path: &Path, round: impl Fn(&str, &[usize], Vec<f32>) -> Vec<f32>) -> Fixture {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), golden["config"].to_string()).unwrap();
    write_weights(&golden, &dir.path().join("model.safetensors"), round);
    let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
    if golden["long_context"] == true {
        checkpoint = checkpoint.with_long_context().unwrap();
    }
    let name = path.file_stem().unwrap().to_string_lossy().into_owned();
    Fixture { name, golden, checkpoint, _dir: dir }
}

/// Room for three sequences of 256 tokens.
pub(crate) fn options(f: &Fixture, layers: Range<usize>, dtype: WeightDtype) -> LoadOptions {
    LoadOptions { layers, dtype, kv_pages: 48, ..LoadOptions::whole(&f.checkpoint) }
}

/// Rows of sequence `id`, whose pages and state are its own.
pub(crate) fn rows(id: u32, start: usize, rows: usize, want: Want) -> SequenceRows {
    let pages = (16 * id..16 * id + 16).collect();
    let (start, rows) = (start as u32, rows as u32);
    SequenceRows { state: id, start, rows, pages, want, ..SequenceRows::default() }
}

pub(crate) fn one(start: usize, n: usize, want: Want) -> ForwardBatch {
    ForwardBatch { sequences: vec![rows(0, start, n, want)] }
}

pub(crate) fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

pub(crate) fn forward(stage: &mut Stage, batch: &ForwardBatch, tokens: &[u32]) -> Vec<f32> {
    stage.forward(batch, StageInput::Tokens(tokens)).unwrap().logits
}

/// Logits of the recorded rows of each prompt; returns the largest difference.
pub(crate) fn prompts(f: &Fixture, stage: &mut Stage) -> f32 {
    let vocab = f.checkpoint.config().vocab;
    let case = |case: &Value| {
        let tokens = ids(&case["tokens"]);
        let logits = forward(stage, &one(0, tokens.len(), Want::AllLogits), &tokens);
        let picked: Vec<f32> = ids(&case["rows"])
            .iter()
            .flat_map(|r| logits[*r as usize * vocab..(*r as usize + 1) * vocab].to_vec())
            .collect();
        worst(&picked, &floats(&case["logits"]))
    };
    f.golden["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(case)
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

/// 32 tokens, one at a time.
pub(crate) fn greedy(f: &Fixture, stage: &mut Stage) -> Vec<u32> {
    let golden = &f.golden["greedy"];
    let mut step = ids(&golden["prompt"]);
    let (mut chosen, mut position) = (Vec::new(), 0);
    for _ in 0..golden["tokens"].as_array().unwrap().len() {
        let logits = forward(stage, &one(position, step.len(), Want::LastLogits), &step);
        position += step.len();
        step = vec![argmax(&logits) as u32];
        chosen.push(step[0]);
    }
    chosen
}

/// Several prompts of unlike length in one batch.
pub(crate) fn ragged(f: &Fixture, stage: &mut Stage) -> (f32, Vec<f32>) {
    let prompts: Vec<Vec<u32>> = f.golden["ragged"]["tokens"].as_array().unwrap().iter().map(ids).collect();
    let sequences = prompts.iter().zip(0..).map(|(p, id)| rows(id, 0, p.len(), Want::LastLogits)).collect();
    let logits = forward(stage, &ForwardBatch { sequences }, &prompts.concat());
    (worst(&logits, &floats(&f.golden["ragged"]["logits"])), logits)
}
