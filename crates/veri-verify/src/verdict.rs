//! The outcome of an audit, and the evidence with which anyone can repeat it.

use serde::{Deserialize, Serialize};

use crate::compare::Distance;
use crate::config::Profile;
use crate::job::{Answer, Job};

/// Outcome of an audit. `Fail` and `Malformed` convict at once; who is `Withheld` from too often in a row is convicted by
/// whoever keeps the books: a connection may break once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
#[non_exhaustive]
pub enum Verdict {
    /// The computation is what was claimed.
    Pass {
        /// Measured distances.
        distance: Distance,
    },
    /// The computation is not what was claimed.
    Fail {
        /// Why.
        reason: FailReason,
        /// Measured distances, as far as they were measured.
        distance: Distance,
    },
    /// Neither near enough to pass nor far enough to convict: audit more.
    Inconclusive {
        /// Measured distances.
        distance: Distance,
    },
    /// No opening came in time.
    Withheld,
    /// Commitment or opening are not what the protocol asks for.
    Malformed {
        /// What is wrong.
        reason: String,
    },
}

/// What convicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailReason {
    /// The hidden rows are far from the recomputed ones: other weights, precision or adapter.
    HiddenStates,
    /// The reported log-probabilities are far from the recomputed ones.
    Logprobs,
    /// The sampler, replayed with the job's seed, draws other tokens.
    Tokens,
}

impl Verdict {
    /// Whether the answer may be used.
    pub fn is_pass(&self) -> bool {
        matches!(self, Self::Pass { .. })
    }

    /// Whether the worker is to be excluded at once: it was wrong or sent nonsense.
    pub fn convicts(&self) -> bool {
        matches!(self, Self::Fail { .. } | Self::Malformed { .. })
    }

    /// One word, as in reports.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Pass { .. } => "pass",
            Self::Fail { .. } => "fail",
            Self::Inconclusive { .. } => "inconclusive",
            Self::Withheld => "withheld",
            Self::Malformed { .. } => "malformed",
        }
    }

    /// Why, in one sentence.
    pub fn reason(&self) -> String {
        match self {
            Self::Pass { distance } if distance.n_exact == distance.n_rows => {
                "all opened rows equal bit for bit".into()
            }
            Self::Pass { distance } => {
                format!("opened rows within {:.1e} of the recomputed ones", distance.relative_l2)
            }
            Self::Fail { reason: FailReason::HiddenStates, distance } => {
                format!("hidden rows differ by {:.1e} from the recomputed ones", distance.relative_l2)
            }
            Self::Fail { reason: FailReason::Logprobs, .. } => {
                "reported log-probabilities are not the model's".into()
            }
            Self::Fail { reason: FailReason::Tokens, .. } => {
                "the sampler with the job's seed draws other tokens".into()
            }
            Self::Inconclusive { distance } => {
                format!(
                    "hidden rows differ by {:.1e}: too far to pass, too near to convict",
                    distance.relative_l2
                )
            }
            Self::Withheld => "no opening came in time".into(),
            Self::Malformed { reason } => reason.clone(),
        }
    }
}

/// Everything that another party needs to repeat an audit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// What was asked.
    pub job: Job,
    /// What was answered.
    pub answer: Answer,
    /// The signed commitment, encoded, in hexadecimal.
    pub commitment: String,
    /// The auditor's randomness, in hexadecimal.
    pub randomness: String,
    /// Rows that were asked for.
    pub n_positions: u32,
    /// The opening, encoded, in hexadecimal; absent when none came.
    pub opening: Option<String>,
    /// Thresholds that were applied.
    pub profile: Profile,
    /// The adapter of the job's policy version, PEFT safetensors in hexadecimal, when there is one.
    pub adapter: Option<String>,
    /// What the auditor concluded.
    pub verdict: Verdict,
}

/// Bytes as hexadecimal.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes from hexadecimal; `None` when the text is not that.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}
