//! Several trainers make one step: assistants compute shares of the batch beside the learner, which adds all shares in their order,
//! makes the step, and gives the new weights to everybody.
//!
//! The learner cuts the batch for as many trainers as there may be ([`crate::shares`]), whoever is there. A share of an assistant that
//! does not come, goes or says something wrong is computed by somebody else, so that a step never depends on one, and comes out the
//! same, bit for bit, with all of them, with some, and with none. Of who was wrong about one share, no other share of that step is
//! believed: those of the same round are computed by others, and where shares of an earlier round were taken from it, the step's
//! rounds are made again from the first, without it. An assistant keeps nothing but the weights: they are hashed by both sides before
//! it computes anything with them, and every answer names that hash.
//!
//! Pure: [`Leader`] says who computes what and how long it is waited for, [`check`] judges an answer, [`wire`] says how it travels.

mod leader;
#[cfg(test)]
mod tests;
pub mod wire;

use std::sync::Arc;

use swarm_wire::PolicyVersion;

use crate::error::StepError;
use crate::metrics::LossMetrics;
use crate::parameters::{Gradients, Parameter};
use crate::shares::{Answer, Hands, Share, Task};

pub use leader::{Leader, LeaderConfig, Next};

/// BLAKE3.
pub type Hash = [u8; 32];

/// Most assistants of one learner.
pub const MAX_ASSISTANTS: usize = 64;

/// Trainers elsewhere that compute shares of a step beside this one.
pub trait Assistants {
    /// For how many of them a batch is cut, whether they are there or not.
    fn seats(&self) -> usize;

    /// These are the weights of `version`: whoever is there is given them.
    fn hold(&mut self, version: PolicyVersion, weights: &[Parameter]);

    /// Has `shares` computed under the weights that were given last, by whoever is there and by `own`; one answer for each of them
    /// in their order. `None` where somebody is found wrong whose answers of an earlier round under these weights were taken: all
    /// rounds are to be made again, without it. At most once for each seat.
    ///
    /// # Errors
    /// What `own` cannot compute. Mistakes of others are not errors.
    fn compute(
        &mut self,
        shares: &[Arc<Share>],
        own: &mut dyn Hands,
    ) -> Result<Option<Vec<Answer>>, StepError>;
}

/// Nobody, in so many seats: the step is the one that all of them would make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Absent(pub usize);

impl Assistants for Absent {
    fn seats(&self) -> usize {
        self.0
    }

    fn hold(&mut self, _: PolicyVersion, _: &[Parameter]) {}

    fn compute(
        &mut self,
        shares: &[Arc<Share>],
        own: &mut dyn Hands,
    ) -> Result<Option<Vec<Answer>>, StepError> {
        own.compute(shares).map(Some)
    }
}

/// Why an assistant was left out. Its share was computed by somebody else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Exclusion {
    /// No answer in time.
    #[error("its share did not come within {patience_ms} ms")]
    Late {
        /// How long it was waited for.
        patience_ms: u64,
    },
    /// The connection ended, or it said itself that it cannot go on.
    #[error("it is gone: {reason}")]
    Gone {
        /// Why.
        reason: String,
    },
    /// Too often late.
    #[error("it was late {times} times in a row")]
    Slow {
        /// How often.
        times: u32,
    },
    /// An answer to something else.
    #[error("it answers for share {got:?} where {asked:?} was asked for (step, round, share)")]
    OtherShare {
        /// What was asked for.
        asked: Attempt,
        /// What the answer is about.
        got: Attempt,
    },
    /// Weights that are not the learner's.
    #[error("its weights are not the learner's")]
    OtherWeights,
    /// A list of another length.
    #[error("it sent {got} bytes where the share has {needed}")]
    Size {
        /// Bytes that were announced.
        got: u64,
        /// Bytes of a right answer.
        needed: u64,
    },
    /// A damaged answer.
    #[error("the hash of what came is not the one that it says")]
    Damaged,
    /// NaN or infinity.
    #[error("a number in its share is not finite")]
    NotFinite,
    /// Figures about something else.
    #[error("it counts other tokens than its share has")]
    OtherTokens,
    /// The same share, computed again, has other bits.
    #[error("its share has other bits than the learner computes")]
    Wrong,
    /// A message that the protocol forbids.
    #[error("it does not keep to the protocol: {reason}")]
    Protocol {
        /// What is wrong.
        reason: String,
    },
}

impl Exclusion {
    /// Whether it holds until the learner is started again. A machine may be late once or lose its connection; who is too often late,
    /// or says what is not so, stays out.
    pub fn is_final(&self) -> bool {
        !matches!(self, Self::Late { .. } | Self::Gone { .. })
    }

    /// Whether what it said of a share is not so. Then nothing that it said in the same step is believed.
    pub fn is_false(&self) -> bool {
        matches!(
            self,
            Self::OtherShare { .. }
                | Self::OtherWeights
                | Self::Size { .. }
                | Self::Damaged
                | Self::NotFinite
                | Self::OtherTokens
                | Self::Wrong
        )
    }
}

/// What an assistant was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt {
    /// The version that the step begins with.
    pub step: u64,
    /// Which time shares were given out.
    pub round: u64,
    /// Which of them.
    pub share: usize,
}

/// The hash by which weights are compared: names, shapes and values.
pub fn weights_hash(weights: &[Parameter]) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key("echo-trainer weights v1");
    for p in weights {
        hasher.update(&(p.name.len() as u64).to_le_bytes()).update(p.name.as_bytes());
        p.shape.iter().for_each(|n| _ = hasher.update(&(*n as u64).to_le_bytes()));
        for values in p.values.chunks(1024) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            hasher.update(&bytes);
        }
    }
    *hasher.finalize().as_bytes()
}

/// An answer as it travels: what it is about, and all its numbers in one list.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// What was asked for.
    pub attempt: Attempt,
    /// Hash of the weights that it was computed with.
    pub weights: Hash,
    /// Of gradients: the share's figures.
    pub figures: LossMetrics,
    /// Log-probabilities, or gradients in the order of the parameters.
    pub values: Vec<f32>,
}

impl Reply {
    /// The answer to `attempt`, computed with these weights.
    pub fn new(attempt: Attempt, weights: Hash, answer: Answer) -> Self {
        let (values, figures) = match answer {
            Answer::Logprobs(values) => (values, LossMetrics::default()),
            Answer::Gradients(gradients, figures) => (gradients.values.concat(), figures),
        };
        Self { attempt, weights, figures, values }
    }
}

/// Values of a right answer to `share` for parameters of these `lengths`.
pub fn answer_values(share: &Share, lengths: &[usize]) -> usize {
    match share.task {
        Task::Logprobs => share.rows(),
        Task::Gradients => lengths.iter().sum(),
    }
}

/// Whether `reply` is an answer to `asked` for `share`, under `weights` whose parameters have these `lengths`. Whether its numbers are
/// the right ones only computing them again tells.
///
/// # Errors
/// What is wrong with it.
pub fn check(
    reply: Reply,
    asked: Attempt,
    share: &Share,
    weights: Hash,
    lengths: &[usize],
) -> Result<Answer, Exclusion> {
    if reply.attempt != asked {
        return Err(Exclusion::OtherShare { asked, got: reply.attempt });
    }
    if reply.weights != weights {
        return Err(Exclusion::OtherWeights);
    }
    let (got, needed) = (reply.values.len(), answer_values(share, lengths));
    if got != needed {
        return Err(Exclusion::Size { got: 4 * got as u64, needed: 4 * needed as u64 });
    }
    let f = &reply.figures;
    let c = &f.correction;
    let figures = [f.loss, f.clip_fraction, f.sampled_kl, f.ratio_deviation_max, c.filtered_fraction];
    let mut figures = figures.into_iter().chain([c.weight_mean, c.weight_max, c.effective_sample_share]);
    if share.task == Task::Gradients && (f.tokens, f.batch_tokens) != share.tokens() {
        return Err(Exclusion::OtherTokens);
    }
    if !reply.values.iter().all(|v| v.is_finite()) || !figures.all(f64::is_finite) {
        return Err(Exclusion::NotFinite);
    }
    Ok(match share.task {
        Task::Logprobs => Answer::Logprobs(reply.values),
        Task::Gradients => {
            let mut rest = &reply.values[..];
            let each = lengths.iter().map(|n| {
                let (values, after) = rest.split_at(*n);
                rest = after;
                values.to_vec()
            });
            Answer::Gradients(Gradients { values: each.collect() }, reply.figures)
        }
    })
}
