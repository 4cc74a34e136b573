//! What a line does to frames: delay, jitter, loss in bursts, overtaking, a rate with a queue. Pure: time is an argument, chance comes from
//! a seed.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// A frame that is overtaken comes this much later than its turn: a few full frames at 10 Mbit/s, dozens at 100.
const OVERTAKEN_BY: Duration = Duration::from_millis(4);

/// One direction of a line.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line {
    /// Every frame takes this long.
    pub(crate) delay: Duration,
    /// And up to this much longer; frames keep their order.
    pub(crate) jitter: Duration,
    /// Share of the frames, 0 to 1, that those behind them overtake.
    pub(crate) overtaken: f64,
    /// Bits per second; `None` is no limit.
    pub(crate) rate_bits_per_s: Option<u64>,
    /// Frames that would wait longer than this for their turn are dropped.
    pub(crate) queue: Duration,
    /// Losses come in bursts.
    pub(crate) loss: Option<Bursts>,
}

impl Line {
    /// Whether it does nothing to frames.
    pub(crate) fn is_plain(&self) -> bool {
        self.delay.is_zero()
            && self.jitter.is_zero()
            && self.overtaken == 0.0
            && self.rate_bits_per_s.is_none()
            && self.loss.is_none()
    }
}

/// Gilbert and Elliott's two states: in the good one nothing is lost, in the bad one everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bursts {
    /// Share of the frames that are lost, 0 to 1.
    pub(crate) share: f64,
    /// Frames that are lost in a row, on average; at least 1.
    pub(crate) length: f64,
}

/// Decides when each frame arrives.
#[derive(Debug)]
pub(crate) struct Shaper {
    line: Line,
    chance: SmallRng,
    losing: bool,
    /// When the frame before has been sent.
    sent_at: Duration,
    /// When the frame before arrives.
    arrives_at: Duration,
}

impl Shaper {
    pub(crate) fn new(line: Line, seed: u64) -> Self {
        let chance = SmallRng::seed_from_u64(seed);
        Self { line, chance, losing: false, sent_at: Duration::ZERO, arrives_at: Duration::ZERO }
    }

    /// When a frame of `n_bytes` that comes `now` arrives at the other end; `None` when it does not.
    pub(crate) fn handle_frame(&mut self, now: Duration, n_bytes: usize) -> Option<Duration> {
        if self.is_lost() {
            return None;
        }
        let begin = now.max(self.sent_at);
        if begin - now > self.line.queue {
            return None;
        }
        let sending = self
            .line
            .rate_bits_per_s
            .map_or(Duration::ZERO, |rate| Duration::from_secs_f64(n_bytes as f64 * 8.0 / rate as f64));
        self.sent_at = begin + sending;
        let jitter = self.line.jitter.mul_f64(self.chance.random::<f64>());
        let arrives_at = self.arrives_at.max(self.sent_at + self.line.delay + jitter);
        if self.line.overtaken > 0.0 && self.chance.random::<f64>() < self.line.overtaken {
            // Those behind it do not wait.
            return Some(arrives_at + OVERTAKEN_BY);
        }
        self.arrives_at = arrives_at;
        Some(arrives_at)
    }

    fn is_lost(&mut self) -> bool {
        let Some(bursts) = self.line.loss else { return false };
        // Mean stay in the bad state is `length` frames; the way there makes `share` of all frames bad.
        let leave = 1.0 / bursts.length.max(1.0);
        let enter = leave * bursts.share / (1.0 - bursts.share).max(f64::EPSILON);
        let turn = if self.losing { leave } else { enter };
        self.losing ^= self.chance.random::<f64>() < turn;
        self.losing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_frame_takes_its_delay_and_its_time_on_the_line() {
        let line =
            Line { delay: 20 * MS, rate_bits_per_s: Some(8_000_000), queue: 10 * MS, ..Line::default() };
        let mut shaper = Shaper::new(line, 1);
        // 1000 bytes at 8 Mbit/s are 1 ms; the second frame waits for the first.
        assert_eq!(shaper.handle_frame(5 * MS, 1000), Some(26 * MS));
        assert_eq!(shaper.handle_frame(5 * MS, 1000), Some(27 * MS));
        assert_eq!(shaper.handle_frame(100 * MS, 1000), Some(121 * MS));
    }

    #[test]
    fn a_full_queue_drops_and_the_rate_is_kept() {
        let line = Line { rate_bits_per_s: Some(8_000_000), queue: 10 * MS, ..Line::default() };
        let mut shaper = Shaper::new(line, 1);
        let arrived = (0..1000).filter(|_| shaper.handle_frame(Duration::ZERO, 1000).is_some()).count();
        assert_eq!(arrived, 11, "10 ms of frames wait behind the one that is being sent");
    }

    #[test]
    fn jitter_never_reorders() {
        let line = Line { delay: 5 * MS, jitter: 50 * MS, ..Line::default() };
        let mut shaper = Shaper::new(line, 7);
        let arrivals: Vec<Duration> = (0..200).filter_map(|i| shaper.handle_frame(i * MS, 100)).collect();
        assert!(arrivals.is_sorted() && arrivals.len() == 200);
        assert!(arrivals.iter().zip(0..).all(|(at, i)| *at >= i * MS + 5 * MS));
    }

    #[test]
    fn the_share_that_was_asked_for_is_overtaken_and_all_others_keep_their_order() {
        let line = Line { delay: 5 * MS, overtaken: 0.1, ..Line::default() };
        let mut shaper = Shaper::new(line, 9);
        let late: Vec<bool> = (0..10_000u32)
            .map(|i| {
                let arrives = shaper.handle_frame(i * MS, 100).expect("nothing is lost");
                assert!(arrives == i * MS + 5 * MS || arrives == i * MS + 5 * MS + OVERTAKEN_BY);
                arrives > i * MS + 5 * MS
            })
            .collect();
        let share = late.iter().filter(|late| **late).count() as f64 / late.len() as f64;
        assert!((share - 0.1).abs() < 0.01, "{share}");
    }

    #[test]
    fn losses_have_the_share_and_the_length_that_was_asked_for() {
        let line = Line { loss: Some(Bursts { share: 0.05, length: 4.0 }), ..Line::default() };
        let mut shaper = Shaper::new(line, 3);
        let lost: Vec<bool> =
            (0..200_000u64).map(|i| shaper.handle_frame(MS * i as u32, 100).is_none()).collect();
        let n_lost = lost.iter().filter(|l| **l).count() as f64;
        let bursts = lost.windows(2).filter(|w| !w[0] && w[1]).count() as f64;
        assert!((n_lost / lost.len() as f64 - 0.05).abs() < 0.01, "{n_lost} lost");
        assert!((n_lost / bursts - 4.0).abs() < 0.4, "{n_lost} lost in {bursts} bursts");
    }

    #[test]
    fn the_same_seed_gives_the_same_line() {
        let line = Line { jitter: 9 * MS, loss: Some(Bursts { share: 0.2, length: 2.0 }), ..Line::default() };
        let run = |seed| {
            let mut shaper = Shaper::new(line.clone(), seed);
            (0..100).map(|i| shaper.handle_frame(i * MS, 500)).collect::<Vec<_>>()
        };
        assert_eq!(run(4), run(4));
        assert_ne!(run(4), run(5));
    }
}
