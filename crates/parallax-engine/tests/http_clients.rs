//! Clients that leave before their answer has ended, that come when a server is full, that never finish their request, and
//! that come from elsewhere: over real connections, to a model that stops at the letter x until the test lets it go on.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "http")]

use std::net::SocketAddr;
use std::time::Duration;

use parallax_engine::http::{HttpLimits, Updates};
use parallax_engine::{EngineConfig, EngineHandle};
use parallax_model::{Adapter, LoraTensors};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedReceiver;

#[path = "support/alphabet.rs"]
mod alphabet;

use alphabet::{Answer, Setup, chat, post, send, start, start_over, with};

/// More than any step of these tests takes.
const PATIENCE: Duration = Duration::from_secs(60);
const JSON: &str = "content-type: application/json\r\n";
/// A prompt of three pages, two letters before the one at which the model stops.
const PROMPT: &str = "abcdefghijklmnopqrstuv";

/// Waits for what is looked at again and again, and does not change by itself.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let reached = async {
        while !is_so().await {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("it never came to this: {what}"));
}

/// A server whose model stops at the letter x.
struct Held {
    address: SocketAddr,
    engine: EngineHandle,
    /// Hears of every arrival at the letter x.
    arrivals: UnboundedReceiver<()>,
    /// Dropped: the model stops no more.
    stop: std::sync::mpsc::Sender<()>,
}

impl Held {
    async fn start(concurrent_requests: usize, config: EngineConfig) -> Self {
        let limits = HttpLimits { concurrent_requests, ..HttpLimits::default() };
        Self::over(Setup { limits, config, ..Setup::default() }).await
    }

    async fn over(setup: Setup) -> Self {
        let (arrived, arrivals) = tokio::sync::mpsc::unbounded_channel();
        let (stop, stopped) = std::sync::mpsc::channel();
        let at_x = move || {
            let _ = arrived.send(());
            let _ = stopped.recv();
        };
        let (address, engine) = start_over(Setup { at_x: Some(Box::new(at_x)), ..setup }).await;
        Self { address, engine, arrivals, stop }
    }

    async fn wait_for_x(&mut self) {
        let arrival = tokio::time::timeout(PATIENCE, self.arrivals.recv()).await;
        arrival.expect("the model gets to the letter x").unwrap();
    }

    /// The status of a request that takes a seat and nothing else.
    async fn knock(&self) -> u16 {
        post(self.address, "/tokenize", &json!({"prompt": "a"})).await.status
    }

    /// Waits until the server has dropped what holds a seat.
    async fn wait_for_a_seat(&self) {
        until("the seat is given back", async || self.knock().await == 200).await;
    }
}

/// Sends a request whose answer is to be read.
async fn ask(address: SocketAddr, path: &str, body: &Value) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (body, length) = (body.to_string(), body.to_string().len());
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{JSON}content-length: {length}\r\n\r\n"
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    stream
}

/// Reads up to the first event of a streamed answer, which is returned with the head.
async fn first_event(stream: &mut TcpStream) -> String {
    let mut seen = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&seen).contains("data: ") {
            assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0, "the answer ends before it began");
        }
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("an event comes");
    String::from_utf8(seen).unwrap()
}

/// Every route that answers with tokens: what to ask for, and how many answers that makes.
fn asks() -> Vec<(&'static str, Value, u64)> {
    let messages = json!([{"role": "user", "content": PROMPT}]);
    vec![
        ("/v1/chat/completions", with(chat(PROMPT), "n", json!(2)), 2),
        ("/v1/completions", json!({"prompt": PROMPT, "max_tokens": 40, "temperature": 0}), 1),
        ("/v1/responses", json!({"input": PROMPT, "temperature": 0}), 1),
        (
            "/v1/messages",
            json!({"model": "alphabet", "max_tokens": 40, "temperature": 0, "messages": messages}),
            1,
        ),
    ]
}

#[tokio::test]
async fn what_a_client_leaves_behind_is_aborted_and_its_pages_come_back() {
    for (path, body, answers) in asks() {
        for streamed in [true, false] {
            let case = format!("{path}, streamed: {streamed}");
            let mut held = Held::start(1, EngineConfig::default()).await;
            let short = with(chat("b"), "max_tokens", json!(3));
            assert_eq!(post(held.address, "/v1/chat/completions", &short).await.status, 200);
            let before = held.engine.metrics();
            assert_eq!((before.running, before.finished_aborted), (0, 0), "{case}");

            let body = with(body.clone(), "stream", json!(streamed));
            let mut client = ask(held.address, path, &body).await;
            if streamed {
                let begun = first_event(&mut client).await;
                assert!(begun.starts_with("HTTP/1.1 200"), "{case}: {begun}");
            }
            held.wait_for_x().await;
            let during = held.engine.metrics();
            assert!(during.pages_used > before.pages_used, "{case}: {during:?}");
            assert_eq!(held.knock().await, 429, "{case}: its seat is taken");

            drop(client);
            held.wait_for_a_seat().await;
            let Held { address, engine, stop, .. } = held;
            drop(stop);
            until("all answers are aborted", async || engine.metrics().finished_aborted == answers).await;
            let after = engine.metrics();
            assert_eq!((after.running, after.waiting, after.pages_used), (0, 0, before.pages_used), "{case}");
            // The model stopped behind w and x; the step in which it did made one token more.
            let made = after.generated_tokens - before.generated_tokens;
            assert!(made <= 3 * answers, "{case}: {made} tokens");
            assert_eq!(after.finished_stop, before.finished_stop, "{case}");
            let counted = send(address, "GET", "/metrics", "", b"").await.body;
            let line = format!(
                "request_success_total{{model_name=\"alphabet\",finished_reason=\"abort\"}} {answers}\n"
            );
            assert!(counted.contains(&line), "{case}: {counted}");

            let next = post(address, "/v1/chat/completions", &chat("uvw")).await;
            assert_eq!(next.json()["choices"][0]["message"]["content"], "xyz", "{case}");
        }
    }
}

#[tokio::test]
async fn who_leaves_the_queue_is_never_computed() {
    let config = EngineConfig { running_sequences: 1, ..EngineConfig::default() };
    let mut held = Held::start(2, config).await;
    let address = held.address;
    let first = tokio::spawn(async move { post(address, "/v1/chat/completions", &chat("uvw")).await });
    held.wait_for_x().await;
    let second = ask(address, "/v1/chat/completions", &chat("m")).await;
    until("both seats are taken", async || held.knock().await == 429).await;
    drop(second);
    held.wait_for_a_seat().await;
    drop(held.stop);
    assert_eq!(first.await.unwrap().json()["choices"][0]["message"]["content"], "xyz");
    until("the second is aborted", async || held.engine.metrics().finished_aborted == 1).await;
    let after = held.engine.metrics();
    assert_eq!((after.running, after.waiting, after.pages_used), (0, 0, 0));
    assert_eq!((after.finished_stop, after.generated_tokens), (1, 4), "the tokens of the first alone");
}

/// A refusal that says when to come again.
fn check_busy(refused: &Answer, seconds: &str, words: &str, case: &str) {
    let told = (refused.status, refused.header("retry-after"), refused.header("content-type"));
    assert_eq!(told, (429, Some(seconds), Some("application/json")), "{case}: {}", refused.body);
    let error = &refused.json()["error"];
    assert_eq!(error["type"], "rate_limit_error", "{case}: {}", refused.body);
    assert!(error["message"].as_str().unwrap().contains(words), "{case}: {}", refused.body);
}

#[tokio::test]
async fn one_more_than_may_be_answered_at_once_is_told_to_come_again() {
    let mut held = Held::start(1, EngineConfig::default()).await;
    let mut open = ask(held.address, "/v1/chat/completions", &with(chat("uv"), "stream", json!(true))).await;
    let mut seen = first_event(&mut open).await;
    held.wait_for_x().await;
    for (path, body, _) in asks() {
        for streamed in [true, false] {
            let refused = post(held.address, path, &with(body.clone(), "stream", json!(streamed))).await;
            check_busy(&refused, "1", "1 requests are being answered", path);
            assert_eq!(refused.json()["type"] == "error", path == "/v1/messages", "{}", refused.body);
        }
    }
    assert_eq!(
        send(held.address, "GET", "/health", "", b"").await.status,
        200,
        "who only looks needs no seat"
    );

    drop(held.stop);
    open.read_to_string(&mut seen).await.unwrap();
    assert!(seen.contains("data: [DONE]"), "the refusals left the open answer alone: {seen}");
    for (path, body, _) in asks() {
        assert_eq!(post(held.address, path, &body).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn a_full_queue_refuses_what_does_not_fit_and_takes_it_later() {
    let config = EngineConfig { queued_requests: 2, ..EngineConfig::default() };
    let mut held = Held::start(64, config).await;
    let mut open = ask(held.address, "/v1/chat/completions", &with(chat("uv"), "stream", json!(true))).await;
    let mut seen = first_event(&mut open).await;
    held.wait_for_x().await;
    let two = with(chat("m"), "n", json!(2));
    for streamed in [true, false] {
        let refused =
            post(held.address, "/v1/chat/completions", &with(two.clone(), "stream", json!(streamed))).await;
        check_busy(&refused, "2", "2 requests are queued", "two answers where one has room");
    }
    let refused =
        post(held.address, "/v1/completions", &json!({"prompt": ["a", "b"], "max_tokens": 2})).await;
    check_busy(&refused, "2", "2 requests are queued", "two prompts where one has room");

    drop(held.stop);
    open.read_to_string(&mut seen).await.unwrap();
    assert!(seen.contains("data: [DONE]"), "{seen}");
    until("there is room for two", async || {
        post(held.address, "/v1/chat/completions", &two).await.status == 200
    })
    .await;
}

/// Sends what is given of a request, and reads until the server closes the connection.
async fn break_off(address: SocketAddr, text: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    rest(stream).await
}

/// A connection over which a request was answered, and which is kept for the next.
async fn kept(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"}") {
        assert_ne!(stream.read_buf(&mut seen).await.unwrap(), 0, "the connection is closed too soon");
    }
    assert!(seen.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&seen));
    stream
}

/// What comes until the server closes the connection.
async fn rest(mut stream: TcpStream) -> String {
    let mut seen = Vec::new();
    let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut seen)).await;
    closed.expect("the server closes the connection").unwrap();
    String::from_utf8(seen).unwrap()
}

#[tokio::test]
async fn half_a_request_is_waited_for_only_so_long_and_answers_take_their_time() {
    // A connection that is closed in this test is closed for the time that its request takes.
    let (read_time, idle_time) = (Duration::from_millis(100), 60 * PATIENCE);
    let limits = HttpLimits { read_time, idle_time, ..HttpLimits::default() };
    let mut held = Held::over(Setup { limits, ..Setup::default() }).await;
    let address = held.address;
    let mut open = ask(address, "/v1/chat/completions", &with(chat("uv"), "stream", json!(true))).await;
    let mut seen = first_event(&mut open).await;
    held.wait_for_x().await;

    // Heads: nothing, what HTTP/2 begins with, half of one, the second on its connection.
    for head in ["", "PRI * HT", "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"] {
        assert_eq!(break_off(address, head).await, "", "{head:?}");
    }
    let mut second = kept(address).await;
    second.write_all(b"GET /version HTTP/1.1\r\n").await.unwrap();
    assert_eq!(rest(second).await, "");

    for path in ["/v1/chat/completions", "/v1/messages"] {
        let part = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{JSON}content-length: 9\r\n\r\n{{}}");
        let answer = break_off(address, &part).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 408") && head.contains("connection: close"), "{head}");
        let body: Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["error"]["type"], "timeout_error", "{body}");
        assert!(body["error"]["message"].as_str().unwrap().contains("100ms"), "{body}");
        assert_eq!(body["type"] == "error", path == "/v1/messages", "{body}");
    }
    let counted = send(address, "GET", "/metrics", "", b"").await.body;
    assert!(counted.contains("http_refusals_total{model_name=\"alphabet\",code=\"408\"} 2\n"), "{counted}");

    drop(held.stop);
    open.read_to_string(&mut seen).await.unwrap();
    assert!(seen.contains("data: [DONE]"), "an answer may take longer: {seen}");
}

#[tokio::test]
async fn connections_are_kept_for_a_time_of_their_own() {
    let (read_time, idle_time) = (60 * PATIENCE, Duration::from_millis(100));
    let limits = HttpLimits { read_time, idle_time, ..HttpLimits::default() };
    let address = start(Setup { limits, ..Setup::default() }).await;
    assert_eq!(rest(kept(address).await).await, "");

    // No answer has to be sooner.
    let limits = HttpLimits { idle_time, ..HttpLimits::default() };
    let mut held = Held::over(Setup { limits, ..Setup::default() }).await;
    let open = ask(held.address, "/v1/chat/completions", &chat("uv")).await;
    held.wait_for_x().await;
    assert_eq!(rest(kept(held.address).await).await, "");
    drop(held.stop);
    let answer = rest(open).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("wxyz"), "{answer}");
}

#[tokio::test]
async fn a_path_that_is_no_text_is_refused_in_the_apis_shape() {
    let address = start(Setup::default()).await;
    let refused = send(address, "GET", "/v1/models/%ff", "", b"").await;
    assert_eq!((refused.status, refused.header("content-type")), (400, Some("application/json")));
    let error = &refused.json()["error"];
    assert_eq!(error["type"], "invalid_request_error", "{error}");
    assert!(error["message"].as_str().unwrap().contains("UTF-8"), "{error}");
}

/// What a browser asks before it lets a page at `origin` post JSON with a key.
async fn preflight(address: SocketAddr, origin: &str) -> Answer {
    let asks = format!(
        "origin: {origin}\r\naccess-control-request-method: POST\r\n\
         access-control-request-headers: authorization,content-type,openai-project\r\n"
    );
    send(address, "OPTIONS", "/v1/chat/completions", &asks, b"").await
}

#[tokio::test]
async fn pages_from_elsewhere_come_in_where_they_are_named() {
    const ALLOWED: &str = "access-control-allow-origin";
    let app = "https://app.example";
    let closed = preflight(start(Setup::default()).await, app).await;
    assert_eq!((closed.status, closed.header(ALLOWED)), (405, None));

    let limited = |origins: &[&'static str]| HttpLimits {
        api_keys: vec!["secret".into()],
        allow_origins: origins.iter().map(|origin| origin.parse().unwrap()).collect(),
        ..HttpLimits::default()
    };
    let limits = limited(&["http://localhost:5173", app]);
    let address = start(Setup { limits, ..Setup::default() }).await;
    let asked = preflight(address, app).await;
    assert_eq!((asked.status, asked.header(ALLOWED)), (200, Some(app)), "{}", asked.head);
    let allowed = asked.header("access-control-allow-headers");
    assert_eq!(allowed, Some("authorization,content-type,openai-project"), "whatever clients add");
    assert_eq!(asked.header("access-control-allow-methods"), Some("GET,POST"));
    assert!(asked.header("x-request-id").is_some(), "{}", asked.head);
    assert_eq!(preflight(address, "https://other.example").await.header(ALLOWED), None);

    // Answers are for the page to read, refusals too, in the shape of either API.
    let from_app = format!("origin: {app}\r\n");
    for path in ["/v1/chat/completions", "/v1/messages"] {
        let refused = send(address, "POST", path, &from_app, b"{}").await;
        assert_eq!((refused.status, refused.header(ALLOWED)), (401, Some(app)), "{}", refused.head);
        let shown = refused.header("access-control-expose-headers").unwrap();
        assert!(shown.contains("x-request-id") && shown.contains("retry-after"), "{shown}");
    }
    let with_key = format!("{from_app}x-api-key: secret\r\n");
    let models = send(address, "GET", "/v1/models", &with_key, b"").await;
    assert_eq!((models.status, models.header(ALLOWED)), (200, Some(app)));

    let open = start(Setup { limits: limited(&[app, "*"]), ..Setup::default() }).await;
    assert_eq!(preflight(open, "https://other.example").await.header(ALLOWED), Some("*"));
}

#[tokio::test]
async fn an_adapter_loaded_in_place_says_what_becomes_of_answers() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = LoraTensors { a: vec![1.0; 2], b: vec![1.0; 2], inputs: 2, outputs: 2 };
    let adapter = Adapter { rank: 1, alpha: 2.0, tensors: [("layers.0.q_proj".to_owned(), tensors)].into() };
    adapter.save(dir.path()).unwrap();
    let mut held = Held::over(Setup { updates: Some(Updates::default()), ..Setup::default() }).await;
    let address = held.address;
    let load = json!({"lora_name": "pirate", "lora_path": dir.path(), "load_inplace": true});
    let refused =
        post(address, "/v1/load_lora_adapter", &with(load.clone(), "on_swap", json!("later"))).await;
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("on_swap")));
    assert_eq!(post(address, "/v1/load_lora_adapter", &load).await.status, 200);

    // Nobody can see whether the change waits for the end of the step already: sooner or later it does.
    let mine = with(chat("uvw"), "model", json!("pirate"));
    let abort = with(load, "on_swap", json!("abort"));
    until("an answer on the replaced adapter is ended", async || {
        let (mine, abort) = (mine.clone(), abort.clone());
        let answer = tokio::spawn(async move { post(address, "/v1/chat/completions", &mine).await });
        held.wait_for_x().await;
        let change = tokio::spawn(async move { post(address, "/v1/load_lora_adapter", &abort).await });
        assert_eq!(held.knock().await, 200);
        held.stop.send(()).unwrap();
        assert_eq!(change.await.unwrap().status, 200);
        let answer = answer.await.unwrap().json();
        let is_ended = answer["choices"][0]["finish_reason"] == "abort";
        assert_eq!(held.engine.metrics().finished_aborted == 1, is_ended, "{answer}");
        is_ended
    })
    .await;
}
