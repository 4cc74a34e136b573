//! Stand-ins of every family: as a GGUF file, laid out as llama.cpp's converter does it, each computes what the safetensors
//! checkpoint does that it was made of; stages need their own bytes only; files in parts are one model; adapters compute
//! what merged weights do; quantised files compute what their values do.

#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]

mod adapters;
mod mixed;
mod parts;
mod quantized;
#[path = "../arch/seeded.rs"]
mod seeded;
mod writer;

use std::{ops::Range, path::Path};

use parallax_model::{
    Checkpoint, Family, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, TokenizerError, Want,
    WeightDtype,
};
use serde_json::{Value, json};

use seeded::{as_recorded, bits, checkpoint_of, hf_tensors, longest_prompt, recorded, worst};
use writer::{Age, Gguf, Key, convert};

/// Largest difference of a logit.
const TOLERANCE: f32 = 1e-4;
/// Largest change of the middle row of logits by weights that stay blocks, against the same values in f32: rows that are
/// multiplied with them are rounded to eight bits. Measured were 1.8 % to 3.6 % in GGUF files (whose weights were
/// rounded otherwise then), 2.1 % to 3.4 % in others.
const OF_BLOCKS: f64 = 0.05;

/// The recordings, the name of their architecture in GGUF files, how old the file is, and whether every bit is the same:
/// decays go through an exponential, llama.cpp's order of value heads adds other heads first, and rotary factors are rounded.
const FAMILIES: [(&str, &str, Age, bool); 30] = [
    ("llama", "llama", Age::New, true),
    ("llama-linear-bias", "llama", Age::New, true),
    ("llama-yarn", "llama", Age::New, true),
    ("llama3-rope", "llama", Age::New, false),
    ("smollm2", "llama", Age::New, true),
    ("smollm3", "smollm3", Age::New, true),
    ("mistral", "llama", Age::New, true),
    ("qwen2", "qwen2", Age::New, true),
    ("qwen3", "qwen3", Age::New, true),
    ("gemma2", "gemma2", Age::New, true),
    ("gemma3", "gemma3", Age::New, true),
    ("phi3", "phi3", Age::New, true),
    ("phi3-longrope", "phi3", Age::New, false),
    ("phi3-longrope-long", "phi3", Age::New, false),
    ("glm4", "glm4", Age::New, true),
    ("mixtral", "llama", Age::New, true),
    ("qwen3-moe", "qwen3moe", Age::New, true),
    ("gpt-oss", "gpt-oss", Age::New, true),
    ("deepseek-v2", "deepseek2", Age::New, true),
    ("deepseek-v2", "deepseek2", Age::Old, true),
    ("deepseek-v2-lite", "deepseek2", Age::New, true),
    ("deepseek-v3", "deepseek2", Age::New, true),
    ("kimi-k2", "deepseek2", Age::New, true),
    ("glm4-moe", "glm4moe", Age::New, true),
    ("glm4-moe-air", "glm4moe", Age::New, true),
    ("minimax-m2", "minimax-m2", Age::New, true),
    ("qwen3-next", "qwen3next", Age::New, false),
    ("qwen3-next", "qwen3next", Age::Old, false),
    ("qwen3.5", "qwen35", Age::New, false),
    ("qwen3.5-moe", "qwen35moe", Age::New, false),
];

/// The recording, as far as GGUF files can say what it is.
fn recording(name: &str) -> Value {
    let mut golden = recorded(name);
    match name {
        "qwen3-moe" => all_sparse(&mut golden),
        // The released model's, which GGUF files do not repeat.
        "gpt-oss" => golden["config"]["swiglu_limit"] = json!(7.0),
        // Files that llama.cpp calls llama have no window.
        "mistral" | "mixtral" => golden["config"]["sliding_window"] = Value::Null,
        // The released model's: every fourth layer does not rotate.
        "smollm3" => {
            golden["config"]["no_rope_layers"] = json!([1, 1, 1, 0, 1]);
            golden["config"]["no_rope_layer_interval"] = json!(4);
        }
        // All but the largest divide the scores by sqrt(D).
        "gemma2" => golden["config"]["query_pre_attn_scalar"] = golden["config"]["head_dim"].clone(),
        "gemma3" => {
            golden["config"]["query_pre_attn_scalar"] = golden["config"]["head_dim"].clone();
            // Another than the one that is taken without the key.
            golden["config"]["rope_parameters"]["sliding_attention"]["rope_theta"] = json!(5000.0);
        }
        _ => {}
    }
    golden
}

/// Experts in layer 1 too: what GGUF files of Qwen3-MoE have.
fn all_sparse(golden: &mut Value) {
    let name = |tensor: &Value| tensor[0].as_str().unwrap().to_owned();
    let (dense, mut kept): (Vec<Value>, Vec<Value>) = golden["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .cloned()
        .partition(|tensor| name(tensor).starts_with("model.layers.1.mlp."));
    assert_eq!(dense.len(), 3);
    let experts: Vec<Value> = kept
        .iter()
        .filter(|tensor| name(tensor).starts_with("model.layers.0.mlp."))
        .map(|tensor| {
            let mut tensor = tensor.clone();
            tensor[0] = json!(name(&tensor).replacen(".0.", ".1.", 1));
            tensor
        })
        .collect();
    kept.extend(experts);
    golden["tensors"] = json!(kept);
    golden["config"]["mlp_only_layers"] = json!([]);
}

/// Logits, or the hidden state, behind every token.
fn forward(checkpoint: &Checkpoint, layers: Range<usize>, input: StageInput<'_>, n: usize) -> Vec<f32> {
    forward_in(WeightDtype::F32, checkpoint, layers, input, n).0
}

/// The same with weights in any format, and their bytes.
fn forward_in(
    dtype: WeightDtype,
    checkpoint: &Checkpoint,
    layers: Range<usize>,
    input: StageInput<'_>,
    n: usize,
) -> (Vec<f32>, u64) {
    let options = LoadOptions { layers, dtype, kv_pages: 16, ..LoadOptions::whole(checkpoint) };
    let mut stage = Stage::load(checkpoint, &options).unwrap();
    let rows = SequenceRows {
        rows: n as u32,
        pages: (0..16).collect(),
        want: Want::AllLogits,
        ..SequenceRows::default()
    };
    let output = stage.forward(&ForwardBatch { sequences: vec![rows] }, input).unwrap();
    (if output.logits.is_empty() { output.hidden } else { output.logits }, stage.weight_bytes())
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let layers = 0..checkpoint.config().n_layers;
    forward(checkpoint, layers, StageInput::Tokens(tokens), tokens.len())
}

fn logits_in(dtype: WeightDtype, checkpoint: &Checkpoint, tokens: &[u32]) -> (Vec<f32>, u64) {
    let layers = 0..checkpoint.config().n_layers;
    forward_in(dtype, checkpoint, layers, StageInput::Tokens(tokens), tokens.len())
}

fn write(gguf: &Gguf, path: &Path) -> Checkpoint {
    std::fs::write(path, gguf.bytes()).unwrap();
    Checkpoint::open(path).unwrap()
}

#[test]
fn every_family_computes_what_its_safetensors_do() {
    for (name, architecture, age, exact) in FAMILIES {
        let golden = recording(name);
        let (dir, hf) = checkpoint_of(&golden, &hf_tensors(&golden));
        let gguf = write(&convert(&golden, architecture, age), &dir.path().join("model.gguf"));
        let [gguf, hf] = [gguf, hf].map(|checkpoint| as_recorded(&golden, checkpoint));
        // Mistral without a window is Llama, and goes under that name.
        let family = if name == "mistral" { Family::Llama } else { hf.config().family };
        assert_eq!(gguf.config().family, family, "{name}");
        assert_eq!(gguf.config().parameters(), hf.config().parameters(), "{name}");
        let tokens = longest_prompt(&golden);
        let (got, expected) = (logits(&gguf, &tokens), logits(&hf, &tokens));
        assert!(worst(&got, &expected) < TOLERANCE, "{name}: {}", worst(&got, &expected));
        assert!(!exact || bits(&got) == bits(&expected), "{name}");
    }
}

/// A copy of a file with zeros where the layers do not read.
fn sparse_copy(checkpoint: &Checkpoint, layers: Range<usize>, path: &Path) -> Checkpoint {
    let whole = std::fs::read(&checkpoint.files()[0]).unwrap();
    let header = checkpoint.tensor_spans(0..checkpoint.config().n_layers)[0].offset as usize;
    let mut copy = vec![0; whole.len()];
    copy[..header].copy_from_slice(&whole[..header]);
    for span in checkpoint.tensor_spans(layers) {
        let range = span.offset as usize..(span.offset + span.len) as usize;
        copy[range.clone()].copy_from_slice(&whole[range]);
    }
    std::fs::write(path, copy).unwrap();
    Checkpoint::open(path).unwrap()
}

#[test]
fn a_stage_needs_the_bytes_of_its_layers_and_no_others() {
    for (name, architecture, age, _) in FAMILIES {
        let golden = recording(name);
        let dir = tempfile::tempdir().unwrap();
        let gguf = write(&convert(&golden, architecture, age), &dir.path().join("model.gguf"));
        let gguf = as_recorded(&golden, gguf);
        let (tokens, n) = (longest_prompt(&golden), gguf.config().n_layers);
        let [a, b] = [(0..n / 2, "a.gguf"), (n / 2..n, "b.gguf")]
            .map(|(layers, file)| sparse_copy(&gguf, layers, &dir.path().join(file)))
            .map(|copy| as_recorded(&golden, copy));
        let x = forward(&a, 0..n / 2, StageInput::Tokens(&tokens), tokens.len());
        let x = forward(&b, n / 2..n, StageInput::Hidden(&x), tokens.len());
        let opened = gguf.bytes_read();
        let whole = logits(&gguf, &tokens);
        let read = gguf.bytes_read() - opened;
        let stored: u64 = gguf.tensor_spans(0..n).iter().map(|span| span.len).sum();
        assert!(read <= stored, "{name}: {read} bytes were read of {stored}");
        assert_eq!(bits(&x), bits(&whole), "{name}");
        let zeros = logits(&a, &tokens);
        assert_ne!(bits(&zeros), bits(&x), "{name}: the copy has holes");
    }
}

#[test]
fn layers_that_guess_ahead_are_left_out() {
    let golden = recording("glm4-moe");
    let dir = tempfile::tempdir().unwrap();
    let plain = convert(&golden, "glm4moe", Age::New);
    let expected = logits(&write(&plain, &dir.path().join("plain.gguf")), &longest_prompt(&golden));
    let mut gguf = plain.clone();
    let spare = plain.tensors.iter().filter(|t| t.name.starts_with("blk.3.")).cloned();
    gguf.tensors.extend(spare.map(|mut t| {
        t.name = t.name.replace("blk.3.", "blk.4.");
        t
    }));
    gguf.keys.insert("glm4moe.block_count".to_owned(), Key::Count(5));
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, gguf.bytes()).unwrap();
    // Without the key they are layers like the others.
    assert_eq!(Checkpoint::open(&path).unwrap().config().n_layers, 5);
    gguf.keys.insert("glm4moe.nextn_predict_layers".to_owned(), Key::Count(1));
    let checkpoint = write(&gguf, &path);
    assert_eq!(checkpoint.config().n_layers, 4);
    assert_eq!(bits(&logits(&checkpoint, &longest_prompt(&golden))), bits(&expected));
    let spans = checkpoint.tensor_spans(0..4);
    assert!(spans.iter().all(|span| !span.name.starts_with("model.layers.4.")));
    gguf.keys.insert("glm4moe.nextn_predict_layers".to_owned(), Key::Count(6));
    std::fs::write(&path, gguf.bytes()).unwrap();
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("nextn_predict_layers"), "{error}");
}

/// Gate and up of all experts of a layer as one tensor, the gate's rows first: an option of llama.cpp's converter.
fn merged(gguf: &Gguf) -> Gguf {
    let mut out = gguf.clone();
    out.tensors.retain(|t| !t.name.contains("ffn_up_exps"));
    for t in out.tensors.iter_mut().filter(|t| t.name.contains("ffn_gate_exps")) {
        let name = t.name.replace("ffn_gate_exps", "ffn_up_exps");
        let up = gguf.tensors.iter().find(|t| t.name == name).unwrap();
        let of_expert = t.values.len() / t.shape[0];
        let pairs = t.values.chunks(of_expert).zip(up.values.chunks(of_expert));
        let values: Vec<f32> = pairs.flat_map(|(gate, up)| [gate, up].concat()).collect();
        t.values = values;
        t.shape[1] *= 2;
        t.name = name.replace("ffn_up_exps", "ffn_gate_up_exps");
    }
    out
}

#[test]
fn experts_with_gate_and_up_in_one_tensor_compute_the_same() {
    for (name, architecture) in [
        ("mixtral", "llama"),
        ("qwen3-moe", "qwen3moe"),
        ("gpt-oss", "gpt-oss"),
        ("deepseek-v3", "deepseek2"),
        ("glm4-moe", "glm4moe"),
        ("minimax-m2", "minimax-m2"),
        ("qwen3-next", "qwen3next"),
        ("qwen3.5-moe", "qwen35moe"),
    ] {
        let golden = recording(name);
        let dir = tempfile::tempdir().unwrap();
        let apart = convert(&golden, architecture, Age::New);
        let merged = merged(&apart);
        assert!(merged.tensors.len() < apart.tensors.len(), "{name}");
        let [apart, merged] = [(apart, "apart.gguf"), (merged, "merged.gguf")]
            .map(|(gguf, file)| write(&gguf, &dir.path().join(file)))
            .map(|checkpoint| logits(&checkpoint, &longest_prompt(&golden)));
        assert_eq!(bits(&merged), bits(&apart), "{name}");
    }
}

#[test]
fn decays_that_are_none_are_refused() {
    let golden = recording("qwen3.5");
    let dir = tempfile::tempdir().unwrap();
    let mut gguf = convert(&golden, "qwen35", Age::New);
    let rates = gguf.tensors.iter_mut().find(|t| t.name == "blk.2.ssm_a").unwrap();
    rates.values[1] = 0.5;
    let checkpoint = write(&gguf, &dir.path().join("model.gguf"));
    let error = Stage::load(&checkpoint, &LoadOptions::whole(&checkpoint)).unwrap_err().to_string();
    assert!(error.contains("model.layers.2.linear_attn.A") && error.contains("0.5"), "{error}");
}

#[test]
fn a_file_without_vocabulary_has_no_tokenizer_and_another_kind_is_named() {
    let mut gguf = convert(&recording("qwen3"), "qwen3", Age::New);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    assert!(matches!(write(&gguf, &path).tokenizer(), Err(TokenizerError::Missing(_))));
    gguf.keys.insert("tokenizer.ggml.model".to_owned(), Key::Text("t5".to_owned()));
    let error = write(&gguf, &path).tokenizer().unwrap_err().to_string();
    assert!(error.contains("model.gguf") && error.contains("\"t5\""), "{error}");
}
