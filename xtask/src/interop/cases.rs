//! What is tried with each peer, and what came of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::Kind;
use super::peer::{Peer, Programs};
use crate::netlab::space::Space;

/// How a case ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Passed,
    Failed,
    /// The peer has no such thing.
    Skipped,
}

/// One thing that was tried.
#[derive(Debug, Serialize)]
pub(crate) struct Case {
    peer: Kind,
    transport: &'static str,
    /// `ours` or `theirs`.
    dialled_by: &'static str,
    name: String,
    pub(crate) outcome: Outcome,
    ms: f64,
    detail: Option<String>,
}

/// Lengths of files: in one block, inline in a presence, one block of Kubo's and one byte more.
const FILES: [usize; 5] = [0, 1, 1024, 262_144, 262_145];

/// Length of a file of many blocks. py-libp2p's QUIC is written in Python: 10 MiB took it 8 s and more.
fn long_file(kind: Kind, transport: &str) -> usize {
    match (kind, transport) {
        (Kind::PyLibp2p, "quic") => 1 << 20,
        _ => 10 << 20,
    }
}

/// Protocol that both sides' DHTs speak; py-libp2p and the wheel know one only.
fn settings(kind: Kind) -> Value {
    match kind {
        Kind::Helia | Kind::Kubo => json!({"dht_protocol": "/lattica/kad/2.0.0/interop"}),
        Kind::PyLibp2p => json!({"dht_protocol": "/ipfs/kad/1.0.0"}),
        Kind::Lattica => json!({"dht_protocol": "/lattica/1.0.0", "identify_version": "/lattica/1.0.0"}),
    }
}

struct Run<'a> {
    programs: &'a Programs,
    cases: Vec<Case>,
    transport: &'static str,
    dialled_by: &'static str,
}

/// Tries everything with one peer.
pub(crate) fn run(programs: &Programs) -> Vec<Case> {
    let mut run = Run { programs, cases: Vec::new(), transport: "tcp", dialled_by: "ours" };
    for transport in ["tcp", "quic"] {
        for dialled_by in ["ours", "theirs"] {
            (run.transport, run.dialled_by) = (transport, dialled_by);
            let done = run.pair();
            run.ended(done);
        }
    }
    (run.transport, run.dialled_by) = ("tcp", "ours");
    let done = run.over_our_relay();
    run.ended(done);
    let done = run.over_their_relay();
    run.ended(done);
    run.cases
}

impl Run<'_> {
    /// Programs that do not come up, or end, are a failed case.
    fn ended(&mut self, done: Result<()>) {
        if let Err(error) = done {
            self.case("programs run", || Err(error));
        }
    }

    fn case(&mut self, name: &str, work: impl FnOnce() -> Result<Option<String>>) -> bool {
        let start = Instant::now();
        let done = work();
        let ms = (start.elapsed().as_secs_f64() * 1e4).round() / 10.0;
        let (outcome, detail) = match done {
            Ok(Some(detail)) => (Outcome::Passed, Some(detail).filter(|d| !d.is_empty())),
            Ok(None) => (Outcome::Skipped, None),
            Err(error) => (Outcome::Failed, Some(format!("{error:#}"))),
        };
        let peer = self.programs.kind;
        eprintln!(
            "{:<9} {:<4} {:<6} {name:<36} {outcome:?} {ms:>8.1} ms {}",
            peer.name(),
            self.transport,
            self.dialled_by,
            detail.as_deref().filter(|_| outcome == Outcome::Failed).unwrap_or_default()
        );
        let Self { transport, dialled_by, .. } = *self;
        self.cases.push(Case { peer, transport, dialled_by, name: name.to_owned(), outcome, ms, detail });
        outcome == Outcome::Passed
    }

    /// Two connected programs: everything that they do with each other.
    fn pair(&mut self) -> Result<()> {
        let space = Space::new("interop")?;
        let files = tempfile::tempdir()?;
        let settings = settings(self.programs.kind);
        let mut ours = self.programs.start_ours(&space, &settings)?;
        let mut their_settings = settings.clone();
        if self.dialled_by == "theirs" {
            // Some programs are told whom to dial when they start.
            their_settings["dial"] = json!(ours.address(self.transport));
        }
        let mut theirs = self.programs.start_theirs(&space, &their_settings)?;
        let (dialler, other) = match self.dialled_by {
            "ours" => (&mut ours, &theirs),
            _ => (&mut theirs, &ours),
        };
        let Some(addr) = other.address(self.transport).map(str::to_owned) else {
            self.case("connect", || Ok(None));
            return Ok(());
        };
        let command = json!({"op": "dial", "addr": addr});
        if !self.case("connect", || Ok(dialler.ask(&command)?.map(|_| String::new()))) {
            return Ok(());
        }
        let (our_id, their_id) = (ours.id.clone(), theirs.id.clone());
        self.case("ping, ours", || told(&mut ours, &json!({"op": "ping", "peer": their_id}), "ms"));
        self.case("ping, theirs", || told(&mut theirs, &json!({"op": "ping", "peer": our_id}), "ms"));
        self.case("identify, ours", || {
            told(&mut ours, &json!({"op": "identify", "peer": their_id}), "addresses")
        });
        self.case("identify, theirs", || {
            told(&mut theirs, &json!({"op": "identify", "peer": our_id}), "protocols")
        });
        self.files(&mut ours, &mut theirs, files.path())?;
        if self.programs.kind == Kind::Lattica {
            self.v1(&mut ours, &mut theirs);
        }
        // Kubo's DHT has names of its own, and is off in a node that reaches nobody.
        if !matches!(self.programs.kind, Kind::Kubo) {
            self.dht(&mut ours, &mut theirs);
        }
        self.gossip(&mut ours, &mut theirs);
        self.case("still connected", || {
            let answer = ours.ask(&json!({"op": "connected", "peer": their_id}))?.context("no answer")?;
            ensure!(answer["connected"] == true, "the connection is gone");
            Ok(Some(answer["paths"].to_string()))
        });
        Ok(())
    }

    fn files(&mut self, ours: &mut Peer, theirs: &mut Peer, dir: &Path) -> Result<()> {
        for length in FILES.into_iter().chain([long_file(self.programs.kind, self.transport)]) {
            for owner in ["ours", "theirs"] {
                let path = dir.join(format!("{owner}-{length}"));
                fs::write(&path, content(length, owner.len()))?;
                self.transfer(&format!("file of {length} bytes, {owner}"), owner, ours, theirs, &path);
            }
        }
        for owner in ["ours", "theirs"] {
            let path = dir.join(format!("{owner}-directory"));
            fs::create_dir_all(path.join("b/d"))?;
            for (name, length) in [("a.bin", 40), ("b/c.bin", 300_000), ("b/d/e", 5), ("z", 0)] {
                fs::write(path.join(name), content(length, owner.len() + name.len()))?;
            }
            self.transfer(&format!("directory, {owner}"), owner, ours, theirs, &path);
        }
        self.case("what nobody has, ours", || {
            let cid = "bafkreidon73zkcrwdb5iafqtijxildoonbwnpv7dyd6ef3qdgads2jc4su";
            let command = json!({"op": "get", "cid": cid, "path": dir.join("never"), "peer": theirs.id});
            ensure!(ours.ask(&command).is_err(), "it got something");
            Ok(Some(String::new()))
        });
        Ok(())
    }

    /// One side adds, the other gets; the bytes must be the same.
    fn transfer(&mut self, name: &str, owner: &str, ours: &mut Peer, theirs: &mut Peer, path: &PathBuf) {
        let (from, to) = if owner == "ours" { (ours, theirs) } else { (theirs, ours) };
        self.case(name, || {
            let Some(added) = from.ask(&json!({"op": "add", "path": path}))? else { return Ok(None) };
            let copy = path.with_extension("copy");
            let command = json!({"op": "get", "cid": added["cid"], "path": copy, "peer": from.id});
            if to.ask(&command)?.is_none() {
                return Ok(None);
            }
            same(path, &copy)?;
            Ok(added["cid"].as_str().map(str::to_owned))
        });
    }

    fn dht(&mut self, ours: &mut Peer, theirs: &mut Peer) {
        let cid = |from: &mut Peer, to: &mut Peer, key: &str| -> Result<Option<String>> {
            let Some(_) = from.ask(&json!({"op": "provide", "key": key}))? else { return Ok(None) };
            let Some(found) = to.ask(&json!({"op": "providers", "key": key}))? else { return Ok(None) };
            ensure!(found["peers"].to_string().contains(&from.id), "found {}", found["peers"]);
            Ok(Some(String::new()))
        };
        let [first, second] = [
            "bafkreifzjut3te7nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e",
            "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku",
        ];
        self.case("provider record, ours", || cid(ours, theirs, first));
        self.case("provider record, theirs", || cid(theirs, ours, second));
        let record = |from: &mut Peer, to: &mut Peer, key: &str| -> Result<Option<String>> {
            let Some(_) = from.ask(&json!({"op": "put", "key": key, "value": "v1"}))? else {
                return Ok(None);
            };
            let Some(found) = to.ask(&json!({"op": "find", "key": key}))? else { return Ok(None) };
            ensure!(found["value"] == "v1", "found {}", found["value"]);
            Ok(Some(String::new()))
        };
        self.case("DHT record, ours", || record(ours, theirs, "/interop/ours"));
        self.case("DHT record, theirs", || record(theirs, ours, "/interop/theirs"));
    }

    fn gossip(&mut self, ours: &mut Peer, theirs: &mut Peer) {
        let full = "/lattica/interop/news";
        let subscribed = || -> Result<Option<String>> {
            ours.ask(&json!({"op": "subscribe", "topic": "news"}))?;
            Ok(theirs.ask(&json!({"op": "subscribe", "topic": full}))?.map(|_| String::new()))
        };
        if !self.case("gossip, subscribing", subscribed) {
            return;
        }
        let send =
            |from: &mut Peer, its: &str, to: &mut Peer, name: &str, text: &str| -> Result<Option<String>> {
                from.ask(&json!({"op": "publish", "topic": its, "data": text}))?;
                let got = to.ask(&json!({"op": "received", "topic": name}))?.context("it cannot receive")?;
                ensure!(got["data"] == text, "got {got}");
                Ok(Some(String::new()))
            };
        self.case("gossip, ours", || send(ours, "news", theirs, full, "from ours"));
        self.case("gossip, theirs", || send(theirs, full, ours, "news", "from theirs"));
    }

    fn v1(&mut self, ours: &mut Peer, theirs: &mut Peer) {
        let (our_id, their_id) = (ours.id.clone(), theirs.id.clone());
        let call = |from: &mut Peer, to: &str, data: &str, back: &str| -> Result<Option<String>> {
            let command = json!({"op": "call_v1", "peer": to, "method": "Interop.echo", "data": data});
            let Some(answer) = from.ask(&command)? else { return Ok(None) };
            let said = answer["data"].as_str().context("it answers bytes")?;
            ensure!(said.contains(back), "answered {} bytes", said.len());
            Ok(Some(String::new()))
        };
        for length in [1, 300, 300_000] {
            let data = "x".repeat(length);
            self.case(&format!("call of {length} bytes, ours"), || {
                // Its handlers' arguments are pickled: a text, in pickle's first protocol.
                call(ours, &their_id, &format!("V{data}\n."), &data)
            });
            self.case(&format!("call of {length} bytes, theirs"), || call(theirs, &our_id, &data, &data));
        }
    }

    /// They are reached through a relay of ours.
    fn over_our_relay(&mut self) -> Result<()> {
        let space = Space::new("interop")?;
        let settings = settings(self.programs.kind);
        let relay = self.programs.start_ours(&space, &settings)?;
        let mut theirs = self.programs.start_theirs(&space, &with_via(&settings, &relay)?)?;
        let mut ours = self.programs.start_ours(&space, &settings)?;
        self.case("reached over our relay", || reached(&mut ours, &mut theirs));
        Ok(())
    }

    /// We are reached through a relay of theirs.
    fn over_their_relay(&mut self) -> Result<()> {
        let space = Space::new("interop")?;
        let settings = settings(self.programs.kind);
        let relay = self.programs.start_theirs(&space, &settings)?;
        let mut ours = self.programs.start_ours(&space, &with_via(&settings, &relay)?)?;
        let mut other = self.programs.start_ours(&space, &settings)?;
        if matches!(self.programs.kind, Kind::Helia) {
            self.case("reached over their relay", || reached(&mut other, &mut ours));
        }
        Ok(())
    }
}

/// The settings of a node that is to be reached through `relay`.
fn with_via(settings: &Value, relay: &Peer) -> Result<Value> {
    let mut settings = settings.clone();
    settings["via"] = json!([relay.address("tcp").context("the relay does not listen on TCP")?]);
    Ok(settings)
}

fn reached(from: &mut Peer, to: &mut Peer) -> Result<Option<String>> {
    let Some(relayed) = to.ask(&json!({"op": "relayed"}))? else { return Ok(None) };
    let addr = relayed["addresses"][0].as_str().context("it has no relayed address")?.to_owned();
    from.ask(&json!({"op": "dial", "addr": addr}))?;
    let answer = from.ask(&json!({"op": "ping", "peer": to.id}))?.context("it cannot ping")?;
    ensure!(answer["ms"].is_number(), "no round trip");
    Ok(Some(addr))
}

/// A field of the answer, which must be there.
fn told(peer: &mut Peer, command: &Value, field: &str) -> Result<Option<String>> {
    let Some(answer) = peer.ask(command)? else { return Ok(None) };
    ensure!(!answer[field].is_null(), "no {field} in {answer}");
    Ok(Some(answer[field].to_string()))
}

/// Bytes that differ from file to file.
fn content(length: usize, salt: usize) -> Vec<u8> {
    let mut state = (length * 31 + salt) as u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Compares files, or directories with everything in them.
fn same(left: &Path, right: &Path) -> Result<()> {
    if !left.is_dir() {
        ensure!(fs::read(left)? == fs::read(right)?, "{} differs", left.display());
        return Ok(());
    }
    let names = |dir: &Path| -> Result<Vec<_>> {
        let mut names = fs::read_dir(dir)?.map(|e| Ok(e?.file_name())).collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    ensure!(names(left)? == names(right)?, "{} holds other names", right.display());
    names(left)?.iter().try_for_each(|name| same(&left.join(name), &right.join(name)))
}
