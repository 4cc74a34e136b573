//! One stream over an emulated line: how much of the line it uses.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::lab::Lab;
use super::nat::NatKind;
use super::node::{Program, Transport};
use super::shaper::{Bursts, Line};
use super::statistics::quantile;

/// The line between the two ends.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Way {
    pub(crate) rtt_ms: f64,
    /// Packets take up to this much longer.
    pub(crate) jitter_ms: f64,
    pub(crate) mbit_per_s: u64,
    /// Share of the packets that are lost each way.
    pub(crate) loss: f64,
    /// Packets that are lost in a row, on average.
    pub(crate) burst: f64,
    /// Share of the packets that are overtaken each way.
    pub(crate) overtaken: f64,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(crate) struct Streamed {
    pub(crate) transport: &'static str,
    #[serde(flatten)]
    pub(crate) way: Way,
    mebibytes: u64,
    /// Runs that gave no figure.
    failed: usize,
    /// Bits of the stream per bit that the line could carry, over the last three quarters of the stream.
    pub(crate) share_p50: Option<f64>,
    /// The same from its first byte, with the time that it takes to get going.
    pub(crate) share_with_start_p50: Option<f64>,
}

impl Way {
    /// One of the lines that it is made of: what goes one way passes two of them.
    fn line(self) -> Line {
        Line {
            delay: Duration::from_secs_f64(self.rtt_ms / 4e3),
            rate_bits_per_s: Some(self.mbit_per_s * 1_000_000),
            // As long as a packet and its acknowledgement are under way: the router's usual share of buffer.
            queue: Duration::from_secs_f64(self.rtt_ms / 1e3),
            jitter: Duration::from_secs_f64(self.jitter_ms / 2e3),
            overtaken: self.overtaken / 2.0,
            loss: (self.loss > 0.0)
                .then(|| Bursts { share: 1.0 - (1.0 - self.loss).sqrt(), length: self.burst }),
        }
    }
}

/// Sends `mebibytes` from one site to another over a fresh lab, `runs` times. `told` hears of each run that failed.
pub(crate) fn run(
    program: &Program,
    transport: Transport,
    way: Way,
    (mebibytes, runs): (u64, usize),
    told: &dyn Fn(&str),
) -> Result<Streamed> {
    let mut lab = Lab::new(way.line())?;
    let (middle, from, to) = (lab.add(NatKind::None)?, lab.add(NatKind::None)?, lab.add(NatKind::None)?);
    let relay = program.relay(lab.get(middle), "stream-relay")?;
    let via = relay.address(transport)?;
    let (mut steady, mut whole) = (Vec::new(), Vec::new());
    for run in 0..runs {
        let name = format!("stream-{}-{run}", transport.name());
        let once = || {
            let peer = program.answerer(lab.get(to), &[via], transport, &format!("{name}-b"))?;
            let call = (&[via][..], peer.peer.as_str());
            let more = ["--stream-mib".to_owned(), mebibytes.to_string()];
            let seen = program.call(lab.get(from), call, transport, (&format!("{name}-a"), &more))?;
            seen.stream.context("the caller streamed nothing")
        };
        match once() {
            Ok(stream) => {
                let share = |mbit_per_s: f64| mbit_per_s / way.mbit_per_s as f64;
                steady.push(share(stream.steady_mbit_per_s));
                whole.push(share(stream.mbit_per_s));
            }
            Err(error) => told(&format!("{name}: {error:#}")),
        }
    }
    // Shares are told in thousandths.
    let middle = |values: &[f64]| {
        let thousandths: Vec<f64> = values.iter().map(|share| share * 1e3).collect();
        quantile(&thousandths, 0.5).map(|share| share.round() / 1e3)
    };
    Ok(Streamed {
        transport: transport.name(),
        way,
        mebibytes,
        failed: runs - steady.len(),
        share_p50: middle(&steady),
        share_with_start_p50: middle(&whole),
    })
}
