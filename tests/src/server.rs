//! Servers of small models over real HTTP on free loopback ports, for programs that others wrote.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test that cannot go on has failed")]

use std::sync::Arc;

use parallax_engine::http::{HttpLimits, HttpState, serve};
use parallax_engine::local::LocalStage;
use parallax_engine::{EngineConfig, EngineHandle};
use parallax_model::train::TrainModel;
use parallax_model::{ChatTemplate, Checkpoint, LoadOptions, ModelConfig, Tokenizer};
use serde_json::{Value, json};

/// The vocabulary: one token each.
const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz .?{}\":,0123456789</>";

/// Serves until it is dropped; the API key is `secret`.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub url: String,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    /// A random model `toy`, whose template can open thoughts.
    pub fn toy() -> Self {
        let dir = tempfile::tempdir().unwrap();
        TrainModel::new_random(&config(), 5).unwrap().save_checkpoint(dir.path()).unwrap();
        let template =
            "{% for m in messages %}{{ m.content }}. {% endfor %}{% if enable_thinking %}<think>{% endif %}";
        let engine = engine(&Checkpoint::open(dir.path()).unwrap(), 64, EngineConfig::default());
        Self::of(HttpState {
            template: Some(Arc::new(ChatTemplate::new(template, "", "").unwrap())),
            ..HttpState::new(engine, tokenizer(), "toy")
        })
    }

    /// The embedded model `tiny`.
    pub fn tiny(config: EngineConfig, limits: HttpLimits) -> Self {
        let checkpoint = Checkpoint::tiny().unwrap();
        Self::of(HttpState {
            template: checkpoint.chat_template().unwrap().map(Arc::new),
            stop_ids: checkpoint.config().eos.clone(),
            limits,
            ..HttpState::new(engine(&checkpoint, 2048, config), checkpoint.tokenizer().unwrap(), "tiny")
        })
    }

    fn of(mut state: HttpState) -> Self {
        state.limits.api_keys = vec!["secret".into()];
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(serve(listener, state));
        Self { url, _runtime: runtime }
    }
}

fn engine(checkpoint: &Checkpoint, kv_pages: usize, config: EngineConfig) -> EngineHandle {
    let options = LoadOptions { kv_pages, ..LoadOptions::whole(checkpoint) };
    let stage = LocalStage::load(checkpoint, &options).unwrap();
    EngineHandle::start(Box::new(stage), config).unwrap()
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
