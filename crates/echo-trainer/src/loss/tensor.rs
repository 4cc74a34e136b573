//! Policy losses on Burn tensors: differentiable, and the version that trains.
//!
//! Everything but the current log-probabilities is constant, so only elementwise operations and, for sequence-level
//! ratios, one segment sum are recorded. The f64 version in [`super::reference`] says what the result must be.

use burn::tensor::{Bool, Device, IndexingUpdateOp, Int, Tensor, TensorData};

use super::config::{LossConfig, RatioLevel, Surrogate};
use super::kl::{KlEstimator, KlGradient, KlTerm};
use super::plan::RowPlan;
use super::{LossError, PolicyTargets};

/// The policy loss of `logprobs` `[rows]` as a scalar tensor `[1]` on the same device and, if they carry one, on the same
/// gradient tape.
///
/// # Errors
/// When lists do not fit each other or a setting is out of range.
pub fn policy_loss(
    logprobs: &Tensor<1>,
    targets: &PolicyTargets,
    config: &LossConfig,
) -> Result<Tensor<1>, LossError> {
    let current: Vec<f64> = logprobs.clone().into_data().iter::<f64>().collect();
    planned_loss(logprobs, targets, config, &RowPlan::new(&current, targets, config)?)
}

/// The same with row weights from `plan`, which may be a part of a larger batch's.
///
/// # Errors
/// As [`policy_loss`].
pub fn planned_loss(
    logprobs: &Tensor<1>,
    targets: &PolicyTargets,
    config: &LossConfig,
    plan: &RowPlan,
) -> Result<Tensor<1>, LossError> {
    targets.validate(logprobs.dims()[0], config)?;
    let rows = Rows { targets, of: targets.sequence_of_rows(), device: logprobs.device() };
    // Rows of weight 0 may hold anything; a product with zero would let NaN through, so they are replaced, in the log
    // ratio already, where an infinite slope would meet a gradient of zero.
    let dead = rows.mask(plan.policy.iter().map(|w| *w == 0.0));
    let anchor = match targets.anchor(config) {
        Some(anchor) => rows.constant(anchor.iter().copied()),
        None => logprobs.clone().detach(),
    };
    let log_ratio = rows.log_ratio(logprobs, anchor.clone(), config).mask_fill(dead.clone(), 0.0);
    let token = token_loss(&log_ratio, logprobs, anchor, &rows, config.surrogate);
    let mut loss = (token.mask_fill(dead, 0.0) * rows.constant(plan.policy.iter().copied())).sum();
    if let (Some(kl), Some(reference)) = (config.divergence(), &targets.reference) {
        let dead = rows.mask(plan.divergence.iter().map(|w| *w == 0.0));
        let d = (logprobs.clone() - rows.constant(reference.iter().copied())).mask_fill(dead, 0.0);
        let weights = plan.divergence.iter().map(|w| w * kl.weight);
        loss = loss + (divergence(d, kl) * rows.constant(weights)).sum();
    }
    Ok(loss)
}

/// The batch, and how its lists become tensors.
struct Rows<'a> {
    targets: &'a PolicyTargets,
    of: Vec<usize>,
    device: Device,
}

impl Rows<'_> {
    fn constant(&self, values: impl Iterator<Item = f64>) -> Tensor<1> {
        let values: Vec<f32> = values.map(|v| v as f32).collect();
        let n = values.len();
        Tensor::from_data(TensorData::new(values, [n]), &self.device)
    }

    fn mask(&self, values: impl Iterator<Item = bool>) -> Tensor<1, Bool> {
        let values: Vec<bool> = values.collect();
        let n = values.len();
        Tensor::from_data(TensorData::new(values, [n]), &self.device)
    }

    /// One number for each row, made from its advantage.
    fn by_advantage(&self, number: impl Fn(f64) -> f64) -> Tensor<1> {
        self.constant(self.targets.advantages.iter().map(|a| number(*a)))
    }

    /// The log ratio at the configured level, within its limits.
    fn log_ratio(&self, logprobs: &Tensor<1>, anchor: Tensor<1>, config: &LossConfig) -> Tensor<1> {
        let own = logprobs.clone() - anchor;
        let ratio = match config.level {
            RatioLevel::Token => own,
            RatioLevel::Sequence => self.sequence_mean(own),
            RatioLevel::SequenceToken => {
                self.sequence_mean(own).detach() + logprobs.clone() - logprobs.clone().detach()
            }
        };
        let ratio = match config.log_ratio.low {
            Some(low) => ratio.clamp_min(low),
            None => ratio,
        };
        match config.log_ratio.high {
            Some(high) => ratio.clamp_max(high),
            None => ratio,
        }
    }

    /// Replaces each row by the mean over the trainable rows of its sequence.
    fn sequence_mean(&self, log_ratio: Tensor<1>) -> Tensor<1> {
        let (rows, t) = (self.of.len(), self.targets);
        let counts: Vec<usize> = (0..t.sequences()).map(|i| t.trainable(i).max(1)).collect();
        let share = (0..rows).map(|r| if t.mask[r] { 1.0 / counts[self.of[r]] as f64 } else { 0.0 });
        let shares = log_ratio.mask_fill(self.mask(t.mask.iter().map(|m| !m)), 0.0) * self.constant(share);
        let index: Vec<i64> = self.of.iter().map(|i| *i as i64).collect();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [rows]), &self.device);
        Tensor::<1>::zeros([t.sequences()], &self.device)
            .select_assign(0, index.clone(), shares, IndexingUpdateOp::Add)
            .select(0, index)
    }
}

fn token_loss(
    log_ratio: &Tensor<1>,
    logprobs: &Tensor<1>,
    anchor: Tensor<1>,
    rows: &Rows<'_>,
    surrogate: Surrogate,
) -> Tensor<1> {
    let advantages = rows.by_advantage(|a| a);
    let ratio = || log_ratio.clone().exp();
    match surrogate {
        Surrogate::Clip { low, high, dual, cap } => {
            let ratio = ratio();
            let clipped = ratio.clone().clamp(1.0 - low, 1.0 + high);
            let bounded = match cap {
                Some(cap) => ratio.clamp_max(cap),
                None => ratio,
            };
            let (free, clipped) = (bounded * advantages.clone(), clipped * advantages);
            // min(free, clipped) by choice, so that at a tie (every on-policy token) the whole gradient flows once.
            let choose_clipped = clipped.clone().lower(free.clone());
            let least = free.mask_where(choose_clipped, clipped);
            match dual {
                Some(dual) => {
                    let floor = rows.by_advantage(|a| if a < 0.0 { dual * a } else { f64::from(f32::MIN) });
                    let below = least.clone().lower(floor.clone());
                    least.mask_where(below, floor).neg()
                }
                None => least.neg(),
            }
        }
        Surrogate::Cispo { least, most } => {
            let weight = ratio().clamp(least.unwrap_or(0.0), most).detach();
            (weight * advantages * logprobs.clone()).neg()
        }
        Surrogate::Sapo { temperature_positive, temperature_negative } => {
            let t = rows.by_advantage(|a| if a > 0.0 { temperature_positive } else { temperature_negative });
            let gate = burn::tensor::activation::sigmoid((ratio() - 1.0) * t.clone());
            (gate * t.recip() * 4.0 * advantages).neg()
        }
        Surrogate::Dro { beta } => {
            log_ratio.clone() * log_ratio.clone() * (0.5 * beta) - logprobs.clone() * advantages
        }
        Surrogate::DppoTv { low, high, most } => {
            // A probability moves by less than 2, so that stands for no bound.
            let highest = rows.by_advantage(|a| if a > 0.0 { high } else { 2.0 });
            let lowest = rows.by_advantage(|a| if a > 0.0 { -2.0 } else { -low });
            let moved = logprobs.clone().detach().exp() - anchor.exp();
            let invalid = moved.clone().greater(highest).bool_or(moved.lower(lowest));
            let weight = ratio().clamp_max(most).detach().mask_fill(invalid, 0.0);
            (weight * advantages * logprobs.clone()).neg()
        }
        Surrogate::Ratio => (ratio() * advantages).neg(),
        Surrogate::Reinforce => (advantages * logprobs.clone()).neg(),
    }
}

/// The divergence's rows from `d = l - p`.
fn divergence(d: Tensor<1>, kl: KlTerm) -> Tensor<1> {
    let half_square = d.clone() * d.clone() * 0.5;
    let value = match kl.estimator {
        KlEstimator::K1 => d,
        KlEstimator::Abs => d.abs(),
        KlEstimator::K2 => half_square.clone(),
        KlEstimator::K3 => {
            let e = match kl.log_limit {
                Some(limit) => d.neg().clamp(-limit, limit),
                None => d.neg(),
            };
            let value = e.clone().exp() - e - 1.0;
            match kl.value_limit {
                Some(limit) => value.clamp_max(limit),
                None => value,
            }
        }
    };
    match kl.gradient {
        KlGradient::Own => value,
        KlGradient::K2 => half_square.clone() - half_square.detach() + value.detach(),
    }
}
