//! Scripts of this package in other languages, which drive what others wrote against our servers. They print JSON.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test that cannot go on has failed")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// Whether a program is there and ends well with these arguments.
pub fn runs(program: &str, args: &[&str]) -> bool {
    let run = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

/// Says what was not tried and what it needs, past the test harness, which shows nothing of tests that pass.
pub fn skipped(what: &str) {
    std::io::stderr().write_all(format!("SKIPPED: {what}\n").as_bytes()).unwrap();
}

/// What a script of this package prints.
pub fn run<'a>(interpreter: &str, script: &str, args: impl IntoIterator<Item = &'a str>) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let mut command = Command::new(interpreter);
    command.arg(path).args(args).env_remove("HTTP_PROXY").env_remove("http_proxy").stderr(Stdio::inherit());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{script} failed; why is above");
    serde_json::from_slice(&output.stdout).unwrap()
}
