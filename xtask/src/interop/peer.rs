//! A program that takes commands: one JSON object a line in, one out.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::Kind;
use crate::netlab::space::Space;

/// Programs answer within 20 s themselves; a start takes longer where a disk is slow.
const PATIENCE: Duration = Duration::from_secs(40);
/// What is not there yet may take this long, and is asked for at these intervals.
const COMES_WITHIN: Duration = Duration::from_secs(15);
const ASK_AGAIN: Duration = Duration::from_millis(20);
const LINES_MAX: usize = 16;

/// What is started.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) ours: PathBuf,
    pub(crate) interpreter: PathBuf,
    pub(crate) theirs: PathBuf,
    pub(crate) logs: Option<PathBuf>,
    pub(crate) kind: Kind,
}

/// A running one, killed on drop.
#[derive(Debug)]
pub(crate) struct Peer {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    pub(crate) id: String,
    pub(crate) addresses: Vec<String>,
}

#[derive(Deserialize)]
struct Hello {
    peer: String,
    addresses: Vec<String>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Programs {
    pub(crate) fn start_ours(&self, space: &Space, settings: &Value) -> Result<Peer> {
        self.start(space, "ours", self.ours.as_os_str(), &[], settings)
    }

    pub(crate) fn start_theirs(&self, space: &Space, settings: &Value) -> Result<Peer> {
        let program = [self.theirs.as_os_str()];
        self.start(space, self.kind.name(), self.interpreter.as_os_str(), &program, settings)
    }

    fn start(
        &self,
        space: &Space,
        name: &str,
        program: &OsStr,
        args: &[&OsStr],
        settings: &Value,
    ) -> Result<Peer> {
        let log = match &self.logs {
            None => Stdio::null(),
            Some(dir) => {
                let path = dir.join(format!("{}-{name}.log", self.kind.name()));
                let file = File::options().create(true).append(true).open(&path);
                file.with_context(|| format!("making {}", path.display()))?.into()
            }
        };
        let mut command = space.command(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let stdin = child.stdin.take().context("its input is piped")?;
        let stdout = child.stdout.take().context("its output is piped")?;
        let (said, lines) = sync_channel(LINES_MAX);
        std::thread::spawn(move || {
            // Ends with the process, or with whoever listens.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if said.send(line).is_err() {
                    break;
                }
            }
        });
        // From here on it is killed whatever happens.
        let mut peer = Peer { child, stdin, lines, id: String::new(), addresses: Vec::new() };
        let hello = peer.say(settings).with_context(|| format!("{name} does not come up"))?;
        let hello: Hello = serde_json::from_value(hello).with_context(|| format!("{name} says hello"))?;
        (peer.id, peer.addresses) = (hello.peer, hello.addresses);
        Ok(peer)
    }
}

impl Peer {
    /// Tells it something and waits for the answer.
    fn say(&mut self, line: &Value) -> Result<Value> {
        writeln!(self.stdin, "{line}")?;
        self.stdin.flush()?;
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("no JSON: {line}")),
            Err(RecvTimeoutError::Timeout) => bail!("no answer within {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("it ended"),
        }
    }

    /// Has a command done: `Ok(None)` when it cannot do such things. Asks again while what the command needs is not there yet.
    pub(crate) fn ask(&mut self, command: &Value) -> Result<Option<Value>> {
        let (op, started) = (command["op"].as_str().unwrap_or_default(), Instant::now());
        loop {
            let answer = self.say(command)?;
            if let Some(error) = answer["error"].as_str() {
                bail!("{op}: {error}");
            }
            if answer["wait"].is_null() {
                return Ok(answer["skip"].is_null().then_some(answer));
            }
            ensure!(started.elapsed() < COMES_WITHIN, "{op}: not within {COMES_WITHIN:?}");
            std::thread::sleep(ASK_AGAIN);
        }
    }

    /// Where it listens on a transport.
    pub(crate) fn address(&self, transport: &str) -> Option<&str> {
        let part = if transport == "quic" { "/quic-v1" } else { "/tcp/" };
        let found = self.addresses.iter().find(|a| a.contains(part) && !a.contains("/p2p-circuit"));
        found.map(String::as_str)
    }
}
