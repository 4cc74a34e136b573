//! Rollouts into one ragged batch: tokens one after another, no padding.
//!
//! The surprise is the row count. A sequence of `n` tokens has `n - 1` log-probabilities, so token offsets and row
//! offsets differ: row `r` of a sequence predicts its token `r + 1`.

use crate::loss::PolicyTargets;

/// One sequence to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Prompt and completion.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt; at least one.
    pub prompt_tokens: usize,
    /// Log-probability of each completion token as sampled.
    pub sampled_logprobs: Vec<f32>,
    /// Log-probability of each completion token under the reference policy, when the loss needs it.
    pub reference_logprobs: Option<Vec<f32>>,
    /// Log-probability of each completion token under the proximal policy, for losses that are anchored there; without
    /// it the policy before the step is taken.
    pub proximal_logprobs: Option<Vec<f32>>,
    /// Which completion tokens are trained on; false for what a tool or another player said.
    pub trainable: Vec<bool>,
    /// Credit of each completion token.
    pub advantages: Vec<f64>,
}

impl Sample {
    /// A sample of one turn: every completion token is trained on with the same credit.
    pub fn new(tokens: Vec<u32>, prompt_tokens: usize, sampled_logprobs: Vec<f32>, advantage: f64) -> Self {
        let n = tokens.len().saturating_sub(prompt_tokens);
        Self {
            tokens,
            prompt_tokens,
            sampled_logprobs,
            reference_logprobs: None,
            proximal_logprobs: None,
            trainable: vec![true; n],
            advantages: vec![advantage; n],
        }
    }
}

/// A packed batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PackedBatch {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// `N + 1` token offsets.
    pub cu_seqlens: Vec<u32>,
    /// What the loss compares with, one row for each predicted token.
    pub targets: PolicyTargets,
}

impl PackedBatch {
    /// Rows: one for each token but the first of each sequence.
    pub fn rows(&self) -> usize {
        self.tokens.len() - self.cu_seqlens.len().saturating_sub(1)
    }
}

/// Why samples could not be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// A sequence without a prompt or without a completion.
    #[error(
        "sample {index} has {tokens} tokens and a prompt of {prompt_tokens}; both parts need at least one token"
    )]
    Empty {
        /// Which sample.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// Of these, the prompt.
        prompt_tokens: usize,
    },
    /// Log-probabilities that do not fit the completion.
    #[error("sample {index} has {got} log-probabilities for {needed} completion tokens")]
    Logprobs {
        /// Which sample.
        index: usize,
        /// How many came.
        got: usize,
        /// How many fit.
        needed: usize,
    },
    /// Marks or credits that do not fit the completion.
    #[error("sample {index} has {got} {what} for {needed} completion tokens")]
    PerToken {
        /// Which sample.
        index: usize,
        /// Marks or credits.
        what: &'static str,
        /// How many came.
        got: usize,
        /// How many fit.
        needed: usize,
    },
    /// More tokens than positions can count.
    #[error("a batch of {tokens} tokens is too large; split it into micro-batches")]
    TooLarge {
        /// Tokens in the batch.
        tokens: usize,
    },
}

/// Packs `samples` in order.
///
/// # Errors
/// Names the first sample that does not fit.
pub fn pack(samples: &[Sample]) -> Result<PackedBatch, PackError> {
    let mut batch = PackedBatch { cu_seqlens: vec![0], ..PackedBatch::default() };
    let (mut sampled, mut proximal, mut reference) = (Vec::new(), Vec::new(), Vec::new());
    let mut offsets = vec![0];
    let with_reference = !samples.is_empty() && samples.iter().all(|s| s.reference_logprobs.is_some());
    let with_proximal = !samples.is_empty() && samples.iter().all(|s| s.proximal_logprobs.is_some());
    for (index, s) in samples.iter().enumerate() {
        let (tokens, prompt_tokens) = (s.tokens.len(), s.prompt_tokens);
        if prompt_tokens == 0 || tokens <= prompt_tokens {
            return Err(PackError::Empty { index, tokens, prompt_tokens });
        }
        let needed = tokens - prompt_tokens;
        let given = [Some(&s.sampled_logprobs), s.proximal_logprobs.as_ref(), s.reference_logprobs.as_ref()];
        for logprobs in given.into_iter().flatten() {
            if logprobs.len() != needed {
                return Err(PackError::Logprobs { index, got: logprobs.len(), needed });
            }
        }
        for (what, got) in [("marks", s.trainable.len()), ("advantages", s.advantages.len())] {
            if got != needed {
                return Err(PackError::PerToken { index, what, got, needed });
            }
        }
        batch.tokens.extend_from_slice(&s.tokens);
        let end = u32::try_from(batch.tokens.len());
        batch.cu_seqlens.push(end.map_err(|_| PackError::TooLarge { tokens: batch.tokens.len() })?);
        let before = prompt_tokens - 1;
        batch.targets.mask.extend(std::iter::repeat_n(false, before).chain(s.trainable.iter().copied()));
        offsets.push(batch.targets.mask.len());
        let spread = |out: &mut Vec<f64>, values: &[f32]| {
            out.extend(std::iter::repeat_n(0.0, before).chain(values.iter().map(|l| f64::from(*l))));
        };
        spread(&mut sampled, &s.sampled_logprobs);
        if let (true, Some(logprobs)) = (with_proximal, &s.proximal_logprobs) {
            spread(&mut proximal, logprobs);
        }
        if let (true, Some(logprobs)) = (with_reference, &s.reference_logprobs) {
            spread(&mut reference, logprobs);
        }
        let credit = std::iter::repeat_n(0.0, before).chain(s.advantages.iter().copied());
        batch.targets.advantages.extend(credit);
    }
    batch.targets.offsets = offsets;
    batch.targets.sampled = Some(sampled);
    batch.targets.proximal = with_proximal.then_some(proximal);
    batch.targets.reference = with_reference.then_some(reference);
    Ok(batch)
}

/// Sequences one after another: their tokens, and the `N + 1` offsets between them.
///
/// # Errors
/// More tokens than positions can count.
pub fn joined<'a>(sequences: impl IntoIterator<Item = &'a [u32]>) -> Result<(Vec<u32>, Vec<u32>), PackError> {
    let (mut tokens, mut ends) = (Vec::new(), vec![0_u32]);
    for sequence in sequences {
        tokens.extend_from_slice(sequence);
        ends.push(u32::try_from(tokens.len()).map_err(|_| PackError::TooLarge { tokens: tokens.len() })?);
    }
    Ok((tokens, ends))
}

/// Cuts `samples`, of so many `tokens` each, into runs of at most `max_tokens` (a longer one stands alone), keeping their
/// order.
pub fn micro_batches<T>(samples: &[T], tokens: impl Fn(&T) -> usize, max_tokens: usize) -> Vec<&[T]> {
    let mut out = Vec::new();
    let (mut start, mut sum) = (0, 0);
    for (i, sample) in samples.iter().enumerate() {
        if i > start && sum + tokens(sample) > max_tokens {
            out.push(&samples[start..i]);
            (start, sum) = (i, 0);
        }
        sum += tokens(sample);
    }
    if start < samples.len() {
        out.push(&samples[start..]);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(tokens: &[u32], prompt_tokens: usize, advantage: f64) -> Sample {
        let n = tokens.len() - prompt_tokens;
        let logprobs = (0..n).map(|i| -(i as f32) - 1.0).collect();
        Sample::new(tokens.to_vec(), prompt_tokens, logprobs, advantage)
    }

    #[test]
    fn rows_mark_exactly_the_completion() {
        let batch = pack(&[sample(&[1, 2, 3, 4], 2, 0.5), sample(&[5, 6], 1, -0.5)]).unwrap();
        assert_eq!(batch.tokens, [1, 2, 3, 4, 5, 6]);
        assert_eq!(batch.cu_seqlens, [0, 4, 6]);
        assert_eq!(batch.targets.offsets, [0, 3, 4]);
        assert_eq!(batch.targets.mask, [false, true, true, true]);
        assert_eq!(batch.targets.sampled.as_deref(), Some(&[0.0, -1.0, -2.0, -1.0][..]));
        assert_eq!(batch.targets.advantages, [0.0, 0.5, 0.5, -0.5]);
    }

    #[test]
    fn what_a_tool_said_is_not_marked() {
        let mut turns = sample(&[1, 2, 3, 4], 1, 0.5);
        turns.trainable[1] = false;
        assert_eq!(pack(&[turns.clone()]).unwrap().targets.mask, [true, false, true]);
        turns.trainable.pop();
        assert!(matches!(pack(&[turns]), Err(PackError::PerToken { what: "marks", got: 2, needed: 3, .. })));
    }

    #[test]
    fn samples_without_completion_or_with_missing_logprobs_are_refused() {
        let mut short = sample(&[1, 2, 3], 1, 0.0);
        short.sampled_logprobs.pop();
        assert_eq!(pack(&[short]), Err(PackError::Logprobs { index: 0, got: 1, needed: 2 }));
        let empty = sample(&[1, 2], 2, 0.0);
        assert!(matches!(pack(&[sample(&[1, 2], 1, 0.0), empty]), Err(PackError::Empty { index: 1, .. })));
    }

    #[test]
    fn joined_sequences_begin_where_the_one_before_ends() {
        let none = joined(std::iter::empty()).unwrap();
        assert_eq!(none, (vec![], vec![0]));
        let some = joined([&[5, 6][..], &[], &[7]]).unwrap();
        assert_eq!(some, (vec![5, 6, 7], vec![0, 2, 2, 3]));
    }

    proptest! {
        #[test]
        fn micro_batches_keep_every_sample_once_and_in_order(
            lengths in proptest::collection::vec(2_usize..40, 0..30), max in 1_usize..100,
        ) {
            let samples: Vec<Sample> = lengths.iter().map(|n| sample(&vec![7; *n], 1, *n as f64)).collect();
            let cuts = micro_batches(&samples, |s| s.tokens.len(), max);
            prop_assert_eq!(&cuts.concat(), &samples);
            for cut in cuts {
                let tokens: usize = cut.iter().map(|s| s.tokens.len()).sum();
                prop_assert!(cut.len() == 1 || tokens <= max);
            }
        }
    }
}
