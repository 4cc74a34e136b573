//! What was asked and what was answered: the things that a commitment binds.

use serde::{Deserialize, Serialize};

/// How tokens were drawn. The seed comes with the job, so that the draw can be replayed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Temperature; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set with this probability; 1 keeps all.
    pub top_p: f32,
    /// Seed of the counter-based generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// One piece of work: everything that fixes the right answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Identity of the base model (hash of configuration and weights).
    pub model_id: String,
    /// Policy version that was asked for.
    pub policy_version: u64,
    /// BLAKE3 of what that version installs, when there is something: an adapter, or the file of all weights.
    pub adapter_hash: Option<[u8; 32]>,
    /// Prompt tokens.
    pub prompt: Vec<u32>,
    /// How to draw.
    pub sampling: Sampling,
    /// Makes the job unique (the lease), so that an old answer cannot be sent again.
    pub nonce: u64,
}

impl Job {
    /// Hash of the job in canonical bytes.
    pub fn id(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new_derive_key("veri/v1/job");
        put_bytes(&mut hash, self.model_id.as_bytes());
        hash.update(&self.policy_version.to_le_bytes());
        put_bytes(&mut hash, self.adapter_hash.as_ref().map_or(&[][..], |h| h));
        put_u32s(&mut hash, &self.prompt);
        hash.update(&self.sampling.temperature.to_bits().to_le_bytes());
        hash.update(&self.sampling.top_k.to_le_bytes());
        hash.update(&self.sampling.top_p.to_bits().to_le_bytes());
        hash.update(&self.sampling.seed.to_le_bytes());
        hash.update(&self.nonce.to_le_bytes());
        *hash.finalize().as_bytes()
    }
}

/// What a worker reports: output tokens and the log-probability of each. In an episode of several turns some of them
/// were not sampled but said by a tool or another player; a commitment has rows for the sampled ones only.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Output tokens.
    pub tokens: Vec<u32>,
    /// Natural log-probability of each output token under the model (temperature 1, no cut-off); of no meaning where the
    /// token was not sampled.
    pub logprobs: Vec<f32>,
    /// Half-open ranges of output tokens that were not sampled, in rising order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub foreign: Vec<(u32, u32)>,
}

impl Answer {
    /// An answer of one turn: all of it was sampled.
    pub fn new(tokens: Vec<u32>, logprobs: Vec<f32>) -> Self {
        Self { tokens, logprobs, foreign: Vec::new() }
    }

    /// An answer of several turns from its tokens in order: token, log-probability, and whether it was sampled.
    pub fn of_turns(tokens: impl IntoIterator<Item = (u32, f32, bool)>) -> Self {
        let mut answer = Self::default();
        for ((token, logprob, sampled), at) in tokens.into_iter().zip(0..) {
            answer.tokens.push(token);
            answer.logprobs.push(logprob);
            match answer.foreign.last_mut() {
                _ if sampled => {}
                Some((_, end)) if *end == at => *end += 1,
                _ => answer.foreign.push((at, at + 1)),
            }
        }
        answer
    }

    /// Indices of the sampled tokens: row `r` of a commitment is behind output token `sampled()[r]`.
    pub fn sampled(&self) -> Vec<usize> {
        let mut ranges = self.foreign.iter().peekable();
        let sampled = |i: &usize| {
            while ranges.next_if(|(_, to)| *to as usize <= *i).is_some() {}
            ranges.peek().is_none_or(|(from, _)| *i < *from as usize)
        };
        (0..self.tokens.len()).filter(sampled).collect()
    }

    /// Whether the foreign ranges are in order and apart, as [`Self::sampled`] needs them.
    pub(crate) fn is_in_order(&self) -> bool {
        self.foreign.iter().all(|(from, to)| from < to) && self.foreign.windows(2).all(|w| w[0].1 < w[1].0)
    }

    /// Hash of tokens and log-probabilities, bit for bit.
    pub fn hash(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new_derive_key("veri/v1/answer");
        put_u32s(&mut hash, &self.tokens);
        let bits: Vec<u32> = self.logprobs.iter().map(|p| p.to_bits()).collect();
        put_u32s(&mut hash, &bits);
        if !self.foreign.is_empty() {
            put_u32s(&mut hash, &self.foreign.iter().flat_map(|(from, to)| [*from, *to]).collect::<Vec<_>>());
        }
        *hash.finalize().as_bytes()
    }
}

fn put_bytes(hash: &mut blake3::Hasher, bytes: &[u8]) {
    hash.update(&(bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn put_u32s(hash: &mut blake3::Hasher, values: &[u32]) {
    hash.update(&(values.len() as u64).to_le_bytes());
    for value in values {
        hash.update(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            model_id: "m".into(),
            policy_version: 1,
            adapter_hash: None,
            prompt: vec![1, 2, 3],
            sampling: Sampling::default(),
            nonce: 9,
        }
    }

    #[test]
    fn every_field_of_a_job_changes_its_id() {
        let base = job();
        let mut seen = vec![base.id()];
        let changed = [
            Job { model_id: "n".into(), ..base.clone() },
            Job { policy_version: 2, ..base.clone() },
            Job { adapter_hash: Some([0; 32]), ..base.clone() },
            Job { prompt: vec![1, 2], ..base.clone() },
            Job { sampling: Sampling { temperature: 0.5, ..Sampling::default() }, ..base.clone() },
            Job { sampling: Sampling { top_k: 5, ..Sampling::default() }, ..base.clone() },
            Job { sampling: Sampling { top_p: 0.5, ..Sampling::default() }, ..base.clone() },
            Job { sampling: Sampling { seed: 5, ..Sampling::default() }, ..base.clone() },
            Job { nonce: 10, ..base },
        ];
        for job in changed {
            let id = job.id();
            assert!(!seen.contains(&id), "{job:?}");
            seen.push(id);
        }
    }

    #[test]
    fn answers_are_bound_bit_for_bit() {
        let answer = Answer::new(vec![1, 2], vec![0.0, -1.0]);
        let negative_zero = Answer { logprobs: vec![-0.0, -1.0], ..answer.clone() };
        let moved = Answer { tokens: vec![1], ..answer.clone() };
        assert_ne!(answer.hash(), negative_zero.hash());
        assert_ne!(answer.hash(), moved.hash());
        let turns = Answer::of_turns([(1, 0.0, true), (5, 0.0, false), (6, 0.0, false), (2, -1.0, true)]);
        assert_eq!((turns.foreign.as_slice(), turns.sampled()), (&[(1, 3)][..], vec![0, 3]));
        let other = Answer { foreign: vec![(1, 2)], ..turns.clone() };
        assert_ne!(turns.hash(), other.hash());
        assert_eq!(Answer::of_turns([(1, 0.0, true), (2, -1.0, true)]), answer);
    }
}
