//! A program's frame: logging to stderr, one sentence on failure, what was asked for on stdout, in words or as a report on its last
//! line.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long requests and calls in flight may take once a program is asked to stop.
pub const DRAIN: Duration = Duration::from_secs(10);

/// Installs logging (`RUST_LOG`, by default warnings) and runs `main`; a failure becomes one sentence on stderr and a
/// non-zero exit.
pub fn run(main: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {}", sentence(&error)));
            ExitCode::FAILURE
        }
    }
}

/// Reads settings in TOML.
///
/// # Errors
/// A missing file, text that is no TOML, settings that are missing, unknown or of another kind.
pub fn settings<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    toml::from_str(&text).with_context(|| format!("settings in {}", path.display()))
}

/// An error and its causes; a cause that the text before it says already is left out.
pub fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Waits until the program is asked to stop: by ctrl-c, or by a service manager (SIGTERM).
///
/// # Errors
/// When the operating system does not let us listen for it.
pub async fn asked_to_stop() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted,
            _ = terminated.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// Waits until the program is asked to stop and says what happens then; asked again, the program ends at once.
pub async fn stopping() {
    if let Err(error) = asked_to_stop().await {
        // Nobody can ask: the program runs until it is killed.
        tracing::warn!(%error, "signals cannot be listened for");
        return std::future::pending().await;
    }
    say(&format!("stopping: what is in flight has {} s; once more to stop now", DRAIN.as_secs()));
    tokio::spawn(async {
        if asked_to_stop().await.is_ok() {
            std::process::exit(130);
        }
    });
}

/// A line for people about what goes on.
#[expect(clippy::print_stderr, reason = "programs talk to people on stderr")]
pub fn say(line: &str) {
    eprintln!("{line}");
}

/// What a program was asked for, in words: stdout, so that it can be searched and paged. Who stops reading has had enough.
///
/// # Errors
/// A stdout that cannot be written.
pub fn list(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    match std::io::stdout().lock().write_all(format!("{text}\n").as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// What a command was asked for, in words: as a [`list`], but on stderr where its report goes to stdout (`json`).
///
/// # Errors
/// A stdout that cannot be written.
pub fn tell(text: &str, json: bool) -> anyhow::Result<()> {
    if !json {
        return list(text);
    }
    say(text);
    Ok(())
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

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[derive(Debug)]
    struct Reading(std::io::Error);

    impl std::fmt::Display for Reading {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "reading a.json: {}", self.0)
        }
    }

    impl std::error::Error for Reading {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn no_cause_is_said_twice_and_none_is_lost() {
        let error = Reading(std::io::Error::other("disk on fire"));
        let outer = Err::<(), _>(error).context("opening the model").unwrap_err();
        assert_eq!(sentence(&outer), "opening the model: reading a.json: disk on fire");
        let nested = anyhow::anyhow!("port taken").context("starting");
        assert_eq!(sentence(&nested), "starting: port taken");
    }
}
