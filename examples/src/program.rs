//! A program's frame: logging to stderr, one sentence on failure, the report as the last line of stdout.

use std::process::ExitCode;

use serde::Serialize;

/// Installs logging (`RUST_LOG`, by default warnings) and runs `main`; a failure becomes one sentence on stderr and a
/// non-zero exit.
pub fn run(main: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// A line for people.
#[expect(clippy::print_stderr, reason = "programs talk to people on stderr")]
pub fn say(line: &str) {
    eprintln!("{line}");
}

/// The report: one JSON object on one line of stdout.
///
/// # Errors
/// A report that is not JSON, or a closed stdout.
pub fn report(report: &impl Serialize) -> anyhow::Result<()> {
    use std::io::Write as _;
    let mut line = serde_json::to_string(report)?;
    line.push('\n');
    Ok(std::io::stdout().lock().write_all(line.as_bytes())?)
}
