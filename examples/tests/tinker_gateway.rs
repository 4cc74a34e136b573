//! The unmodified PyPI client `tinker` against `tinker-gateway` with the embedded model: supervised steps lower the loss, a
//! reinforcement loop raises the reward. What the client does is in tests/tinker_client.py.
//!
//! Without `python3` or the package it says so and passes: the build needs no Python. `TINKER_PYTHON` names another
//! interpreter, for instance one of a virtual environment with `pip install tinker`.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};

use echo_rollout::text::Text as _;
use echo_rollout::{Arithmetic, Environment as _};
use parallax_model::Checkpoint;
use serde_json::{Value, json};
use swarm_examples::rollouts::ModelText;

/// Steps of the reinforcement loop.
const STEPS: usize = 20;

/// A gateway that does not outlive the test.
struct Gateway(Child);

impl Drop for Gateway {
    fn drop(&mut self) {
        // One that has ended needs neither.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn python() -> Option<String> {
    let python = std::env::var("TINKER_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import tinker"]).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    let skipped = "SKIPPED: the client tinker was not tried; it needs python3 with that package (pip install tinker), or \
                   TINKER_PYTHON=INTERPRETER\n";
    // Past the test harness, which shows nothing of tests that pass.
    std::io::stderr().write_all(skipped.as_bytes()).unwrap();
    None
}

/// Prompts and right answers as tokens.
fn tasks() -> Value {
    let checkpoint = Checkpoint::resolve("tiny").unwrap();
    let (text, tokenizer) = (ModelText::open(&checkpoint).unwrap(), checkpoint.tokenizer().unwrap());
    let environment = Arithmetic::default();
    let tasks = (0..STEPS as u64 * 16).map(|seed| {
        let task = environment.task(seed).unwrap();
        let answer = tokenizer.encode(&task.answer, false).unwrap();
        let (prompt, answer) = (text.prompt(&task).unwrap(), [answer, vec![text.stop_ids()[0]]].concat());
        json!([prompt, answer])
    });
    tasks.collect()
}

#[test]
fn the_tinker_client_trains_and_samples() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (keys, questions) = (dir.path().join("keys"), dir.path().join("tasks.json"));
    std::fs::write(&keys, "tml-secret\n").unwrap();
    std::fs::write(&questions, tasks().to_string()).unwrap();
    let saved = dir.path().join("saved");
    let mut gateway = Command::new(env!("CARGO_BIN_EXE_tinker-gateway"));
    gateway.args(["--model", "tiny", "--listen", "127.0.0.1:0", "--json", "--dir"]).arg(&saved);
    gateway.arg("--api-keys").arg(&keys).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut gateway = Gateway(gateway.spawn().unwrap());
    let mut ready = String::new();
    BufReader::new(gateway.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    let ready: Value = serde_json::from_str(&ready).unwrap();

    let mut client = Command::new(python)
        .args(["-", ready["url"].as_str().unwrap(), questions.to_str().unwrap(), &STEPS.to_string()])
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .env_remove("TINKER_API_KEY")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(include_bytes!("../../tests/tinker_client.py")).unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "the client's script failed; its traceback is above");
    let got: Value = serde_json::from_slice(&output.stdout).unwrap();

    assert_eq!((&got["models"], &got["info"]), (&json!([["tiny", true, true]]), &json!(["tiny", true, 8])));
    let numbers = |name: &str| -> Vec<f64> {
        got[name].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let losses = numbers("sft_losses");
    assert!(losses[7] < 0.5 * losses[0], "the loss falls: {losses:?}");
    assert_eq!((&got["rows"][0], &got["rows"][2]), (&got["rows"][1], &json!(true)), "{}", got["rows"]);

    assert!(got["path"].as_str().unwrap().ends_with("/weights/after-sft"), "{}", got["path"]);
    assert!(got["twice"][1].as_str().unwrap().contains("is there already"), "{}", got["twice"]);
    assert_eq!((&got["resumed_is_equal"], &got["fresh_is_equal"]), (&json!(true), &json!(false)));
    assert_eq!((&got["greedy"][0], &got["greedy"][1]), (&got["greedy"][2], &json!("stop")), "it was learnt");
    assert_eq!(got["prompt_logprobs"][0], got["prompt_logprobs"][1]);
    assert_eq!((&got["prompt_logprobs"][2], &got["prompt_logprobs"][3]), (&Value::Null, &json!(true)));
    assert_eq!(got["stop_text"], json!([["Hello", "stop"], ["Hello", "stop"], ["Hello", "stop"]]));
    assert_eq!(got["top"], json!([2, "length", [4, 3]]));
    let listed = json!([["sampler_weights/after-sft", "sampler"], ["weights/after-sft", "training"]]);
    assert_eq!(got["checkpoints"], listed);

    let rewards = numbers("rewards");
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&rewards[..4]), mean(&rewards[STEPS - 4..]));
    assert!(last > first + 0.15, "mean reward {first} of the first steps, {last} of the last: {rewards:?}");
    assert_eq!(got["logprob_deviation"], 0.0, "sampler and trainer agree bit for bit");

    for (name, kind, words) in [
        ("loss", "BadRequestError", "\\\"dro\\\" is not served"),
        ("targets", "BadRequestError", "shifted by one"),
        ("no_gradients", "RequestFailedError", "forward_backward before optim_step"),
        ("model", "NotFoundError", "base model is"),
        ("rank", "BadRequestError", "1 to 256"),
        ("path", "NotFoundError", "nothing saved"),
        ("token", "RequestFailedError", "1000000"),
        ("stranger", "AuthenticationError", "API key"),
    ] {
        let error = &got["errors"][name];
        assert_eq!(error[0], kind, "{name}: {error}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
    assert_eq!(got["after_errors"], true);
}
