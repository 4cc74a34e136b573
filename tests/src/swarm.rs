//! A swarm of real processes: `parallax serve` and `parallax join` on loopback addresses, with a small random model.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use parallax_engine::local::Pipeline;
use parallax_engine::{EngineConfig, EngineHandle, Request, SamplingParams};
use parallax_model::{Checkpoint, LoadOptions, ModelConfig, TrainModel};
use serde_json::{Value, json};

/// Longer than anything takes on a loaded machine: who has waited for so long waits in vain.
pub const PATIENCE: Duration = Duration::from_secs(120);
const WORDS: usize = 64;

/// The binary beside this test's own: target/release/deps/TEST-1234 -> target/release/parallax.
pub fn parallax() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.parent().and_then(Path::parent).unwrap().join("parallax");
    assert!(
        path.is_file(),
        "{} is not there: build it with `cargo build --release -p swarm-examples`, or run the whole workspace's tests",
        path.display()
    );
    path
}

/// A random model of six layers whose words are w0 ... w63.
fn random_checkpoint(dir: &Path, seed: u64) {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": WORDS,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false, "max_position_embeddings": 8192,
    });
    let config = ModelConfig::from_hf_json(&config.to_string()).unwrap();
    let words: serde_json::Map<String, Value> = (0..WORDS).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    let mut model = TrainModel::new_random(&config, seed).unwrap();
    model.set_text_file("tokenizer.json", tokenizer.to_string().into_bytes());
    model.save_checkpoint(dir).unwrap();
}

/// What a process wrote to stderr so far, in whole lines.
#[derive(Debug, Default)]
struct Log {
    text: String,
    /// Nothing more will come: the process has ended.
    is_complete: bool,
}

/// A process that does not outlive the test, and what it writes to stderr.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// The second tells of every change of the first.
    log: Arc<(Mutex<Log>, Condvar)>,
}

impl Process {
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(parallax())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).split(b'\n');
        let log = Arc::<(Mutex<Log>, Condvar)>::default();
        let read = Arc::clone(&log);
        std::thread::spawn(move || {
            let (log, changed) = &*read;
            for line in lines.map_while(Result::ok) {
                let mut log = log.lock().unwrap();
                log.text.push_str(&String::from_utf8_lossy(&line));
                log.text.push('\n');
                changed.notify_all();
            }
            log.lock().unwrap().is_complete = true;
            changed.notify_all();
        });
        Self { child, log }
    }

    /// What it wrote to stderr so far.
    pub fn log(&self) -> String {
        self.log.0.lock().unwrap().text.clone()
    }

    /// What `find` makes of the log, as soon as it makes something of it; the log where the process ends before, or
    /// patience does.
    fn hear<T>(&self, find: impl Fn(&str) -> Option<T>) -> Result<T, String> {
        let (log, changed) = &*self.log;
        let end = Instant::now() + PATIENCE;
        let mut log = log.lock().unwrap();
        loop {
            if let Some(found) = find(&log.text) {
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if log.is_complete || left.is_zero() {
                return Err(log.text.clone());
            }
            log = changed.wait_timeout(log, left).unwrap().0;
        }
    }

    /// What `find` makes of the log, as soon as it makes something of it; `what` is the name of that.
    pub fn wait_until<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        self.hear(find).unwrap_or_else(|log| panic!("no {what:?}:\n{log}"))
    }

    /// What follows `mark` on the first line that has it.
    pub fn wait_for(&self, mark: &str) -> String {
        self.wait_for_nth(mark, 1)
    }

    /// What follows `mark` on the `n`th line that has it.
    pub fn wait_for_nth(&self, mark: &str, n: usize) -> String {
        self.wait_until(mark, |log| {
            let (_, rest) = log.lines().filter_map(|line| line.split_once(mark)).nth(n - 1)?;
            Some(rest.trim().to_owned())
        })
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that was killed already needs neither.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends one HTTP request; the answer is to be read.
pub fn send(address: &str, method: &str, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    stream
}

/// Status and JSON body of an answer that is not streamed.
pub fn call(address: &str, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let mut answer = String::new();
    send(address, method, path, &body).read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), serde_json::from_str(body).unwrap())
}

/// A process of the swarm with an address and a cache of its own.
fn member(dir: &Path, name: &str, n: u8, layers: &str, command: &[&str]) -> Process {
    let cache = dir.join(format!("cache-{name}"));
    let (tcp, quic) = (format!("/ip4/127.0.0.{n}/tcp/0"), format!("/ip4/127.0.0.{n}/udp/0/quic-v1"));
    let place =
        ["--swarm", "test", "--cache-dir", cache.to_str().unwrap(), "--listen", &tcp, "--listen", &quic];
    let share = ["--layers", layers, "--threads", "1", "--memory-gb", "1"];
    Process::start(&[command, &place, &share].concat())
}

/// What a head said last about requests: `ready`, or `not ready: ` and why.
fn readiness(log: &str) -> Option<&str> {
    log.lines().rfind(|line| *line == "ready" || line.starts_with("not ready: "))
}

/// A head with the first two of six layers.
#[derive(Debug)]
pub struct Swarm {
    dir: tempfile::TempDir,
    /// Scheduler, API and the first stage.
    pub head: Process,
    /// Of the API.
    pub address: String,
    /// Of the head in the network.
    pub bootstrap: String,
    model: String,
}

impl Swarm {
    /// Starts the head, which then waits for layers 2..6.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// One that takes other weights.
    pub fn updatable() -> Self {
        Self::start_with(&["--allow-weight-updates"])
    }

    fn start_with(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        random_checkpoint(&model, 20_260);
        let model = model.to_str().unwrap().to_owned();
        let command = [&["serve", "--model", &model, "--port", "0"], options].concat();
        let head = member(dir.path(), "serve", 1, "0..2", &command);
        let address = head.wait_for("serving on http://");
        let bootstrap = head.wait_for("--bootstrap ");
        Self { dir, head, address, bootstrap, model }
    }

    /// The weights that it starts with.
    pub fn weights(&self) -> &str {
        &self.model
    }

    /// Other weights of the same model.
    pub fn other_weights(&self) -> String {
        let model = self.dir.path().join("other");
        random_checkpoint(&model, 20_261);
        model.to_str().unwrap().to_owned()
    }

    /// A stage on a loopback address of its own; it gets its weights from the head.
    pub fn join(&self, name: &str, n: u8, layers: &str) -> Process {
        member(self.dir.path(), name, n, layers, &["join", "--bootstrap", &self.bootstrap])
    }

    /// The head's report.
    pub fn status(&self) -> Value {
        call(&self.address, "GET", "/swarm/status", &Value::Null).1
    }

    /// Waits until all layers are held, as far as the head says so: up to a fifth of a second late.
    pub fn wait_until_ready(&self, members: &[&Process]) {
        let ready = |log: &str| (readiness(log)? == "ready").then_some(());
        if let Err(log) = self.head.hear(ready) {
            let logs: Vec<String> = members.iter().map(|member| member.log()).collect();
            panic!("layers are missing:\n{log}\n---\n{}", logs.join("\n---\n"));
        }
    }

    /// Every request is refused with 503; soon the reason is this one.
    pub fn wait_until_refused(&self, why: &str) {
        let refusal = || {
            let (status, refused) = self.complete(&json!({"prompt": "w1", "max_tokens": 1}));
            assert_eq!(status, 503, "{refused}");
            refused["error"]["message"].as_str().unwrap_or_default().to_owned()
        };
        refusal();
        self.head.wait_until(why, |log| readiness(log)?.contains(why).then_some(()));
        let refused = refusal();
        assert!(refused.contains(why), "{refused}");
    }

    /// Status and answer of a completion.
    pub fn complete(&self, request: &Value) -> (u16, Value) {
        call(&self.address, "POST", "/v1/completions", request)
    }

    /// The swarm gives the tokens of one process.
    pub fn check_tokens(&self) {
        self.check_tokens_of(&self.model);
    }

    /// The swarm gives the tokens of one process with this model.
    pub fn check_tokens_of(&self, model: &str) {
        for (body, expected) in expected(model) {
            let (status, answer) = self.complete(&body);
            assert_eq!(
                (status, answer["choices"][0]["text"].as_str()),
                (200, Some(expected.as_str())),
                "{answer}"
            );
        }
    }
}

const PROMPTS: [&str; 3] =
    ["w3 w9 w1 w44", "w60", "w7 w7 w7 w8 w21 w5 w2 w63 w11 w30 w31 w32 w33 w34 w35 w36 w37 w38"];

/// Requests, greedy and sampled, with the text that one process gives.
fn expected(model: &str) -> Vec<(Value, String)> {
    let checkpoint = Checkpoint::open(Path::new(model)).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let pipeline = Pipeline::load(&checkpoint, &LoadOptions::whole(&checkpoint), 1, |_| ()).unwrap();
    let engine = EngineHandle::start(Box::new(pipeline), EngineConfig::default()).unwrap();
    let mut cases = Vec::new();
    for prompt in PROMPTS {
        for temperature in [0.0f32, 1.0] {
            let sampling =
                SamplingParams { temperature, seed: 7, max_tokens: 40, ..SamplingParams::default() };
            let request =
                Request { prompt: tokenizer.encode(prompt, true).unwrap(), sampling, ..Request::default() };
            let completion = engine.generate_blocking(request).unwrap();
            let ids: Vec<u32> = completion.tokens.iter().map(|t| t.id).collect();
            assert_eq!(ids.len(), 40);
            let mut text = tokenizer.stream();
            let mut whole: String = ids.iter().map(|&id| text.push(id).unwrap()).collect();
            whole.push_str(&text.finish().unwrap());
            let body = json!({"prompt": prompt, "max_tokens": 40, "temperature": temperature, "seed": 7});
            cases.push((body, whole));
        }
    }
    cases
}
