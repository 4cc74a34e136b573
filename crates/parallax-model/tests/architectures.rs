//! Every architecture against transformers: tiny random checkpoints whose numbers are in `tests/golden/arch`.
//!
//! The weights are not stored: `make.py` there and this file make the same ones from names and counters.

#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use parallax_model::{
    Checkpoint, Family, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, StateSave, Want,
    WeightDtype, logprob::argmax,
};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::Value;
use tempfile::TempDir;

/// Largest difference of a logit, and of a hidden value relative to the largest of its layer.
const TOLERANCE: f32 = 1e-4;

fn folder() -> PathBuf {
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
struct Fixture {
    name: String,
    golden: Value,
    checkpoint: Checkpoint,
    _dir: TempDir,
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| u32::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    let bytes = BASE64_STANDARD.decode(value.as_str().unwrap()).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn write_weights(golden: &Value, path: &Path) {
    let mut tensors = Vec::new();
    for entry in golden["tensors"].as_array().unwrap() {
        let name = entry[0].as_str().unwrap();
        let shape: Vec<usize> = ids(&entry[1]).iter().map(|n| *n as usize).collect();
        let (offset, scale) = (entry[2].as_f64().unwrap() as f32, entry[3].as_f64().unwrap() as f32);
        let (n, hash) = (shape.iter().product::<usize>() as u64, fnv1a(name));
        let bytes: Vec<u8> = (0..n).flat_map(|i| (offset + scale * uniform(hash, i)).to_le_bytes()).collect();
        tensors.push((name, shape, bytes));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn fixtures() -> Vec<Fixture> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    paths.sort();
    paths.iter().map(|path| open(path)).collect()
}

fn open(path: &Path) -> Fixture {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), golden["config"].to_string()).unwrap();
    write_weights(&golden, &dir.path().join("model.safetensors"));
    let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
    if golden["long_context"] == true {
        checkpoint = checkpoint.with_long_context().unwrap();
    }
    let name = path.file_stem().unwrap().to_string_lossy().into_owned();
    Fixture { name, golden, checkpoint, _dir: dir }
}

fn load(f: &Fixture, layers: Range<usize>, dtype: WeightDtype) -> Stage {
    let options = LoadOptions { layers, dtype, kv_pages: 48, ..LoadOptions::whole(&f.checkpoint) };
    Stage::load(&f.checkpoint, &options).unwrap()
}

/// Rows of sequence `id`, whose pages and state are its own.
fn rows(id: u32, start: usize, rows: usize, want: Want) -> SequenceRows {
    let pages = (16 * id..16 * id + 16).collect();
    let (start, rows) = (start as u32, rows as u32);
    SequenceRows { state: id, start, rows, pages, want, ..SequenceRows::default() }
}

fn one(start: usize, n: usize, want: Want) -> ForwardBatch {
    ForwardBatch { sequences: vec![rows(0, start, n, want)] }
}

fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn forward(stage: &mut Stage, batch: &ForwardBatch, tokens: &[u32]) -> Vec<f32> {
    stage.forward(batch, StageInput::Tokens(tokens)).unwrap().logits
}

/// Logits of the recorded rows of each prompt; returns the largest difference.
fn prompts(f: &Fixture, stage: &mut Stage) -> f32 {
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
    f.golden["prompts"].as_array().unwrap().iter().map(case).fold(0.0, f32::max)
}

/// Rows behind each layer, and behind the final norm: one stage per layer.
fn hidden(f: &Fixture) -> f32 {
    let prompts = f.golden["prompts"].as_array().unwrap();
    let case = prompts.iter().find(|case| case.get("hidden").is_some()).unwrap();
    let tokens = ids(&case["tokens"]);
    let mut x: Vec<f32> = Vec::new();
    let mut difference = 0.0f32;
    for (i, expected) in case["hidden"].as_array().unwrap().iter().enumerate() {
        let mut stage = load(f, i..i + 1, WeightDtype::F32);
        let input = if i == 0 { StageInput::Tokens(&tokens) } else { StageInput::Hidden(&x) };
        let output = stage.forward(&one(0, tokens.len(), Want::Nothing), input).unwrap();
        let expected = floats(expected);
        let largest = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
        difference = difference.max(worst(&output.hidden, &expected) / largest);
        x = output.hidden;
    }
    difference
}

/// 32 tokens, one at a time.
fn greedy(f: &Fixture, stage: &mut Stage) -> Vec<u32> {
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
fn ragged(f: &Fixture, stage: &mut Stage) -> (f32, Vec<f32>) {
    let prompts: Vec<Vec<u32>> = f.golden["ragged"]["tokens"].as_array().unwrap().iter().map(ids).collect();
    let sequences = prompts.iter().zip(0..).map(|(p, id)| rows(id, 0, p.len(), Want::LastLogits)).collect();
    let logits = forward(stage, &ForwardBatch { sequences }, &prompts.concat());
    (worst(&logits, &floats(&f.golden["ragged"]["logits"])), logits)
}

#[test]
fn every_architecture_agrees_with_transformers() {
    let mut failures = Vec::new();
    for f in &fixtures() {
        let mut stage = load(f, 0..f.checkpoint.config().n_layers, WeightDtype::F32);
        let (logits, hidden, ragged) = (prompts(f, &mut stage), hidden(f), ragged(f, &mut stage).0);
        let same = greedy(f, &mut stage) == ids(&f.golden["greedy"]["tokens"]);
        println!(
            "{:<24} logits {logits:.1e}  hidden {hidden:.1e}  ragged {ragged:.1e}  greedy {}",
            f.name,
            if same { "equal" } else { "DIFFERENT" }
        );
        if !(logits < TOLERANCE && hidden < TOLERANCE && ragged < TOLERANCE && same) {
            failures.push(f.name.clone());
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn cuts_chunks_and_batches_do_not_change_a_bit() {
    for f in &fixtures() {
        let n_layers = f.checkpoint.config().n_layers;
        let prompts = f.golden["prompts"].as_array().unwrap();
        let tokens = ids(&prompts.last().unwrap()["tokens"]);
        let n = tokens.len();
        for dtype in [WeightDtype::F32, WeightDtype::Q8_0] {
            let mut whole = load(f, 0..n_layers, dtype);
            let expected = bits(&forward(&mut whole, &one(0, n, Want::AllLogits), &tokens));
            let what = format!("{} {dtype}", f.name);

            let mut x = Vec::new();
            for layers in [0..1, 1..n_layers - 1, n_layers - 1..n_layers] {
                let input =
                    if layers.start == 0 { StageInput::Tokens(&tokens) } else { StageInput::Hidden(&x) };
                let output = load(f, layers, dtype).forward(&one(0, n, Want::AllLogits), input).unwrap();
                x = if output.logits.is_empty() { output.hidden } else { output.logits };
            }
            assert_eq!(bits(&x), expected, "{what}: cut into stages");

            // Chunks beside another sequence, which is begun anew each time as after a preemption.
            let mut chunks = Vec::new();
            for (start, end) in [(0, 3), (3, 4), (4, n - 1), (n - 1, n)] {
                let n = end - start;
                let sequences = vec![rows(1, 0, n, Want::AllLogits), rows(2, start, n, Want::AllLogits)];
                let tokens = [&tokens[..n], &tokens[start..end]].concat();
                let logits = forward(&mut whole, &ForwardBatch { sequences }, &tokens);
                let (other, own) = logits.split_at(logits.len() / 2);
                assert_eq!(bits(other), expected[..other.len()], "{what}: begun anew");
                chunks.extend(bits(own));
            }
            assert_eq!(chunks, expected, "{what}: chunks");

            let together = ragged(f, &mut whole).1;
            let prompts = f.golden["ragged"]["tokens"].as_array().unwrap().iter().map(ids);
            let alone: Vec<f32> =
                prompts.flat_map(|p| forward(&mut whole, &one(0, p.len(), Want::LastLogits), &p)).collect();
            assert_eq!(bits(&together), bits(&alone), "{what}: batch");
        }
    }
}

#[test]
fn threads_and_pages_do_not_change_a_bit() {
    let before = parallax_kernels::pool::threads();
    for f in &fixtures() {
        let n_layers = f.checkpoint.config().n_layers;
        let tokens = ids(&f.golden["prompts"].as_array().unwrap().last().unwrap()["tokens"]);
        let n = tokens.len();
        for dtype in [WeightDtype::F32, WeightDtype::Q8_0] {
            let run = |threads: usize, kv_page_tokens: usize| {
                parallax_kernels::pool::set_threads(threads);
                let kv_pages = n.div_ceil(kv_page_tokens);
                let options = LoadOptions {
                    layers: 0..n_layers,
                    dtype,
                    kv_pages,
                    kv_page_tokens,
                    ..LoadOptions::whole(&f.checkpoint)
                };
                let mut stage = Stage::load(&f.checkpoint, &options).unwrap();
                let pages = (0..kv_pages as u32).rev().collect();
                let sequence = SequenceRows { pages, ..rows(0, 0, n, Want::AllLogits) };
                bits(&forward(&mut stage, &ForwardBatch { sequences: vec![sequence] }, &tokens))
            };
            let expected = run(1, 16);
            for (threads, page_tokens) in [(2, 16), (3, 32), (2, 48)] {
                let what = format!("{} {dtype}: {threads} threads, pages of {page_tokens}", f.name);
                assert_eq!(run(threads, page_tokens), expected, "{what}");
            }
        }
    }
    parallax_kernels::pool::set_threads(before);
}

#[test]
fn a_recurrent_state_is_continued_taken_back_and_kept_as_asked() {
    for name in ["qwen3-next", "qwen3.5", "qwen3.5-moe"] {
        let f = &open(&folder().join(format!("{name}.json")));
        let n_layers = f.checkpoint.config().n_layers;
        let tokens = ids(&f.golden["prompts"].as_array().unwrap().last().unwrap()["tokens"]);
        let n = tokens.len();
        let mut stage = load(f, 0..n_layers, WeightDtype::F32);
        assert!(stage.is_recurrent());
        let expected = bits(&forward(&mut stage, &one(0, n, Want::AllLogits), &tokens));
        let vocab = f.checkpoint.config().vocab;
        let expected = |start: usize, end: usize| &expected[start * vocab..end * vocab];

        let refused =
            stage.forward(&one(2, 1, Want::LastLogits), StageInput::Tokens(&tokens[2..3])).unwrap_err();
        assert!(refused.to_string().contains("run it again from 0"), "{refused}");
        assert!(stage.copy_state(0, stage.state_slots() as u32).is_err());

        // Wrong guesses behind position 4, the state before position 2 kept in a slot of its own.
        let saves = vec![StateSave { position: 2, slot: 9 }];
        let guessed = SequenceRows { drafted: 3, saves, ..rows(0, 0, 7, Want::AllLogits) };
        let wrong = [&tokens[..4], &[1, 1, 1]].concat();
        let got = forward(&mut stage, &ForwardBatch { sequences: vec![guessed] }, &wrong);
        assert_eq!(bits(&got[..4 * vocab]), expected(0, 4), "{name}: before the guesses");
        let got = forward(&mut stage, &one(4, n - 4, Want::AllLogits), &tokens[4..]);
        assert_eq!(bits(&got), expected(4, n), "{name}: taken back");
        // Another sequence on pages that it shares goes on from the copy.
        stage.copy_state(9, 5).unwrap();
        let other = SequenceRows { state: 5, ..rows(0, 2, n - 2, Want::AllLogits) };
        let got = forward(&mut stage, &ForwardBatch { sequences: vec![other] }, &tokens[2..]);
        assert_eq!(bits(&got), expected(2, n), "{name}: from the copy");
    }
}

#[test]
fn every_family_has_a_recording() {
    let fixtures = fixtures();
    for family in Family::ALL {
        assert!(fixtures.iter().any(|f| f.checkpoint.config().family == family), "{family:?}");
    }
}
