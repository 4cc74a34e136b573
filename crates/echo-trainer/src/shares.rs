//! A step's batch in shares, each computed by one trainer: how it is cut, what a share is, and how their gradients add up.
//!
//! The cut depends on settings only, a share is computed in the same way wherever that is, and shares are added in their order: who
//! computed which, and how many computed at all, changes no bit of a step.

use std::ops::Range;
use std::sync::Arc;

use crate::error::StepError;
use crate::loss::plan::{RowPlan, needs_current};
use crate::loss::{LossConfig, reference, tensor};
use crate::metrics::LossMetrics;
use crate::packing::{PackError, PackedBatch, Sample, micro_batches, pack};
use crate::parameters::Gradients;
use crate::policy::{Policy, values};

/// How a batch is cut. It changes memory and last bits of a step, not its meaning: row weights are those of the whole batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// At most so many shares, of about as many tokens each.
    pub shares: usize,
    /// Most tokens of one micro-batch of a share.
    pub micro_batch_tokens: usize,
}

/// What is asked of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// The log-probabilities of all rows under the present weights.
    Logprobs,
    /// The gradients of its part of the loss.
    Gradients,
}

/// A micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its sequences; of [`Task::Logprobs`] only the tokens are read.
    pub batch: PackedBatch,
    /// What each row weighs in the whole batch's loss; `None` when this is the whole batch, which then makes the plan from its own
    /// forward pass and does not travel.
    pub plan: Option<RowPlan>,
}

/// What one trainer computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// What is asked.
    pub task: Task,
    /// Micro-batches in order, at least one.
    pub parts: Vec<Part>,
    /// Trainable tokens of the whole batch, at least 1.
    pub total_tokens: usize,
}

/// What came of a share.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// One log-probability for each row of the parts.
    Logprobs(Vec<f32>),
    /// Gradients, and the share's part of the figures.
    Gradients(Gradients, LossMetrics),
}

impl Share {
    /// Rows of all parts.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.batch.rows()).sum()
    }

    /// Its trainable tokens, and all of its tokens.
    pub fn tokens(&self) -> (usize, usize) {
        let each = self.parts.iter().map(|part| (trainable(&part.batch), part.batch.tokens.len()));
        each.fold((0, 0), |sum, next| (sum.0 + next.0, sum.1 + next.1))
    }

    /// Computes it, one micro-batch after the other.
    ///
    /// # Errors
    /// When the model or the loss refuses a part.
    pub fn compute<P: Policy>(&self, policy: &P, config: &LossConfig) -> Result<Answer, StepError> {
        match self.task {
            Task::Logprobs => {
                let mut all = Vec::with_capacity(self.rows());
                for Part { batch, .. } in &self.parts {
                    all.extend(values(policy.token_logprobs(&batch.tokens, &batch.cu_seqlens)?.into_data()));
                }
                Ok(Answer::Logprobs(all))
            }
            Task::Gradients => {
                let mut sum = Sum::default();
                for part in &self.parts {
                    sum.add(self.learn(policy, config, part)?);
                }
                let (gradients, figures) = sum.gradients.ok_or(EMPTY)?;
                Ok(Answer::Gradients(gradients, figures))
            }
        }
    }

    fn learn<P: Policy>(
        &self,
        policy: &P,
        config: &LossConfig,
        Part { batch, plan }: &Part,
    ) -> Result<(Gradients, LossMetrics), StepError> {
        let (logprobs, backward) = policy.pass(&batch.tokens, &batch.cu_seqlens)?;
        let seen = values(logprobs.clone().into_data()).into_iter().map(f64::from).collect::<Vec<_>>();
        let own_plan = match plan {
            Some(_) => None,
            None => Some(RowPlan::new(&seen, &batch.targets, config)?),
        };
        let rows = plan.as_ref().or(own_plan.as_ref()).expect("one of both");
        let figures = reference::planned_loss(&seen, &batch.targets, config, rows)?;
        let loss = tensor::planned_loss(&logprobs, &batch.targets, config, rows)?;
        let tokens = trainable(batch);
        let share = tokens as f64 / self.total_tokens as f64;
        let metrics = LossMetrics {
            loss: figures.loss,
            tokens,
            batch_tokens: batch.tokens.len(),
            clip_fraction: share * figures.clip_fraction,
            sampled_kl: share * figures.sampled_kl,
            ratio_deviation_max: figures.ratio_deviation_max,
            correction: figures.correction,
        };
        Ok((backward(&loss)?, metrics))
    }
}

/// Gradients of a batch without samples, or of a share without parts.
const EMPTY: PackError = PackError::Empty { index: 0, tokens: 0, prompt_tokens: 0 };

fn trainable(batch: &PackedBatch) -> usize {
    batch.targets.mask.iter().filter(|m| **m).count()
}

/// Parts or shares, added in order.
#[derive(Debug, Default)]
struct Sum {
    gradients: Option<(Gradients, LossMetrics)>,
}

impl Sum {
    fn add(&mut self, (gradients, metrics): (Gradients, LossMetrics)) {
        match &mut self.gradients {
            Some((sum, figures)) => {
                sum.add(&gradients);
                figures.add(&metrics);
            }
            None => self.gradients = Some((gradients, metrics)),
        }
    }
}

/// Whoever computes shares.
pub trait Hands {
    /// How many are computed at a time.
    fn width(&self) -> usize;

    /// One answer for each of `shares`, in their order.
    ///
    /// # Errors
    /// As [`Share::compute`].
    fn compute(&mut self, shares: &[Arc<Share>]) -> Result<Vec<Answer>, StepError>;
}

/// Replicas of one model in this process, each on a thread of its own.
#[derive(Debug)]
pub struct Replicas<'a, P> {
    policies: Vec<&'a mut P>,
    loss: &'a LossConfig,
}

impl<'a, P> Replicas<'a, P> {
    /// Computes with `policies`, at least one.
    pub fn new(policies: Vec<&'a mut P>, loss: &'a LossConfig) -> Self {
        assert!(!policies.is_empty(), "somebody computes");
        Self { policies, loss }
    }
}

impl<P: Policy + Send> Hands for Replicas<'_, P> {
    fn width(&self) -> usize {
        self.policies.len()
    }

    fn compute(&mut self, shares: &[Arc<Share>]) -> Result<Vec<Answer>, StepError> {
        let loss = self.loss;
        if let [policy] = &self.policies[..] {
            return shares.iter().map(|share| share.compute(&**policy, loss)).collect();
        }
        let mut answers = Vec::with_capacity(shares.len());
        for wave in shares.chunks(self.policies.len()) {
            let done: Vec<Result<Answer, StepError>> = std::thread::scope(|scope| {
                let mut threads = Vec::with_capacity(wave.len());
                for (policy, share) in self.policies.iter_mut().zip(wave) {
                    threads.push(scope.spawn(move || share.compute(&**policy, loss)));
                }
                let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
                ended.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
            });
            for answer in done {
                answers.push(answer?);
            }
        }
        Ok(answers)
    }
}

/// Which of `samples` belong to each share: a sample belongs where its first token lies. No share is empty.
fn cut(samples: &[Sample], shares: usize) -> Vec<Range<usize>> {
    let total: usize = samples.iter().map(|s| s.tokens.len()).sum();
    let mut cuts: Vec<(usize, Range<usize>)> = Vec::with_capacity(shares);
    let mut before = 0;
    for (i, sample) in samples.iter().enumerate() {
        let place = before * shares.max(1) / total.max(1);
        before += sample.tokens.len();
        match cuts.last_mut() {
            Some((last, range)) if *last == place => range.end = i + 1,
            _ => cuts.push((place, i..i + 1)),
        }
    }
    cuts.into_iter().map(|(_, range)| range).collect()
}

/// Gradients of the policy loss over `samples`. `compute` computes shares in their order, as [`Hands::compute`] does; the trainer asks
/// its assistants there. A loss whose corrections depend on the current policy costs one more forward pass when the batch is cut.
/// Where `compute` gives `None`, answers that it gave before are not to be believed, and all are asked for again.
///
/// # Errors
/// When there are no samples or they do not fit, or the model or the loss refuses them.
pub fn policy_gradients(
    mut compute: impl FnMut(&[Arc<Share>]) -> Result<Option<Vec<Answer>>, StepError>,
    samples: &[Sample],
    config: &LossConfig,
    sizes: Cut,
) -> Result<(Gradients, LossMetrics), StepError> {
    let whole = pack(samples)?;
    let total_tokens = trainable(&whole).max(1);
    let mut batches: Vec<Vec<PackedBatch>> = Vec::new();
    for range in cut(samples, sizes.shares) {
        let parts = micro_batches(&samples[range], |s| s.tokens.len(), sizes.micro_batch_tokens);
        batches.push(parts.into_iter().map(pack).collect::<Result<_, _>>()?);
    }
    let n_parts: usize = batches.iter().map(Vec::len).sum();
    let shares = |task, plan: Option<&RowPlan>| -> Vec<Arc<Share>> {
        let mut rows = 0;
        let mut part = |batch: &PackedBatch| {
            let start = rows;
            rows += batch.rows();
            Part { batch: batch.clone(), plan: plan.map(|plan| plan.slice(start..rows)) }
        };
        let mut share = |parts: &Vec<PackedBatch>| {
            Arc::new(Share { task, parts: parts.iter().map(&mut part).collect(), total_tokens })
        };
        batches.iter().map(&mut share).collect()
    };
    let answers = loop {
        let plan = match (needs_current(&whole.targets, config), n_parts) {
            (false, _) => Some(RowPlan::new(&[], &whole.targets, config)?),
            // The only part makes the plan from its own forward pass.
            (true, 0 | 1) => None,
            (true, _) => {
                let Some(answers) = compute(&shares(Task::Logprobs, None))? else { continue };
                let mut current = Vec::with_capacity(whole.targets.rows());
                for answer in answers {
                    let Answer::Logprobs(logprobs) = answer else {
                        unreachable!("log-probabilities were asked for")
                    };
                    current.extend(logprobs.into_iter().map(f64::from));
                }
                Some(RowPlan::new(&current, &whole.targets, config)?)
            }
        };
        if let Some(answers) = compute(&shares(Task::Gradients, plan.as_ref()))? {
            break answers;
        }
    };
    let mut sum = Sum::default();
    for answer in answers {
        let Answer::Gradients(gradients, figures) = answer else { unreachable!("gradients were asked for") };
        sum.add((gradients, figures));
    }
    Ok(sum.gradients.ok_or(EMPTY)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::loss::config::Correction;
    use crate::policy::read_parameters;
    use crate::step::tests::{Bigram, sample};

    /// With `n` replicas of `policy`.
    fn computed(
        policy: &Bigram,
        n: usize,
        samples: &[Sample],
        config: &LossConfig,
        sizes: Cut,
    ) -> (Gradients, LossMetrics) {
        let mut replicas: Vec<Bigram> = (0..n).map(|_| policy.replica()).collect();
        let mut hands = Replicas::new(replicas.iter_mut().collect(), config);
        policy_gradients(|shares| hands.compute(shares).map(Some), samples, config, sizes).unwrap()
    }

    const WHOLE: Cut = Cut { shares: 1, micro_batch_tokens: 1000 };
    const SMALL: Cut = Cut { shares: 1, micro_batch_tokens: 5 };

    fn batch() -> [Sample; 3] {
        [sample(&[0, 1, 2, 3], 2, 0.7), sample(&[3, 1], 1, -0.4), sample(&[2, 2, 0, 1, 3], 1, 0.2)]
    }

    #[test]
    fn gradients_are_those_of_finite_differences_and_the_cut_does_not_change_them() {
        let mut samples = batch();
        samples[2].trainable[1] = false;
        for config in [
            LossConfig::grpo(),
            LossConfig::dapo(),
            LossConfig::dr_grpo(6),
            LossConfig::ppo(),
            LossConfig::gspo(),
        ] {
            let policy = Bigram::new(4);
            let (whole, figures) = computed(&policy, 1, &samples, &config, WHOLE);
            for sizes in [SMALL, Cut { shares: 3, ..WHOLE }, Cut { shares: 2, ..SMALL }] {
                let (parts, same) = computed(&policy, 1, &samples, &config, sizes);
                assert!((figures.loss - same.loss).abs() < 1e-6);
                for (a, b) in whole.values[0].iter().zip(&parts.values[0]) {
                    assert!((a - b).abs() < 1e-6, "{a} {b}");
                }
            }
            for entry in [1, 6, 11, 13] {
                let h = 1e-2_f32;
                let at = |shift: f32| {
                    let mut p = read_parameters(&policy);
                    p[0].values[entry] += shift;
                    let mut moved = policy.clone();
                    moved.assign(&p).unwrap();
                    computed(&moved, 1, &samples, &config, WHOLE).1.loss
                };
                let slope = (at(h) - at(-h)) / (2.0 * f64::from(h));
                assert!((slope - f64::from(whole.values[0][entry])).abs() < 2e-3, "{entry}: {slope}");
            }
        }
    }

    #[test]
    fn corrections_are_those_of_the_whole_batch_however_it_is_cut() {
        let samples = batch();
        let mut correction = Correction::tis(1.1);
        correction.weight.as_mut().unwrap().batch_normalise = true;
        correction.filters.token.k3 = Some(0.02);
        correction.count_filtered = false;
        let config = LossConfig::ppo().decoupled(correction);
        let policy = Bigram::new(4);
        let (whole, figures) = computed(&policy, 1, &samples, &config, WHOLE);
        for sizes in [SMALL, Cut { shares: 3, ..WHOLE }] {
            let (parts, same) = computed(&policy, 1, &samples, &config, sizes);
            let filtered = figures.correction.filtered_fraction;
            assert!(filtered > 0.0 && filtered < 1.0);
            assert_eq!(figures.correction, same.correction);
            for (a, b) in whole.values[0].iter().zip(&parts.values[0]) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
            // However many replicas compute it, to the bit.
            for n in [2, 3, 7] {
                let by_many = computed(&policy, n, &samples, &config, sizes);
                assert_eq!(by_many, (parts.clone(), same), "{n} replicas");
            }
        }
    }

    #[test]
    fn where_answers_are_not_believed_any_more_all_are_asked_for_again() {
        let (samples, config) = (batch(), LossConfig::ppo().decoupled(Correction::tis(1.5)));
        let sizes = Cut { shares: 3, ..WHOLE };
        let expected = computed(&Bigram::new(4), 1, &samples, &config, sizes);
        // The first log-probabilities are a lie, which is noticed with the gradients or never.
        for noticed in [true, false] {
            let (mut policy, mut tasks) = (Bigram::new(4), Vec::new());
            let mut hands = Replicas::new(vec![&mut policy], &config);
            let compute = |shares: &[Arc<Share>]| -> Result<Option<Vec<Answer>>, StepError> {
                tasks.push(shares[0].task);
                let mut answers = hands.compute(shares)?;
                match (tasks.len(), answers.last_mut()) {
                    (1, Some(Answer::Logprobs(told))) => told.iter_mut().for_each(|l| *l -= 0.25),
                    (2, _) if noticed => return Ok(None),
                    _ => {}
                }
                Ok(Some(answers))
            };
            let found = policy_gradients(compute, &samples, &config, sizes).unwrap();
            assert_eq!(found == expected, noticed);
            assert_eq!(tasks, [Task::Logprobs, Task::Gradients].repeat(if noticed { 2 } else { 1 }));
        }
    }

    #[test]
    fn a_batch_without_samples_is_refused() {
        let (mut policy, config) = (Bigram::new(4), LossConfig::grpo());
        let mut hands = Replicas::new(vec![&mut policy], &config);
        let refused = policy_gradients(|shares| hands.compute(shares).map(Some), &[], &config, WHOLE);
        assert!(matches!(refused, Err(StepError::Pack(PackError::Empty { .. }))));
    }

    proptest! {
        #[test]
        fn shares_cover_a_batch_once_in_order_and_evenly(
            lengths in proptest::collection::vec(2_usize..40, 0..30), shares in 1_usize..9,
        ) {
            let samples: Vec<Sample> = lengths.iter().map(|n| sample(&vec![1; *n], 1, 0.0)).collect();
            let cuts = cut(&samples, shares);
            prop_assert!(cuts.len() <= shares && cuts.iter().all(|c| !c.is_empty()));
            prop_assert_eq!(cuts.iter().cloned().flatten().collect::<Vec<_>>(), (0..samples.len()).collect::<Vec<_>>());
            let total: usize = lengths.iter().sum();
            for range in cuts {
                let tokens: usize = lengths[range].iter().sum();
                prop_assert!(tokens <= total / shares + 41, "{tokens} of {total}");
            }
        }
    }
}
