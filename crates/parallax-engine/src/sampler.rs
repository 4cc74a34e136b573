//! Logits to one token, with the log-probability of the choice.
//!
//! Randomness is a function, not a stream: the number for a token is word 0 of the ChaCha8 block stream `position`
//! under the key (seed, stream). A token does not depend on what was sampled before it or beside it, so that a
//! recovered, preempted or re-batched request gives the same tokens.
//!
//! Filters apply in the order temperature, top-k, top-p (over what top-k left), min-p. Ties go to the lower id.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::request::SamplingParams;
use crate::stage::LogSoftmax;

/// Chooses tokens.
#[derive(Debug, Clone, Copy)]
pub struct Sampler {
    log_softmax: LogSoftmax,
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub id: u32,
    /// Log-probability at temperature 1 with nothing cut off.
    pub logprob: f32,
    /// Log-probability under the distribution it was drawn from.
    pub sampled_logprob: f32,
}

impl Sampler {
    /// A sampler with the model's own log-softmax.
    pub fn new(log_softmax: LogSoftmax) -> Self {
        Self { log_softmax }
    }

    /// Chooses the token at `position` of a sequence from logits `[V]`.
    pub fn sample(&self, logits: &[f32], params: &SamplingParams, position: u64) -> Sampled {
        let logprobs = (self.log_softmax)(logits);
        let pick = |index: usize, sampled_logprob| Sampled {
            id: u32::try_from(index).expect("vocabularies have fewer than 2^32 tokens"),
            logprob: logprobs[index],
            sampled_logprob,
        };
        if params.temperature == 0.0 {
            return pick(argmax(logits), 0.0);
        }
        // At temperature 1 the very same numbers, so that an importance ratio at staleness 0 is exactly 1.
        let scaled = if params.temperature.to_bits() == 1.0f32.to_bits() {
            None
        } else {
            Some((self.log_softmax)(&logits.iter().map(|l| l / params.temperature).collect::<Vec<f32>>()))
        };
        let tempered = scaled.as_deref().unwrap_or(&logprobs);
        let random = uniform(params.seed, params.stream, position);
        let Some(kept) = kept_tokens(tempered, params) else {
            let index = draw(tempered, random);
            return pick(index, tempered[index]);
        };
        let kept_logprobs = (self.log_softmax)(&kept.iter().map(|&i| tempered[i]).collect::<Vec<f32>>());
        let index = draw(&kept_logprobs, random);
        pick(kept[index], kept_logprobs[index])
    }
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

/// Index of the highest value, the lowest among equals.
fn argmax(values: &[f32]) -> usize {
    values.iter().enumerate().fold(0, |best, (i, v)| if *v > values[best] { i } else { best })
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

/// Indices, ascending, that the filters keep; `None` when they keep all.
fn kept_tokens(logprobs: &[f32], params: &SamplingParams) -> Option<Vec<usize>> {
    let vocab = logprobs.len();
    let cuts_k = params.top_k > 0 && params.top_k < vocab;
    if !cuts_k && params.top_p >= 1.0 && params.min_p <= 0.0 {
        return None;
    }
    let likelier = |a: &usize, b: &usize| logprobs[*b].total_cmp(&logprobs[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..vocab).collect();
    if cuts_k {
        order.select_nth_unstable_by(params.top_k - 1, likelier);
        order.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        let total: f64 = order.iter().map(|&i| f64::from(logprobs[i]).exp()).sum();
        let wanted = f64::from(params.top_p) * total;
        let nucleus = nucleus_len(&mut order, likelier, wanted, |i| f64::from(logprobs[i]).exp());
        order.truncate(nucleus);
    }
    if params.min_p > 0.0 {
        let best = order.iter().map(|&i| logprobs[i]).fold(f32::NEG_INFINITY, f32::max);
        let floor = f64::from(best) + f64::from(params.min_p).ln();
        order.retain(|&i| f64::from(logprobs[i]) >= floor);
    }
    order.sort_unstable();
    Some(order)
}

/// Sorts `order` as far as needed and returns how many of its first entries reach `wanted` probability, at least one.
/// The head of a vocabulary is usually enough, so it is sorted in growing pieces.
fn nucleus_len(
    order: &mut [usize],
    likelier: impl Fn(&usize, &usize) -> std::cmp::Ordering + Copy,
    wanted: f64,
    probability: impl Fn(usize) -> f64,
) -> usize {
    let (mut sorted, mut sum) = (0, 0.0);
    let mut piece = 256;
    while sorted < order.len() {
        let rest = &mut order[sorted..];
        let take = piece.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take - 1, likelier);
        }
        rest[..take].sort_unstable_by(likelier);
        for (i, &token) in rest[..take].iter().enumerate() {
            sum += probability(token);
            if sum >= wanted {
                return sorted + i + 1;
            }
        }
        sorted += take;
        piece *= 4;
    }
    order.len()
}

#[cfg(test)]
mod tests;
