//! The official `openai` and `anthropic` Python clients against our server: a small random model, real HTTP on a free
//! loopback port. What the clients do is in the scripts beside this file.
//!
//! Without `python3` or the packages it says so and passes: the build needs no Python. `OPENAI_PYTHON` names another
//! interpreter, for instance one of a virtual environment with `pip install openai anthropic`.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

use std::io::Write as _;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use swarm_tests::toy_server::{LETTERS, ToyServer};

/// An interpreter that can import a package.
fn python(package: &str) -> Option<String> {
    let python = std::env::var("OPENAI_PYTHON").unwrap_or_else(|_| "python3".into());
    let import = format!("import {package}");
    let found = Command::new(&python).args(["-c", &import]).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    // Past the test harness, which shows nothing of tests that pass.
    let skipped = format!(
        "SKIPPED: the client {package} was not tried; it needs python3 with that package (pip install {package}), or \
         OPENAI_PYTHON=INTERPRETER\n"
    );
    std::io::stderr().write_all(skipped.as_bytes()).unwrap();
    None
}

/// What the script of a client prints about a server of its own; nothing without the client.
fn served(package: &str, script: &str) -> Option<Value> {
    let python = python(package)?;
    let server = ToyServer::new();
    let mut client = Command::new(python)
        .args(["-", &server.url])
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    client.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "the client's script failed; its traceback is above");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

fn check_failure(got: &Value, kind: &str, status: u16, words: &str) {
    assert_eq!((&got[0], &got[1]), (&json!(kind), &json!(status)), "{got}");
    assert!(got.to_string().contains(words), "{got}");
}

#[test]
fn the_openai_client_is_served() {
    let Some(got) = served("openai", include_str!("openai_client.py")) else { return };
    assert_eq!((&got["models"], &got["model"]), (&json!(["toy"]), &json!("toy")));
    assert_eq!((&got["role"], &got["finish"]), (&json!("assistant"), &json!("length")));
    assert_eq!(got["text"].as_str().unwrap().chars().count(), 24);
    let prompt_tokens = "be kind. hello there. ".len();
    assert_eq!(got["usage"], json!([prompt_tokens, 24, prompt_tokens + 24]));
    assert_eq!((&got["same_seed_same_text"], &got["other_seed_other_text"]), (&json!(true), &json!(true)));
    assert_eq!(got["streamed"], json!([[got["text"]], ["length"], got["usage"]]));

    let matrix = got["matrix"].as_object().unwrap();
    assert_eq!(matrix.len(), 19);
    for (name, answer) in matrix {
        assert_eq!(
            (&answer["same_streamed"], &answer["same_logprobs"]),
            (&json!(true), &json!(true)),
            "{name}: {answer}"
        );
        let choices = if name == "n" { 3 } else { 1 };
        assert_eq!(answer["texts"].as_array().unwrap().len(), choices, "{name}");
        assert_eq!(answer["logprobs"], json!(if name == "logprobs" { 24 } else { 0 }), "{name}");
    }
    assert_eq!(got["streamed_call"], json!(["tool_calls", "w", true, 1]));
    assert_eq!(got["json_object"], json!(["stop", {}]));
    assert_eq!(got["response_call"], json!(["completed", "function_call", "w", true]));
    assert_eq!(got["response_call_stream"], json!(["response.completed", true, 1]));
    assert_eq!(matrix["bias"]["texts"][0], "d".repeat(24));
    assert_eq!(matrix["max_completion_tokens"]["texts"][0].as_str().unwrap().chars().count(), 5);
    let late = |name: &str| matrix[name]["texts"][0].as_str().unwrap();
    for name in ["stop_ids", "min_tokens"] {
        assert!(late(name).chars().all(|c| LETTERS[22..].contains(c)), "{name}: {}", late(name));
    }
    assert_eq!(matrix["stop_ids"]["finish"], json!(["stop"]));
    assert!(late("min_tokens").chars().count() >= 5, "{}", late("min_tokens"));
    let object: Value = serde_json::from_str(late("schema")).unwrap();
    assert!(object["n"].as_u64().unwrap() < 100, "{object}");
    for name in ["forced_named", "forced_required"] {
        assert_eq!(got[name], json!(["tool_calls", "w", true]), "{name}");
    }
    let stopped = matrix["stop"]["texts"][0].as_str().unwrap();
    assert!(!stopped.contains(['e', 'a']), "{stopped}");
    assert_eq!(got["alternatives"], json!(vec![4; 24]));

    assert_eq!(got["completions"], json!([["hello", "length", 10], ["there", "length", 10]]));
    assert_eq!(got["completion_stream"], json!(5));
    assert_eq!(got["response"], json!(["incomplete", "max_output_tokens", 6, 6]));
    assert_eq!(got["response_stream"], json!(["response.created", "response.incomplete", true]));

    check_failure(&got["too_hot"], "BadRequestError", 400, "temperature");
    check_failure(&got["too_long"], "BadRequestError", 400, "300 tokens");
    check_failure(&got["no_model"], "NotFoundError", 404, "gpt-9");
    check_failure(&got["stranger"], "AuthenticationError", 401, "API key");
}

#[test]
fn the_anthropic_client_is_served() {
    let Some(got) = served("anthropic", include_str!("anthropic_client.py")) else { return };
    assert_eq!(got["whole"], json!(["message", "assistant", "text", "max_tokens", 12]));
    assert_eq!((&got["same_streamed"], &got["final"]), (&json!(true), &json!([true, "max_tokens", 12])));
    let events: Vec<&str> = got["events"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!((events[0], events[events.len() - 1]), ("message_start", "message_stop"));
    assert_eq!(got["counted"], json!(true));
    assert_eq!(got["stopped"], json!(["stop_sequence", true, true]));
    assert_eq!(got["forced"], json!(vec![json!(["tool_use", "tool_use", "w", true, true, true]); 2]));
    for name in ["prefilled", "tools", "parameters"] {
        assert_eq!(got[name], json!("max_tokens"), "{name}");
    }
    assert_eq!(got["unthinking"], json!(["max_tokens", ["text"]]));
    // Four tokens of thoughts, eight that end them, twelve of the answer.
    assert_eq!(got["thinking"], json!([["thinking", "text"], 4, true, 24, true]));
    let thoughts = ["thinking_delta", "signature_delta", "text_delta"];
    assert_eq!(got["thinking_streamed"], json!([true, true, thoughts]));
    assert_eq!(got["thinking_returned"], json!("max_tokens"));
    check_failure(&got["too_much_thinking"], "BadRequestError", 400, "thinking.budget_tokens");
    check_failure(&got["too_hot"], "BadRequestError", 400, "temperature");
    check_failure(&got["no_model"], "NotFoundError", 404, "other");
    check_failure(&got["stranger"], "AuthenticationError", 401, "API key");
}
