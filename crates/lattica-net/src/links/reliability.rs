//! How much a path can be relied on: over hours, where the window of the last probes covers a minute. Pure.

use std::time::Duration;

/// What happened counts half after this long.
const HALF_LIFE: Duration = Duration::from_secs(3600);
/// A connection that broke counts as this many probes without an answer: a minute of them, at the usual distance.
const BREAK_PROBES: f64 = 60.0;

/// Counts that fade.
#[derive(Debug, Clone, Default)]
pub(super) struct Reliability {
    answered: f64,
    failed: f64,
    at: Duration,
}

impl Reliability {
    pub(super) fn handle_answer(&mut self, now: Duration) {
        self.fade(now);
        self.answered += 1.0;
    }

    pub(super) fn handle_loss(&mut self, now: Duration) {
        self.fade(now);
        self.failed += 1.0;
    }

    pub(super) fn handle_break(&mut self, now: Duration) {
        self.fade(now);
        self.failed += BREAK_PROBES;
    }

    /// The share that was answered, 0 to 1; nothing bad is thought of what is not known.
    pub(super) fn share(&self) -> f64 {
        let all = self.answered + self.failed;
        if all > 0.0 { self.answered / all } else { 1.0 }
    }

    fn fade(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64();
        let left = (-passed).exp2();
        self.answered *= left;
        self.failed *= left;
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_break_is_held_against_a_path_for_hours_and_forgiven_in_the_end() {
        let mut path = Reliability::default();
        let probed = |path: &mut Reliability, from: u32, to: u32| {
            (from..to).for_each(|second| path.handle_answer(second * S));
            path.share()
        };
        assert!((probed(&mut path, 0, 3600) - 1.0).abs() < 1e-9);
        path.handle_break(3600 * S);
        let after = path.share();
        assert!(
            (0.97..0.98).contains(&after),
            "{after}: a minute in an hour, the older probes counting less"
        );
        assert!(probed(&mut path, 3600, 7200) > after);
        assert!(probed(&mut path, 7200, 36_000) > 0.9999);
    }

    #[test]
    fn counts_are_those_of_a_plain_sum_over_what_happened() {
        let events = [(0, true), (10, false), (1800, true), (5400, true), (5400, false), (9000, true)];
        let mut path = Reliability::default();
        for (second, answered) in events {
            if answered { path.handle_answer(second * S) } else { path.handle_loss(second * S) }
        }
        let weight = |second: u32| (-f64::from(9000 - second) / 3600.0).exp2();
        let sum = |wanted| -> f64 {
            events.iter().filter(|(_, answered)| *answered == wanted).map(|(second, _)| weight(*second)).sum()
        };
        let naive = sum(true) / (sum(true) + sum(false));
        assert!((path.share() - naive).abs() < 1e-12, "{} {naive}", path.share());
    }
}
