//! What is taken off rewards before credit is given: overlong answers, and a divergence counted as a cost.

use serde::{Deserialize, Serialize};

use super::AdvantageError;
use crate::loss::kl::KlTerm;

/// DAPO's soft punishment of answers that come close to the length limit (arXiv 2503.14476, equation 13): nothing up to
/// `max_tokens - buffer_tokens`, then falling linearly to `-factor` at `max_tokens` and beyond.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OverlongPenalty {
    /// The longest answer that is wanted.
    pub max_tokens: u32,
    /// Over how many tokens the penalty grows.
    pub buffer_tokens: u32,
    /// The full penalty. DAPO: 1.
    pub factor: f64,
}

impl OverlongPenalty {
    /// What is added to the reward of an answer with `tokens` of the policy's own: 0 or negative.
    pub fn of(&self, tokens: usize) -> f64 {
        let free = f64::from(self.max_tokens) - f64::from(self.buffer_tokens);
        let over = (tokens as f64 - free).max(0.0) / f64::from(self.buffer_tokens);
        if over == 0.0 { 0.0 } else { -self.factor * over.min(1.0) }
    }
}

/// How rewards are changed before credit is given.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardShaping {
    /// Takes from answers that are too long.
    pub overlong: Option<OverlongPenalty>,
    /// Takes the divergence from the policy that the run began with, token by token, as it was at sampling (verl's
    /// `use_kl_in_reward`; usual estimator: `k1`).
    pub kl: Option<KlTerm>,
}

impl RewardShaping {
    /// The divergence, unless its weight is 0.
    pub fn divergence(&self) -> Option<KlTerm> {
        self.kl.filter(|term| term.weight > 0.0)
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), AdvantageError> {
        let fault = |setting, value| Err(AdvantageError::Setting { setting, value });
        if let Some(o) = self.overlong {
            if o.buffer_tokens == 0 || o.buffer_tokens > o.max_tokens {
                return fault("overlong buffer_tokens", f64::from(o.buffer_tokens));
            }
            if !(o.factor >= 0.0 && o.factor.is_finite()) {
                return fault("overlong factor", o.factor);
            }
        }
        match self.kl {
            Some(kl) if !(kl.weight >= 0.0 && kl.weight.is_finite()) => fault("reward kl weight", kl.weight),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_penalty_grows_over_the_buffer_and_stays() {
        let penalty = OverlongPenalty { max_tokens: 100, buffer_tokens: 20, factor: 0.5 };
        assert_eq!([0, 80, 90, 100, 130].map(|n| penalty.of(n)), [0.0, 0.0, -0.25, -0.5, -0.5]);
        let none = OverlongPenalty { buffer_tokens: 0, ..penalty };
        assert!(RewardShaping { overlong: Some(none), kl: None }.validate().is_err());
    }
}
