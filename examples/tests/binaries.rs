//! The binaries as a person meets them: help that teaches, wrong input that ends in one clear sentence and a failure.
//!
//! This file also makes cargo build the binaries for `cargo test`, which the tests with real processes need.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Output};

const PARALLAX: &str = env!("CARGO_BIN_EXE_parallax");
const DEMO_SWARM: &str = env!("CARGO_BIN_EXE_demo-swarm");
const LATTICA_NODE: &str = env!("CARGO_BIN_EXE_lattica-node");
const ROLLOUT_FLEET: &str = env!("CARGO_BIN_EXE_rollout-fleet");
const TRAINING_SWARM: &str = env!("CARGO_BIN_EXE_training-swarm");
const TINKER_GATEWAY: &str = env!("CARGO_BIN_EXE_tinker-gateway");
const VERI_AUDIT: &str = env!("CARGO_BIN_EXE_veri-audit");

fn run(binary: &str, args: &[&str]) -> Output {
    Command::new(binary).args(args).env_remove("RUST_LOG").env("NO_PROXY", "127.0.0.1").output().unwrap()
}

/// Where everybody who asks is told this.
fn server(body: &'static str) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let request = BufReader::new(&stream).lines().map_while(Result::ok);
            assert!(request.take_while(|line| !line.is_empty()).count() > 0);
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            (&stream).write_all([head.as_bytes(), body.as_bytes()].concat().as_slice()).unwrap();
        }
    });
    url
}

#[test]
fn the_embedded_engine_answers_a_question() {
    let embedded = env!("CARGO_BIN_EXE_embed-engine");
    let output = run(embedded, &[]);
    let said = String::from_utf8(output.stdout).unwrap();
    // One greedy answer and two sampled ones.
    assert!(output.status.success() && said.starts_with("42\n") && said.lines().count() == 3, "{said}");
    let other = run(embedded, &["tiny", "What is 1+1?"]);
    assert!(other.status.success() && !other.stdout.starts_with(b"42\n"), "{other:?}");
    let output = run(embedded, &["no-such-model.gguf"]);
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && why.contains("no-such-model.gguf"), "{why}");
}

#[test]
fn every_binary_and_command_explains_itself() {
    let commands: &[(&str, &[&str])] = &[
        (
            PARALLAX,
            &[
                "generate",
                "score",
                "bench",
                "run",
                "chat",
                "models",
                "devices",
                "fetch",
                "serve",
                "join",
                "status",
                "plan",
                "bench-swarm",
            ],
        ),
        (DEMO_SWARM, &[]),
        (
            LATTICA_NODE,
            &["bench", "bench-idle", "bench-spread", "probe", "publish", "fetch", "store", "swarm-key"],
        ),
        (ROLLOUT_FLEET, &[]),
        (TINKER_GATEWAY, &[]),
        (VERI_AUDIT, &["run", "check"]),
        (
            TRAINING_SWARM,
            &["losses", "bench", "pretrain", "sft", "dpo", "simulate", "solo", "exploitability", "staleness"],
        ),
    ];
    for (binary, subcommands) in commands {
        for subcommand in subcommands.iter().map(|s| vec![*s, "--help"]).chain([vec!["--help"]]) {
            let output = run(binary, &subcommand);
            let help = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success() && help.contains("Usage:"), "{binary} {subcommand:?}: {help}");
        }
    }
}

#[test]
fn devices_are_named_or_missing_with_a_reason() {
    let output = run(PARALLAX, &["devices", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let devices = report["devices"].as_array().unwrap();
    assert_eq!(devices.iter().map(|d| &d["device"]).collect::<Vec<_>>(), ["cpu", "cuda", "wgpu"]);
    assert!(devices.iter().all(|d| d["name"].is_string() != d["missing"].is_string()), "{report}");
    assert!(devices[0]["name"].is_string());
}

#[test]
fn what_was_asked_for_goes_to_stdout_and_beside_a_report_to_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (ids, cluster, blocks, key) = (path("ids.json"), path("cluster.json"), path("blocks"), path("a.key"));
    std::fs::write(&ids, r#"{"sequences":[[1,2,3]]}"#).unwrap();
    std::fs::write(&cluster, r#"{"nodes":[{"id":"a","memory_gb":80,"bandwidth_gbps":100}]}"#).unwrap();
    std::fs::create_dir(&blocks).unwrap();
    let head = server(r#"{"nodes":[{"peer":"one","layers":[0,2],"state":"ready"}],"why":"serving"}"#);
    let scenario = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/simulate.toml");
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/golden-rl-losses.json");
    let cases: &[(&str, &[&str], &str)] = &[
        (PARALLAX, &["models"], "Qwen/Qwen3-0.6B"),
        (PARALLAX, &["devices"], "cpu"),
        (PARALLAX, &["status", "--url", &head], "one layers 0..2"),
        (PARALLAX, &["plan", "--cluster", &cluster, "--model", "tiny"], "pipeline 0: a "),
        (PARALLAX, &["score", "--model", "tiny", "--ids", &ids], "sequence 0: 3 tokens"),
        (LATTICA_NODE, &["store", &blocks, "list"], "pins"),
        (TRAINING_SWARM, &["simulate", "--plan", "--scenario", scenario], "learner busy"),
        (TRAINING_SWARM, &["losses", "--cases", golden], " loss "),
        (TRAINING_SWARM, &["assist", "--show-peer", "--identity", &key], "assistants = ["),
        (VERI_AUDIT, &["run", "--show-peer", "--identity", &key], "auditors = ["),
    ];
    for (binary, args, asked) in cases {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let plain = run(binary, args);
        let (stdout, stderr) = (text(plain.stdout), text(plain.stderr));
        assert!(plain.status.success() && stdout.contains(asked), "{args:?}: {stdout}{stderr}");
        assert!(!stderr.contains(asked), "{args:?}: {stderr}");
        let reported = run(binary, &[*args, &["--json"]].concat());
        let (stdout, stderr) = (text(reported.stdout), text(reported.stderr));
        assert!(serde_json::from_str::<serde_json::Value>(&stdout).is_ok(), "{args:?}: {stdout}");
        assert_eq!(stdout.lines().count(), 1, "{args:?}: {stdout}");
        // One binary has no words beside a report.
        assert!(*binary == LATTICA_NODE || stderr.contains(asked), "{args:?}: {stderr}");
    }
}

#[test]
fn a_model_without_a_tokenizer_answers_in_token_ids() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny.join(file), dir.path().join(file)).unwrap();
    }
    let model = dir.path().to_str().unwrap();
    let args = ["generate", "--model", model, "--prompt-ids", "1,2,3", "--max-tokens", "4"];
    let reported = run(PARALLAX, &[&args[..], &["--json"]].concat());
    let report: serde_json::Value = serde_json::from_slice(&reported.stdout).unwrap();
    let ids: Vec<String> = report["token_ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    let told = String::from_utf8(run(PARALLAX, &args).stdout).unwrap();
    assert!(!ids.is_empty());
    assert_eq!(told, format!("{}\n", ids.join(",")));
}

#[test]
fn the_example_fleet_is_planned_and_played() {
    let scenario = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/simulate.toml");
    let output = run(TRAINING_SWARM, &["simulate", "--scenario", scenario, "--staleness", "2", "--json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(report["staleness_budget"], 2);
    assert!(report["max_staleness"].as_u64().unwrap() <= 2, "{report}");
    assert!(report["learner_utilisation"].as_f64().unwrap() > 0.5, "{report}");
}

#[test]
fn the_example_settings_fine_tune_the_tiny_model() {
    let out = tempfile::tempdir().unwrap();
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    for command in ["sft", "dpo"] {
        let config = format!("examples/configs/{command}.toml");
        let out = out.path().join(command);
        let args = [command, "--config", &config, "--out", out.to_str().unwrap(), "--json"];
        let output = Command::new(TRAINING_SWARM).args(args).current_dir(root).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let loss = |name: &str| report[name].as_f64().unwrap();
        assert!(loss("loss_after") < 0.2 * loss("loss_before"), "{report}");
        assert_eq!(report["broken_lines"], 0);
        assert!(out.join("adapter_config.json").is_file() && out.join("adapter_model.safetensors").is_file());
    }
}

#[test]
fn wrong_input_ends_in_one_sentence_and_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("broken.gguf");
    std::fs::write(&broken, b"GGUF\x03\x00\x00\x00 and then nothing of use").unwrap();
    let broken = broken.to_str().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().port().to_string();
    let taken_address = format!("/ip4/127.0.0.1/tcp/{taken}");
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let config = file(
        "unknown/config.json",
        r#"{"architectures":["GPT2LMHeadModel"],"model_type":"gpt2","n_layer":12}"#,
    );
    file("unknown/model.safetensors", "\u{2}\0\0\0\0\0\0\0{}");
    let unknown = config.trim_end_matches("/config.json");
    let long = "what is 1+2? ".repeat(100);
    let long_ids = &file("ids.json", &format!("{{\"sequences\":[[{}5]]}}", "5,".repeat(600)));
    // A directory cannot be made where a file is.
    let no_directory = &file("a-file", "");
    let settings = &file("pretrain.toml", "steps = 1\nbatch = 1\n");
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let nobody = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
    let cases: &[(&str, &[&str], &str)] = &[
        (PARALLAX, &["generate", "--model", "/no/such/model", "--prompt", "hi"], "/no/such/model"),
        (PARALLAX, &["generate", "--model", broken, "--prompt", "hi"], "broken.gguf"),
        (PARALLAX, &["generate", "--model", "tiny", "--prompt-ids", "1,99999999"], "99999999"),
        (PARALLAX, &["generate", "--model", "tiny", "--prompt", "hi", "--stages", "99"], "--stages"),
        (PARALLAX, &["generate", "--model", "tiny", "--prompt", "hi", "--temperature=-1"], "temperature"),
        (PARALLAX, &["score", "--model", "tiny", "--ids", "/no/such/file.json"], "/no/such/file.json"),
        (PARALLAX, &["run", "--model", "tiny", "--port", taken.as_str()], "--port"),
        (
            PARALLAX,
            &["run", "--model", "tiny", "--port", "0", "--step-tokens", "16", "--running-sequences", "64"],
            "--running-sequences 64 is out of range, expected 1..=16 (--step-tokens)",
        ),
        (
            PARALLAX,
            &["run", "--model", "tiny", "--port", "0", "--draft", "lookup", "--draft-tokens", "0"],
            "--draft lookup with --draft-tokens 0",
        ),
        (PARALLAX, &["chat"], "--url"),
        (PARALLAX, &["chat", "--model", "tiny", "--url", "http://127.0.0.1:1"], "--url"),
        (PARALLAX, &["chat", "--url", "http://127.0.0.1:1", "--dtype", "q8_0"], "--dtype"),
        (
            PARALLAX,
            &["serve", "--model", "tiny", "--swarm", "s", "--no-layers", "--layers", "0..1"],
            "--layers",
        ),
        (
            PARALLAX,
            &["serve", "--model", "tiny", "--swarm", "s", "--no-layers", "--memory-gb", "1"],
            "--memory-gb",
        ),
        (LATTICA_NODE, &["probe", "--via", nobody, "--stream-mib", "1"], "--to"),
        (LATTICA_NODE, &["probe", "--via", nobody, "--patience-s", "1"], "--to"),
        (TRAINING_SWARM, &["simulate", "--scenario", "none.toml", "--plan", "--curve", "1"], "--curve"),
        (PARALLAX, &["generate", "--model", "tiny"], "--prompt-ids"),
        (DEMO_SWARM, &["--workers", "0"], "--workers"),
        (DEMO_SWARM, &["--mode", "async", "--staleness", "0"], "staleness"),
        (DEMO_SWARM, &["--cheater", "--workers", "1"], "--workers"),
        (ROLLOUT_FLEET, &[], "--trainer"),
        (ROLLOUT_FLEET, &["--trainer", nobody, "--patience-s", "0"], "tries: 1, 0 s"),
        (ROLLOUT_FLEET, &["--trainer", "nonsense"], "trainer nonsense: "),
        (LATTICA_NODE, &["--listen", "nonsense"], "nonsense"),
        (LATTICA_NODE, &["--listen", &taken_address], "already in use"),
        (LATTICA_NODE, &["store", no_directory, "list"], no_directory),
        (PARALLAX, &["serve", "--model", "tiny", "--swarm", "s", "--port", taken.as_str()], "--port"),
        (
            PARALLAX,
            &["serve", "--model", "tiny", "--swarm", "s", "--port", "0", "--listen", &taken_address],
            "already in use",
        ),
        (PARALLAX, &["join", "--swarm", "s", "--listen", &taken_address], "already in use"),
        (PARALLAX, &["run", "--model", "tiny", "--port", "0", "--host", "203.0.113.7"], "--host"),
        (PARALLAX, &["generate", "--model", unknown, "--prompt", "hi"], "GPT2LMHeadModel"),
        (PARALLAX, &["generate", "--model", unknown, "--prompt", "hi"], "config.json"),
        (PARALLAX, &["generate", "--model", "tiny", "--prompt", &long], "context holds 512"),
        (PARALLAX, &["generate", "--model", "tiny", "--chat", "--prompt", &long], "context holds 512"),
        (PARALLAX, &["score", "--model", "tiny", "--ids", long_ids], "context holds 512"),
        (DEMO_SWARM, &["--out", no_directory], no_directory),
        (DEMO_SWARM, &["--model", "/no/such/model", "--out", out], "/no/such/model"),
        (TRAINING_SWARM, &[], "--config"),
        (TRAINING_SWARM, &["--config", "/no/such/run.toml"], "/no/such/run.toml"),
        (TRAINING_SWARM, &["pretrain", "--config", settings, "--out", no_directory], no_directory),
        (TRAINING_SWARM, &["bench", "--model", "/no/such/model"], "/no/such/model"),
    ];
    for (binary, args, named) in cases {
        let output = run(binary, args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{args:?} succeeded");
        assert!(said.contains(named), "{args:?} should name {named:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
}

#[test]
fn all_faults_of_a_run_are_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    let settings = "[run]\nmode = \"async\"\nenvironment = \"chess\"\nworkers = 0\naudit_first = 2\n[run.trainer]\ngroup_size = 0\n";
    std::fs::write(&path, settings).unwrap();
    let output = run(TRAINING_SWARM, &["--config", path.to_str().unwrap()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{said}");
    for named in ["run.toml", "a staleness budget of 0", "chess", "workers = 0", "auditors", "group_size"] {
        assert!(said.contains(named), "{named}: {said}");
    }
    std::fs::write(&path, "[run]\nworker = 1\n").unwrap();
    let output = run(TRAINING_SWARM, &["--config", path.to_str().unwrap()]);
    assert!(String::from_utf8(output.stderr).unwrap().contains("worker"), "an unknown setting is named");
}

#[test]
fn the_embedded_model_answers_and_reports() {
    let args =
        ["generate", "--model", "tiny", "--prompt", "What is 1+2?", "--chat", "--max-tokens", "8", "--json"];
    let whole = run(PARALLAX, &args);
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    let report: serde_json::Value = serde_json::from_slice(&whole.stdout).unwrap();
    let ids = report["token_ids"].as_array().unwrap();
    assert_eq!(ids.len(), report["logprobs"].as_array().unwrap().len());
    assert!(!ids.is_empty() && report["text"].is_string(), "{report}");

    let cut = run(PARALLAX, &[&args[..], &["--stages", "2", "--threads", "1"]].concat());
    let cut: serde_json::Value = serde_json::from_slice(&cut.stdout).unwrap();
    assert_eq!(
        (&cut["token_ids"], &cut["logprobs"]),
        (&report["token_ids"], &report["logprobs"]),
        "the cut changed bits"
    );
}
