//! The numeric profile of an audit: which distances an honest machine may show, and what convicts.
//!
//! Thresholds belong to a profile, not to the protocol: they are calibrated per storage type and kernel. With the
//! kernels of parallax-kernels an honest worker on any thread count and batch gives the same bits (docs/NUMERICS.md), so
//! the tolerances below only cover machines that run other kernels.

use serde::{Deserialize, Serialize};

/// Thresholds of an audit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Name, for evidence and reports.
    pub name: String,
    /// Mean relative L2 distance of the opened rows up to which the rows pass.
    pub pass_relative_l2: f64,
    /// Mean relative L2 distance from which the rows convict; between the two the audit is inconclusive.
    pub fail_relative_l2: f64,
    /// Mean absolute difference of reported and recomputed log-probabilities, in nats, from which the answer convicts.
    pub fail_logprob_nats: f64,
    /// Absolute difference of a single log-probability, in nats, from which the answer convicts: a mean over a long answer
    /// would hide one that is far off.
    pub fail_logprob_max_nats: f64,
    /// Share of tokens that a replay of the sampler must reproduce, when the sampler can be replayed.
    pub min_token_agreement: f64,
}

impl Profile {
    /// Weights and activations in f32. Honest distance measured on one machine: 0. Other summation orders stay below
    /// 1e-5 at 30 layers; int8 activations or 4-bit weights lie above 1e-3.
    pub fn f32() -> Self {
        Self {
            name: "f32".to_owned(),
            pass_relative_l2: 1e-4,
            fail_relative_l2: 1e-3,
            fail_logprob_nats: 1e-2,
            fail_logprob_max_nats: 0.1,
            min_token_agreement: 0.98,
        }
    }
}

impl Default for Profile {
    fn default() -> Self {
        Self::f32()
    }
}

/// How far the random number of a draw may lie from the probabilities of the claimed token and still agree with it:
/// another order of summation moves them by less.
pub const DRAW_SLACK: f64 = 1e-4;
/// Rows opened by default: enough that a change that touches half of the rows escapes with probability 1/256.
pub const DEFAULT_POSITIONS: u32 = 8;
/// Rows that one challenge may ask for.
pub const MAX_POSITIONS: u32 = 256;
/// Rows that one commitment may cover: the longest completion.
pub const MAX_ROWS: u32 = 1 << 20;
/// Values of one row: the widest hidden state.
pub const MAX_WIDTH: u32 = 1 << 16;
