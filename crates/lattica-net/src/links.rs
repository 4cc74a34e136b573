//! What a link is like: round trips, lost probes, goodput and how much it can be relied on, with the age of the knowledge, for
//! each [`path`] to a peer. Pure: time is an argument. [`map`] is the same for pairs of other nodes, by what they say or by
//! [`coordinate`]s.
//!
//! Probes travel on a reliable stream, so "loss" here is the share of probes that stayed unanswered for longer than the
//! probe timeout, not of packets.

pub mod coordinate;
pub mod map;
pub mod path;
pub mod probe;
mod reliability;

use std::collections::VecDeque;
use std::time::Duration;

pub use path::{PathKind, PeerLinks};
use reliability::Reliability;
use serde::Serialize;

/// Round trips kept for the percentiles.
const WINDOW: usize = 64;
/// Weight of a new sample in the smoothed values (the one that TCP uses, RFC 6298).
const SMOOTHING: f64 = 0.125;
/// A pause longer than this ends a burst: what comes later says nothing about the link's rate.
const BURST_GAP: Duration = Duration::from_millis(50);
/// A burst is judged at the latest after this long.
const BURST_MAX: Duration = Duration::from_millis(500);
/// Smaller bursts are dominated by latency, not by rate.
const BURST_MIN_BYTES: u64 = 256 * 1024;

/// What is known about one path to a peer, as this node measured it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinkEstimate {
    /// Smoothed round trip.
    pub rtt_ms: f64,
    /// Smallest round trip of the last 64.
    pub rtt_min_ms: f64,
    /// 95th percentile of the last 64 round trips.
    pub rtt_p95_ms: f64,
    /// Smoothed deviation from the smoothed round trip.
    pub jitter_ms: f64,
    /// Share of the last 64 probes that were not answered in time, 0 to 1.
    pub loss: f64,
    /// Bytes per second that useful transfers reached: towards the peer as it reported them, else from the peer.
    pub goodput_bytes_per_s: Option<f64>,
    /// Bytes per second that arrived here in bursts of at least 256 KiB.
    pub goodput_in_bytes_per_s: Option<f64>,
    /// Bytes per second that the peer says arrived there. A claim of the peer.
    pub goodput_out_bytes_per_s: Option<f64>,
    /// Time since the last transfer, of either direction, that was large enough to tell the goodput.
    pub goodput_age: Option<Duration>,
    /// Share of probes that were answered in time, 0 to 1, over hours: what was an hour ago counts half. A connection in
    /// use that ended otherwise than by this end (also where the peer closed it) counts as a minute without answers.
    pub reliability: f64,
    /// Time since the last answered probe.
    pub age: Duration,
    /// Answered probes so far.
    pub n_samples: u64,
    /// Which path this is.
    pub path: PathKind,
}

/// Collects the probes of one path.
#[derive(Debug, Clone, Default)]
pub struct LinkEstimator {
    /// Round trips in milliseconds, `None` for a probe that was lost; the latest last.
    probes: VecDeque<Option<f64>>,
    smoothed_ms: f64,
    deviation_ms: f64,
    last_answer: Option<Duration>,
    n_samples: u64,
    incoming: GoodputMeter,
    /// What the peer reports, and when that last changed.
    reported_out: Option<(f64, Duration)>,
    reliability: Reliability,
}

impl LinkEstimator {
    /// A probe came back after `rtt`.
    pub fn handle_answer(&mut self, now: Duration, rtt: Duration) {
        let rtt_ms = rtt.as_secs_f64() * 1e3;
        if self.n_samples == 0 {
            self.smoothed_ms = rtt_ms;
            self.deviation_ms = rtt_ms / 2.0;
        } else {
            self.deviation_ms += SMOOTHING * 2.0 * ((self.smoothed_ms - rtt_ms).abs() - self.deviation_ms);
            self.smoothed_ms += SMOOTHING * (rtt_ms - self.smoothed_ms);
        }
        self.n_samples += 1;
        self.last_answer = Some(now);
        self.reliability.handle_answer(now);
        self.push(Some(rtt_ms));
    }

    /// A probe stayed unanswered.
    pub fn handle_loss(&mut self, now: Duration) {
        self.reliability.handle_loss(now);
        self.push(None);
    }

    /// The path broke while it was in use.
    pub fn handle_break(&mut self, now: Duration) {
        self.reliability.handle_break(now);
    }

    /// `n_bytes` arrived from the peer.
    pub fn handle_received(&mut self, now: Duration, n_bytes: usize) {
        self.incoming.handle_bytes(now, n_bytes);
    }

    /// The peer says at what rate our bytes reach it. Values that are not sane rates are ignored.
    pub fn handle_reported_goodput(&mut self, now: Duration, bytes_per_s: f64) {
        let sane = bytes_per_s.is_finite() && bytes_per_s > 0.0;
        // The same again is what every echo says until there was another transfer.
        if sane && self.reported_out.is_none_or(|(known, _)| known != bytes_per_s) {
            self.reported_out = Some((bytes_per_s, now));
        }
    }

    /// The rate at which bytes arrive here, for telling the peer.
    pub fn incoming_bytes_per_s(&self) -> Option<f64> {
        self.incoming.bytes_per_s()
    }

    /// What is known at `now`; `None` before the first answered probe.
    pub fn estimate(&self, now: Duration, path: PathKind) -> Option<LinkEstimate> {
        let last_answer = self.last_answer?;
        let mut sorted: Vec<f64> = self.probes.iter().filter_map(|p| *p).collect();
        sorted.sort_by(f64::total_cmp);
        let lost = self.probes.len() - sorted.len();
        // When the window holds losses only, the smoothed value is the best that is known.
        let rtt_min_ms = sorted.first().copied().unwrap_or(self.smoothed_ms);
        let rtt_p95_ms = percentile(&sorted, 0.95).unwrap_or(self.smoothed_ms);
        let (incoming, reported) = (self.incoming.bytes_per_s(), self.reported_out.map(|(rate, _)| rate));
        let told = self.reported_out.map(|(_, at)| at).into_iter().chain(self.incoming.judged_at).max();
        Some(LinkEstimate {
            rtt_ms: self.smoothed_ms,
            rtt_min_ms,
            rtt_p95_ms,
            jitter_ms: self.deviation_ms,
            loss: lost as f64 / self.probes.len() as f64,
            goodput_bytes_per_s: reported.or(incoming),
            goodput_in_bytes_per_s: incoming,
            goodput_out_bytes_per_s: reported,
            goodput_age: reported
                .or(incoming)
                .map(|_| told.map_or(Duration::ZERO, |at| now.saturating_sub(at))),
            reliability: self.reliability.share(),
            age: now.saturating_sub(last_answer),
            n_samples: self.n_samples,
            path,
        })
    }

    fn push(&mut self, probe: Option<f64>) {
        if self.probes.len() == WINDOW {
            self.probes.pop_front();
        }
        self.probes.push_back(probe);
    }
}

/// The value below which `share` of the sorted values lie, by the nearest-rank rule.
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Finds the rate of bursts in a flow of arrivals. The first arrival of a burst starts the watch and does not count:
/// its bytes were sent before.
#[derive(Debug, Clone, Default)]
struct GoodputMeter {
    burst: Option<Burst>,
    smoothed: Option<f64>,
    /// When the last of the bursts ended that were long enough.
    judged_at: Option<Duration>,
}

#[derive(Debug, Clone)]
struct Burst {
    start: Duration,
    last: Duration,
    n_bytes: u64,
}

impl GoodputMeter {
    fn handle_bytes(&mut self, now: Duration, n_bytes: usize) {
        let Some(burst) = &mut self.burst else {
            self.burst = Some(Burst { start: now, last: now, n_bytes: 0 });
            return;
        };
        if now.saturating_sub(burst.last) > BURST_GAP {
            let finished = std::mem::replace(burst, Burst { start: now, last: now, n_bytes: 0 });
            self.judge(&finished);
            return;
        }
        burst.last = now;
        burst.n_bytes += n_bytes as u64;
        if now.saturating_sub(burst.start) >= BURST_MAX {
            let finished = std::mem::replace(burst, Burst { start: now, last: now, n_bytes: 0 });
            self.judge(&finished);
        }
    }

    fn judge(&mut self, burst: &Burst) {
        if let Some(rate) = burst.bytes_per_s() {
            self.smoothed = Some(self.smoothed.map_or(rate, |old| old + 0.3 * (rate - old)));
            self.judged_at = Some(burst.last);
        }
    }

    /// The smoothed rate, or that of the burst under way when none was finished yet.
    fn bytes_per_s(&self) -> Option<f64> {
        self.smoothed.or_else(|| self.burst.as_ref().and_then(Burst::bytes_per_s))
    }
}

impl Burst {
    fn bytes_per_s(&self) -> Option<f64> {
        let seconds = self.last.saturating_sub(self.start).as_secs_f64();
        (self.n_bytes >= BURST_MIN_BYTES && seconds > 0.0).then(|| self.n_bytes as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn nothing_is_known_before_the_first_answer() {
        let mut estimator = LinkEstimator::default();
        estimator.handle_loss(MS);
        assert_eq!(estimator.estimate(MS, PathKind::Quic), None);
    }

    #[test]
    fn a_steady_link_is_estimated_exactly() {
        let mut estimator = LinkEstimator::default();
        for second in 0..100 {
            estimator.handle_answer(Duration::from_secs(second), 20 * MS);
        }
        let estimate = estimator.estimate(Duration::from_secs(102), PathKind::Relayed).unwrap();
        assert!((estimate.rtt_ms - 20.0).abs() < 1e-9 && (estimate.rtt_p95_ms - 20.0).abs() < 1e-9);
        assert!(estimate.jitter_ms < 1e-3 && estimate.loss == 0.0 && estimate.path.is_relayed());
        assert_eq!((estimate.age, estimate.n_samples), (Duration::from_secs(3), 100));
    }

    #[test]
    fn a_path_change_is_followed_within_twenty_probes() {
        let mut estimator = LinkEstimator::default();
        for _ in 0..50 {
            estimator.handle_answer(MS, 80 * MS);
        }
        for _ in 0..20 {
            estimator.handle_answer(MS, 10 * MS);
        }
        let estimate = estimator.estimate(MS, PathKind::Tcp).unwrap();
        assert!(estimate.rtt_ms < 16.0 && (estimate.rtt_min_ms - 10.0).abs() < 1e-9, "{estimate:?}");
    }

    #[test]
    fn goodput_is_the_rate_of_bursts_and_pauses_do_not_dilute_it() {
        let mut meter = GoodputMeter::default();
        // Ten bursts of 100 ms at 64 KiB per millisecond, each followed by a second of silence.
        for burst in 0..10u32 {
            for step in 0..100u32 {
                meter.handle_bytes(burst * Duration::from_millis(1100) + step * MS, 65_536);
            }
        }
        let rate = meter.bytes_per_s().unwrap();
        assert!((rate / 65_536_000.0 - 1.0).abs() < 0.01, "{rate}");
    }

    #[test]
    fn small_transfers_say_nothing_about_goodput() {
        let mut meter = GoodputMeter::default();
        for step in 0..100u32 {
            meter.handle_bytes(step * Duration::from_secs(1), 10_000);
        }
        assert_eq!(meter.bytes_per_s(), None);
    }

    #[test]
    fn insane_reports_of_the_peer_are_ignored() {
        let mut estimator = LinkEstimator::default();
        estimator.handle_answer(MS, MS);
        for claim in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            estimator.handle_reported_goodput(MS, claim);
        }
        assert_eq!(estimator.estimate(MS, PathKind::Quic).unwrap().goodput_bytes_per_s, None);
    }

    #[test]
    fn goodput_is_as_old_as_the_last_transfer_not_as_the_last_echo() {
        let (mut estimator, s) = (LinkEstimator::default(), Duration::from_secs);
        for second in 0..100 {
            estimator.handle_answer(s(second), MS);
            estimator.handle_reported_goodput(s(second), 5e6);
        }
        let age = |estimator: &LinkEstimator| estimator.estimate(s(100), PathKind::Quic).unwrap().goodput_age;
        assert_eq!(age(&estimator), Some(s(100)));
        estimator.handle_reported_goodput(s(60), 4e6);
        assert_eq!(age(&estimator), Some(s(40)));
        for step in 0..100u32 {
            estimator.handle_received(s(90) + step * MS, 65_536);
        }
        estimator.handle_received(s(99), 1);
        assert_eq!(age(&estimator), Some(s(10) - 99 * MS));
    }

    proptest! {
        // Against the naive definition over the last 64 probes.
        #[test]
        fn window_statistics_match_the_naive_ones(probes in proptest::collection::vec(proptest::option::of(1u64..500), 1..200)) {
            let mut estimator = LinkEstimator::default();
            for (i, probe) in probes.iter().enumerate() {
                match probe {
                    Some(ms) => estimator.handle_answer(i as u32 * MS, Duration::from_millis(*ms)),
                    None => estimator.handle_loss(i as u32 * MS),
                }
            }
            let window = &probes[probes.len().saturating_sub(64)..];
            let mut answered: Vec<u64> = window.iter().filter_map(|p| *p).collect();
            answered.sort_unstable();
            if let (Some(estimate), false) = (estimator.estimate(Duration::from_secs(1), PathKind::Quic), answered.is_empty()) {
                let expected_loss = (window.len() - answered.len()) as f64 / window.len() as f64;
                prop_assert!((estimate.loss - expected_loss).abs() < 1e-12);
                prop_assert!((estimate.rtt_min_ms - answered[0] as f64).abs() < 1e-6);
                let below = answered.iter().filter(|ms| (**ms as f64) < estimate.rtt_p95_ms - 1e-6).count();
                let at_most = answered.iter().filter(|ms| (**ms as f64) <= estimate.rtt_p95_ms + 1e-6).count();
                prop_assert!(below as f64 <= 0.95 * answered.len() as f64);
                prop_assert!(at_most as f64 >= 0.95 * answered.len() as f64);
                let largest = *answered.last().unwrap_or(&0) as f64;
                prop_assert!(estimate.rtt_ms <= 500.0 && estimate.rtt_p95_ms <= largest + 1e-6);
            }
        }
    }
}
