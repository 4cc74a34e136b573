//! `lattica-node` processes at the lab's sites: relays, those who answer, those who call.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::Deserialize;

use super::lab::Site;
use super::statistics::Run;

/// A process says that it is up within this time.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Lines of a process that wait to be read.
const LINES_MAX: usize = 64;

/// What nodes speak directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Transport {
    Quic,
    Tcp,
}

impl Transport {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        }
    }
}

/// The program and where its logs go.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) node: PathBuf,
    /// Standard error of every process goes to a file here.
    pub(crate) logs: Option<PathBuf>,
    pub(crate) patience_s: f64,
}

/// A process that is killed on drop.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    pub(crate) peer: String,
    pub(crate) addresses: Vec<String>,
    /// What it says, line by line.
    lines: Receiver<String>,
}

/// The first line of a process that is up.
#[derive(Deserialize)]
struct Ready {
    peer: String,
    addresses: Vec<String>,
}

/// The last line of a node that called until it was told to stop.
#[derive(Deserialize)]
struct Report {
    held: Held,
}

/// What became of those calls.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Held {
    pub(crate) calls: u64,
    pub(crate) calls_failed: u64,
}

/// A later line of a node that answers: a relay keeps a slot for it.
#[derive(Deserialize)]
struct Slot {
    relay: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    fn line(&self, patience: Duration) -> Result<String> {
        Ok(self.lines.recv_timeout(patience)?)
    }

    /// The next relay that keeps a slot for a node that answers.
    pub(crate) fn slot(&self, patience: Duration) -> Result<String> {
        let slot: Slot = serde_json::from_str(&self.line(patience)?)?;
        Ok(slot.relay)
    }

    /// Waits until a node that calls is answered again after an outage.
    pub(crate) fn answered_again(&self, patience: Duration) -> Result<()> {
        let line = self.line(patience)?;
        ensure!(line.contains("gap_ms"), "it says {line:?}");
        Ok(())
    }

    /// Has a node that calls stop, and tells what became of its calls.
    pub(crate) fn stop_calling(&mut self) -> Result<Held> {
        drop(self.stdin.take());
        let line = loop {
            let line = self.line(START_TIMEOUT)?;
            // It was answered again after a gap.
            if !line.contains("gap_ms") {
                break line;
            }
        };
        let report: Report = serde_json::from_str(&line).context("what the caller reports")?;
        Ok(report.held)
    }

    /// The address of a relay over a transport.
    pub(crate) fn address(&self, transport: Transport) -> Result<&str> {
        let part = match transport {
            Transport::Quic => "/quic-v1/",
            Transport::Tcp => "/tcp/",
        };
        let found = self.addresses.iter().find(|a| a.contains(part) && !a.contains("/p2p-circuit"));
        found
            .map(String::as_str)
            .with_context(|| format!("the relay does not listen on {}", transport.name()))
    }
}

impl Program {
    /// Starts a relay.
    pub(crate) fn relay(&self, site: &Site, name: &str) -> Result<Process> {
        let ip = site.address;
        let mut command = site.host.command(&self.node);
        command.args(["--relay", "--json"]);
        for listen in [format!("/ip4/{ip}/udp/4001/quic-v1"), format!("/ip4/{ip}/tcp/4001")] {
            command.args(["--listen", &listen]);
        }
        self.start(command, name)
    }

    /// Starts a node that answers, and waits until it can be reached over a relay.
    pub(crate) fn answerer(
        &self,
        site: &Site,
        vias: &[&str],
        transport: Transport,
        name: &str,
    ) -> Result<Process> {
        self.start(self.probe(site, vias, transport), name)
    }

    /// Reaches `peer` from a site and tells how.
    pub(crate) fn call(
        &self,
        site: &Site,
        (vias, peer): (&[&str], &str),
        transport: Transport,
        (name, more): (&str, &[String]),
    ) -> Result<Run> {
        let mut command = self.probe(site, vias, transport);
        command.args(["--to", peer, "--patience-s", &self.patience_s.to_string()]).args(more);
        let output =
            command.stdin(Stdio::null()).stderr(self.log(name)?).output().context("starting the caller")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "the caller ended with {}", output.status);
        serde_json::from_str(text.lines().last().unwrap_or_default()).context("what the caller reports")
    }

    /// Starts a node that calls `peer` without a pause, and waits until it does so directly.
    pub(crate) fn keep_calling(
        &self,
        site: &Site,
        (vias, peer): (&[&str], &str),
        transport: Transport,
        name: &str,
    ) -> Result<Process> {
        let mut command = self.probe(site, vias, transport);
        command.args(["--to", peer, "--patience-s", &self.patience_s.to_string(), "--hold"]);
        let process = self.spawn(command, name)?;
        let line = process.line(START_TIMEOUT).with_context(|| format!("{name} does not call"))?;
        ensure!(line.contains("calling"), "{name} says {line:?}");
        Ok(process)
    }

    fn probe(&self, site: &Site, vias: &[&str], transport: Transport) -> Command {
        let mut command = site.host.command(&self.node);
        command.args(["probe", "--json", "--transport", transport.name()]);
        for via in vias {
            command.args(["--via", via]);
        }
        command
    }

    fn start(&self, command: Command, name: &str) -> Result<Process> {
        let mut process = self.spawn(command, name)?;
        let line = process.line(START_TIMEOUT).with_context(|| format!("{name} is not up"))?;
        let ready: Ready =
            serde_json::from_str(&line).with_context(|| format!("{name} is not up: {line:?}"))?;
        (process.peer, process.addresses) = (ready.peer, ready.addresses);
        Ok(process)
    }

    fn spawn(&self, mut command: Command, name: &str) -> Result<Process> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(self.log(name)?);
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().context("its output is piped")?);
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
        Ok(Process { child, stdin, peer: String::new(), addresses: Vec::new(), lines })
    }

    fn log(&self, name: &str) -> Result<Stdio> {
        let Some(dir) = &self.logs else { return Ok(Stdio::null()) };
        let file = |path: &Path| File::create(path).with_context(|| format!("making {}", path.display()));
        Ok(file(&dir.join(format!("{name}.log")))?.into())
    }
}
