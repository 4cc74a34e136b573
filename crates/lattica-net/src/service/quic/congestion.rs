//! How much may be under way. CUBIC, but for which packets that get lost count: single ones, as radio and busy lines lose them,
//! say nothing about how full the line is, and CUBIC, which takes each for a sign of a full one, would leave nearly all of such
//! a line unused. So a loss is passed on to it only when more is lost than [`TOLERATED`] explains.
//!
//! A line that is full loses more than that, in bursts, and then this gives way as CUBIC does. Without loss the two are the same.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};
use quinn_proto::RttEstimator;

/// The share of packets that may get lost for no reason.
const TOLERATED: f64 = 0.02;
/// Standard deviations by which a round may exceed it by chance.
const DEVIATIONS: f64 = 1.5;
/// What may be under way before anything is known of the line.
const INITIAL_PACKETS: u64 = 32;
const PACKET_BYTES: u64 = 1200;

/// Makes a [`Tolerant`] for each connection.
#[derive(Debug, Default)]
pub(super) struct TolerantConfig;

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(INITIAL_PACKETS * PACKET_BYTES);
        let cubic = Arc::new(cubic).build(now, mtu);
        Box::new(Tolerant {
            cubic,
            mtu: mtu.into(),
            began: now,
            rounds: [Round::default(); 2],
            gave_way: None,
        })
    }
}

/// What became of the bytes that were heard of in one round trip.
#[derive(Debug, Default, Clone, Copy)]
struct Round {
    arrived: u64,
    lost: u64,
}

/// See the module.
struct Tolerant {
    cubic: Box<dyn Controller>,
    mtu: u64,
    /// When the last of the rounds began.
    began: Instant,
    rounds: [Round; 2],
    /// When CUBIC last gave way. What was sent before that was sent into the same full line.
    gave_way: Option<Instant>,
}

impl Tolerant {
    /// Whether more was lost than may be by chance.
    fn is_too_much(&self) -> bool {
        let packets =
            |bytes: fn(&Round) -> u64| self.rounds.iter().map(bytes).sum::<u64>() as f64 / self.mtu as f64;
        let lost = packets(|round| round.lost);
        let expected = TOLERATED * (packets(|round| round.arrived) + lost);
        lost > expected + DEVIATIONS * expected.sqrt() + 1.0
    }
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last: u64) {
        self.cubic.on_sent(now, bytes, last);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        if now.saturating_duration_since(self.began) > rtt.get().max(Duration::from_millis(1)) {
            self.rounds = [self.rounds[1], Round::default()];
            self.began = now;
        }
        self.rounds[1].arrived += bytes;
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost: u64) {
        if !persistent && self.gave_way.is_some_and(|at| sent <= at) {
            return;
        }
        self.rounds[1].lost += lost;
        // Without a loss, a router says that it is about to lose something.
        if persistent || lost == 0 || self.is_too_much() {
            self.rounds = [Round::default(); 2];
            self.began = now;
            self.gave_way = Some(now);
            self.cubic.on_congestion_event(now, sent, persistent, lost);
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = mtu.into();
        self.cubic.on_mtu_update(mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let &Self { mtu, began, rounds, gave_way, .. } = self;
        Box::new(Self { cubic: self.cubic.clone_box(), mtu, began, rounds, gave_way })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u16 = 1200;

    fn controller() -> (Box<dyn Controller>, Instant) {
        let now = Instant::now();
        (Arc::new(TolerantConfig).build(now, MTU), now)
    }

    /// Says that `lost` of `n` packets got lost, evenly spread; acknowledgements are kept out of it, as they need a connection.
    fn tolerant(n: u64, lost: u64) -> Tolerant {
        let mtu = u64::from(MTU);
        let rounds = [Round { arrived: (n - lost) * mtu, lost: lost * mtu }, Round::default()];
        let began = Instant::now();
        let cubic = Arc::new(CubicConfig::default()).build(began, MTU);
        Tolerant { cubic, mtu, began, rounds, gave_way: None }
    }

    #[test]
    fn one_lost_packet_in_a_hundred_is_no_sign_of_a_full_line_and_one_in_ten_is() {
        for n in [10, 30, 100, 300, 1000, 10_000] {
            assert!(!tolerant(n, n.div_ceil(100)).is_too_much(), "one percent of {n}");
            assert!(tolerant(n, (n / 10).max(2)).is_too_much(), "ten percent of {n}");
        }
    }

    #[test]
    fn single_losses_leave_the_window_and_bursts_take_from_it() {
        let (mut controller, start) = controller();
        let window = controller.window();
        assert_eq!(window, INITIAL_PACKETS * PACKET_BYTES);
        let later = start + Duration::from_millis(10);
        controller.on_congestion_event(later, later, false, MTU.into());
        assert_eq!(controller.window(), window);
        controller.on_congestion_event(later, later, false, 8 * u64::from(MTU));
        let less = controller.window();
        assert!(less < window);
        // The rest of the burst is no further sign.
        controller.on_congestion_event(later, later, false, 80 * u64::from(MTU));
        assert_eq!(controller.window(), less);
    }

    #[test]
    fn what_routers_mark_counts_at_once() {
        let (mut controller, start) = controller();
        let window = controller.window();
        let later = start + Duration::from_millis(10);
        controller.on_congestion_event(later, later, false, 0);
        assert!(controller.window() < window);
    }
}
