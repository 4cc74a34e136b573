//! A server of a small random model over real HTTP on a free loopback port, for programs that others wrote.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use parallax_engine::http::{HttpLimits, HttpState, serve};
use parallax_engine::local::LocalStage;
use parallax_engine::{EngineConfig, EngineHandle};
use parallax_model::train::TrainModel;
use parallax_model::{ChatTemplate, Checkpoint, LoadOptions, ModelConfig, Tokenizer};
use serde_json::{Value, json};

/// The vocabulary: one token each.
pub const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz .?{}\":,0123456789</>";

/// Serves the model `toy` with the API key `secret` until it is dropped.
#[derive(Debug)]
pub struct ToyServer {
    /// Where it listens.
    pub url: String,
    _runtime: tokio::runtime::Runtime,
}

impl ToyServer {
    /// Makes the model and serves it.
    #[expect(clippy::new_without_default, reason = "it opens a port")]
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        TrainModel::new_random(&config(), 5).unwrap().save_checkpoint(dir.path()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let options = LoadOptions { kv_pages: 64, ..LoadOptions::whole(&checkpoint) };
        let stage = LocalStage::load(&checkpoint, &options).unwrap();
        let template =
            "{% for m in messages %}{{ m.content }}. {% endfor %}{% if enable_thinking %}<think>{% endif %}";
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
        Self { url, _runtime: runtime }
    }
}

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
