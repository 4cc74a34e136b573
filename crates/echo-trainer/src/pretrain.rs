//! Learning from labelled text with all weights: how the tiny model is made, and supervised fine-tuning.

use crate::error::StepError;
use crate::optim::{AdamW, OptimConfig};
use crate::parameters::Parameters;
use crate::policy::{Policy, read_parameters};
use crate::step::{Labelled, cross_entropy, cross_entropy_gradients};

/// A run over labelled text. Which text is the caller's choice, step by step.
#[derive(Debug)]
pub struct TextTrainer<P> {
    policy: P,
    masters: Parameters,
    optimiser: AdamW,
    micro_batch_tokens: usize,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TextReport {
    /// Mean cross entropy before the update, in nats per learnt token.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
}

impl<P: Policy> TextTrainer<P> {
    /// Starts from the policy's present values. A batch is cut into parts of at most `micro_batch_tokens`, which bounds
    /// memory.
    ///
    /// # Errors
    /// When an optimiser setting is out of range.
    pub fn new(policy: P, optim: OptimConfig, micro_batch_tokens: usize) -> Result<Self, StepError> {
        let masters = read_parameters(&policy);
        let optimiser = AdamW::new(optim, &masters)?;
        Ok(Self { policy, masters, optimiser, micro_batch_tokens })
    }

    /// One update on `batch`.
    ///
    /// # Errors
    /// When the model refuses the batch or a gradient is not finite; nothing has changed then.
    pub fn step(&mut self, batch: &[Labelled]) -> Result<TextReport, StepError> {
        let (mut gradients, loss) = cross_entropy_gradients(&self.policy, batch, self.micro_batch_tokens)?;
        let update = self.optimiser.update(&mut self.masters, &mut gradients)?;
        self.policy.assign(&self.masters)?;
        Ok(TextReport { loss, grad_norm: update.grad_norm, learning_rate: update.learning_rate })
    }

    /// Mean cross entropy on `batch`, without learning.
    ///
    /// # Errors
    /// When the model refuses the batch.
    pub fn loss(&self, batch: &[Labelled]) -> Result<f64, StepError> {
        cross_entropy(&self.policy, batch, self.micro_batch_tokens)
    }

    /// Updates so far.
    pub fn steps(&self) -> u64 {
        self.optimiser.steps()
    }

    /// The policy as it is now.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// Ends the run.
    pub fn into_policy(self) -> P {
        self.policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::tests::Bigram;

    #[test]
    fn a_repeated_line_is_learnt() {
        let optim = OptimConfig { learning_rate: 0.1, ..OptimConfig::default() };
        let mut trainer = TextTrainer::new(Bigram::new(5), optim, 8).unwrap();
        let line = Labelled { tokens: vec![0, 3, 1, 4], learn: vec![false, true, true, true] };
        let before = trainer.loss(std::slice::from_ref(&line)).unwrap();
        for _ in 0..60 {
            trainer.step(std::slice::from_ref(&line)).unwrap();
        }
        let after = trainer.loss(std::slice::from_ref(&line)).unwrap();
        assert!(before > 1.0 && after < 0.1, "{before} {after}");
        assert_eq!(trainer.steps(), 60);
    }
}
