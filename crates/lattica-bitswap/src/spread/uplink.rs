//! How fast chunks may leave: one after the other, at a given rate.

use std::time::Duration;

/// A turn that was taken late is made up for by as much: timers are only so exact.
const CATCH_UP: Duration = Duration::from_millis(10);

/// An uplink that spreads share.
#[derive(Debug, Clone)]
pub struct Uplink {
    bytes_per_s: f64,
    free_at: Duration,
}

impl Uplink {
    /// An idle uplink of `bytes_per_s`.
    ///
    /// # Panics
    /// When that is below 1 or no number: the operator's choice, never a peer's.
    pub fn new(bytes_per_s: f64) -> Self {
        assert!(bytes_per_s >= 1.0, "an uplink of {bytes_per_s} bytes/s; give at least 1");
        Self { bytes_per_s, free_at: Duration::ZERO }
    }

    /// Takes the turn for `n_bytes`: when the last of them has left. Who takes it waits until then before the next is taken;
    /// so a turn of somebody who has left in the meantime is never taken.
    pub fn reserve(&mut self, n_bytes: u32, now: Duration) -> Duration {
        let takes = Duration::from_secs_f64(f64::from(n_bytes) / self.bytes_per_s);
        self.free_at = self.free_at.max(now.saturating_sub(CATCH_UP)) + takes;
        self.free_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_follow_each_other_and_only_a_moment_is_made_up_for() {
        let mut uplink = Uplink::new(1000.0);
        let seconds = Duration::from_secs;
        assert_eq!(uplink.reserve(2000, seconds(1)), seconds(3) - CATCH_UP, "idle time is not saved up");
        assert_eq!(uplink.reserve(1000, seconds(1)), seconds(4) - CATCH_UP);
        assert_eq!(uplink.reserve(1000, seconds(4)), seconds(5) - CATCH_UP, "a late turn is made up for");
        assert_eq!(uplink.reserve(1000, seconds(9)), seconds(10) - CATCH_UP);
    }
}
