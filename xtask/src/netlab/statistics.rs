//! What many runs of one pair add up to. Pure.

use serde::{Deserialize, Serialize};

/// What the calling side of one run saw (the report of `lattica-node probe --to`).
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Run {
    /// Whether the first call went over a relay.
    pub(crate) first_relayed: bool,
    /// From the decision to call a peer, known only by name and relay, to the first answer.
    pub(crate) first_call_ms: f64,
    /// From the same moment to the first direct connection.
    pub(crate) direct_ms: Option<f64>,
    /// Calls that got no answer, and answers that were not to their call.
    pub(crate) calls_failed: u64,
    /// Round trip to the relay.
    pub(crate) relay_rtt_ms: Option<f64>,
    /// The stream that was sent afterwards, if any was.
    #[serde(default)]
    pub(crate) stream: Option<Stream>,
}

/// How fast a stream arrived, as its receiver saw it.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Stream {
    /// From the opening of the stream to its last byte.
    pub(crate) mbit_per_s: f64,
    /// Over the last three quarters of its bytes.
    pub(crate) steady_mbit_per_s: f64,
}

/// One pair of sites over one transport.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Pair {
    pub(crate) a: &'static str,
    pub(crate) b: &'static str,
    pub(crate) transport: &'static str,
    /// Runs that ended on a direct connection.
    pub(crate) direct: usize,
    /// Runs whose calls were all answered, over the relay to the end.
    pub(crate) relayed: usize,
    /// Runs in which a call failed, or in which no call was made.
    pub(crate) failed: usize,
    pub(crate) time_to_direct_p50_ms: Option<f64>,
    pub(crate) time_to_direct_p95_ms: Option<f64>,
    /// First calls that went over the relay.
    pub(crate) relayed_first_calls: usize,
    pub(crate) relayed_first_call_p50_ms: Option<f64>,
    pub(crate) relayed_first_call_p95_ms: Option<f64>,
    pub(crate) relay_rtt_p50_ms: Option<f64>,
}

impl Pair {
    /// Sums runs up; `None` is one that gave no report.
    pub(crate) fn of(
        a: &'static str,
        b: &'static str,
        transport: &'static str,
        runs: &[Option<Run>],
    ) -> Self {
        let good: Vec<&Run> = runs.iter().flatten().filter(|r| r.calls_failed == 0).collect();
        let direct: Vec<f64> = good.iter().filter_map(|r| r.direct_ms).collect();
        let first: Vec<f64> = good.iter().filter(|r| r.first_relayed).map(|r| r.first_call_ms).collect();
        let rtts: Vec<f64> = good.iter().filter_map(|r| r.relay_rtt_ms).collect();
        Self {
            a,
            b,
            transport,
            direct: direct.len(),
            relayed: good.len() - direct.len(),
            failed: runs.len() - good.len(),
            time_to_direct_p50_ms: quantile(&direct, 0.5),
            time_to_direct_p95_ms: quantile(&direct, 0.95),
            relayed_first_calls: first.len(),
            relayed_first_call_p50_ms: quantile(&first, 0.5),
            relayed_first_call_p95_ms: quantile(&first, 0.95),
            relay_rtt_p50_ms: quantile(&rtts, 0.5),
        }
    }
}

/// The smallest value that is not below `share` of the values (nearest rank), rounded to a tenth; none of no values.
pub(crate) fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    let value = sorted.get(rank.max(1) - 1)?;
    Some((value * 10.0).round() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(direct_ms: Option<f64>, calls_failed: u64) -> Run {
        Run {
            first_relayed: true,
            first_call_ms: 20.0,
            direct_ms,
            calls_failed,
            relay_rtt_ms: Some(5.0),
            stream: None,
        }
    }

    #[test]
    fn quantiles_are_values_that_were_seen() {
        let values: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert_eq!(quantile(&values, 0.95), Some(19.0));
        assert_eq!(quantile(&values, 0.5), Some(10.0));
        assert_eq!(quantile(&values, 1.0), Some(20.0));
        assert_eq!(quantile(&[7.04], 0.95), Some(7.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn a_run_counts_once_and_one_with_a_lost_call_counts_as_failed() {
        let runs = [Some(run(Some(90.0), 0)), Some(run(None, 0)), Some(run(Some(1.0), 1)), None];
        let pair = Pair::of("open", "none", "tcp", &runs);
        assert_eq!((pair.direct, pair.relayed, pair.failed), (1, 1, 2));
        assert_eq!(pair.time_to_direct_p95_ms, Some(90.0));
        assert_eq!((pair.relayed_first_calls, pair.relayed_first_call_p95_ms), (2, Some(20.0)));
    }
}
