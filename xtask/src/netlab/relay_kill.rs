//! A relay dies without a word: how long until the node that was reached through it keeps a slot elsewhere, and whether
//! others reach it there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::lab::Lab;
use super::nat::NatKind;
use super::node::{Process, Program, Transport};
use super::statistics::quantile;

/// Two slots are kept, so that three relays leave one to replace.
const RELAYS: usize = 3;
/// A slot that is not replaced by then is lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of many relays that were killed.
#[derive(Debug, Serialize)]
pub(crate) struct RelayKill {
    pub(crate) transport: &'static str,
    /// Slots that were replaced, and whose node was then reached over the relays that are left.
    pub(crate) replaced: usize,
    pub(crate) failed: usize,
    replaced_p50_ms: Option<f64>,
    pub(crate) replaced_p95_ms: Option<f64>,
}

/// Kills one of three relays, `runs` times. `told` hears of each run that failed.
pub(crate) fn run(
    lab: &mut Lab,
    program: &Program,
    transport: Transport,
    runs: usize,
    told: &dyn Fn(&str),
) -> Result<RelayKill> {
    let mut sites = Vec::new();
    for _ in 0..RELAYS {
        sites.push(lab.add(NatKind::None)?);
    }
    let (hidden, caller) = (lab.add(NatKind::Symmetric)?, lab.add(NatKind::Symmetric)?);
    let mut replaced_ms = Vec::new();
    for run in 0..runs {
        let name = format!("kill-{}-{run}", transport.name());
        match once(lab, program, transport, (&sites, hidden, caller), &name) {
            Ok(replaced) => replaced_ms.push(replaced.as_secs_f64() * 1e3),
            Err(error) => told(&format!("{name}: {error:#}")),
        }
    }
    Ok(RelayKill {
        transport: transport.name(),
        replaced: replaced_ms.len(),
        failed: runs - replaced_ms.len(),
        replaced_p50_ms: quantile(&replaced_ms, 0.5),
        replaced_p95_ms: quantile(&replaced_ms, 0.95),
    })
}

fn once(
    lab: &Lab,
    program: &Program,
    transport: Transport,
    (sites, hidden, caller): (&[usize], usize, usize),
    name: &str,
) -> Result<Duration> {
    let mut relays: Vec<Process> = Vec::new();
    for (i, site) in sites.iter().enumerate() {
        relays.push(program.relay(lab.get(*site), &format!("{name}-relay{i}"))?);
    }
    let addresses: Vec<String> =
        relays.iter().map(|r| r.address(transport).map(str::to_owned)).collect::<Result<_>>()?;
    let vias: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let node = program.answerer(lab.get(hidden), &vias, transport, &format!("{name}-b"))?;
    let first = node.slot(PATIENCE).context("the first slot")?;
    let second = node.slot(PATIENCE).context("the second slot")?;
    ensure!(first != second, "both slots are at one relay");
    let at = relays.iter().position(|r| r.peer == first).context("the slot is at a relay of this lab")?;
    drop(relays.remove(at));
    let killed = Instant::now();
    let third = node.slot(PATIENCE).context("no slot in its place")?;
    let replaced = killed.elapsed();
    ensure!(
        relays.iter().any(|r| r.peer == third) && third != second,
        "the new slot is at a relay that is left"
    );
    let left: Vec<&str> = vias.iter().filter(|via| !via.ends_with(&first)).copied().collect();
    let call = (&left[..], node.peer.as_str());
    let answered = program.call(lab.get(caller), call, transport, (&format!("{name}-a"), &[]))?;
    ensure!(answered.calls_failed == 0, "{} calls failed afterwards", answered.calls_failed);
    Ok(replaced)
}
