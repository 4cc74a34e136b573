//! One pure step: a policy and a batch in, gradients and figures out. Nothing is updated here.

use std::ops::Range;

use burn::tensor::{Tensor, TensorData};

use crate::error::StepError;
use crate::loss::plan::{RowPlan, needs_current};
use crate::loss::{LossConfig, reference, tensor};
use crate::metrics::LossMetrics;
use crate::packing::{PackError, PackedBatch, Sample, joined, micro_batches, pack};
use crate::parameters::Gradients;
use crate::policy::{Backward, Policy, read_parameters, values};

/// Gradients of the policy loss over `samples`, cut into micro-batches of at most `max_tokens` tokens, as many of which are
/// computed at a time as there are `policies`: replicas of one model. The cut changes memory and last bits, not the meaning: row
/// weights are those of the whole batch. How many replicas there are changes nothing at all, because gradients are added in the
/// order of the micro-batches. A loss whose corrections depend on the current policy costs one more forward pass when the batch
/// is cut.
///
/// # Errors
/// When samples do not fit, or the model or the loss refuses them.
pub fn policy_gradients<P: Policy + Send>(
    policies: &mut [&mut P],
    samples: &[Sample],
    config: &LossConfig,
    max_tokens: usize,
) -> Result<(Gradients, LossMetrics), StepError> {
    let whole = pack(samples)?;
    let total = whole.targets.mask.iter().filter(|m| **m).count().max(1) as f64;
    let mut parts = Vec::new();
    let mut rows = 0;
    for part in micro_batches(samples, |s| s.tokens.len(), max_tokens) {
        let batch = pack(part)?;
        let start = rows;
        rows += batch.targets.rows();
        parts.push((batch, start..rows));
    }
    let plan = match (needs_current(&whole.targets, config), parts.len()) {
        (false, _) => Some(RowPlan::new(&[], &whole.targets, config)?),
        // The only part makes the plan from its own forward pass.
        (true, 0 | 1) => None,
        (true, _) => {
            let mut current = Vec::with_capacity(whole.targets.rows());
            let logprobs =
                |policy: &P, (batch, _): &(PackedBatch, Range<usize>)| -> Result<Vec<f32>, StepError> {
                    let logprobs = policy.token_logprobs(&batch.tokens, &batch.cu_seqlens)?;
                    Ok(values(logprobs.into_data()))
                };
            each_part(policies, &parts, logprobs, |_, logprobs| {
                current.extend(logprobs.into_iter().map(f64::from));
            })?;
            Some(RowPlan::new(&current, &whole.targets, config)?)
        }
    };
    let learn = |policy: &P, (batch, rows): &(PackedBatch, Range<usize>)| -> Result<_, StepError> {
        let (logprobs, backward) = policy.pass(&batch.tokens, &batch.cu_seqlens)?;
        let seen = values(logprobs.clone().into_data()).into_iter().map(f64::from).collect::<Vec<_>>();
        let rows = match &plan {
            Some(plan) => plan.slice(rows.clone()),
            None => RowPlan::new(&seen, &batch.targets, config)?,
        };
        let figures = reference::planned_loss(&seen, &batch.targets, config, &rows)?;
        let loss = tensor::planned_loss(&logprobs, &batch.targets, config, &rows)?;
        Ok((figures, backward(&loss)?))
    };
    let mut gradients: Option<Gradients> = None;
    let mut metrics = LossMetrics::default();
    each_part(policies, &parts, learn, |(batch, _), (figures, part)| {
        accumulate(&mut gradients, part);
        let part_tokens = batch.targets.mask.iter().filter(|m| **m).count();
        let tokens_share = part_tokens as f64 / total;
        metrics.loss += figures.loss;
        metrics.tokens += part_tokens;
        metrics.batch_tokens += batch.tokens.len();
        metrics.clip_fraction += tokens_share * figures.clip_fraction;
        metrics.sampled_kl += tokens_share * figures.sampled_kl;
        metrics.ratio_deviation_max = metrics.ratio_deviation_max.max(figures.ratio_deviation_max);
        metrics.correction = figures.correction;
    })?;
    let zeros = || Gradients::zeros(&policies.first().map(|p| read_parameters(&**p)).unwrap_or_default());
    Ok((gradients.unwrap_or_else(zeros), metrics))
}

/// Does `work` for each of `parts`, for as many at a time as there are `policies`, each on a thread of its own; `take` gets what
/// comes of it in the order of the parts.
fn each_part<P: Policy + Send, B: Sync, T: Send>(
    policies: &mut [&mut P],
    parts: &[B],
    work: impl Fn(&P, &B) -> Result<T, StepError> + Sync,
    mut take: impl FnMut(&B, T),
) -> Result<(), StepError> {
    if let [policy] = policies {
        for part in parts {
            take(part, work(policy, part)?);
        }
        return Ok(());
    }
    for wave in parts.chunks(policies.len().max(1)) {
        let work = &work;
        let done: Vec<Result<T, StepError>> = std::thread::scope(|scope| {
            let mut threads = Vec::with_capacity(wave.len());
            for (policy, part) in policies.iter_mut().zip(wave) {
                threads.push(scope.spawn(move || work(&**policy, part)));
            }
            let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        for (part, done) in wave.iter().zip(done) {
            take(part, done?);
        }
    }
    Ok(())
}

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
    use crate::loss::config::Correction;
    use crate::parameters::Parameter;

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
    fn gradients_are_those_of_finite_differences_and_micro_batches_do_not_change_them() {
        let samples =
            [sample(&[0, 1, 2, 3], 2, 0.7), sample(&[3, 1], 1, -0.4), sample(&[2, 2, 0, 1, 3], 1, 0.2)];
        let mut masked = samples[2].clone();
        masked.trainable[1] = false;
        let samples = [samples[0].clone(), samples[1].clone(), masked];
        for config in [
            LossConfig::grpo(),
            LossConfig::dapo(),
            LossConfig::dr_grpo(6),
            LossConfig::ppo(),
            LossConfig::gspo(),
        ] {
            let mut policy = Bigram::new(4);
            let (whole, figures) = policy_gradients(&mut [&mut policy], &samples, &config, 1000).unwrap();
            let (parts, same) = policy_gradients(&mut [&mut policy], &samples, &config, 5).unwrap();
            assert!((figures.loss - same.loss).abs() < 1e-6);
            for (a, b) in whole.values[0].iter().zip(&parts.values[0]) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
            for entry in [1, 6, 11, 13] {
                let h = 1e-2_f32;
                let at = |shift: f32| {
                    let mut p = read_parameters(&policy);
                    p[0].values[entry] += shift;
                    let mut moved = policy.clone();
                    moved.assign(&p).unwrap();
                    policy_gradients(&mut [&mut moved], &samples, &config, 1000).unwrap().1.loss
                };
                let slope = (at(h) - at(-h)) / (2.0 * f64::from(h));
                assert!((slope - f64::from(whole.values[0][entry])).abs() < 2e-3, "{entry}: {slope}");
            }
        }
    }

    #[test]
    fn corrections_are_those_of_the_whole_batch_however_it_is_cut() {
        let samples =
            [sample(&[0, 1, 2, 3], 2, 0.7), sample(&[3, 1], 1, -0.4), sample(&[2, 2, 0, 1, 3], 1, 0.2)];
        let mut correction = Correction::tis(1.1);
        correction.weight.as_mut().unwrap().batch_normalise = true;
        correction.filters.token.k3 = Some(0.02);
        correction.count_filtered = false;
        let config = LossConfig::ppo().decoupled(correction);
        let mut policy = Bigram::new(4);
        let (whole, figures) = policy_gradients(&mut [&mut policy], &samples, &config, 1000).unwrap();
        let (parts, same) = policy_gradients(&mut [&mut policy], &samples, &config, 5).unwrap();
        assert!(figures.correction.filtered_fraction > 0.0 && figures.correction.filtered_fraction < 1.0);
        assert_eq!(figures.correction, same.correction);
        // However many replicas compute it.
        for n in [2, 3, 7] {
            let mut replicas: Vec<Bigram> = (0..n).map(|_| policy.replica()).collect();
            let mut replicas: Vec<&mut Bigram> = replicas.iter_mut().collect();
            assert_eq!(policy_gradients(&mut replicas, &samples, &config, 5).unwrap(), (parts.clone(), same));
        }
        for (a, b) in whole.values[0].iter().zip(&parts.values[0]) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
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
