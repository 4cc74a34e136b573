//! When to probe a connection, which probe an echo answers, and when silence means death. Pure: time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

/// The first probes follow each other quickly, so that a fresh link has an estimate before anybody plans with it.
const FIRST_PROBES: u64 = 5;
/// Distance of the first probes.
const FIRST_INTERVAL: Duration = Duration::from_millis(50);
/// A probe is late when it takes this many smoothed round trips (and longer than the probe interval).
const LATE_ROUND_TRIPS: u32 = 4;

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeAction {
    /// Send a probe with this number.
    Send(u64),
    /// Nothing yet.
    Wait,
    /// The peer has been silent for too long: close the connection.
    Dead,
}

/// The probes of one connection. Call [`ProbeTracker::handle_tick`] at [`ProbeTracker::next_tick`].
#[derive(Debug)]
pub struct ProbeTracker {
    interval: Duration,
    timeout: Duration,
    next_sequence: u64,
    next_tick: Duration,
    /// Unanswered probes: number, when sent, whether counted as lost. The oldest first.
    unanswered: VecDeque<(u64, Duration, bool)>,
    smoothed: Option<Duration>,
}

impl ProbeTracker {
    /// Probes every `interval` from `now` on; silence of `timeout` means death.
    pub fn new(now: Duration, interval: Duration, timeout: Duration) -> Self {
        Self {
            interval,
            timeout,
            next_sequence: 0,
            next_tick: now,
            unanswered: VecDeque::new(),
            smoothed: None,
        }
    }

    /// When to call [`ProbeTracker::handle_tick`] next.
    pub fn next_tick(&self) -> Duration {
        self.next_tick
    }

    /// Time has come to `now`. Returns what to do and how many probes have just become late.
    pub fn handle_tick(&mut self, now: Duration) -> (ProbeAction, usize) {
        let late_after = match self.smoothed {
            Some(rtt) => (rtt * LATE_ROUND_TRIPS).max(self.interval),
            None => self.timeout,
        };
        let mut newly_late = 0;
        for (_, sent, late) in &mut self.unanswered {
            if !*late && now.saturating_sub(*sent) > late_after {
                *late = true;
                newly_late += 1;
            }
        }
        if self.unanswered.front().is_some_and(|(_, sent, _)| now.saturating_sub(*sent) > self.timeout) {
            return (ProbeAction::Dead, newly_late);
        }
        if now < self.next_tick {
            return (ProbeAction::Wait, newly_late);
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let distance =
            if sequence + 1 < FIRST_PROBES { FIRST_INTERVAL.min(self.interval) } else { self.interval };
        self.next_tick = now + distance;
        self.unanswered.push_back((sequence, now, false));
        (ProbeAction::Send(sequence), newly_late)
    }

    /// The echo of probe `sequence` came at `now`. Returns its round trip, or `None` for an echo that answers nothing.
    /// Earlier probes that are still unanswered are forgotten: the stream keeps the order, so their echoes cannot come.
    pub fn handle_echo(&mut self, now: Duration, sequence: u64) -> Option<Duration> {
        let index = self.unanswered.iter().position(|(s, _, _)| *s == sequence)?;
        let (_, sent, _) = self.unanswered[index];
        self.unanswered.drain(..=index);
        let rtt = now.saturating_sub(sent);
        self.smoothed = Some(self.smoothed.map_or(rtt, |old| (old * 7 + rtt) / 8));
        Some(rtt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn five_quick_probes_then_one_per_interval() {
        let mut tracker = ProbeTracker::new(Duration::ZERO, 1000 * MS, 5000 * MS);
        let mut sent_at = Vec::new();
        for _ in 0..7 {
            let now = tracker.next_tick();
            let (ProbeAction::Send(sequence), 0) = tracker.handle_tick(now) else {
                panic!("not sent at {now:?}")
            };
            assert_eq!(tracker.handle_echo(now + 10 * MS, sequence), Some(10 * MS));
            sent_at.push(now.as_millis());
        }
        assert_eq!(sent_at, [0, 50, 100, 150, 200, 1200, 2200]);
    }

    #[test]
    fn silence_means_death_only_after_the_timeout() {
        let mut tracker = ProbeTracker::new(Duration::ZERO, 1000 * MS, 5000 * MS);
        let mut now = Duration::ZERO;
        loop {
            match tracker.handle_tick(now).0 {
                ProbeAction::Dead => break,
                _ => now = tracker.next_tick(),
            }
        }
        assert!(now > 5000 * MS && now <= 6300 * MS, "{now:?}");
    }

    #[test]
    fn a_late_probe_counts_once_and_its_echo_still_counts_as_life() {
        let mut tracker = ProbeTracker::new(Duration::ZERO, 100 * MS, 5000 * MS);
        assert_eq!(tracker.handle_tick(Duration::ZERO), (ProbeAction::Send(0), 0));
        tracker.handle_echo(MS, 0);
        assert_eq!(tracker.handle_tick(50 * MS), (ProbeAction::Send(1), 0));
        let late: usize = (2..30).map(|i| tracker.handle_tick(i * 50 * MS).1).sum();
        assert!(late >= 1);
        let last = tracker.next_sequence - 1;
        assert!(tracker.handle_echo(1600 * MS, last).is_some());
        assert!(tracker.unanswered.is_empty());
    }

    #[test]
    fn echoes_that_answer_nothing_are_ignored() {
        let mut tracker = ProbeTracker::new(Duration::ZERO, 100 * MS, 5000 * MS);
        assert_eq!(tracker.handle_echo(MS, 9), None);
        tracker.handle_tick(Duration::ZERO);
        assert_eq!(tracker.handle_echo(MS, 0), Some(MS));
        assert_eq!(tracker.handle_echo(MS, 0), None);
    }
}
