//! A model cut over three operating system processes: the tokens of one process, and a killed stage that is reported
//! within two seconds. Runs the real `parallax` binary, which `cargo test --workspace` builds beside this test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use parallax_engine::local::Pipeline;
use parallax_engine::{EngineConfig, EngineHandle, Request, SamplingParams};
use parallax_model::{Checkpoint, LoadOptions, ModelConfig, TrainModel};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);
/// A killed stage has to be reported within this.
const DETECTED_WITHIN: Duration = Duration::from_secs(2);
const WORDS: usize = 64;

/// The binary beside this test's own: target/release/deps/pipeline-1234 -> target/release/parallax.
fn parallax() -> PathBuf {
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
fn random_checkpoint(dir: &Path) {
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
    let mut model = TrainModel::new_random(&config, 20_260).unwrap();
    model.set_text_file("tokenizer.json", tokenizer.to_string().into_bytes());
    model.save_checkpoint(dir).unwrap();
}

/// A process that does not outlive the test, with its stderr in a file.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(args: &[&str], log: PathBuf) -> Self {
        let stderr = File::create(&log).unwrap();
        let child = Command::new(parallax())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What follows `mark` on the first line that has it.
    fn wait_for(&mut self, mark: &str) -> String {
        let started = Instant::now();
        loop {
            let log = self.log();
            // Only whole lines: the process may be in the middle of writing one.
            let whole = log.rfind('\n').map_or("", |end| &log[..end]);
            if let Some(rest) = whole.lines().find_map(|line| line.split_once(mark)) {
                return rest.1.trim().to_owned();
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && started.elapsed() < PATIENCE, "no {mark:?}, {ended:?}:\n{log}");
            pause();
        }
    }

    /// SIGKILL.
    fn kill(&mut self) {
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

fn send(address: &str, method: &str, path: &str, body: &str) -> TcpStream {
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
fn call(address: &str, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let mut answer = String::new();
    send(address, method, path, &body).read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), serde_json::from_str(body).unwrap())
}

struct Swarm {
    dir: tempfile::TempDir,
    head: Process,
    address: String,
    bootstrap: String,
    model: String,
}

impl Swarm {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        random_checkpoint(&model);
        let model = model.to_str().unwrap().to_owned();
        let cache = dir.path().join("head-cache");
        let mut head = Process::start(
            &[
                "serve",
                "--model",
                &model,
                "--swarm",
                "test",
                "--port",
                "0",
                "--layers",
                "0..2",
                "--threads",
                "1",
                "--memory-gb",
                "1",
                "--cache-dir",
                cache.to_str().unwrap(),
                "--listen",
                "/ip4/127.0.0.1/tcp/0",
                "--listen",
                "/ip4/127.0.0.1/udp/0/quic-v1",
            ],
            dir.path().join("serve.log"),
        );
        let address = head.wait_for("serving on http://");
        let bootstrap = head.wait_for("--bootstrap ");
        Self { dir, head, address, bootstrap, model }
    }

    /// A stage on a loopback address of its own; it gets its weights from the head.
    fn join(&self, name: &str, n: u8, layers: &str) -> Process {
        let cache = self.dir.path().join(format!("cache-{name}"));
        let (tcp, quic) = (format!("/ip4/127.0.0.{n}/tcp/0"), format!("/ip4/127.0.0.{n}/udp/0/quic-v1"));
        Process::start(
            &[
                "join",
                "--swarm",
                "test",
                "--bootstrap",
                &self.bootstrap,
                "--layers",
                layers,
                "--threads",
                "1",
                "--memory-gb",
                "1",
                "--cache-dir",
                cache.to_str().unwrap(),
                "--listen",
                &tcp,
                "--listen",
                &quic,
            ],
            self.dir.path().join(format!("{name}.log")),
        )
    }

    fn status(&self) -> Value {
        call(&self.address, "GET", "/swarm/status", &Value::Null).1
    }

    fn wait_until_ready(&self, members: &[&Process]) {
        let started = Instant::now();
        while self.status()["ready"] != json!(true) {
            let logs: Vec<String> = members.iter().map(|m| m.log()).collect();
            assert!(
                started.elapsed() < PATIENCE,
                "{}\n{}\n{}",
                self.status(),
                self.head.log(),
                logs.join("\n---\n")
            );
            pause();
        }
    }

    /// Every request is refused with 503; soon the reason is this one.
    fn wait_until_refused(&self, why: &str) {
        let started = Instant::now();
        loop {
            let (status, refused) = self.complete(&json!({"prompt": "w1", "max_tokens": 1}));
            assert_eq!(status, 503, "{refused}");
            if refused["error"]["message"].as_str().is_some_and(|message| message.contains(why)) {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "{refused}");
            pause();
        }
    }

    fn complete(&self, request: &Value) -> (u16, Value) {
        call(&self.address, "POST", "/v1/completions", request)
    }

    fn check_tokens(&self) {
        for (body, expected) in expected(&self.model) {
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

#[test]
fn three_processes_give_the_tokens_of_one_and_a_killed_stage_is_reported_in_time() {
    let swarm = Swarm::start();
    swarm.wait_until_refused("nobody holds layers 2..6");

    let middle = swarm.join("middle", 2, "2..4");
    let mut last = swarm.join("last", 3, "4..6");
    swarm.wait_until_ready(&[&middle, &last]);
    let report = swarm.status();
    let stages = report["pipelines"][0]["stages"].as_array().unwrap();
    let layers: Vec<&Value> = stages.iter().map(|s| &s["layers"]).collect();
    assert_eq!(layers, [&json!([0, 2]), &json!([2, 4]), &json!([4, 6])]);
    swarm.check_tokens();

    // Long enough that it is certainly in the middle when the stage dies.
    let body = json!({"prompt": "w1 w2", "max_tokens": 8000, "temperature": 0, "stream": true}).to_string();
    let mut lines = BufReader::new(send(&swarm.address, "POST", "/v1/completions", &body)).lines();
    let events = lines.by_ref().map(Result::unwrap).filter(|line| line.starts_with("data:")).take(5).count();
    assert_eq!(events, 5, "tokens stream through all stages");
    let killed = Instant::now();
    last.kill();
    let error = lines
        .map(Result::unwrap)
        .find(|line| line.contains("\"error\""))
        .expect("the stream ends with an error");
    assert!(killed.elapsed() < DETECTED_WITHIN, "{:?}: {error}", killed.elapsed());
    let peer = stages[2]["peer"].as_str().unwrap();
    assert!(error.contains(peer) && error.contains("4..6"), "{error}");

    swarm.wait_until_refused("nobody holds layers 4..6");

    let again = swarm.join("again", 4, "4..6");
    swarm.wait_until_ready(&[&middle, &again]);
    swarm.check_tokens();
}

#[test]
fn commands_that_cannot_do_their_job_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(parallax()).args(args).output().unwrap();
        assert!(!output.status.success(), "{args:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let cache = dir.path().to_str().unwrap();
    let alone = [
        "join",
        "--swarm",
        "nobody",
        "--patience-s",
        "0",
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
        "--cache-dir",
        cache,
    ];
    assert!(run(&alone).contains("no head of swarm `nobody`"));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    assert!(
        run(&["serve", "--model", "tiny", "--swarm", "s", "--port", &port]).contains("choose another --port")
    );
    assert!(
        run(&["status", "--url", &format!("http://127.0.0.1:{}", free_port())]).contains("nobody answers")
    );
    let bench = ["bench-swarm", "--model", "tiny", "--nodes", "2", "--kill-every-s", "3"];
    assert!(run(&bench).contains("--kill-every-s"));
    let cluster = dir.path().join("cluster.json");
    std::fs::write(&cluster, r#"{"nodes":[{"id":"a","memory_gb":1,"bandwidth_gbps":100}]}"#).unwrap();
    let cluster = cluster.to_str().unwrap();
    let plan = run(&["plan", "--cluster", cluster, "--model", "meta-llama/Llama-3.1-8B", "--json"]);
    assert!(plan.contains("more of 32 layers"), "{plan}");
    assert!(
        run(&["plan", "--cluster", cluster, "--model", "tiny", "--algorithm", "paper"]).contains("exact")
    );
}

/// Between two looks at another process, whose cores these are, too.
fn pause() {
    std::thread::park_timeout(Duration::from_millis(20));
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
