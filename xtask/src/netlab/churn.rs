//! Nodes come and go, killed and started at random moments, while two that stay call each other; in the end everybody who is
//! there must be reached.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use serde::Serialize;

use super::lab::Lab;
use super::nat::NatKind;
use super::node::{Process, Program, Transport};

/// How long a node is there, and how long its place is empty, on average.
const UP: Duration = Duration::from_secs(6);
const DOWN: Duration = Duration::from_secs(2);
/// Moments are drawn with it, so that the same command gives the same churn.
const SEED: u64 = 11;

/// What became of it.
#[derive(Debug, Serialize)]
pub(crate) struct Churned {
    pub(crate) transport: &'static str,
    pub(crate) nodes: usize,
    pub(crate) seconds: f64,
    pub(crate) killed: usize,
    /// Starts that did not end at a relay's slot.
    pub(crate) not_started: usize,
    /// Calls of the two that stay.
    pub(crate) calls: u64,
    pub(crate) calls_failed: u64,
    /// Nodes that were there in the end and answered a newcomer's calls, and those that did not.
    pub(crate) reached: usize,
    pub(crate) not_reached: usize,
}

/// Sites beside those that come and go: the relay, who calls, and who answers.
pub(crate) const SITES_MORE: usize = 3;

/// Has `nodes` nodes come and go for so many seconds. `told` hears of what failed.
pub(crate) fn run(
    lab: &mut Lab,
    program: &Program,
    transport: Transport,
    (nodes, seconds): (usize, f64),
    told: &dyn Fn(&str),
) -> Result<Churned> {
    let relay_site = lab.add(NatKind::None)?;
    let (caller_site, stays_site) = (lab.add(NatKind::PortRestricted)?, lab.add(NatKind::PortRestricted)?);
    let mut sites = Vec::new();
    for kind in NatKind::ALL.into_iter().cycle().take(nodes) {
        sites.push(lab.add(kind)?);
    }
    let name = format!("churn-{}", transport.name());
    let relay = program.relay(lab.get(relay_site), &format!("{name}-relay"))?;
    let via = relay.address(transport)?;
    let stays = program.answerer(lab.get(stays_site), &[via], transport, &format!("{name}-stays"))?;
    let call = (&[via][..], stays.peer.as_str());
    let mut caller =
        program.keep_calling(lab.get(caller_site), call, transport, &format!("{name}-caller"))?;

    let (mut chance, mut killed, mut not_started) = (SmallRng::seed_from_u64(SEED), 0, 0);
    let mut after = |mean: Duration| mean.mul_f64(-(1.0 - chance.random::<f64>()).ln());
    let mut places: Vec<Option<Process>> = (0..nodes).map(|_| None).collect();
    let mut due: BinaryHeap<Reverse<(Duration, usize)>> =
        (0..nodes).map(|place| Reverse((after(DOWN), place))).collect();
    let start = Instant::now();
    while let Some(Reverse((at, place))) = due.pop().filter(|Reverse((at, _))| at.as_secs_f64() < seconds) {
        std::thread::sleep(at.saturating_sub(start.elapsed()));
        if places[place].take().is_some() {
            killed += 1;
            due.push(Reverse((at + after(DOWN), place)));
            continue;
        }
        let node = format!("{name}-{place}-{killed}");
        match program.answerer(lab.get(sites[place]), &[via], transport, &node) {
            Ok(process) => places[place] = Some(process),
            Err(error) => {
                not_started += 1;
                told(&format!("{node}: {error:#}"));
            }
        }
        due.push(Reverse((at.max(start.elapsed()) + after(UP), place)));
    }
    let held = caller.stop_calling().context("the calls of those who stay")?;
    let (mut reached, mut not_reached) = (0, 0);
    for (place, process) in places.iter().enumerate().filter_map(|(i, p)| Some((i, p.as_ref()?))) {
        let call = (&[via][..], process.peer.as_str());
        let newcomer = format!("{name}-{place}-newcomer");
        match program.call(lab.get(caller_site), call, transport, (&newcomer, &[])) {
            Ok(run) if run.calls_failed == 0 => reached += 1,
            Ok(run) => {
                not_reached += 1;
                told(&format!("{newcomer}: {} calls failed", run.calls_failed));
            }
            Err(error) => {
                not_reached += 1;
                told(&format!("{newcomer}: {error:#}"));
            }
        }
    }
    Ok(Churned {
        transport: transport.name(),
        nodes,
        seconds,
        killed,
        not_started,
        calls: held.calls,
        calls_failed: held.calls_failed,
        reached,
        not_reached,
    })
}
