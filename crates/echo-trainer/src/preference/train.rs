//! Direct preference optimisation: a policy learns to prefer chosen answers to rejected ones more than it did before.
//!
//! The reference is the policy before the first step. Its log-probabilities are computed once, so nothing but the trained
//! weights is in memory.

use burn::tensor::{Tensor, TensorData};

use super::{PreferenceConfig, preference_loss_tensor};
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

/// What one step did, or would do.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PairReport {
    /// The mean loss before the update.
    pub loss: f64,
    /// Share of pairs that the policy orders right more clearly than the reference does.
    pub accuracy: f64,
    /// Mean of `beta (h)`: how much more the chosen answer is preferred than by the reference, in the units of the loss.
    pub margin: f64,
    /// Global gradient norm before clipping; 0 without an update.
    pub grad_norm: f64,
}

/// A run over pairs. Which pairs is the caller's choice, step by step.
#[derive(Debug)]
pub struct PairTrainer<P> {
    policy: P,
    masters: Parameters,
    optimiser: AdamW,
    config: PreferenceConfig,
    pairs: Vec<Pair>,
    /// Of each pair: the reference's chosen minus rejected log-probability.
    offsets: Vec<f64>,
    micro_batch_tokens: usize,
}

impl<P: Policy> PairTrainer<P> {
    /// Takes the policy's present values as the reference for `pairs`. Batches are cut into parts of at most
    /// `micro_batch_tokens`, which bounds memory.
    ///
    /// # Errors
    /// A setting out of range, or a pair that the model refuses.
    pub fn new(
        policy: P,
        pairs: Vec<Pair>,
        config: PreferenceConfig,
        optim: OptimConfig,
        micro_batch_tokens: usize,
    ) -> Result<Self, StepError> {
        config.validate().map_err(StepError::model)?;
        let masters = read_parameters(&policy);
        let optimiser = AdamW::new(optim, &masters)?;
        let mut offsets = Vec::with_capacity(pairs.len());
        for part in micro_batches(&pairs, Pair::tokens, micro_batch_tokens) {
            let logprobs = labelled_logprobs(&policy, lines(part))?;
            let sums = values(answers(&logprobs, lines(part), &config).into_data());
            offsets.extend(sums.chunks_exact(2).map(|pair| f64::from(pair[0]) - f64::from(pair[1])));
        }
        Ok(Self { policy, masters, optimiser, config, pairs, offsets, micro_batch_tokens })
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
            let sums = answers(&logprobs, lines(pairs), &self.config);
            let seen = values(sums.clone().into_data());
            let columns = sums.reshape([n, 2]);
            let [chosen, rejected] = [0, 1].map(|i| columns.clone().narrow(1, i, 1).reshape([n]));
            let loss = preference_loss_tensor(&chosen, &rejected, &offsets, &self.config)
                .map_err(StepError::model)?
                * (n as f64 / batch.len() as f64);
            report.loss += loss.clone().into_data().iter::<f64>().sum::<f64>();
            for (pair, offset) in seen.chunks_exact(2).zip(&offsets) {
                let h = f64::from(pair[0]) - f64::from(pair[1]) - offset;
                report.accuracy += f64::from(u8::from(h > 0.0)) / batch.len() as f64;
                report.margin += self.config.beta * h / batch.len() as f64;
            }
            with(backward, &loss)?;
        }
        Ok(report)
    }
}

/// Each answer's log-probability, or its mean per token where the loss wants that: chosen and rejected in turn, `[2 pairs]`.
fn answers<'a>(
    logprobs: &Tensor<1>,
    lines: impl IntoIterator<Item = &'a Labelled>,
    config: &PreferenceConfig,
) -> Tensor<1> {
    let lines: Vec<&Labelled> = lines.into_iter().collect();
    let rows = logprobs.dims()[0];
    let mut weights = vec![0_f32; lines.len() * rows];
    let mut row = 0;
    for (line, weights) in lines.iter().zip(weights.chunks_exact_mut(rows)) {
        let share = if config.averages() { 1.0 / line.learnt().max(1) as f32 } else { 1.0 };
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
        let config = PreferenceConfig::dpo(0.5);
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
    fn cutting_a_batch_changes_nothing_and_the_loss_is_the_specified_one() {
        for kind in
            [PreferenceKind::Sigmoid { label_smoothing: 0.1 }, PreferenceKind::Hinge, PreferenceKind::Ipo]
        {
            let config = PreferenceConfig { kind, beta: 0.4 };
            let start = |tokens| {
                let policy = Bigram::new(4);
                let mut t =
                    PairTrainer::new(policy, pairs(), config, OptimConfig::default(), tokens).unwrap();
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
                let sums = values(answers(&logprobs, lines(&pairs), &config).into_data());
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
