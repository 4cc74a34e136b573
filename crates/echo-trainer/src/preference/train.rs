//! Learning from pairs of answers: a policy learns to prefer the chosen ones (direct preference optimisation), or a judge to
//! score them higher (a pairwise reward model).
//!
//! The reference of the former is the policy before the first step. Its log-probabilities are computed once, so nothing but the
//! trained weights is in memory. The score of the latter is a log-probability, too: of a second end of the sequence right after
//! the answer's own ([`judged`]). So a reward model is a language model with an adapter, like any other, and needs no head of
//! its own; generative verifiers (arXiv 2408.15240) take the word "Yes" in the same way.

use burn::tensor::{Tensor, TensorData};

use super::{
    PreferenceConfig, PreferenceError, RewardModelConfig, preference_loss_tensor, reward_model_loss_tensor,
};
use crate::error::StepError;
use crate::optim::{AdamW, OptimConfig};
use crate::packing::micro_batches;
use crate::parameters::{Gradients, Parameters};
use crate::policy::{Backward, Policy, read_parameters, values};
use crate::step::{Labelled, accumulate, labelled_logprobs, labelled_pass};

/// Two answers to one prompt; the marked tokens count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The better one.
    pub chosen: Labelled,
    /// The other one.
    pub rejected: Labelled,
}

impl Pair {
    /// Of both answers, prompts included.
    pub(crate) fn tokens(&self) -> usize {
        self.chosen.tokens.len() + self.rejected.tokens.len()
    }
}

/// The line `tokens`, which ends with the end of its sequence, for a judge: only the `end` after that counts.
pub fn judged(mut tokens: Vec<u32>, end: u32) -> Labelled {
    let mut learn = vec![false; tokens.len()];
    tokens.push(end);
    learn.push(true);
    Labelled { tokens, learn }
}

/// What is learnt from a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PairObjective {
    /// To prefer the chosen answer to the rejected one, more than the reference does.
    Preference(PreferenceConfig),
    /// To score the chosen answer higher; answers are lines as [`judged`] makes them.
    Reward(RewardModelConfig),
}

impl PairObjective {
    fn validate(&self) -> Result<(), PreferenceError> {
        match self {
            Self::Preference(config) => config.validate(),
            Self::Reward(config) => config.validate(),
        }
    }

    /// Whether answers count by their mean log-probability instead of their sum.
    fn averages(&self) -> bool {
        matches!(self, Self::Preference(config) if config.averages())
    }

    /// What a margin is multiplied by in the loss.
    fn unit(&self) -> f64 {
        match self {
            Self::Preference(config) => config.beta,
            Self::Reward(_) => 1.0,
        }
    }

    /// The mean loss of `[pairs]`.
    fn loss(
        &self,
        chosen: &Tensor<1>,
        rejected: &Tensor<1>,
        offsets: &[f64],
    ) -> Result<Tensor<1>, PreferenceError> {
        match self {
            Self::Preference(config) => preference_loss_tensor(chosen, rejected, offsets, config),
            Self::Reward(config) => Ok(reward_model_loss_tensor(chosen, rejected, config)),
        }
    }
}

/// What one step did, or would do.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PairReport {
    /// The mean loss before the update.
    pub loss: f64,
    /// Share of pairs that are ordered right: more clearly than by the reference where there is one.
    pub accuracy: f64,
    /// Mean of `beta (h)`: how much more the chosen answer is preferred than by the reference, in the units of the loss. For
    /// rewards: how much higher its score is.
    pub margin: f64,
    /// Mean of all answers' log-probabilities: for rewards the score of an answer that is neither good nor bad.
    pub middle: f64,
    /// Global gradient norm before clipping; 0 without an update.
    pub grad_norm: f64,
}

/// A run over pairs. Which pairs is the caller's choice, step by step.
#[derive(Debug)]
pub struct PairTrainer<P> {
    policy: P,
    masters: Parameters,
    optimiser: AdamW,
    objective: PairObjective,
    pairs: Vec<Pair>,
    /// Of each pair: the reference's chosen minus rejected log-probability; 0 where there is no reference.
    offsets: Vec<f64>,
    micro_batch_tokens: usize,
}

impl<P: Policy> PairTrainer<P> {
    /// Takes the policy's present values as the reference for `pairs`, if the objective has one. Batches are cut into parts of at most
    /// `micro_batch_tokens`, which bounds memory.
    ///
    /// # Errors
    /// A setting out of range, or a pair that the model refuses.
    pub fn new(
        policy: P,
        pairs: Vec<Pair>,
        objective: PairObjective,
        optim: OptimConfig,
        micro_batch_tokens: usize,
    ) -> Result<Self, StepError> {
        objective.validate().map_err(StepError::model)?;
        let masters = read_parameters(&policy);
        let optimiser = AdamW::new(optim, &masters)?;
        let mut offsets = vec![0.0; pairs.len()];
        if let PairObjective::Preference(_) = objective {
            offsets.clear();
            for part in micro_batches(&pairs, Pair::tokens, micro_batch_tokens) {
                let logprobs = labelled_logprobs(&policy, lines(part))?;
                let sums = values(answers(&logprobs, lines(part), objective.averages()).into_data());
                offsets.extend(sums.chunks_exact(2).map(|pair| f64::from(pair[0]) - f64::from(pair[1])));
            }
        }
        Ok(Self { policy, masters, optimiser, objective, pairs, offsets, micro_batch_tokens })
    }

    /// One update on the pairs of these numbers.
    ///
    /// # Errors
    /// When the model refuses a pair or a gradient is not finite; nothing has changed then.
    pub fn step(&mut self, batch: &[usize]) -> Result<PairReport, StepError> {
        let mut gradients: Option<Gradients> = None;
        let mut report = self.each_part(batch, |backward, loss| {
            accumulate(&mut gradients, backward(loss)?);
            Ok(())
        })?;
        let Some(mut gradients) = gradients else { return Ok(report) };
        report.grad_norm = self.optimiser.update(&mut self.masters, &mut gradients)?.grad_norm;
        self.policy.assign(&self.masters)?;
        Ok(report)
    }

    /// The same figures without learning.
    ///
    /// # Errors
    /// When the model refuses a pair.
    pub fn measure(&self, batch: &[usize]) -> Result<PairReport, StepError> {
        self.each_part(batch, |_, _| Ok(()))
    }

    /// Ends the run.
    pub fn into_policy(self) -> P {
        self.policy
    }

    fn each_part(
        &self,
        batch: &[usize],
        mut with: impl FnMut(Backward<'_>, &Tensor<1>) -> Result<(), StepError>,
    ) -> Result<PairReport, StepError> {
        let mut report = PairReport::default();
        for part in micro_batches(batch, |i| self.pairs[*i].tokens(), self.micro_batch_tokens) {
            let pairs: Vec<&Pair> = part.iter().map(|i| &self.pairs[*i]).collect();
            let offsets: Vec<f64> = part.iter().map(|i| self.offsets[*i]).collect();
            let n = part.len();
            let (logprobs, backward) = labelled_pass(&self.policy, lines(pairs.iter().copied()))?;
            let sums = answers(&logprobs, lines(pairs), self.objective.averages());
            let seen = values(sums.clone().into_data());
            let columns = sums.reshape([n, 2]);
            let [chosen, rejected] = [0, 1].map(|i| columns.clone().narrow(1, i, 1).reshape([n]));
            let loss = self.objective.loss(&chosen, &rejected, &offsets).map_err(StepError::model)?
                * (n as f64 / batch.len() as f64);
            report.loss += loss.clone().into_data().iter::<f64>().sum::<f64>();
            for (pair, offset) in seen.chunks_exact(2).zip(&offsets) {
                let [chosen, rejected] = [pair[0], pair[1]].map(f64::from);
                let (h, share) = (chosen - rejected - offset, 1.0 / batch.len() as f64);
                report.accuracy += share * f64::from(u8::from(h > 0.0));
                report.margin += share * self.objective.unit() * h;
                report.middle += share * (chosen + rejected) / 2.0;
            }
            with(backward, &loss)?;
        }
        Ok(report)
    }
}

/// Each answer's log-probability, or its mean per token: chosen and rejected in turn, `[2 pairs]`.
fn answers<'a>(
    logprobs: &Tensor<1>,
    lines: impl IntoIterator<Item = &'a Labelled>,
    average: bool,
) -> Tensor<1> {
    let lines: Vec<&Labelled> = lines.into_iter().collect();
    let rows = logprobs.dims()[0];
    let mut weights = vec![0_f32; lines.len() * rows];
    let mut row = 0;
    for (line, weights) in lines.iter().zip(weights.chunks_exact_mut(rows)) {
        let share = if average { 1.0 / line.learnt().max(1) as f32 } else { 1.0 };
        for learn in &line.learn[1..] {
            weights[row] = if *learn { share } else { 0.0 };
            row += 1;
        }
    }
    let weights = TensorData::new(weights, [lines.len(), rows]);
    let weights = Tensor::<2>::from_data(weights, &logprobs.device());
    weights.matmul(logprobs.clone().reshape([rows, 1])).reshape([lines.len()])
}

/// Chosen and rejected answers in turn.
fn lines<'a>(pairs: impl IntoIterator<Item = &'a Pair>) -> impl Iterator<Item = &'a Labelled> {
    pairs.into_iter().flat_map(|pair| [&pair.chosen, &pair.rejected])
}

#[cfg(test)]
mod tests {
    use super::super::{PreferenceKind, preference_loss};
    use super::*;
    use crate::step::tests::Bigram;

    fn line(tokens: &[u32]) -> Labelled {
        Labelled { tokens: tokens.to_vec(), learn: (0..tokens.len()).map(|i| i > 0).collect() }
    }

    fn pairs() -> Vec<Pair> {
        let pair = |chosen, rejected| Pair { chosen: line(chosen), rejected: line(rejected) };
        vec![pair(&[0, 1, 2], &[0, 3]), pair(&[1, 3], &[1, 0, 0, 2]), pair(&[2, 2], &[2, 1])]
    }

    #[test]
    fn the_first_loss_is_that_of_no_preference_and_learning_makes_one() {
        let optim = OptimConfig { learning_rate: 0.1, ..OptimConfig::default() };
        let config = PairObjective::Preference(PreferenceConfig::dpo(0.5));
        let mut trainer = PairTrainer::new(Bigram::new(4), pairs(), config, optim, 100).unwrap();
        let before = trainer.measure(&[0, 1, 2]).unwrap();
        assert!((before.loss - 2f64.ln()).abs() < 1e-6 && before.margin.abs() < 1e-6, "{before:?}");
        for _ in 0..30 {
            trainer.step(&[0, 1, 2]).unwrap();
        }
        let after = trainer.measure(&[0, 1, 2]).unwrap();
        assert!(after.loss < 0.3 && after.accuracy == 1.0 && after.margin > 1.0, "{after:?}");
    }

    #[test]
    fn a_judge_learns_to_score_chosen_answers_higher() {
        // Answers that end with 3 are better; the end after it tells.
        let line = |last: u32| judged(vec![0, 1, last], 2);
        assert_eq!(line(3), Labelled { tokens: vec![0, 1, 3, 2], learn: vec![false, false, false, true] });
        let pairs = vec![Pair { chosen: line(3), rejected: line(1) }; 2];
        let optim = OptimConfig { learning_rate: 0.1, ..OptimConfig::default() };
        let objective = PairObjective::Reward(RewardModelConfig { margin: 0.0, centre: 0.0 });
        let mut judge = PairTrainer::new(Bigram::new(4), pairs, objective, optim, 4).unwrap();
        let before = judge.measure(&[0, 1]).unwrap();
        assert!((before.loss - 2f64.ln()).abs() < 1e-6 && before.accuracy == 0.0, "{before:?}");
        for _ in 0..30 {
            judge.step(&[0, 1]).unwrap();
        }
        let after = judge.measure(&[0, 1]).unwrap();
        assert!(after.loss < 0.2 && after.accuracy == 1.0 && after.margin > 2.0, "{after:?}");
        // Nothing else has moved.
        let rows =
            |policy: &Bigram| values(policy.token_logprobs(&[0, 1, 2, 0], &[0, 2, 4]).unwrap().into_data());
        assert_ne!(judge.masters[0].values, read_parameters(&Bigram::new(4))[0].values);
        assert_eq!(rows(&judge.policy), rows(&Bigram::new(4)), "the answers' own tokens do not count");
        let centred = PairObjective::Reward(RewardModelConfig { margin: 0.0, centre: f64::NAN });
        assert!(PairTrainer::new(Bigram::new(4), Vec::new(), centred, optim, 4).is_err());
    }

    #[test]
    fn cutting_a_batch_changes_nothing_and_the_loss_is_the_specified_one() {
        for kind in
            [PreferenceKind::Sigmoid { label_smoothing: 0.1 }, PreferenceKind::Hinge, PreferenceKind::Ipo]
        {
            let config = PreferenceConfig { kind, beta: 0.4 };
            let start = |tokens| {
                let policy = Bigram::new(4);
                let objective = PairObjective::Preference(config);
                let mut t =
                    PairTrainer::new(policy, pairs(), objective, OptimConfig::default(), tokens).unwrap();
                t.step(&[0, 1, 2]).unwrap();
                t
            };
            let (whole, cut) = (start(100), start(4));
            for (a, b) in whole.masters[0].values.iter().zip(&cut.masters[0].values) {
                assert!((a - b).abs() < 1e-5, "{kind:?}: {a} {b}");
            }
            let sums = |policy: &Bigram| -> (Vec<f64>, Vec<f64>) {
                let pairs = pairs();
                let logprobs = labelled_logprobs(policy, lines(&pairs)).unwrap();
                let sums = values(answers(&logprobs, lines(&pairs), config.averages()).into_data());
                sums.chunks_exact(2).map(|p| (f64::from(p[0]), f64::from(p[1]))).unzip()
            };
            let (now, reference) = (sums(&whole.policy), sums(&Bigram::new(4)));
            let expected =
                preference_loss(&now.0, &now.1, Some((&reference.0, &reference.1)), &config).unwrap();
            let got = cut.measure(&[0, 1, 2]).unwrap();
            assert!((got.loss - expected.loss).abs() < 1e-5, "{kind:?}: {} {}", got.loss, expected.loss);
            assert_eq!(got.accuracy, expected.accuracy);
        }
    }
}
