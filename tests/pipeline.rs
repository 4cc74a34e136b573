//! A model cut over three operating system processes: the tokens of one process, and a killed stage that is reported
//! within two seconds, or replaced without a trace in the answer. Runs the real `parallax` binary, which
//! `cargo test --workspace` builds beside this test.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use swarm_tests::swarm::{Swarm, call, parallax, send};

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
    let swarm = Swarm::start();
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
    assert!(middle.log().contains("the next weights are here"), "{}", middle.log());

    // Who comes later gets the weights that are served.
    last.kill();
    swarm.wait_until_refused("nobody holds layers 4..6");
    let again = swarm.join("again", 4, "4..6");
    swarm.wait_until_ready(&[&middle, &again]);
    swarm.check_tokens_of(&other);
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
