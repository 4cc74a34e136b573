//! The official `openai` and `anthropic` Python clients against our servers: small models, real HTTP on free loopback ports.
//! What the clients ask and check is in the scripts beside this file.
//!
//! Without `python3` or the packages it says so and passes: the build needs no Python. `OPENAI_PYTHON` names another
//! interpreter, for instance one of a virtual environment with `pip install openai anthropic jsonschema`.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

use std::io::Write as _;
use std::process::{Command, Stdio};

use parallax_engine::EngineConfig;
use parallax_engine::http::HttpLimits;
use serde_json::{Map, Value};
use swarm_tests::server::Server;

/// The embedded model, where there is soon no room.
fn narrow() -> Server {
    let limits = HttpLimits {
        concurrent_requests: 4,
        requests_per_minute: Some(20),
        body_bytes: 20_000,
        ..HttpLimits::default()
    };
    Server::tiny(EngineConfig { running_sequences: 1, ..EngineConfig::default() }, limits)
}

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

/// How many checks the script of a client made in each area, against servers of its own; nothing without the client.
fn checked(package: &str, script: &str) -> Option<Map<String, Value>> {
    let python = python(package)?;
    let thinker = Server::toy();
    let tiny = Server::tiny(EngineConfig::default(), HttpLimits::default());
    let narrow = narrow();
    let output = Command::new(python)
        .args([script, &thinker.url, &tiny.url, &narrow.url])
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "the client's script failed; its traceback is above");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["checks"].as_object().cloned()
}

#[test]
fn the_openai_client_is_served() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/openai_client.py");
    let Some(checks) = checked("openai", script) else { return };
    for area in [
        "models",
        "chat_sampling",
        "completions_sampling",
        "completions",
        "conversations",
        "thoughts",
        "tools",
        "responses",
        "helpers",
        "together",
        "errors",
        "limits",
    ] {
        assert!(checks[area].as_u64() > Some(0), "{area}: {checks:?}");
    }
}

#[test]
fn the_anthropic_client_is_served() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/anthropic_client.py");
    let Some(checks) = checked("anthropic", script) else { return };
    for area in ["sampling", "ends", "conversations", "tools", "thinking", "errors", "limits", "together"] {
        assert!(checks[area].as_u64() > Some(0), "{area}: {checks:?}");
    }
}
