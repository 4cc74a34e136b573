//! Which pipeline serves the next request: the ready one with the least work in flight for its rate.

use std::collections::HashMap;

/// Counts what is in flight per pipeline and picks the least loaded.
#[derive(Debug, Clone, Default)]
pub struct Router {
    in_flight: HashMap<usize, u32>,
}

impl Router {
    /// Nothing in flight.
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses among pipelines given as (index, tokens per second), and counts the request there. The expected wait is
    /// (requests in flight + 1) / rate; ties go to the lower index.
    pub fn choose(&mut self, ready: &[(usize, f64)]) -> Option<usize> {
        let wait =
            |&(index, rate): &(usize, f64)| f64::from(self.load(index) + 1) / rate.max(f64::MIN_POSITIVE);
        let (index, _) = *ready.iter().min_by(|a, b| wait(a).total_cmp(&wait(b)).then(a.0.cmp(&b.0)))?;
        *self.in_flight.entry(index).or_default() += 1;
        Some(index)
    }

    /// A request of this pipeline has ended, however it ended.
    pub fn finish(&mut self, index: usize) {
        if let Some(n) = self.in_flight.get_mut(&index) {
            *n = n.saturating_sub(1);
        }
    }

    /// Requests in flight there.
    pub fn load(&self, index: usize) -> u32 {
        self.in_flight.get(&index).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_spread_in_proportion_to_rates() {
        let mut router = Router::new();
        let ready = [(0, 10.0), (1, 30.0)];
        for _ in 0..40 {
            router.choose(&ready).unwrap();
        }
        assert_eq!((router.load(0), router.load(1)), (10, 30));
        for _ in 0..30 {
            router.finish(1);
        }
        assert_eq!(router.choose(&ready), Some(1));
        assert_eq!(router.choose(&[]), None);
    }
}
