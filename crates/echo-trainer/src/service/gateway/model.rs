//! One model in training: gradients are summed over requests until a step uses them.

use burn::tensor::{Tensor, TensorData};

use super::datum::{Batch, Sequence};
use crate::checkpoint::{CheckpointError, decode_state, encode_state};
use crate::error::StepError;
use crate::loss::reference::policy_loss;
use crate::optim::adamw::UpdateReport;
use crate::optim::{AdamW, OptimConfig, OptimError};
use crate::packing::{joined, micro_batches};
use crate::parameters::{Gradients, Parameters};
use crate::policy::{Policy, read_parameters, values};
use crate::step::accumulate;

/// A policy, its masters, its optimiser, and the gradients of the step that comes.
#[derive(Debug)]
pub(super) struct Trained<P> {
    policy: P,
    masters: Parameters,
    optimiser: AdamW,
    gradients: Option<Gradients>,
    /// Tokens of one forward and backward pass.
    micro_batch_tokens: usize,
}

/// What a pass over a batch gave.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Passed {
    /// Log-probability of each target, by sequence.
    pub(super) logprobs: Vec<Vec<f32>>,
    /// The loss, summed over tokens.
    pub(super) loss: f64,
    /// Tokens that have a part in it.
    pub(super) trained_tokens: usize,
}

/// Why a request to a model failed. The model is as before, but a step that failed has used up the gradients.
#[derive(Debug, thiserror::Error)]
pub(super) enum ModelError {
    #[error("no gradients are there: send a forward_backward before optim_step")]
    NoGradients,
    #[error(transparent)]
    Optim(#[from] OptimError),
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    State(#[from] CheckpointError),
}

impl ModelError {
    /// Whether the request was at fault.
    pub(super) fn is_users(&self) -> bool {
        matches!(
            self,
            Self::NoGradients | Self::Optim(_) | Self::Step(StepError::Optim(_) | StepError::Loss(_))
        )
    }
}

impl<P: Policy> Trained<P> {
    pub(super) fn new(policy: P, micro_batch_tokens: usize) -> Result<Self, ModelError> {
        let masters = read_parameters(&policy);
        let optimiser = AdamW::new(OptimConfig::default(), &masters)?;
        Ok(Self { policy, masters, optimiser, gradients: None, micro_batch_tokens })
    }

    pub(super) fn policy(&self) -> &P {
        &self.policy
    }

    /// Log-probabilities and loss of `batch`; its gradients are added to those that wait, unless it is forward only.
    pub(super) fn pass(&mut self, batch: &Batch) -> Result<Passed, ModelError> {
        let mut out = Passed { logprobs: Vec::new(), loss: 0.0, trained_tokens: 0 };
        let mut gradients = None;
        for part in micro_batches(&batch.sequences, |s| s.tokens.len(), self.micro_batch_tokens) {
            let (tokens, ends) = joined(part.iter().map(|s| &s.tokens[..])).map_err(StepError::from)?;
            let (logprobs, backward) = self.policy.pass(&tokens, &ends)?;
            let seen = values(logprobs.clone().into_data());
            let targets = Sequence::targets(part);
            out.logprobs.extend(part.iter().enumerate().map(|(i, s)| {
                let mut rows = seen[targets.range(i)].to_vec();
                s.unscored.iter().for_each(|row| rows[*row] = f32::NAN);
                rows
            }));
            let wide: Vec<f64> = seen.into_iter().map(f64::from).collect();
            let loss = policy_loss(&wide, &targets, &batch.loss).map_err(StepError::from)?;
            out.loss += loss.loss;
            let trained = targets.mask.iter().filter(|m| **m).count();
            out.trained_tokens += trained;
            if !batch.forward_only && trained > 0 {
                // A loss is as good as the sum of its rows times their derivatives, which are known by hand.
                let slopes: Vec<f32> = loss.gradient.iter().map(|g| *g as f32).collect();
                let rows = slopes.len();
                let slopes = Tensor::<1>::from_data(TensorData::new(slopes, [rows]), &logprobs.device());
                accumulate(&mut gradients, backward(&(logprobs * slopes).sum())?);
            }
        }
        if !batch.forward_only {
            let gradients = gradients.unwrap_or_else(|| Gradients::zeros(&self.masters));
            accumulate(&mut self.gradients, gradients);
        }
        Ok(out)
    }

    /// Moves the weights by the gradients that wait, and forgets those.
    pub(super) fn step(&mut self, config: OptimConfig) -> Result<UpdateReport, ModelError> {
        self.optimiser.set_config(config)?;
        let mut gradients = self.gradients.take().ok_or(ModelError::NoGradients)?;
        let report = self.optimiser.update(&mut self.masters, &mut gradients)?;
        self.policy.assign(&self.masters)?;
        Ok(report)
    }

    /// Optimiser updates so far.
    pub(super) fn steps(&self) -> u64 {
        self.optimiser.steps()
    }

    /// Weights and moments.
    pub(super) fn state(&self) -> Result<Vec<u8>, ModelError> {
        Ok(encode_state(&self.masters, self.optimiser.moments())?)
    }

    /// Goes on from `state`, which was saved after so many steps; without its moments when `steps` is `None`. Gradients
    /// that wait are of other weights, so they go.
    pub(super) fn restore(&mut self, state: &[u8], steps: Option<u64>) -> Result<(), ModelError> {
        let names: Vec<String> = self.masters.iter().map(|p| p.name.clone()).collect();
        let (masters, moments) = decode_state(&names, state)?;
        let config = OptimConfig::default();
        let optimiser = match steps {
            Some(steps) => AdamW::resume(config, &masters, steps, moments)?,
            None => AdamW::new(config, &masters)?,
        };
        self.policy.assign(&masters)?;
        (self.masters, self.optimiser, self.gradients) = (masters, optimiser, None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::datum::tests::{LIMITS, datum, request};
    use super::*;
    use crate::step::tests::Bigram;

    fn batch(forward_only: bool, from: usize) -> Batch {
        let data = [[1, 2, 3, 4], [3, 2, 1, 0]].map(|t| datum("cross_entropy", &t, &[0.0, 1.0, 0.5], &[]));
        let mut message = request("cross_entropy", data[from..].to_vec());
        message.forward_only = forward_only;
        Batch::read(&message, &LIMITS).unwrap()
    }

    fn model(micro_batch_tokens: usize) -> Trained<Bigram> {
        Trained::new(Bigram::new(8), micro_batch_tokens).unwrap()
    }

    fn rate(learning_rate: f64) -> OptimConfig {
        OptimConfig { learning_rate, max_grad_norm: 0.0, ..OptimConfig::default() }
    }

    #[test]
    fn gradients_are_summed_over_requests_and_used_once() {
        let (mut whole, mut parts) = (model(100), model(4));
        let passed = whole.pass(&batch(false, 0)).unwrap();
        assert_eq!((passed.trained_tokens, passed.logprobs[1].len()), (4, 3));
        let by_hand: f64 = passed.logprobs.iter().map(|l| -f64::from(l[1]) - 0.5 * f64::from(l[2])).sum();
        assert!((passed.loss - by_hand).abs() < 1e-6, "{} {by_hand}", passed.loss);
        assert_eq!(parts.pass(&batch(true, 0)).unwrap().logprobs, passed.logprobs, "cut into micro-batches");
        let mut first = batch(false, 0);
        first.sequences.truncate(1);
        let sum = parts.pass(&first).unwrap().loss + parts.pass(&batch(false, 1)).unwrap().loss;
        assert!((sum - passed.loss).abs() < 1e-6);
        let norms = [&mut whole, &mut parts].map(|m| m.step(rate(0.1)).unwrap().grad_norm);
        assert!((norms[0] - norms[1]).abs() < 1e-6, "{norms:?}");
        assert!(matches!(parts.step(rate(0.1)), Err(ModelError::NoGradients)));
        assert!(whole.pass(&batch(true, 0)).unwrap().loss < passed.loss);
        assert!(matches!(whole.step(rate(0.1)), Err(ModelError::NoGradients)), "a forward pass leaves none");
    }

    #[test]
    fn the_log_probability_of_a_target_that_does_not_follow_is_not_given() {
        let mut batch = batch(false, 0);
        let mut model = model(100);
        let scored = model.pass(&batch).unwrap();
        batch.sequences[1].unscored = vec![0];
        let passed = model.pass(&batch).unwrap();
        assert!(passed.logprobs[1][0].is_nan());
        assert_eq!(
            (&passed.logprobs[0], passed.logprobs[1][1]),
            (&scored.logprobs[0], scored.logprobs[1][1])
        );
        assert_eq!(passed.loss, scored.loss);
    }

    #[test]
    fn a_rate_of_zero_moves_no_weight_and_a_wrong_one_uses_nothing_up() {
        let mut model = model(100);
        model.pass(&batch(false, 0)).unwrap();
        assert!(matches!(model.step(rate(-1.0)), Err(ModelError::Optim(_))));
        let before = model.masters.clone();
        model.step(rate(0.0)).unwrap();
        assert_eq!((&model.masters, model.steps()), (&before, 1));
    }

    #[test]
    fn a_restored_model_goes_on_bit_for_bit() {
        let mut model = model(100);
        let go_on = |m: &mut Trained<Bigram>| {
            m.pass(&batch(false, 0)).unwrap();
            m.step(rate(0.1)).unwrap();
            m.masters.clone()
        };
        go_on(&mut model);
        let (state, steps) = (model.state().unwrap(), model.steps());
        let weights = model.masters.clone();
        let expected = go_on(&mut model);
        let mut other = self::model(100);
        other.pass(&batch(false, 0)).unwrap();
        other.restore(&state, Some(steps)).unwrap();
        assert_eq!(go_on(&mut other), expected);
        other.restore(&state, None).unwrap();
        assert_eq!((&other.masters, other.steps()), (&weights, 0));
        assert_ne!(go_on(&mut other), expected, "without moments the step is another");
        assert!(other.restore(&state[..9], None).is_err());
    }
}
