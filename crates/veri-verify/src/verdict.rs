//! The outcome of an audit, and the evidence with which anyone can repeat it.

use serde::{Deserialize, Serialize};

use swarm_wire::PeerId;

use crate::commitment::SignedCommitment;
use crate::compare::Distance;
use crate::config::Profile;
use crate::job::{Answer, Job};
use crate::prover::Opening;
use crate::verifier::{Audit, Replay};
use crate::wire;

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

/// Everything that another party needs to repeat an audit. Thresholds are not part of it: who checks applies its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// What was asked.
    pub job: Job,
    /// What was answered.
    pub answer: Answer,
    /// The signed commitment, encoded, in hexadecimal: the worker's own word.
    pub commitment: String,
    /// The auditor's randomness, in hexadecimal.
    pub randomness: String,
    /// Rows that were asked for.
    pub n_positions: u32,
    /// The opening, encoded, in hexadecimal; absent when none came.
    pub opening: Option<String>,
    /// The adapter of the job's policy version, PEFT safetensors in hexadecimal, when there is one.
    pub adapter: Option<String>,
    /// The policy version replaces all weights: the job's `adapter_hash` is that of their safetensors file, which is too large to be
    /// in here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// What the auditor concluded.
    pub verdict: Verdict,
}

/// Evidence whose every proof was checked; only the recomputation is missing.
#[derive(Debug, Clone)]
pub struct Opened {
    audit: Audit,
    opening: Opening,
    adapter: Option<Vec<u8>>,
    all_weights: Option<[u8; 32]>,
}

impl Opened {
    /// The adapter to install before the recomputation; `None`: the base model, or [`Self::all_weights`].
    pub fn adapter(&self) -> Option<&[u8]> {
        self.adapter.as_deref()
    }

    /// BLAKE3 of the file of all weights with which to recompute instead of the base model's; whoever checks brings it along.
    pub fn all_weights(&self) -> Option<[u8; 32]> {
        self.all_weights
    }

    /// The verdict, by the thresholds of whoever checks.
    pub fn judge(&self, replay: &Replay, profile: &Profile) -> Verdict {
        self.audit.judge(&self.opening, replay, profile)
    }
}

impl Evidence {
    /// Who committed to the answer; `None` when the commitment is none.
    pub fn worker(&self) -> Option<PeerId> {
        Some(self.signed().ok()?.signer().clone())
    }

    fn signed(&self) -> Result<SignedCommitment, Verdict> {
        let bytes = unhex("commitment", &self.commitment)?;
        wire::decode_signed_commitment(&bytes).map_err(|e| malformed(e.to_string()))
    }

    /// Checks all that needs no model: the signature, what it is about, the drawn rows and their proofs, the adapter's
    /// hash.
    ///
    /// # Errors
    /// The verdict, where it is settled without a recomputation.
    pub fn open(&self) -> Result<Opened, Verdict> {
        let signed = self.signed()?;
        let randomness = unhex("randomness", &self.randomness)?;
        let randomness = randomness.try_into().map_err(|_| malformed("randomness is not 32 bytes"))?;
        let audit = Audit::begin(&self.job, &self.answer, &signed, None, randomness, self.n_positions)?;
        let adapter = self.adapter.as_deref().map(|hex| unhex("adapter", hex)).transpose()?;
        let hash = adapter.as_ref().map(|bytes| *blake3::hash(bytes).as_bytes());
        let (carried, all_weights) =
            if self.full { (None, self.job.adapter_hash) } else { (self.job.adapter_hash, None) };
        if hash != carried {
            return Err(malformed("the adapter is not the one of the job"));
        }
        if self.full && all_weights.is_none() {
            return Err(malformed("the job names no weights"));
        }
        let Some(opening) = &self.opening else { return Err(Verdict::Withheld) };
        let opening = wire::decode_opening(&unhex("opening", opening)?);
        let opening = opening.map_err(|e| malformed(e.to_string()))?;
        Ok(Opened { audit, opening, adapter, all_weights })
    }
}

fn malformed(reason: impl Into<String>) -> Verdict {
    Verdict::Malformed { reason: reason.into() }
}

fn unhex(what: &str, text: &str) -> Result<Vec<u8>, Verdict> {
    from_hex(text).ok_or_else(|| malformed(format!("the {what} is not hexadecimal")))
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
