//! What a policy says about sequences, and gradients of the cross entropy. Nothing is updated here.

use burn::tensor::{Tensor, TensorData};

use crate::error::StepError;
use crate::packing::{PackError, Sample, joined, micro_batches, pack};
use crate::parameters::Gradients;
use crate::policy::{Backward, Policy, values};

/// Log-probability of every completion token of `samples` under `policy`, for a reference policy.
///
/// # Errors
/// When samples do not fit or the model refuses them.
pub fn completion_logprobs(
    policy: &impl Policy,
    samples: &[Sample],
    max_tokens: usize,
) -> Result<Vec<Vec<f32>>, StepError> {
    let mut out = Vec::with_capacity(samples.len());
    for part in micro_batches(samples, |s| s.tokens.len(), max_tokens) {
        let batch = pack(part)?;
        let all = values(policy.token_logprobs(&batch.tokens, &batch.cu_seqlens)?.into_data());
        for (i, sample) in part.iter().enumerate() {
            out.push(all[batch.targets.range(i)][sample.prompt_tokens - 1..].to_vec());
        }
    }
    Ok(out)
}

/// A sequence with marks on the tokens that are to be predicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labelled {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Whether token `i` counts in the loss; the first never does.
    pub learn: Vec<bool>,
}

impl Labelled {
    /// How many tokens count.
    pub fn learnt(&self) -> usize {
        self.learn.iter().skip(1).filter(|learn| **learn).count()
    }
}

/// Gradients of the mean cross entropy over the marked tokens of `sequences`, and that mean in nats. Cut into
/// micro-batches of at most `max_tokens` tokens, which changes memory and last bits, not the meaning.
///
/// # Errors
/// When marks do not fit, no token is marked, or the model refuses.
pub fn cross_entropy_gradients(
    policy: &impl Policy,
    sequences: &[Labelled],
    max_tokens: usize,
) -> Result<(Gradients, f64), StepError> {
    let marked = marked(sequences)?;
    let (mut gradients, mut mean) = (None, 0.0);
    for part in micro_batches(sequences, |s| s.tokens.len(), max_tokens) {
        let (logprobs, backward) = labelled_pass(policy, part)?;
        let (loss, figure) = part_of_cross_entropy(logprobs, part, marked);
        accumulate(&mut gradients, backward(&loss)?);
        mean += figure;
    }
    Ok((gradients.expect("marked tokens are in a part"), mean))
}

/// The mean cross entropy over the marked tokens, in nats.
///
/// # Errors
/// As [`cross_entropy_gradients`].
pub fn cross_entropy(
    policy: &impl Policy,
    sequences: &[Labelled],
    max_tokens: usize,
) -> Result<f64, StepError> {
    let marked = marked(sequences)?;
    micro_batches(sequences, |s| s.tokens.len(), max_tokens)
        .into_iter()
        .map(|part| Ok(part_of_cross_entropy(labelled_logprobs(policy, part)?, part, marked).1))
        .sum()
}

/// How many tokens are marked, at least one.
fn marked(sequences: &[Labelled]) -> Result<usize, StepError> {
    for (index, s) in sequences.iter().enumerate() {
        if s.tokens.len() < 2 || s.learn.len() != s.tokens.len() {
            return Err(
                PackError::Empty { index, tokens: s.tokens.len(), prompt_tokens: s.learn.len() }.into()
            );
        }
    }
    match sequences.iter().map(Labelled::learnt).sum() {
        0 => {
            let tokens = sequences.iter().map(|s| s.tokens.len()).sum();
            Err(PackError::Empty { index: 0, tokens, prompt_tokens: tokens }.into())
        }
        marked => Ok(marked),
    }
}

/// What `sequences` add to a mean over `marked` tokens, as a differentiable scalar and as a number.
fn part_of_cross_entropy(logprobs: Tensor<1>, sequences: &[Labelled], marked: usize) -> (Tensor<1>, f64) {
    let share = 1.0 / marked as f32;
    let rows = sequences.iter().flat_map(|s| &s.learn[1..]);
    let weights: Vec<f32> = rows.map(|learn| if *learn { -share } else { 0.0 }).collect();
    let n = weights.len();
    let weights = Tensor::<1>::from_data(TensorData::new(weights, [n]), &logprobs.device());
    let loss = (logprobs * weights).sum();
    let figure = loss.clone().into_data().iter::<f64>().sum();
    (loss, figure)
}

/// Log-probabilities of all tokens but the first of each sequence, one after the other.
pub(crate) fn labelled_logprobs<'a>(
    policy: &impl Policy,
    sequences: impl IntoIterator<Item = &'a Labelled>,
) -> Result<Tensor<1>, StepError> {
    let (tokens, ends) = joined(sequences.into_iter().map(|s| &s.tokens[..]))?;
    policy.token_logprobs(&tokens, &ends)
}

/// The same for learning.
pub(crate) fn labelled_pass<'a, 'p>(
    policy: &'p impl Policy,
    sequences: impl IntoIterator<Item = &'a Labelled>,
) -> Result<(Tensor<1>, Backward<'p>), StepError> {
    let (tokens, ends) = joined(sequences.into_iter().map(|s| &s.tokens[..]))?;
    policy.pass(&tokens, &ends)
}

pub(crate) fn accumulate(sum: &mut Option<Gradients>, part: Gradients) {
    match sum {
        Some(sum) => sum.add(&part),
        None => *sum = Some(part),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use burn::tensor::{Device, Int, activation::log_softmax};

    use super::*;
    use crate::parameters::Parameter;
    use crate::policy::read_parameters;

    /// The smallest policy: a table of next-token logits.
    #[derive(Debug, Clone)]
    pub(crate) struct Bigram {
        table: Tensor<2>,
        vocabulary: usize,
    }

    impl Bigram {
        pub(crate) fn new(vocabulary: usize) -> Self {
            let values = (0..vocabulary * vocabulary).map(|i| ((i * 37 % 11) as f32 - 5.0) * 0.1).collect();
            let mut model = Self {
                table: Tensor::zeros([vocabulary, vocabulary], &Device::flex().autodiff()),
                vocabulary,
            };
            let shape = [vocabulary, vocabulary];
            model.assign(&[Parameter { name: "table".to_owned(), shape, values }]).unwrap();
            model
        }
    }

    impl Policy for Bigram {
        fn leaves(&self) -> Vec<(String, Tensor<2>)> {
            vec![("table".to_owned(), self.table.clone())]
        }

        fn assign(&mut self, parameters: &[Parameter]) -> Result<(), StepError> {
            let data = TensorData::new(parameters[0].values.clone(), parameters[0].shape);
            self.table = Tensor::from_data(data, &Device::flex().autodiff()).require_grad();
            Ok(())
        }

        fn replica(&self) -> Self {
            let mut replica = self.clone();
            replica.assign(&read_parameters(self)).unwrap();
            replica
        }

        fn token_logprobs(&self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<Tensor<1>, StepError> {
            if let Some(token) = tokens.iter().find(|t| **t as usize >= self.vocabulary) {
                return Err(StepError::model(format!("token {token} is not in the vocabulary")));
            }
            let (mut from, mut to) = (Vec::new(), Vec::new());
            for w in cu_seqlens.windows(2) {
                for pair in tokens[w[0] as usize..w[1] as usize].windows(2) {
                    from.push(i64::from(pair[0]));
                    to.push(i64::from(pair[1]));
                }
            }
            let n = from.len();
            let index =
                |v: Vec<i64>| Tensor::<1, Int>::from_data(TensorData::new(v, [n]), &self.table.device());
            let rows = log_softmax(self.table.clone().select(0, index(from)), 1);
            Ok(rows.gather(1, index(to).reshape([n, 1])).reshape([n]))
        }
    }

    pub(crate) fn sample(tokens: &[u32], prompt_tokens: usize, advantage: f64) -> Sample {
        let logprobs = (prompt_tokens..tokens.len()).map(|i| -1.3 - 0.1 * i as f32).collect();
        Sample::new(tokens.to_vec(), prompt_tokens, logprobs, advantage)
    }

    #[test]
    fn cross_entropy_counts_marked_tokens_only() {
        let policy = Bigram::new(3);
        let logprobs = values(policy.token_logprobs(&[0, 1, 2], &[0, 3]).unwrap().into_data());
        let labelled = |learn: [bool; 3]| Labelled { tokens: vec![0, 1, 2], learn: learn.to_vec() };
        let second = cross_entropy(&policy, &[labelled([true, false, true])], 100).unwrap();
        assert!((second + f64::from(logprobs[1])).abs() < 1e-6);
        let both = cross_entropy(&policy, &[labelled([false, true, true])], 100).unwrap();
        assert!((both + f64::from(logprobs[0] + logprobs[1]) / 2.0).abs() < 1e-6);
        assert!(cross_entropy(&policy, &[labelled([true, false, false])], 100).is_err());
        // Cut up, one part without a mark: the same mean and gradients.
        let three = [[true, false, true], [false, false, false], [false, true, true]].map(labelled);
        let (whole, mean) = cross_entropy_gradients(&policy, &three, 100).unwrap();
        let (parts, same) = cross_entropy_gradients(&policy, &three, 3).unwrap();
        assert!((mean - same).abs() < 1e-6 && (mean - (2.0 * both + second) / 3.0).abs() < 1e-6);
        for (a, b) in whole.values[0].iter().zip(&parts.values[0]) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn completion_logprobs_belong_to_the_completion() {
        let policy = Bigram::new(4);
        let s = [sample(&[0, 1, 2, 3], 2, 0.0)];
        let all = values(policy.token_logprobs(&[0, 1, 2, 3], &[0, 4]).unwrap().into_data());
        assert_eq!(completion_logprobs(&policy, &s, 100).unwrap(), [all[1..].to_vec()]);
    }
}
