//! The official `openai` and `anthropic` Python clients against our servers: small models, real HTTP on free loopback ports.
//! What the clients ask and check is in the scripts beside this file.
//!
//! Without `python3` or the packages it says so and passes: the build needs no Python. `OPENAI_PYTHON` names another
//! interpreter, for instance one of a virtual environment with `pip install openai anthropic jsonschema`.

use parallax_engine::EngineConfig;
use parallax_engine::http::HttpLimits;
use serde_json::{Map, Value};
use swarm_tests::script;
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
    if script::runs(&python, &["-c", &format!("import {package}")]) {
        return Some(python);
    }
    script::skipped(&format!(
        "the client {package} was not tried; it needs python3 with that package (pip install {package}), or \
         OPENAI_PYTHON=INTERPRETER"
    ));
    None
}

/// How many checks the script of a client made in each area, against servers of its own; nothing without the client.
fn checked(package: &str, file: &str) -> Option<Map<String, Value>> {
    let python = python(package)?;
    let thinker = Server::toy();
    let tiny = Server::tiny(EngineConfig::default(), HttpLimits::default());
    let narrow = narrow();
    let report = script::run(&python, file, [thinker.url.as_str(), &tiny.url, &narrow.url]);
    report["checks"].as_object().cloned()
}

#[test]
fn the_openai_client_is_served() {
    let Some(checks) = checked("openai", "openai_client.py") else { return };
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
    let Some(checks) = checked("anthropic", "anthropic_client.py") else { return };
    for area in ["sampling", "ends", "conversations", "tools", "thinking", "errors", "limits", "together"] {
        assert!(checks[area].as_u64() > Some(0), "{area}: {checks:?}");
    }
}
