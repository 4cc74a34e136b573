//! Logits to one token, with the log-probability of the choice.
//!
//! Randomness is a function, not a stream: the number for a token is word 0 of the ChaCha8 block stream `position`
//! under the key (seed, stream). A token does not depend on what was sampled before it or beside it, so that a
//! recovered, preempted or re-batched request gives the same tokens.
//!
//! The order, as in Hugging Face transformers and vLLM: what the constraint forbids, stop tokens before `min_tokens`,
//! logit bias, repetition penalty, frequency and presence penalties ([`History`] says over which tokens); then, unless
//! greedy, temperature, top-k, top-p, min-p, typical-p. Ties go to the lower id.

mod filters;
mod history;

use std::borrow::Cow;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::constraint::ConstraintState;
use crate::sampling::SamplingParams;
use crate::stage::LogSoftmax;
pub use history::History;

/// Chooses tokens.
#[derive(Debug, Clone, Copy)]
pub struct Sampler {
    log_softmax: LogSoftmax,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub id: u32,
    /// Log-probability under the model: temperature 1, nothing changed or cut off.
    pub logprob: f32,
    /// Log-probability under the distribution it was drawn from.
    pub sampled_logprob: f32,
    /// The likeliest tokens under the model, likeliest first, as many as were asked for.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Where in its sequence a token is chosen.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Tokens before it, prompt and answer.
    pub position: u64,
    /// Tokens of the answer before it.
    pub generated: usize,
    /// Which tokens there are, if [`SamplingParams::has_penalties`].
    pub history: Option<&'a History>,
}

/// No token could be chosen. The request ends; its neighbours do not notice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The constraint failed.
    #[error("the constraint on the answer failed: {reason}")]
    Constraint {
        /// Its account.
        reason: String,
    },
    /// Constraint, bias and stop rules together allow nothing.
    #[error(
        "no token is allowed at position {position}: constraints (a form, allowed or forbidden tokens), logit_bias and \
         min_tokens exclude each other"
    )]
    NothingAllowed {
        /// Position in the sequence.
        position: u64,
    },
}

/// What a token is drawn from: log-probabilities of all tokens, or of some (ascending ids).
enum Distribution<'a> {
    All(Cow<'a, [f32]>),
    Some { ids: Vec<usize>, logprobs: Vec<f32> },
}

impl Sampler {
    /// A sampler with the model's own log-softmax.
    pub fn new(log_softmax: LogSoftmax) -> Self {
        Self { log_softmax }
    }

    /// The model's own log-probabilities of logits `[V]`.
    pub fn logprobs(&self, logits: &[f32]) -> Vec<f32> {
        (self.log_softmax)(logits)
    }

    /// Chooses the token at `place` of a sequence from logits `[V]`. The constraint does not learn of the choice here.
    ///
    /// # Errors
    /// A constraint that fails, or rules that allow no token at all.
    pub fn sample(
        &self,
        logits: &[f32],
        params: &SamplingParams,
        place: Place<'_>,
        constraint: Option<&mut (dyn ConstraintState + '_)>,
    ) -> Result<Sampled, SampleError> {
        let logprobs = (self.log_softmax)(logits);
        let ruled = ruled(logits, params, place, constraint)?;
        let (index, sampled_logprob) = if params.temperature == 0.0 {
            (argmax(&ruled), 0.0)
        } else {
            let random = uniform(params.seed, params.stream, place.position);
            match self.tempered(ruled, &logprobs, params) {
                Distribution::All(all) => {
                    let index = draw(&all, random);
                    (index, all[index])
                }
                Distribution::Some { ids, logprobs } => {
                    let index = draw(&logprobs, random);
                    (ids[index], logprobs[index])
                }
            }
        };
        Ok(Sampled {
            id: token_id(index),
            logprob: logprobs[index],
            sampled_logprob,
            top_logprobs: top(&logprobs, params.top_logprobs),
        })
    }

    /// The log-probabilities `[V]` that a token is drawn from (minus infinity: cut off); at temperature 0, those of
    /// temperature 1 before the highest is taken.
    ///
    /// # Errors
    /// As [`Self::sample`].
    pub fn distribution(
        &self,
        logits: &[f32],
        params: &SamplingParams,
        place: Place<'_>,
        constraint: Option<&mut (dyn ConstraintState + '_)>,
    ) -> Result<Vec<f32>, SampleError> {
        let logprobs = (self.log_softmax)(logits);
        let ruled = ruled(logits, params, place, constraint)?;
        Ok(match self.tempered(ruled, &logprobs, params) {
            Distribution::All(all) => all.into_owned(),
            Distribution::Some { ids, logprobs } => {
                let mut all = vec![f32::NEG_INFINITY; logits.len()];
                ids.iter().zip(logprobs).for_each(|(i, logprob)| all[*i] = logprob);
                all
            }
        })
    }

    fn tempered<'a>(
        &self,
        ruled: Cow<'_, [f32]>,
        logprobs: &'a [f32],
        params: &SamplingParams,
    ) -> Distribution<'a> {
        let unscaled = params.temperature == 0.0 || params.temperature.to_bits() == 1.0f32.to_bits();
        // At temperature 1 the very same numbers, so that an importance ratio at staleness 0 is exactly 1.
        let tempered = match (unscaled, ruled) {
            (true, Cow::Borrowed(_)) => Cow::Borrowed(logprobs),
            (true, Cow::Owned(ruled)) => Cow::Owned((self.log_softmax)(&ruled)),
            (false, ruled) => {
                let scaled: Vec<f32> = ruled.iter().map(|l| l / params.temperature).collect();
                Cow::Owned((self.log_softmax)(&scaled))
            }
        };
        match filters::kept_tokens(&tempered, params) {
            None => Distribution::All(tempered),
            Some(ids) => {
                let kept: Vec<f32> = ids.iter().map(|&i| tempered[i]).collect();
                Distribution::Some { ids, logprobs: (self.log_softmax)(&kept) }
            }
        }
    }
}

/// Logits after everything that is not a matter of temperature; borrowed when nothing changes them.
fn ruled<'a>(
    logits: &'a [f32],
    params: &SamplingParams,
    place: Place<'_>,
    constraint: Option<&mut (dyn ConstraintState + '_)>,
) -> Result<Cow<'a, [f32]>, SampleError> {
    let mut ruled = Cow::Borrowed(logits);
    if let Some(constraint) = constraint.filter(|constraint| !constraint.is_free()) {
        constraint.mask(ruled.to_mut()).map_err(|reason| SampleError::Constraint { reason })?;
    }
    if place.generated < params.min_tokens {
        for &id in &params.stop_ids {
            if let Some(logit) = ruled.to_mut().get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for (&id, bias) in &params.logit_bias {
        if let Some(logit) = ruled.to_mut().get_mut(id as usize) {
            *logit += bias;
        }
    }
    if let Some(history) = place.history.filter(|_| params.has_penalties()) {
        history.penalise(ruled.to_mut(), params);
    }
    if matches!(ruled, Cow::Owned(_)) && ruled.iter().all(|l| *l == f32::NEG_INFINITY) {
        return Err(SampleError::NothingAllowed { position: place.position });
    }
    Ok(ruled)
}

fn token_id(index: usize) -> u32 {
    u32::try_from(index).expect("vocabularies have fewer than 2^32 tokens")
}

/// The `n` highest, highest first, the lower id among equals.
fn top(logprobs: &[f32], n: usize) -> Vec<(u32, f32)> {
    let n = n.min(logprobs.len());
    if n == 0 {
        return Vec::new();
    }
    let higher = |a: &usize, b: &usize| logprobs[*b].total_cmp(&logprobs[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..logprobs.len()).collect();
    order.select_nth_unstable_by(n - 1, higher);
    order.truncate(n);
    order.sort_unstable_by(higher);
    order.into_iter().map(|i| (token_id(i), logprobs[i])).collect()
}

/// The random number in [0, 1) of a position: 53 bits of ChaCha8 with the key `seed || stream || 0`.
pub fn uniform(seed: u64, stream: u64, position: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&stream.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(position);
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Index of the highest value, the lowest among equals; NaN only when there is nothing else. As
/// `parallax_model::logprob::argmax`, which the verifier uses.
pub(crate) fn argmax(values: &[f32]) -> usize {
    let highest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter().position(|v| *v == highest).unwrap_or(0)
}

/// Inverse transform in index order; sums in f64.
fn draw(logprobs: &[f32], random: f64) -> usize {
    let probability = |l: &f32| f64::from(*l).exp();
    let target = random * logprobs.iter().map(probability).sum::<f64>();
    let mut sum = 0.0;
    let mut last = 0;
    for (i, logprob) in logprobs.iter().enumerate() {
        let p = probability(logprob);
        if p > 0.0 {
            last = i;
            sum += p;
            if target < sum {
                return i;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests;
