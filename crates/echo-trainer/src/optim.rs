//! From gradients to the next parameters: clipping, schedule, AdamW.

pub mod adamw;
pub mod clip;
pub mod schedule;

use serde::{Deserialize, Serialize};

pub use adamw::{AdamW, Moments};
pub use schedule::Schedule;

/// Settings of the optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, per step and learning rate.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// The learning rate over the steps.
    pub schedule: Schedule,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            schedule: Schedule::default(),
        }
    }
}

/// Why optimiser settings or inputs were refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OptimError {
    /// A setting out of range.
    #[error("optimiser setting {setting} = {value} is out of range")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Its value.
        value: f64,
    },
    /// Gradients, moments and parameters of different shapes.
    #[error("{what} of parameter {name} has {got} values where the parameter has {needed}")]
    Shape {
        /// Gradient or moment.
        what: &'static str,
        /// Which parameter.
        name: String,
        /// Values that came.
        got: usize,
        /// Values that fit.
        needed: usize,
    },
    /// NaN or infinity in a gradient; the parameters are left as they were.
    #[error("the gradient of {name} is not finite; nothing was updated, lower the learning rate")]
    NotFinite {
        /// Which parameter.
        name: String,
    },
}

impl OptimConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), OptimError> {
        let checks = [
            ("learning_rate", self.learning_rate, self.learning_rate >= 0.0),
            ("beta1", self.beta1, (0.0..1.0).contains(&self.beta1)),
            ("beta2", self.beta2, (0.0..1.0).contains(&self.beta2)),
            ("epsilon", self.epsilon, self.epsilon > 0.0),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0),
            ("max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0.0),
        ];
        match checks.into_iter().find(|(_, value, fine)| !fine || !value.is_finite()) {
            Some((setting, value, _)) => Err(OptimError::Setting { setting, value }),
            None => Ok(()),
        }
    }
}
