//! The recordings in `tests/golden/arch` with their checkpoints, and what is run of each.

use std::ops::Range;

use base64::{Engine, prelude::BASE64_STANDARD};
use parallax_model::{
    Checkpoint, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, Want, WeightDtype,
    logprob::argmax,
};
use serde_json::Value;
use tempfile::TempDir;

use super::seeded::{Tensor, as_recorded, checkpoint_of, hf_tensors, ids, largest, names, recorded, worst};

/// One recording and its checkpoint.
pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) golden: Value,
    pub(crate) checkpoint: Checkpoint,
    _dir: TempDir,
}

pub(crate) fn floats(value: &Value) -> Vec<f32> {
    let bytes = BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

pub(crate) fn fixtures() -> Vec<Fixture> {
    names().iter().map(|name| open(name)).collect()
}

pub(crate) fn open(name: &str) -> Fixture {
    rounded(name, |_| ())
}

/// With weights that `round` made of the recorded ones.
pub(crate) fn rounded(name: &str, round: impl FnMut(&mut Tensor)) -> Fixture {
    let golden = recorded(name);
    let mut tensors = hf_tensors(&golden);
    tensors.iter_mut().for_each(round);
    let (dir, checkpoint) = checkpoint_of(&golden, &tensors);
    let checkpoint = as_recorded(&golden, checkpoint);
    Fixture { name: name.to_owned(), golden, checkpoint, _dir: dir }
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
    largest(f.golden["prompts"].as_array().unwrap().iter().map(case))
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
