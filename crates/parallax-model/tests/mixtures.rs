//! Families with experts, latent attention and recurrent layers against transformers (numbers in `tests/golden/arch`),
//! and against themselves: other cuts, chunks, batches, and sequences that are preempted and begun again.
//!
//! The weights are not stored: `make.py` there and this file make the same ones from names and counters.

#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]

use std::{ops::Range, path::Path};

use parallax_model::{
    Checkpoint, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, Want, WeightDtype,
    logprob::argmax,
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Largest difference of a logit.
const TOLERANCE: f32 = 1e-4;

const FIXTURES: [&str; 13] = [
    "mixtral",
    "qwen3-moe",
    "qwen3-moe-plain",
    "gpt-oss",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "kimi-k2",
    "glm4-moe",
    "minimax-m2",
    "qwen3-next",
    "qwen3.5",
    "qwen3.5-moe",
];

/// Values of a tensor: SplitMix64 of the FNV-1a hash of its name plus a counter, multiples of 2^-23 in -1..1.
fn uniform(name: &str, n: u64) -> impl Iterator<Item = f32> {
    let hash = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    (1..=n).map(move |i| {
        let mut z = hash.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// Floats of base64, little endian.
fn floats(text: &Value) -> Vec<f32> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut n_bits, mut bytes) = (0u32, 0, Vec::new());
    for digit in text.as_str().unwrap().bytes().map_while(|c| ALPHABET.iter().position(|a| *a == c)) {
        bits = bits << 6 | digit as u32;
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push((bits >> n_bits) as u8);
            bits &= (1 << n_bits) - 1;
        }
    }
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

struct Fixture {
    name: &'static str,
    golden: Value,
    checkpoint: Checkpoint,
    _dir: TempDir,
}

fn fixture(name: &'static str) -> Fixture {
    let path = format!("{}/../../tests/golden/arch/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), golden["config"].to_string()).unwrap();
    write_weights(&golden, &dir.path().join("model.safetensors"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    Fixture { name, golden, checkpoint, _dir: dir }
}

fn write_weights(golden: &Value, path: &Path) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for tensor in golden["tensors"].as_array().unwrap() {
        let name = tensor[0].as_str().unwrap();
        let n = tensor[1].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).product();
        let (offset, scale) = (tensor[2].as_f64().unwrap() as f32, tensor[3].as_f64().unwrap() as f32);
        let start = data.len();
        data.extend(uniform(name, n).flat_map(|v| (offset + scale * v).to_le_bytes()));
        let entry = json!({"dtype": "F32", "shape": tensor[1], "data_offsets": [start, data.len()]});
        header.insert(name.to_owned(), entry);
    }
    let header = Value::Object(header).to_string();
    let size = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [size.as_slice(), header.as_bytes(), &data].concat()).unwrap();
}

fn load(f: &Fixture, layers: Range<usize>, dtype: WeightDtype) -> Stage {
    let options = LoadOptions { layers, dtype, kv_pages: 64, ..LoadOptions::whole(&f.checkpoint) };
    Stage::load(&f.checkpoint, &options).unwrap()
}

/// Rows of sequence `id`, whose pages are its own.
fn rows(id: u64, start: usize, n: usize) -> SequenceRows {
    let pages = (id as u32 * 16..id as u32 * 16 + 16).collect();
    let (start, rows) = (start as u32, n as u32);
    SequenceRows { id, start, rows, pages, want: Want::AllLogits, ..SequenceRows::default() }
}

fn forward(stage: &mut Stage, sequences: Vec<SequenceRows>, tokens: &[u32]) -> Vec<f32> {
    stage.forward(&ForwardBatch { sequences }, StageInput::Tokens(tokens)).unwrap().logits
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

#[test]
fn experts_latents_and_states_agree_with_transformers() {
    for name in FIXTURES {
        let f = fixture(name);
        let vocab = f.checkpoint.config().vocab;
        let mut stage = load(&f, 0..f.checkpoint.config().n_layers, WeightDtype::F32);
        let mut largest = 0.0f32;
        for case in f.golden["prompts"].as_array().unwrap() {
            let tokens = ids(&case["tokens"]);
            let logits = forward(&mut stage, vec![rows(0, 0, tokens.len())], &tokens);
            let picked: Vec<f32> = ids(&case["rows"])
                .iter()
                .flat_map(|r| &logits[*r as usize * vocab..(*r as usize + 1) * vocab])
                .copied()
                .collect();
            largest = largest.max(worst(&picked, &floats(&case["logits"])));
        }
        let (mut step, mut position, mut chosen) = (ids(&f.golden["greedy"]["prompt"]), 0, Vec::new());
        for _ in 0..32 {
            let logits = forward(&mut stage, vec![rows(1, position, step.len())], &step);
            position += step.len();
            step = vec![argmax(&logits[logits.len() - vocab..]) as u32];
            chosen.push(step[0]);
        }
        let prompts: Vec<Vec<u32>> =
            f.golden["ragged"]["tokens"].as_array().unwrap().iter().map(ids).collect();
        let batch = prompts.iter().enumerate().map(|(i, p)| rows(i as u64, 0, p.len())).collect();
        let logits = forward(&mut stage, batch, &prompts.concat());
        let mut end = 0;
        let last = prompts.iter().flat_map(|p| {
            end += p.len();
            logits[(end - 1) * vocab..end * vocab].to_vec()
        });
        let ragged = worst(&last.collect::<Vec<f32>>(), &floats(&f.golden["ragged"]["logits"]));
        println!("{name:<20} logits {largest:.1e}  ragged {ragged:.1e}");
        assert!(largest < TOLERANCE && ragged < TOLERANCE, "{name}: {largest} {ragged}");
        assert_eq!(chosen, ids(&f.golden["greedy"]["tokens"]), "{name}");
    }
}

#[test]
fn cuts_chunks_batches_and_formats_keep_every_bit() {
    for name in FIXTURES {
        let f = fixture(name);
        let n_layers = f.checkpoint.config().n_layers;
        let tokens = ids(&f.golden["prompts"].as_array().unwrap().last().unwrap()["tokens"]);
        let tokens = &tokens[..40];
        for dtype in [WeightDtype::F32, WeightDtype::Q8_0] {
            let mut whole = load(&f, 0..n_layers, dtype);
            let expected = bits(&forward(&mut whole, vec![rows(0, 0, 40)], tokens));
            let what = format!("{} {dtype}", f.name);

            let mut x = Vec::new();
            for layers in [0..1, 1..n_layers - 1, n_layers - 1..n_layers] {
                let input =
                    if layers.start == 0 { StageInput::Tokens(tokens) } else { StageInput::Hidden(&x) };
                let batch = ForwardBatch { sequences: vec![rows(0, 0, 40)] };
                let output = load(&f, layers, dtype).forward(&batch, input).unwrap();
                x = if output.logits.is_empty() { output.hidden } else { output.logits };
            }
            assert_eq!(bits(&x), expected, "{what}: stages");

            // Chunks beside another sequence, which is begun anew each time as after a preemption.
            let mut chunks = Vec::new();
            for (start, end) in [(0, 3), (3, 4), (4, 29), (29, 40)] {
                let n = end - start;
                let batch = vec![rows(1, 0, n), rows(2, start, n)];
                let logits = forward(&mut whole, batch, &[&tokens[..n], &tokens[start..end]].concat());
                let (other, own) = logits.split_at(logits.len() / 2);
                assert_eq!(bits(other), expected[..other.len()], "{what}: begun anew");
                chunks.extend(bits(own));
            }
            assert_eq!(chunks, expected, "{what}: chunks in a batch");
        }
    }
}

#[test]
fn a_recurrent_state_is_continued_or_refused_and_released() {
    let f = fixture("qwen3-next");
    let mut stage = load(&f, 0..4, WeightDtype::F32);
    assert!(stage.is_recurrent());
    forward(&mut stage, vec![rows(1, 0, 3)], &[1, 2, 3]);
    let again = ForwardBatch { sequences: vec![rows(1, 2, 1)] };
    let refused = stage.forward(&again, StageInput::Tokens(&[3])).unwrap_err().to_string();
    assert!(refused.contains("run it again from 0"), "{refused}");
    forward(&mut stage, vec![rows(1, 3, 1)], &[4]);
    assert_eq!(stage.n_states(), 1);
    stage.release(1);
    assert_eq!(stage.n_states(), 0);
    let gone = ForwardBatch { sequences: vec![rows(1, 4, 1)] };
    assert!(stage.forward(&gone, StageInput::Tokens(&[5])).is_err());
}
