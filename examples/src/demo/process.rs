//! Child processes of the demo: this very binary in another role. A child prints one JSON object per line on stdout;
//! its log goes to a file beside the report. Children die with their handle.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// A running role.
#[derive(Debug)]
pub struct Role {
    name: String,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    log: PathBuf,
}

impl Role {
    /// Starts this binary with `args`; the log goes to `dir/NAME.log`.
    ///
    /// # Errors
    /// When the log file or the process cannot be made.
    pub fn start(dir: &Path, name: &str, args: &[String]) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let log_file = File::create(&log).with_context(|| format!("creating the log {}", log.display()))?;
        let mut child = Command::new(std::env::current_exe().context("finding this program's own file")?)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting the role {name}"))?;
        let stdout = child.stdout.take().context("a child's standard output is piped")?;
        Ok(Self { name: name.to_owned(), child, lines: BufReader::new(stdout).lines(), log })
    }

    /// The role's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The next event; `None` when the role has ended.
    ///
    /// Cancel-safe: a line that was not returned is returned by the next call.
    ///
    /// # Errors
    /// When the role prints something that is no JSON.
    pub async fn next(&mut self) -> Result<Option<Value>> {
        let Some(line) =
            self.lines.next_line().await.with_context(|| format!("reading from {}", self.name))?
        else {
            return Ok(None);
        };
        Ok(Some(serde_json::from_str(&line).with_context(|| format!("{} printed {line:?}", self.name))?))
    }

    /// The next event, which must be of this kind and come within `patience`.
    ///
    /// # Errors
    /// When the role ends, stays silent or says something else; the error shows the end of its log.
    pub async fn expect(&mut self, event: &str, patience: Duration) -> Result<Value> {
        match tokio::time::timeout(patience, self.next()).await {
            Ok(Ok(Some(value))) if value["event"] == event => Ok(value),
            Ok(Ok(Some(other))) => bail!("{} said {other} instead of {event:?}", self.name),
            Ok(Ok(None)) => {
                bail!("{} ended before {event:?}; its log ends with:\n{}", self.name, self.log_tail())
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                bail!(
                    "{} did not say {event:?} within {patience:?}; its log ends with:\n{}",
                    self.name,
                    self.log_tail()
                )
            }
        }
    }

    /// The last lines of the role's log.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// Ends the role.
    pub async fn stop(mut self) {
        // A role that has ended by itself cannot be killed again, which is just what was wanted.
        let _ = self.child.kill().await;
    }
}

/// Prints one event of a role, as its only output on stdout.
#[expect(clippy::print_stdout, reason = "a role talks to its parent by lines on stdout")]
pub fn say(event: &Value) {
    println!("{event}");
}
