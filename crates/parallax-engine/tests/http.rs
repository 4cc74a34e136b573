//! The HTTP server over a toy language model that counts through the alphabet: shapes, streams, stops, errors.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "http")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parallax_engine::http::{HttpState, Readiness, router};
use parallax_engine::{
    Batch, EngineConfig, EngineHandle, LogSoftmax, StageError, StageOutput, StageRunner, StageShape, Tensor,
};
use parallax_model::{ChatTemplate, Tokenizer};
use serde_json::{Value, json};
use swarm_wire::{LayerRange, PolicyVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz.";

/// After each letter comes the next one; after `z` the full stop, which ends the answer. Fails at the letter `x` when told.
struct Alphabet {
    fails_at_x: bool,
}

impl StageRunner for Alphabet {
    fn shape(&self) -> StageShape {
        StageShape {
            layers: LayerRange::new(0, 1).unwrap(),
            n_layers: 1,
            hidden: 1,
            vocab: LETTERS.len(),
            max_context: 64,
            page_tokens: 8,
            n_pages: 64,
            recurrent: false,
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
            let next = (ids[row] as usize + 1).min(LETTERS.len() - 1);
            logits.extend((0..LETTERS.len()).map(|i| if i == next { 20.0 } else { 0.0 }));
        }
        Ok(StageOutput {
            hidden: None,
            logits: Some(Tensor::from_f32(&[batch.n_wanted(), LETTERS.len()], &logits)),
        })
    }

    fn set_adapter(&mut self, _version: PolicyVersion, _adapter: Option<&[u8]>) -> Result<(), StageError> {
        Ok(())
    }

    fn log_softmax(&self) -> LogSoftmax {
        parallax_engine::local::log_softmax
    }
}

fn tokenizer() -> Tokenizer {
    let vocab: serde_json::Map<String, Value> =
        LETTERS.chars().enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    let file = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
        "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "."}});
    Tokenizer::from_json(file.to_string().as_bytes()).unwrap()
}

#[derive(Default)]
struct Setup {
    fails_at_x: bool,
    api_key: Option<&'static str>,
    readiness: Option<Readiness>,
}

/// A server on a free port; ends with the runtime.
async fn start(setup: Setup) -> std::net::SocketAddr {
    let runner = Box::new(Alphabet { fails_at_x: setup.fails_at_x });
    let state = HttpState {
        engine: EngineHandle::start(runner, EngineConfig::default()).unwrap(),
        tokenizer: tokenizer(),
        template: Some(Arc::new(ChatTemplate::new("{{ messages[-1].content }}", "", "").unwrap())),
        model_name: "alphabet".into(),
        stop_ids: vec![26],
        api_key: setup.api_key.map(str::to_owned),
        body_limit_bytes: 4096,
        readiness: setup.readiness,
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router(state)).await });
    address
}

async fn send(
    address: std::net::SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn post(address: std::net::SocketAddr, path: &str, body: &Value) -> (u16, Value) {
    let (status, text) =
        send(address, "POST", path, "content-type: application/json\r\n", &body.to_string()).await;
    (status, serde_json::from_str(&text).unwrap())
}

fn chat(text: &str) -> Value {
    json!({"model": "alphabet", "messages": [{"role": "user", "content": text}], "temperature": 0})
}

fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}

/// The `data:` payloads of a chunked server-sent stream.
fn events(body: &str) -> Vec<String> {
    body.lines().filter_map(|l| l.strip_prefix("data: ")).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_chat_answer_has_text_reason_and_counts() {
    let address = start(Setup::default()).await;
    let (status, answer) = post(address, "/v1/chat/completions", &chat("uvw")).await;
    assert_eq!(status, 200);
    assert_eq!(answer["choices"][0]["message"]["content"], "xyz");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"], json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}));

    let (_, answer) = post(address, "/v1/chat/completions", &with(chat("abc"), "max_tokens", json!(5))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "defgh");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");

    let (_, answer) =
        post(address, "/v1/chat/completions", &with(chat("abc"), "stop", json!(["gh", "zz"]))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "def");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");

    let logprobs = with(with(chat("a"), "logprobs", json!(true)), "max_tokens", json!(2));
    let (_, answer) = post(address, "/v1/chat/completions", &logprobs).await;
    assert_eq!(answer["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 2);
    assert!(answer["choices"][0]["logprobs"]["content"][0]["logprob"].as_f64().unwrap() <= 0.0);
}

#[tokio::test]
async fn a_stream_gives_the_same_text_piece_by_piece() {
    let address = start(Setup::default()).await;
    let body =
        with(with(chat("uvw"), "stream", json!(true)), "stream_options", json!({"include_usage": true}));
    let (status, text) = send(address, "POST", "/v1/chat/completions", "", &body.to_string()).await;
    assert_eq!(status, 200);
    let events = events(&text);
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let said: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(said, "xyz");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "stop");
    assert_eq!(chunks[chunks.len() - 1]["usage"]["completion_tokens"], 4);

    let body = json!({"prompt": "uv", "stream": true, "temperature": 0, "max_tokens": 2});
    let (_, text) = send(address, "POST", "/v1/completions", "", &body.to_string()).await;
    assert!(text.contains("\"text\":\"w\"") && text.contains("\"object\":\"text_completion\""), "{text}");
}

#[tokio::test]
async fn a_lost_stage_is_an_error_event_or_a_503() {
    let address = start(Setup { fails_at_x: true, ..Setup::default() }).await;
    let (status, answer) = post(address, "/v1/chat/completions", &chat("abcx")).await;
    assert_eq!(status, 503);
    assert!(answer["error"]["message"].as_str().unwrap().contains("3..6"), "{answer}");

    let body = with(chat("uv"), "stream", json!(true));
    let (status, text) = send(address, "POST", "/v1/chat/completions", "", &body.to_string()).await;
    assert_eq!(status, 200);
    let last: Value = serde_json::from_str(events(&text).last().unwrap()).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("connection lost"), "{text}");
    assert!(!text.contains("[DONE]"));
}

#[tokio::test]
async fn malformed_requests_get_a_4xx_with_a_message() {
    let address = start(Setup::default()).await;
    let long = "a".repeat(64);
    for (method, path, body, expected) in [
        ("POST", "/v1/chat/completions", "{".to_owned(), 400),
        ("POST", "/v1/chat/completions", "{}".to_owned(), 400),
        ("POST", "/v1/chat/completions", with(chat("a"), "model", json!("gpt-9")).to_string(), 404),
        ("POST", "/v1/chat/completions", with(chat("a"), "temperature", json!(-1)).to_string(), 400),
        ("POST", "/v1/chat/completions", chat(&long).to_string(), 400),
        ("POST", "/v1/chat/completions", chat(&"a".repeat(5000)).to_string(), 413),
        ("POST", "/v1/completions", json!({"prompt": ["a", "b"]}).to_string(), 400),
        ("POST", "/v1/completions", json!({"prompt": ""}).to_string(), 400),
        ("GET", "/v1/completions", String::new(), 405),
        ("GET", "/v1/models/other", String::new(), 404),
        ("GET", "/nothing", String::new(), 404),
    ] {
        let (status, text) = send(address, method, path, "", &body).await;
        assert_eq!(status, expected, "{method} {path} {body}: {text}");
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{path}: {text:?}"));
        assert!(error["error"]["message"].as_str().is_some_and(|m| m.len() > 5), "{text}");
    }
}

#[tokio::test]
async fn keys_readiness_models_metrics_and_the_page() {
    let ready = Arc::new(AtomicBool::new(false));
    let seen = ready.clone();
    let readiness: Readiness =
        Arc::new(
            move || if seen.load(Ordering::SeqCst) { Ok(()) } else { Err("waiting for layers 3..6".into()) },
        );
    let address =
        start(Setup { api_key: Some("secret"), readiness: Some(readiness), ..Setup::default() }).await;
    let key = "authorization: Bearer secret\r\n";
    assert_eq!(send(address, "GET", "/v1/models", "", "").await.0, 401);
    assert_eq!(send(address, "GET", "/v1/models", "authorization: Bearer secre\r\n", "").await.0, 401);
    let (status, models) = send(address, "GET", "/v1/models", key, "").await;
    assert_eq!((status, models.contains("\"id\":\"alphabet\"")), (200, true));

    let (status, text) = send(address, "POST", "/v1/chat/completions", key, &chat("a").to_string()).await;
    assert_eq!((status, text.contains("waiting for layers 3..6")), (503, true));
    assert_eq!(send(address, "GET", "/health", "", "").await.0, 503);
    ready.store(true, Ordering::SeqCst);
    assert_eq!(send(address, "GET", "/health", "", "").await.0, 200);
    assert_eq!(send(address, "POST", "/v1/chat/completions", key, &chat("y").to_string()).await.0, 200);

    let (status, metrics) = send(address, "GET", "/metrics", "", "").await;
    assert_eq!(
        (status, metrics.contains("vllm:generation_tokens_total{model_name=\"alphabet\"} 2")),
        (200, true),
        "{metrics}"
    );
    let (status, page) = send(address, "GET", "/", "", "").await;
    assert_eq!((status, page.contains("<!doctype html>")), (200, true));
}

#[tokio::test]
async fn many_clients_are_served_together() {
    let address = start(Setup::default()).await;
    let asks = (0..20).map(|i| async move {
        let start = LETTERS.chars().nth(i).unwrap().to_string();
        let (status, answer) =
            post(address, "/v1/chat/completions", &with(chat(&start), "max_tokens", json!(6))).await;
        assert_eq!(status, 200);
        assert_eq!(answer["choices"][0]["message"]["content"], LETTERS[i + 1..i + 7]);
    });
    futures::future::join_all(asks).await;
}
