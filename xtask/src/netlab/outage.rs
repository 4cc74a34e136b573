//! Outages under calls: the network falls in two and grows together again; a site gets another address. How long until calls
//! are answered again, and whether those went on that had nothing to do with it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum as _;
use serde::Serialize;

use super::lab::Lab;
use super::nat::NatKind;
use super::node::{Process, Program, Transport};
use super::statistics::quantile;

/// Longer than any connection survives, and than the first pauses between attempts.
const PARTED: Duration = Duration::from_secs(8);
/// Calls that are not answered again by then are lost.
const PATIENCE: Duration = Duration::from_secs(45);

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outage {
    /// Two halves, each with a relay, do not reach each other for 8 s.
    Partition,
    /// The caller's router gets another address.
    NewAddress,
}

impl Outage {
    /// As reports name it.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What became of many of them.
#[derive(Debug, Serialize)]
pub(crate) struct Outages {
    pub(crate) kind: Outage,
    pub(crate) transport: &'static str,
    /// Runs after which calls were answered again.
    pub(crate) back: usize,
    pub(crate) failed: usize,
    /// From the end of the outage (the change of address) to the first answer.
    back_p50_ms: Option<f64>,
    pub(crate) back_p95_ms: Option<f64>,
    /// Calls meanwhile between two of the island, whom it does not concern, and those of them that failed.
    pub(crate) near_calls: u64,
    pub(crate) near_calls_failed: u64,
}

/// Sites of the scenario: on either side a relay and one who answers, and on the island those who call.
struct Map {
    relays: [usize; 2],
    far: usize,
    near: usize,
    callers: [usize; 2],
}

/// Has `kind` happen `runs` times. `told` hears of each run that failed.
pub(crate) fn run(
    lab: &mut Lab,
    program: &Program,
    (kind, transport): (Outage, Transport),
    runs: usize,
    told: &dyn Fn(&str),
) -> Result<Outages> {
    let map = Map {
        relays: [lab.add(NatKind::None)?, lab.add(NatKind::None)?],
        far: lab.add(NatKind::PortRestricted)?,
        near: lab.add(NatKind::PortRestricted)?,
        callers: [lab.add(NatKind::PortRestricted)?, lab.add(NatKind::PortRestricted)?],
    };
    let (mut back_ms, mut near_calls, mut near_calls_failed) = (Vec::new(), 0, 0);
    for run in 0..runs {
        let name = format!("{}-{}-{run}", kind.name(), transport.name());
        let mut peers = Peers::start(lab, program, transport, &map, &name)?;
        match peers.once(lab, kind, &map) {
            Ok((back, calls, failed)) => {
                back_ms.push(back.as_secs_f64() * 1e3);
                near_calls += calls;
                near_calls_failed += failed;
            }
            Err(error) => told(&format!("{name}: {error:#}")),
        }
        lab.heal(&map.island())?;
    }
    Ok(Outages {
        kind,
        transport: transport.name(),
        back: back_ms.len(),
        failed: runs - back_ms.len(),
        back_p50_ms: quantile(&back_ms, 0.5),
        back_p95_ms: quantile(&back_ms, 0.95),
        near_calls,
        near_calls_failed,
    })
}

impl Map {
    /// Everybody on the caller's side.
    fn island(&self) -> [usize; 4] {
        [self.relays[1], self.near, self.callers[0], self.callers[1]]
    }
}

/// Everybody of one run.
struct Peers {
    /// Calls the other side.
    across: Process,
    /// Calls on its own side.
    within: Process,
    _others: Vec<Process>,
}

impl Peers {
    fn start(lab: &Lab, program: &Program, transport: Transport, map: &Map, name: &str) -> Result<Self> {
        let mut others = Vec::new();
        for (i, site) in map.relays.iter().enumerate() {
            others.push(program.relay(lab.get(*site), &format!("{name}-relay{i}"))?);
        }
        let vias: Vec<String> =
            others.iter().map(|r| r.address(transport).map(str::to_owned)).collect::<Result<_>>()?;
        let vias: Vec<&str> = vias.iter().map(String::as_str).collect();
        let mut callers = Vec::new();
        for (site, from, side) in [(map.far, map.callers[0], "far"), (map.near, map.callers[1], "near")] {
            let peer = program.answerer(lab.get(site), &vias, transport, &format!("{name}-{side}"))?;
            // A slot at each relay, so that either side has one.
            for _ in &map.relays {
                peer.slot(PATIENCE).context("a slot at a relay")?;
            }
            let call = (&vias[..], peer.peer.as_str());
            let caller = format!("{name}-{side}-caller");
            callers.push(program.keep_calling(lab.get(from), call, transport, &caller)?);
            others.push(peer);
        }
        let within = callers.pop().context("two callers were started")?;
        let across = callers.pop().context("two callers were started")?;
        Ok(Self { across, within, _others: others })
    }

    /// From the end of the outage to the first answer; then the calls within one side, and those that failed.
    fn once(&mut self, lab: &mut Lab, kind: Outage, map: &Map) -> Result<(Duration, u64, u64)> {
        let over = match kind {
            Outage::Partition => {
                lab.part(&map.island())?;
                std::thread::sleep(PARTED);
                lab.heal(&map.island())?;
                Instant::now()
            }
            Outage::NewAddress => {
                lab.change_address(map.callers[0])?;
                Instant::now()
            }
        };
        self.across.answered_again(PATIENCE).context("no call was answered again")?;
        let back = over.elapsed();
        let across = self.across.stop_calling()?;
        ensure!(across.calls > across.calls_failed, "no call was answered");
        let within = self.within.stop_calling()?;
        Ok((back, within.calls, within.calls_failed))
    }
}
