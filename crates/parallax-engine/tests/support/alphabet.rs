//! A server over a toy language model that counts through the alphabet, and a client of a few lines.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parallax_engine::http::{HttpLimits, HttpState, Readiness, Updates, serve, serve_until};
use parallax_engine::{
    AdapterFile, Batch, EngineConfig, EngineHandle, LogSoftmax, StageError, StageOutput, StageRunner,
    StageShape, Tensor,
};
use parallax_model::{ChatTemplate, Tokenizer};
use serde_json::{Value, json};
use swarm_wire::{LayerRange, PolicyVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz.";

/// After each letter comes the next one; after `z` the full stop, which ends the answer. Fails at the letter `x` when told.
pub struct Alphabet {
    /// Fail at the letter x.
    pub fails_at_x: bool,
    /// Called at the letter x.
    pub at_x: Option<AtX>,
}

/// What happens at the letter x.
pub type AtX = Box<dyn Fn() + Send>;

impl StageRunner for Alphabet {
    fn shape(&self) -> StageShape {
        StageShape {
            state_slots: 0,
            layers: LayerRange::new(0, 1).unwrap(),
            n_layers: 1,
            hidden: 1,
            vocab: LETTERS.len(),
            max_context: 64,
            page_tokens: 8,
            n_pages: 64,
        }
    }

    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        let ids = input.to_ids(batch.n_rows())?;
        let mut logits = Vec::new();
        for row in batch.wanted_rows() {
            if self.fails_at_x && ids[row] == 23 {
                let (peer, layers, reason) = ("Qm7".into(), "3..6".into(), "connection lost".into());
                return Err(StageError::Lost { peer, layers, reason });
            }
            if let Some(at_x) = self.at_x.as_ref().filter(|_| ids[row] == 23) {
                at_x();
            }
            let next = (ids[row] as usize + 1).min(LETTERS.len() - 1);
            logits.extend((0..LETTERS.len()).map(|i| if i == next { 20.0 } else { 0.0 }));
        }
        Ok(StageOutput {
            hidden: None,
            logits: Some(Tensor::from_f32(&[batch.n_wanted(), LETTERS.len()], logits)),
        })
    }

    fn set_adapter(
        &mut self,
        _version: PolicyVersion,
        _adapter: Option<&AdapterFile>,
    ) -> Result<(), StageError> {
        Ok(())
    }

    fn add_adapter(&mut self, _id: u32, _adapter: &AdapterFile) -> Result<(), StageError> {
        Ok(())
    }

    fn log_softmax(&self) -> LogSoftmax {
        parallax_engine::local::log_softmax
    }
}

/// One token per letter. `begins`: the full stop is a special token, and put in front of texts.
pub fn tokenizer(begins: bool) -> Tokenizer {
    let vocab: serde_json::Map<String, Value> =
        LETTERS.chars().enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    let stop = json!({"SpecialToken": {"id": ".", "type_id": 0}});
    let [text, other] = ["A", "B"].map(|id| json!({"Sequence": {"id": id, "type_id": 0}}));
    let before = json!({"type": "TemplateProcessing", "single": [stop, text], "pair": [stop, text, other],
                        "special_tokens": {".": {"id": ".", "ids": [26], "tokens": ["."]}}});
    let special = json!({"id": 26, "content": ".", "single_word": false, "lstrip": false, "rstrip": false,
                         "normalized": false, "special": true});
    let added = if begins { json!([special]) } else { json!([]) };
    let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
        "post_processor": begins.then_some(before), "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "."}});
    Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
}

/// What is special about a server.
#[derive(Default)]
pub struct Setup {
    /// The model fails at the letter x.
    pub fails_at_x: bool,
    /// Called at the letter x.
    pub at_x: Option<AtX>,
    /// Who may come in, and how much.
    pub limits: HttpLimits,
    /// When.
    pub readiness: Option<Readiness>,
    /// The chat template; the last message alone by default.
    pub template: Option<&'static str>,
    /// What clients may change.
    pub updates: Option<Updates>,
    /// Bounds of the engine.
    pub config: EngineConfig,
    /// Texts begin with a special token, the full stop.
    pub begins: bool,
}

/// A server on a free port; ends with the runtime.
pub async fn start(setup: Setup) -> SocketAddr {
    start_over(setup).await.0
}

/// A server on a free port, and its engine.
pub async fn start_over(setup: Setup) -> (SocketAddr, EngineHandle) {
    let (listener, state) = open(setup).await;
    let (address, engine) = (listener.local_addr().unwrap(), state.engine.clone());
    tokio::spawn(serve(listener, state));
    (address, engine)
}

/// A server that ends after `stop` and at most `patience`.
pub async fn start_until(
    setup: Setup,
    stop: impl Future<Output = ()> + Send + 'static,
    patience: Duration,
) -> (SocketAddr, tokio::task::JoinHandle<std::io::Result<()>>) {
    let (listener, state) = open(setup).await;
    let address = listener.local_addr().unwrap();
    (address, tokio::spawn(serve_until(listener, state, axum::Router::new(), stop, patience)))
}

async fn open(setup: Setup) -> (TcpListener, HttpState) {
    let runner = Box::new(Alphabet { fails_at_x: setup.fails_at_x, at_x: setup.at_x });
    let template = setup.template.unwrap_or("{{ messages[-1].content }}");
    let engine = EngineHandle::start(runner, setup.config).unwrap();
    let state = HttpState {
        updates: setup.updates,
        template: Some(Arc::new(ChatTemplate::new(template, "", "").unwrap())),
        stop_ids: vec![26],
        limits: setup.limits,
        readiness: setup.readiness,
        ..HttpState::new(engine, tokenizer(setup.begins), "alphabet")
    };
    (TcpListener::bind("127.0.0.1:0").await.unwrap(), state)
}

/// An answer as it came over the wire.
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Header lines.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The payloads of server-sent events.
    pub fn events(&self) -> Vec<String> {
        self.body.lines().filter_map(|l| l.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

/// Sends a request; `headers` are lines with their ends.
pub async fn send(address: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    // A server that refuses a body may close before it has read all of it.
    let _ = stream.write_all(body).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}

/// Posts JSON.
pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Answer {
    send(address, "POST", path, "content-type: application/json\r\n", body.to_string().as_bytes()).await
}

/// A greedy chat request.
pub fn chat(text: &str) -> Value {
    json!({"model": "alphabet", "messages": [{"role": "user", "content": text}], "temperature": 0})
}

/// `body` with a field replaced.
pub fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}
