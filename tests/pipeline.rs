//! A model cut over three operating system processes: the tokens of one process, and a killed stage that is reported
//! within two seconds, or replaced without a trace in the answer. Runs the real `parallax` binary, which
//! `cargo test --workspace` builds beside this test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parallax_engine::local::Pipeline;
use parallax_engine::score;
use parallax_model::{Checkpoint, LoadOptions};
use serde_json::{Value, json};
use swarm_tests::swarm::{PATIENCE, Swarm, call, parallax, send};

/// What a member says when it has other weights beside those that are served.
const STAGED: &str = "the next weights are here";
/// A killed stage has to be reported within this.
const DETECTED_WITHIN: Duration = Duration::from_secs(2);

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
fn an_answer_goes_on_with_the_same_text_when_its_last_stage_is_killed_and_another_holds_the_layers() {
    let swarm = Swarm::start();
    let middle = swarm.join("middle", 2, "2..4");
    let mut holders = [swarm.join("one", 3, "4..6"), swarm.join("other", 4, "4..6")];
    swarm.wait_until_ready(&[&middle, &holders[0], &holders[1]]);

    let body = json!({"prompt": "w1 w2", "max_tokens": 2000, "temperature": 1, "seed": 7});
    let (status, whole) = swarm.complete(&body);
    assert_eq!(status, 200, "{whole}");
    let mut text = String::new();
    for (n, event) in events(&swarm, &body).enumerate() {
        text += event["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{event}"));
        if n == 5 {
            let last = swarm.status()["pipelines"][0]["stages"][2]["peer"].as_str().unwrap().to_owned();
            let at = usize::from(!holders[0].log().contains(&last));
            holders[at].kill();
        }
    }
    assert_eq!(json!(text), whole["choices"][0]["text"]);
}

/// The events of a streamed completion.
fn events(swarm: &Swarm, body: &Value) -> impl Iterator<Item = Value> {
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let stream = send(&swarm.address, "POST", "/v1/completions", &streamed.to_string());
    let lines = BufReader::new(stream).lines().map(Result::unwrap);
    let data = lines.filter_map(|line| line.strip_prefix("data: ").map(str::to_owned));
    data.take_while(|event| event != "[DONE]").map(|event| serde_json::from_str(&event).unwrap())
}

#[test]
fn other_weights_are_taken_up_by_all_machines_at_once_while_answers_go_on() {
    let swarm = Swarm::updatable();
    let middle = swarm.join("middle", 2, "2..4");
    let mut last = swarm.join("last", 3, "4..6");
    swarm.wait_until_ready(&[&middle, &last]);
    swarm.check_tokens();
    let other = swarm.other_weights();
    let update = |path: &str, on_swap: &str| {
        call(&swarm.address, "POST", "/v1/update_weights", &json!({"path": path, "on_swap": on_swap}))
    };
    let (status, refused) = update("/nowhere", "finish");
    assert!(status == 400 && refused.to_string().contains("/nowhere"), "{status} {refused}");
    let (status, refused) = update("../assets/tiny", "finish");
    assert!(status == 400 && refused.to_string().contains("configuration differs"), "{status} {refused}");

    let body = json!({"prompt": "w1 w2", "max_tokens": 1500, "temperature": 0});
    let mut words = 0;
    for (n, event) in events(&swarm, &body).enumerate() {
        let text = event["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{event}"));
        words += text.split_whitespace().count();
        if n == 5 {
            let (status, updated) = update(&other, "switch");
            assert_eq!((status, &updated["version"]), (200, &json!(1)), "{updated}\n{}", middle.log());
        }
    }
    assert_eq!(words, 1500);
    swarm.check_tokens_of(&other);
    middle.wait_for(STAGED);

    // Who comes later gets the weights that are served.
    last.kill();
    swarm.wait_until_refused("nobody holds layers 4..6");
    let again = swarm.join("again", 4, "4..6");
    swarm.wait_until_ready(&[&middle, &again]);
    swarm.check_tokens_of(&other);
}

/// Two prompts, whose answers share every step of the pipeline.
const PROMPTS: [&[u32]; 2] = [&[3, 9, 1, 44], &[60]];

/// What a client hears of a sampled answer: its tokens behind those of the prompt, how likely each is, and which weights made
/// it.
#[derive(Debug, Default)]
struct Heard {
    prompt_tokens: usize,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    versions: Vec<u64>,
    reason: String,
}

impl Heard {
    fn take(&mut self, event: &Value) {
        let choice = &event["choices"][0];
        assert!(choice["text"].is_string(), "{event}");
        let list = |name: &str| choice["logprobs"][name].as_array().cloned().unwrap_or_default();
        let id = |token: Value| token.as_str().unwrap().strip_prefix('w').unwrap().parse::<u32>().unwrap();
        self.tokens.extend(list("tokens").into_iter().map(id));
        // Written with all its bits.
        self.logprobs.extend(list("token_logprobs").into_iter().map(|p| p.as_f64().unwrap() as f32));
        self.versions.extend(list("weights_versions").into_iter().map(|v| v.as_u64().unwrap()));
        self.reason = choice["finish_reason"].as_str().unwrap_or_default().to_owned();
    }
}

/// One process with certain weights, which says how likely tokens are.
struct Judge(Pipeline);

impl Judge {
    fn of(model: &str) -> Self {
        let checkpoint = Checkpoint::open(Path::new(model)).unwrap();
        let options = LoadOptions { kv_pages: 512, ..LoadOptions::whole(&checkpoint) };
        Self(Pipeline::load(&checkpoint, &options, 1, |_| ()).unwrap())
    }

    /// The bits of the log-probability of each of the answer's tokens, with everything before it computed by these weights.
    fn bits(&mut self, heard: &Heard) -> Vec<u32> {
        let scored = score(&mut self.0, &heard.tokens).unwrap();
        scored.logprobs[heard.prompt_tokens - 1..].iter().map(|p| p.to_bits()).collect()
    }
}

/// Every token is exactly as likely as the weights say that made it, and not as the others say. Even versions are of the
/// first judge.
fn check_versions(heard: &Heard, judges: &mut [Judge; 2]) {
    let bits = judges.each_mut().map(|judge| judge.bits(heard));
    assert_eq!((heard.versions.len(), heard.logprobs.len()), (bits[0].len(), bits[0].len()));
    let mut apart = 0;
    for (i, (version, logprob)) in heard.versions.iter().zip(&heard.logprobs).enumerate() {
        let own = usize::try_from(version % 2).unwrap();
        assert_eq!(logprob.to_bits(), bits[own][i], "token {i}, made by version {version}");
        apart += usize::from(bits[0][i] != bits[1][i]);
    }
    assert!(apart * 10 > bits[0].len() * 9, "the weights can be told apart: {apart} of {}", bits[0].len());
}

/// Asks for sampled answers to all prompts and hears them until they end or there is `enough` of each; does something
/// `meanwhile`, as soon as all have begun.
fn hear(
    swarm: &Swarm,
    max_tokens: usize,
    enough: impl Fn(&Heard) -> bool + Sync,
    meanwhile: impl FnOnce(),
) -> Vec<Heard> {
    let (begun, begins) = mpsc::channel();
    std::thread::scope(|scope| {
        let clients = PROMPTS.map(|prompt| {
            let (begun, enough) = (begun.clone(), &enough);
            scope.spawn(move || {
                let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 1, "seed": 7,
                                  "logprobs": 0});
                let mut heard =
                    Heard { prompt_tokens: prompt.len(), tokens: prompt.to_vec(), ..Heard::default() };
                for (n, event) in events(swarm, &body).enumerate() {
                    heard.take(&event);
                    if n == 5 {
                        begun.send(()).unwrap();
                    }
                    if enough(&heard) {
                        break;
                    }
                }
                heard
            })
        });
        for _ in PROMPTS {
            begins.recv_timeout(PATIENCE).expect("every answer begins");
        }
        meanwhile();
        clients.map(|client| client.join().unwrap()).into()
    })
}

#[test]
fn every_token_is_as_likely_as_the_weights_say_that_made_it_whatever_becomes_of_answers_in_the_making() {
    let swarm = Swarm::updatable();
    let members = [swarm.join("middle", 2, "2..4"), swarm.join("last", 3, "4..6")];
    swarm.wait_until_ready(&[&members[0], &members[1]]);
    let other = swarm.other_weights();
    let first = swarm.weights();
    let mut judges = [first, &other].map(Judge::of);
    let update = |version: u64, on_swap: &str| {
        let path = if version.is_multiple_of(2) { first } else { &other };
        let body = json!({"path": path, "on_swap": on_swap});
        let (status, updated) = call(&swarm.address, "POST", "/v1/update_weights", &body);
        assert_eq!((status, &updated["version"]), (200, &json!(version)), "{updated}\n{}", members[0].log());
    };
    let running =
        || call(&swarm.address, "GET", "/cluster/status", &Value::Null).1["engine"]["running"].clone();

    // Computed again: begun under the first weights, they go on under the second.
    let new = |heard: &Heard| heard.versions.iter().filter(|version| **version == 1).count();
    for heard in hear(&swarm, 8000, |heard| new(heard) >= 100, || update(1, "switch")) {
        assert!(heard.versions.is_sorted() && heard.versions[0] == 0, "{:?}", heard.versions);
        assert!(new(&heard) >= 100, "it ended with {:?}", heard.reason);
        check_versions(&heard, &mut judges);
    }

    // Finished: in the middle when every machine has the next weights, they end under the old ones.
    let finish = || {
        std::thread::scope(|scope| {
            let updating = scope.spawn(|| update(2, "finish"));
            for member in &members {
                member.wait_for_nth(STAGED, 2);
            }
            assert_eq!(running(), 2, "both answers are in the making when the weights could change");
            updating.join().unwrap();
            assert_eq!(running(), 0);
        });
    };
    for heard in hear(&swarm, 2000, |_| false, finish) {
        assert_eq!((heard.versions.len(), heard.reason.as_str()), (2000, "length"));
        assert!(heard.versions.iter().all(|version| *version == 1), "{:?}", heard.versions);
        check_versions(&heard, &mut judges);
    }

    // Ended.
    for heard in hear(&swarm, 8000, |_| false, || update(3, "abort")) {
        assert_eq!(heard.reason, "abort");
        assert!(heard.versions.iter().all(|version| *version == 2), "{:?}", heard.versions);
        check_versions(&heard, &mut judges);
    }

    // And whoever comes then has the weights that are served.
    for heard in hear(&swarm, 40, |_| false, || ()) {
        assert_eq!(heard.versions, [3; 40]);
        check_versions(&heard, &mut judges);
    }
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

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
