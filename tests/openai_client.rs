//! The official `openai` Python client against our server: a small random model, real HTTP on a free loopback port.
//!
//! Without `python3` or the package it says so and passes: the build needs no Python. `OPENAI_PYTHON` names another
//! interpreter, for instance one of a virtual environment with `pip install openai`.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use parallax_engine::http::{HttpLimits, HttpState, serve};
use parallax_engine::local::LocalStage;
use parallax_engine::{EngineConfig, EngineHandle};
use parallax_model::train::TrainModel;
use parallax_model::{ChatTemplate, Checkpoint, LoadOptions, ModelConfig, Tokenizer};
use serde_json::{Value, json};

const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz .?";

const SCRIPT: &str = r#"
import json, sys, openai
url = sys.argv[1]
client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
out = {}
out["models"] = [m.id for m in client.models.list()]
ask = dict(model="toy", messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}],
           max_tokens=24, temperature=0.8, seed=11)
whole = client.chat.completions.create(**ask)
out["text"] = whole.choices[0].message.content
out["role"] = whole.choices[0].message.role
out["finish"] = whole.choices[0].finish_reason
out["usage"] = [whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens]
again = client.chat.completions.create(**ask)
out["same_seed_same_text"] = again.choices[0].message.content == out["text"]
pieces, finish, usage = [], None, None
for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask):
    if chunk.usage:
        usage = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.total_tokens]
    for choice in chunk.choices:
        pieces.append(choice.delta.content or "")
        finish = choice.finish_reason or finish
out["streamed"] = ["".join(pieces), finish, usage]
out["completion"] = client.completions.create(model="toy", prompt="hello", max_tokens=5).choices[0].finish_reason
def failure(call):
    try:
        call()
    except openai.APIStatusError as e:
        return [type(e).__name__, e.status_code, e.body["message"]]
    return "no failure"
out["too_hot"] = failure(lambda: client.chat.completions.create(**{**ask, "temperature": 9}))
out["too_long"] = failure(lambda: client.completions.create(model="toy", prompt="a" * 300, max_tokens=1))
stranger = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
out["stranger"] = failure(lambda: stranger.models.list())
print(json.dumps(out))
"#;

fn config() -> ModelConfig {
    let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32,
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "vocab_size": LETTERS.len(), "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        "max_position_embeddings": 256, "hidden_act": "silu"});
    ModelConfig::from_hf_json(&config.to_string()).unwrap()
}

fn tokenizer() -> Tokenizer {
    let vocab: serde_json::Map<String, Value> =
        LETTERS.chars().enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
        "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"}});
    Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
}

/// An interpreter that can import the client.
fn python() -> Option<String> {
    let python = std::env::var("OPENAI_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import openai"]).stderr(Stdio::null()).status();
    found.is_ok_and(|status| status.success()).then_some(python)
}

#[test]
fn the_openai_client_is_served() {
    let Some(python) = python() else {
        eprintln!(
            "skipped: needs python3 with the package openai (pip install openai, or set OPENAI_PYTHON)"
        );
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    TrainModel::new_random(&config(), 5).unwrap().save_checkpoint(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let options = LoadOptions { kv_pages: 64, ..LoadOptions::whole(&checkpoint) };
    let stage = LocalStage::load(&checkpoint, &options).unwrap();
    let template = "{% for m in messages %}{{ m.content }}. {% endfor %}";
    let engine = EngineHandle::start(Box::new(stage), EngineConfig::default()).unwrap();
    let state = HttpState {
        template: Some(Arc::new(ChatTemplate::new(template, "", "").unwrap())),
        limits: HttpLimits { api_keys: vec!["secret".into()], ..HttpLimits::default() },
        ..HttpState::new(engine, tokenizer(), "toy")
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    runtime.spawn(serve(listener, state));

    let mut client = Command::new(python)
        .args(["-", &url])
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(SCRIPT.as_bytes()).unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "the client's script failed; its traceback is above");
    let got: Value = serde_json::from_slice(&output.stdout).unwrap();

    assert_eq!(got["models"], json!(["toy"]));
    assert_eq!((&got["role"], &got["finish"]), (&json!("assistant"), &json!("length")));
    assert_eq!(got["text"].as_str().unwrap().chars().count(), 24);
    let prompt_tokens = "be kind. hello there. ".len();
    assert_eq!(got["usage"], json!([prompt_tokens, 24, prompt_tokens + 24]));
    assert_eq!(got["same_seed_same_text"], json!(true));
    assert_eq!(got["streamed"], json!([got["text"], "length", got["usage"]]));
    assert_eq!(got["completion"], json!("length"));
    assert_eq!(got["too_hot"][0], json!("BadRequestError"));
    assert!(got["too_hot"][2].as_str().unwrap().contains("temperature"), "{}", got["too_hot"]);
    assert_eq!(got["too_long"][1], json!(400));
    assert!(got["too_long"][2].as_str().unwrap().contains("300 tokens"), "{}", got["too_long"]);
    assert_eq!(got["stranger"][0], json!("AuthenticationError"));
}
