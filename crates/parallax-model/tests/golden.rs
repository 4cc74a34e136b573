//! SmolLM2-135M-Instruct against numbers recorded with transformers in f32 (see `tests/golden/README.md`).
//!
//! The weights are fetched by `cargo xtask fetch-model smollm2-135m`; without them the tests say so and pass.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test: the helpers outside the test functions too"
)]

use std::path::{Path, PathBuf};

use parallax_model::{
    ChatMessage, Checkpoint, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, Want, WeightDtype,
    logprob::{argmax, log_softmax},
};
use serde_json::Value;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn checkpoint() -> Option<Checkpoint> {
    let models = std::env::var_os("PARALLAX_MODELS").map_or_else(|| root().join("models"), PathBuf::from);
    let path = models.join("smollm2-135m").join(FILE);
    if !path.is_file() {
        println!("skipped: {} is not there; cargo xtask fetch-model smollm2-135m", path.display());
        return None;
    }
    Some(Checkpoint::open(&path).unwrap())
}

fn golden() -> Value {
    let text = std::fs::read_to_string(root().join("tests/golden/golden-smollm2.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| u32::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn load(checkpoint: &Checkpoint, dtype: WeightDtype) -> Stage {
    Stage::load(checkpoint, &LoadOptions { dtype, kv_pages: 16, ..LoadOptions::whole(checkpoint) }).unwrap()
}

fn rows(start: u32, rows: u32, want: Want) -> ForwardBatch {
    let rows = SequenceRows { start, rows, pages: (0..16).collect(), want, ..SequenceRows::default() };
    ForwardBatch { sequences: vec![rows] }
}

/// log p(token[i + 1] | token[..= i]) by one prefill.
fn score(stage: &mut Stage, tokens: &[u32]) -> Vec<f32> {
    let batch = rows(0, tokens.len() as u32, Want::AllLogits);
    let output = stage.forward(&batch, StageInput::Tokens(tokens)).unwrap();
    let logits = output.logits.chunks_exact(stage.config().vocab);
    tokens[1..].iter().zip(logits).map(|(t, row)| log_softmax(row)[*t as usize]).collect()
}

#[test]
fn tokens_and_chat_prompt_equal_the_recording() {
    let Some(checkpoint) = checkpoint() else { return };
    let tokenizer = checkpoint.tokenizer().unwrap();
    let golden = golden();
    for case in golden["cases"].as_array().unwrap() {
        let prompt = case["prompt"].as_str().unwrap();
        assert_eq!(tokenizer.encode(prompt, false).unwrap(), ids(&case["prompt_ids"]), "{}", case["name"]);
        let output = ids(&case["output_ids"]);
        assert_eq!(tokenizer.decode_with_special(&output).unwrap(), case["text"].as_str().unwrap());
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for id in &output {
            text += &stream.push(*id).unwrap();
        }
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(&output).unwrap());
    }
    let template = checkpoint.chat_template().unwrap().unwrap();
    let prompt =
        template.render(&[ChatMessage::new("user", "What is the capital of France?")], true).unwrap();
    assert_eq!(prompt, golden["cases"][0]["prompt"].as_str().unwrap());
}

#[test]
fn f32_logprobs_and_greedy_tokens_agree_with_the_reference() {
    let Some(checkpoint) = checkpoint() else { return };
    let mut stage = load(&checkpoint, WeightDtype::F32);
    for case in golden()["cases"].as_array().unwrap() {
        let (prompt, output) = (ids(&case["prompt_ids"]), ids(&case["output_ids"]));
        let tokens = [prompt.as_slice(), &output].concat();
        let scored = score(&mut stage, &tokens);
        let expected = floats(&case["logprobs_all"]);
        // Largest of all, for this order, is what is no number.
        let differences = scored.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        let worst = differences.max_by(f32::total_cmp).unwrap();
        println!("{}: largest log-probability difference {worst:.2e}", case["name"]);
        assert!(worst < 2e-3, "{}: {worst}", case["name"]);

        // Decoding token by token gives the very values of the prefill, and the recorded tokens.
        let margins = floats(&case["top1_margin"]);
        let mut logits = stage
            .forward(&rows(0, prompt.len() as u32, Want::LastLogits), StageInput::Tokens(&prompt))
            .unwrap()
            .logits;
        for (i, token) in output.iter().enumerate() {
            if margins[i] > 0.05 {
                assert_eq!(argmax(&logits) as u32, *token, "{} token {i}", case["name"]);
            }
            let decoded = log_softmax(&logits)[*token as usize];
            assert_eq!(
                decoded.to_bits(),
                scored[prompt.len() - 1 + i].to_bits(),
                "{} token {i}",
                case["name"]
            );
            let batch = rows((prompt.len() + i) as u32, 1, Want::LastLogits);
            logits = stage.forward(&batch, StageInput::Tokens(&[*token])).unwrap().logits;
        }
    }
}

#[test]
fn smaller_weights_stay_near_the_reference() {
    let Some(checkpoint) = checkpoint() else { return };
    let golden = golden();
    let case = &golden["cases"][2];
    let tokens = [ids(&case["prompt_ids"]), ids(&case["output_ids"])].concat();
    let expected = floats(&case["logprobs_all"]);
    let mut bytes = Vec::new();
    for (dtype, bound) in [
        (WeightDtype::Native, 0.05),
        (WeightDtype::Bf16, 0.05),
        (WeightDtype::Q8_0, 0.05),
        (WeightDtype::Q4_0, 0.7),
    ] {
        let mut stage = load(&checkpoint, dtype);
        let scored = score(&mut stage, &tokens);
        let mean =
            scored.iter().zip(&expected).map(|(a, b)| (a - b).abs()).sum::<f32>() / scored.len() as f32;
        println!("{dtype}: mean log-probability difference {mean:.4}, {} weight bytes", stage.weight_bytes());
        assert!(mean < bound, "{dtype}: {mean}");
        bytes.push(stage.weight_bytes());
    }
    assert!(bytes[2] < bytes[1] && bytes[3] < bytes[2], "{bytes:?}");
}
