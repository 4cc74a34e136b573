//! How fast chunks may leave: one after the other, at a given rate.

use std::time::Duration;

/// An uplink that spreads share.
#[derive(Debug, Clone)]
pub struct Uplink {
    bytes_per_s: f64,
    free_at: Duration,
}

impl Uplink {
    /// An idle uplink of `bytes_per_s`, above 0.
    pub fn new(bytes_per_s: f64) -> Self {
        Self { bytes_per_s, free_at: Duration::ZERO }
    }

    /// Takes the next turn for `n_bytes`: when the last of them has left.
    pub fn reserve(&mut self, n_bytes: u32, now: Duration) -> Duration {
        let takes = Duration::from_secs_f64(f64::from(n_bytes) / self.bytes_per_s);
        self.free_at = self.free_at.max(now) + takes;
        self.free_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_follow_each_other_and_idle_time_is_not_saved_up() {
        let mut uplink = Uplink::new(1000.0);
        let seconds = Duration::from_secs;
        assert_eq!(uplink.reserve(2000, seconds(1)), seconds(3));
        assert_eq!(uplink.reserve(1000, seconds(1)), seconds(4));
        assert_eq!(uplink.reserve(1000, seconds(9)), seconds(10));
    }
}
