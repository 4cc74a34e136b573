//! Estimators of the divergence from a reference policy, from one sampled token each (Schulman, "Approximating KL
//! divergence", 2020). With `d = l - p` (current minus reference log-probability):
//!
//! | estimator | value | own derivative by `l` |
//! |---|---|---|
//! | `k1` | `d` | 1 |
//! | `abs` | `abs(d)` | sign(d) |
//! | `k2` | `d^2 / 2` | `d` |
//! | `k3` | `exp(-d) + d - 1` | `1 - exp(-d)` |
//!
//! The surprise: as a loss, the expected gradient of `k1` and `k3` is not that of the divergence (`k1`'s is zero);
//! `k2`'s is. [`KlGradient::K2`] therefore reports one estimator and follows another (verl's `+` variants).

use serde::{Deserialize, Serialize};

/// Which estimator; the table is in the [module's documentation](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KlEstimator {
    /// The plain log ratio; unbiased, can be negative.
    K1,
    /// Its absolute value.
    Abs,
    /// Half its square.
    K2,
    /// Unbiased and never negative; what GRPO uses.
    #[default]
    K3,
}

/// Whose gradient is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KlGradient {
    /// The estimator's own.
    #[default]
    Own,
    /// That of `k2`, whatever value is reported.
    K2,
}

/// A divergence term of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlTerm {
    /// Its weight, beta.
    pub weight: f64,
    /// Which estimator.
    #[serde(default)]
    pub estimator: KlEstimator,
    /// Whose gradient.
    #[serde(default)]
    pub gradient: KlGradient,
    /// `k3` only: `d` is clamped to plus and minus this before the exponential. verl: 20; TRL: none.
    #[serde(default)]
    pub log_limit: Option<f64>,
    /// `k3` only: the value is clamped to this. verl: 10; TRL: none.
    #[serde(default)]
    pub value_limit: Option<f64>,
}

impl KlTerm {
    /// `k3` with its own gradient and no limits, as TRL has it.
    pub fn trl(weight: f64) -> Self {
        Self {
            weight,
            estimator: KlEstimator::K3,
            gradient: KlGradient::Own,
            log_limit: None,
            value_limit: None,
        }
    }

    /// `estimator` with verl's limits: `d` within 20, the value within 10.
    pub fn verl(weight: f64, estimator: KlEstimator, gradient: KlGradient) -> Self {
        Self { weight, estimator, gradient, log_limit: Some(20.0), value_limit: Some(10.0) }
    }

    /// Value and derivative by the current log-probability `l`, without the weight; `p` is the reference's.
    pub fn evaluate(&self, l: f64, p: f64) -> (f64, f64) {
        let d = l - p;
        let (value, own) = match self.estimator {
            KlEstimator::K1 => (d, 1.0),
            KlEstimator::Abs => (d.abs(), if d == 0.0 { 0.0 } else { d.signum() }),
            KlEstimator::K2 => (0.5 * d * d, d),
            KlEstimator::K3 => {
                let limit = self.log_limit.unwrap_or(f64::INFINITY);
                let e = (-d).clamp(-limit, limit);
                let value = e.exp() - e - 1.0;
                let top = self.value_limit.unwrap_or(f64::INFINITY);
                let moves = d.abs() <= limit && value <= top;
                (value.min(top), if moves { 1.0 - e.exp() } else { 0.0 })
            }
        };
        match self.gradient {
            KlGradient::Own => (value, own),
            KlGradient::K2 => (value, d),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimators_agree_to_second_order_and_k3_is_never_negative() {
        for estimator in [KlEstimator::K2, KlEstimator::K3] {
            let term = KlTerm { estimator, ..KlTerm::trl(1.0) };
            for d in [-3.0, -0.5, -0.01, 0.0, 0.01, 0.5, 3.0] {
                let (value, _) = term.evaluate(d - 1.0, -1.0);
                assert!(value >= 0.0);
                if d.abs() < 0.1 {
                    assert!((value - 0.5 * d * d).abs() < 1e-6);
                }
            }
        }
        let plus = KlTerm { estimator: KlEstimator::K1, gradient: KlGradient::K2, ..KlTerm::trl(1.0) };
        assert_eq!(plus.evaluate(-0.5, -1.0), (0.5, 0.5));
    }

    #[test]
    fn verl_limits_bound_value_and_gradient() {
        let term = KlTerm::verl(1.0, KlEstimator::K3, KlGradient::Own);
        assert_eq!(term.evaluate(-30.0, -1.0), (10.0, 0.0));
    }
}
