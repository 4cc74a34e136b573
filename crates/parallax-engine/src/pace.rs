//! How many rows a step may have to end in time. Pure: durations are arguments.
//!
//! A step costs something by itself (the weights are read, peers answer) and something for each row. Both are estimated by
//! least squares over the last steps, older ones counting less. What is computed does not depend on how it is cut.

use std::time::Duration;

/// What the steps before count, with each new one.
const DECAY: f64 = 0.9;
/// Steps of rows more alike than this share of their mean tell no costs apart.
const ALIKE: f64 = 0.1;

/// Keeps steps within a time.
#[derive(Debug, Clone)]
pub struct Pace {
    target_s: f64,
    steps: f64,
    rows: f64,
    rows_squared: f64,
    seconds: f64,
    rows_seconds: f64,
}

impl Pace {
    /// Aims at steps of `target` at most; zero: any time will do.
    pub fn new(target: Duration) -> Self {
        let target_s = target.as_secs_f64();
        Self { target_s, steps: 0.0, rows: 0.0, rows_squared: 0.0, seconds: 0.0, rows_seconds: 0.0 }
    }

    /// A step of so many rows took so long.
    pub fn observe(&mut self, rows: usize, took: Duration) {
        let (rows, seconds) = (rows as f64, took.as_secs_f64());
        let add = |sum: &mut f64, one: f64| *sum = *sum * DECAY + one;
        add(&mut self.steps, 1.0);
        add(&mut self.rows, rows);
        add(&mut self.rows_squared, rows * rows);
        add(&mut self.seconds, seconds);
        add(&mut self.rows_seconds, rows * seconds);
    }

    /// Rows of the next step. Where a step itself takes most of the time, fewer rows would not make it short: then they may
    /// take as long as it does.
    pub fn rows(&self) -> usize {
        let Some((fixed, each)) = self.costs().filter(|_| self.target_s > 0.0) else { return usize::MAX };
        ((self.target_s - fixed).max(fixed) / each) as usize
    }

    /// Seconds of a step, and of each of its rows.
    fn costs(&self) -> Option<(f64, f64)> {
        if self.rows <= 0.0 || self.seconds <= 0.0 {
            return None;
        }
        let mean = self.rows / self.steps;
        let variance = self.rows_squared / self.steps - mean * mean;
        let together = self.rows_seconds / self.steps - mean * self.seconds / self.steps;
        let each = together / variance;
        let fixed = self.seconds / self.steps - each * mean;
        if variance < (ALIKE * mean).powi(2) || each <= 0.0 || fixed < 0.0 {
            return Some((0.0, self.seconds / self.rows));
        }
        Some((fixed, each))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last step's rows and seconds on a machine whose steps take `fixed + each * rows`, give or take a fifth.
    fn settled(fixed: f64, each: f64) -> (usize, f64) {
        let mut pace = Pace::new(Duration::from_millis(80));
        let mut last = (0, 0.0);
        for step in 0..200 {
            let rows = if step % 5 == 0 { 3 } else { pace.rows().min(128) };
            let noise = [1.0, 1.2, 0.9, 0.8, 1.1, 1.0, 0.9][step % 7];
            let seconds = (fixed + each * rows as f64) * noise;
            pace.observe(rows, Duration::from_secs_f64(seconds));
            if step % 5 != 0 {
                last = (rows, fixed + each * rows as f64);
            }
        }
        last
    }

    #[test]
    fn steps_come_near_their_time_and_do_not_pass_it_by_much() {
        for (fixed, each) in [(0.005, 0.0012), (0.02, 0.004), (0.0, 0.01)] {
            let (rows, seconds) = settled(fixed, each);
            assert!((0.05..0.11).contains(&seconds), "{fixed} + {each} * {rows} = {seconds}");
        }
        assert_eq!(settled(0.001, 0.00001).0, 128, "a fast machine is not slowed down");
    }

    #[test]
    fn what_a_step_costs_by_itself_does_not_starve_prompts() {
        // Peers that answer after 300 ms: shorter steps would only be more of them.
        let (rows, _) = settled(0.3, 0.0005);
        assert_eq!(rows, 128);
    }

    #[test]
    fn without_a_time_and_without_steps_there_is_no_bound() {
        let mut free = Pace::new(Duration::ZERO);
        free.observe(100, Duration::from_secs(10));
        assert_eq!((free.rows(), Pace::new(Duration::from_millis(80)).rows()), (usize::MAX, usize::MAX));
    }
}
