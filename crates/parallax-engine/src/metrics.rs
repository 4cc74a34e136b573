//! Counters of an engine. The engine counts; whoever owns a clock adds the latencies.

use crate::request::FinishReason;

/// What an engine has done and how full it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineMetrics {
    /// Sequences that hold cache pages.
    pub running: usize,
    /// Sequences that can run together at most.
    pub most_running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// Cache pages in all.
    pub pages: usize,
    /// Cache pages held.
    pub pages_used: usize,
    /// Slots of recurrent states in all; none where no layer is recurrent.
    pub states: usize,
    /// Of these, the states of running sequences.
    pub states_used: usize,
    /// Of the others, those with a state that requests can begin with.
    pub states_kept: usize,
    /// Names of the resident adapters of running sequences.
    pub running_adapters: Vec<String>,
    /// Names of those of sequences in the queue.
    pub waiting_adapters: Vec<String>,
    /// Forward passes.
    pub steps: u64,
    /// Rows of all forward passes.
    pub rows: u64,
    /// Prompt tokens of all requests.
    pub prompt_tokens: u64,
    /// Tokens of all answers.
    pub generated_tokens: u64,
    /// Prompt tokens that were looked up in the prefix index.
    pub prefix_cache_queries: u64,
    /// Prompt tokens that were found there.
    pub prefix_cache_hits: u64,
    /// How often speculation proposed tokens for a sequence.
    pub speculations: u64,
    /// Tokens that speculation proposed.
    pub speculated_tokens: u64,
    /// Of these, tokens that the sampler chose.
    pub accepted_tokens: u64,
    /// How often a sequence lost its pages to an older one.
    pub preemptions: u64,
    /// Requests that ended with a stop token.
    pub finished_stop: u64,
    /// Requests that ended with their allowance.
    pub finished_length: u64,
    /// Requests that were aborted.
    pub finished_aborted: u64,
    /// Requests that a stage failed.
    pub finished_error: u64,
    /// Times, as far as they were measured.
    pub latencies: Latencies,
}

impl EngineMetrics {
    /// Share of cache pages that are held, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        if self.pages == 0 { 0.0 } else { self.pages_used as f64 / self.pages as f64 }
    }

    pub(crate) fn count_finished(&mut self, reason: FinishReason) {
        *match reason {
            FinishReason::Stop => &mut self.finished_stop,
            FinishReason::Length => &mut self.finished_length,
            FinishReason::Aborted => &mut self.finished_aborted,
            FinishReason::Error => &mut self.finished_error,
        } += 1;
    }
}

/// Times and lengths of requests and steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Latencies {
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of one answer.
    pub inter_token: Histogram,
    /// From submission to the end.
    pub end_to_end: Histogram,
    /// From submission to the first step that computes it, of finished requests.
    pub queue: Histogram,
    /// From there to the first token.
    pub prefill: Histogram,
    /// From the first token to the last one.
    pub decode: Histogram,
    /// `decode` per token after the first, of requests with more than one.
    pub time_per_token: Histogram,
    /// `prefill` and `decode` together.
    pub inference: Histogram,
    /// Tokens of the prompts of finished requests.
    pub prompt_tokens: Histogram,
    /// Tokens of their answers.
    pub generated_tokens: Histogram,
    /// Rows (tokens) of steps.
    pub step_rows: Histogram,
    /// Seconds inside runners, of all steps.
    pub forward_seconds: f64,
    /// Seconds of all steps, planning and sampling included.
    pub step_seconds: f64,
}

/// Upper bounds of the histogram buckets in seconds; a last bucket has no bound.
pub const BUCKETS_SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0];

/// Upper bounds of the buckets of numbers of tokens.
pub const BUCKETS_TOKENS: [f64; 16] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];

impl Default for Latencies {
    fn default() -> Self {
        let (seconds, tokens) = (Histogram::new(&BUCKETS_SECONDS), Histogram::new(&BUCKETS_TOKENS));
        Self {
            time_to_first_token: seconds.clone(),
            inter_token: seconds.clone(),
            end_to_end: seconds.clone(),
            queue: seconds.clone(),
            prefill: seconds.clone(),
            decode: seconds.clone(),
            time_per_token: seconds.clone(),
            inference: seconds,
            prompt_tokens: tokens.clone(),
            generated_tokens: tokens.clone(),
            step_rows: tokens,
            forward_seconds: 0.0,
            step_seconds: 0.0,
        }
    }
}

/// Observations by bucket.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds: the last has none.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// No observations; `bounds` are the upper ends of the buckets, rising.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// Adds one observation.
    pub fn observe(&mut self, value: f64) {
        let bucket = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(self.bounds.len());
        self.counts[bucket] += 1;
        self.sum += value;
    }

    /// Observations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of the observations.
    pub fn sum(&self) -> f64 {
        self.sum
    }

    /// Bucket bounds with the number of observations at or below each, as Prometheus wants them; the last bound is
    /// infinite.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_at_or_below_each_bound() {
        let mut histogram = Histogram::new(&BUCKETS_SECONDS);
        for seconds in [0.0005, 0.001, 0.3, 1000.0] {
            histogram.observe(seconds);
        }
        let cumulative: Vec<_> = histogram.cumulative().collect();
        assert_eq!(cumulative[0], (0.001, 2));
        assert_eq!(cumulative[8], (0.5, 3));
        assert_eq!(cumulative.last(), Some(&(f64::INFINITY, 4)));
        assert_eq!(histogram.count(), 4);
    }
}
