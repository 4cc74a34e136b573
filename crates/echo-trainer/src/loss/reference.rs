//! Policy losses in f64 with the derivative by hand: the specification that the tensor version is tested against.

use super::config::{LossConfig, RatioLevel, Surrogate};
use super::plan::{CorrectionFigures, RowPlan};
use super::{LossError, PolicyTargets};

/// A loss, its derivative, and what it says about the batch.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivative by each row's current log-probability; 0 outside the mask.
    pub gradient: Vec<f64>,
    /// Share of trainable tokens whose policy gradient a clip stopped although `A` is not 0.
    pub clip_fraction: f64,
    /// Mean of `exp(q - l) - (q - l) - 1` over trainable tokens: how far the policy moved since sampling.
    pub sampled_kl: f64,
    /// Largest `|exp(l - q) - 1|` over trainable tokens; 0 when the sampler and the trainer agree bit for bit.
    pub ratio_deviation_max: f64,
    /// What corrections did.
    pub correction: CorrectionFigures,
}

/// The policy loss of `logprobs` (one per row) against `targets`.
///
/// # Errors
/// When lists do not fit each other, a setting is out of range, or a trainable log-probability is not finite.
pub fn policy_loss(
    logprobs: &[f64],
    targets: &PolicyTargets,
    config: &LossConfig,
) -> Result<PolicyLoss, LossError> {
    check(logprobs, targets, config)?;
    planned_loss(logprobs, targets, config, &RowPlan::new(logprobs, targets, config)?)
}

/// The same with row weights from `plan`, which may be a part of a larger batch's.
///
/// # Errors
/// As [`policy_loss`].
pub fn planned_loss(
    logprobs: &[f64],
    targets: &PolicyTargets,
    config: &LossConfig,
    plan: &RowPlan,
) -> Result<PolicyLoss, LossError> {
    check(logprobs, targets, config)?;
    let sampled = targets.sampled.as_deref().unwrap_or(logprobs);
    let anchor = targets.anchor(config).unwrap_or(logprobs);
    let mut out = PolicyLoss {
        loss: 0.0,
        gradient: vec![0.0; logprobs.len()],
        clip_fraction: 0.0,
        sampled_kl: 0.0,
        ratio_deviation_max: 0.0,
        correction: plan.figures,
    };
    let (low, high) = (config.log_ratio.low(), config.log_ratio.high());
    let mut clipped = 0_usize;
    for i in 0..targets.sequences() {
        let rows: Vec<usize> = targets.range(i).filter(|r| targets.mask[*r]).collect();
        let n = rows.len().max(1) as f64;
        let mean_log_ratio = rows.iter().map(|&r| logprobs[r] - anchor[r]).sum::<f64>() / n;
        // Sum over the sequence of weight * d token_loss / d log ratio: what a shared ratio spreads over its tokens.
        let mut shared = 0.0;
        for &r in &rows {
            let log_ratio = match config.level {
                RatioLevel::Token => logprobs[r] - anchor[r],
                RatioLevel::Sequence | RatioLevel::SequenceToken => mean_log_ratio,
            };
            let moves = log_ratio >= low && log_ratio <= high;
            let token =
                token_loss(log_ratio.clamp(low, high), logprobs[r], anchor[r], targets.advantages[r], config);
            // A row of weight 0 was left out; whatever its loss is, even infinite, it is not part of the sum.
            if plan.policy[r] != 0.0 {
                out.loss += plan.policy[r] * token.value;
                out.gradient[r] += plan.policy[r] * token.by_logprob;
                let by_log_ratio = if moves { plan.policy[r] * token.by_log_ratio } else { 0.0 };
                match config.level {
                    RatioLevel::Token | RatioLevel::SequenceToken => out.gradient[r] += by_log_ratio,
                    RatioLevel::Sequence => shared += by_log_ratio,
                }
            }
            if let (Some(kl), Some(reference)) = (config.divergence(), &targets.reference)
                && plan.divergence[r] != 0.0
            {
                let (value, slope) = kl.evaluate(logprobs[r], reference[r]);
                out.loss += plan.divergence[r] * kl.weight * value;
                out.gradient[r] += plan.divergence[r] * kl.weight * slope;
            }
            clipped += usize::from(token.clipped);
            let moved = logprobs[r] - sampled[r];
            out.sampled_kl += (-moved).exp() + moved - 1.0;
            out.ratio_deviation_max = out.ratio_deviation_max.max((moved.exp() - 1.0).abs());
        }
        if config.level == RatioLevel::Sequence {
            for &r in &rows {
                out.gradient[r] += shared / n;
            }
        }
    }
    let total = targets.mask.iter().filter(|m| **m).count().max(1) as f64;
    out.clip_fraction = clipped as f64 / total;
    out.sampled_kl /= total;
    Ok(out)
}

fn check(logprobs: &[f64], targets: &PolicyTargets, config: &LossConfig) -> Result<(), LossError> {
    targets.validate(logprobs.len(), config)?;
    match (0..logprobs.len()).find(|r| targets.mask[*r] && !logprobs[*r].is_finite()) {
        Some(row) => Err(LossError::NotFinite { row, value: logprobs[row] }),
        None => Ok(()),
    }
}

struct TokenLoss {
    value: f64,
    by_log_ratio: f64,
    by_logprob: f64,
    clipped: bool,
}

impl TokenLoss {
    /// `-weight A l`, the weight without gradient.
    fn weighted(weight: f64, advantage: f64, logprob: f64, clipped: bool) -> Self {
        let by_logprob = -weight * advantage;
        Self { value: by_logprob * logprob, by_log_ratio: 0.0, by_logprob, clipped }
    }
}

fn token_loss(log_ratio: f64, logprob: f64, anchor: f64, advantage: f64, config: &LossConfig) -> TokenLoss {
    let ratio = log_ratio.exp();
    match config.surrogate {
        Surrogate::Clip { low, high, dual, cap } => {
            let bounded = cap.map_or(ratio, |cap| ratio.min(cap));
            let inside = ratio.clamp(1.0 - low, 1.0 + high);
            let (free, clip) = (bounded * advantage, inside * advantage);
            // Whichever product is the smaller one carries the gradient; it has one where its own clamp is inactive.
            let mut moves = if free <= clip { bounded >= ratio } else { inside.to_bits() == ratio.to_bits() };
            let mut value = -free.min(clip);
            if let Some(dual) = dual.filter(|dual| advantage < 0.0 && value > -dual * advantage) {
                (value, moves) = (-dual * advantage, false);
            }
            TokenLoss {
                value,
                by_log_ratio: if moves { -ratio * advantage } else { 0.0 },
                by_logprob: 0.0,
                clipped: !moves && advantage != 0.0,
            }
        }
        Surrogate::Cispo { least, most } => {
            let weight = ratio.clamp(least.unwrap_or(0.0), most);
            TokenLoss::weighted(weight, advantage, logprob, weight.to_bits() != ratio.to_bits())
        }
        Surrogate::Sapo { temperature_positive, temperature_negative } => {
            let t = if advantage > 0.0 { temperature_positive } else { temperature_negative };
            let gate = 1.0 / (1.0 + (-t * (ratio - 1.0)).exp());
            TokenLoss {
                value: -gate * 4.0 / t * advantage,
                by_log_ratio: -4.0 * gate * (1.0 - gate) * advantage * ratio,
                by_logprob: 0.0,
                clipped: false,
            }
        }
        Surrogate::Dro { beta } => TokenLoss {
            value: -(logprob * advantage - 0.5 * beta * log_ratio * log_ratio),
            by_log_ratio: beta * log_ratio,
            by_logprob: -advantage,
            clipped: false,
        },
        Surrogate::DppoTv { low, high, most } => {
            let moved = logprob.exp() - anchor.exp();
            let valid = if advantage > 0.0 { moved <= high } else { moved >= -low };
            let weight = if valid { ratio.min(most) } else { 0.0 };
            TokenLoss::weighted(weight, advantage, logprob, !valid && advantage != 0.0)
        }
        Surrogate::Ratio => TokenLoss {
            value: -ratio * advantage,
            by_log_ratio: -ratio * advantage,
            by_logprob: 0.0,
            clipped: false,
        },
        Surrogate::Reinforce => TokenLoss::weighted(1.0, advantage, logprob, false),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::config::{Correction, Normaliser};
    use super::super::kl::{KlEstimator, KlTerm};
    use super::*;

    fn targets(lengths: &[usize], old: Vec<f64>, reference: Vec<f64>, advantages: &[f64]) -> PolicyTargets {
        let mut offsets = vec![0];
        for n in lengths {
            offsets.push(offsets[offsets.len() - 1] + n);
        }
        let rows = offsets[offsets.len() - 1];
        // Every fourth row is a prompt row.
        let mask = (0..rows).map(|r| r % 4 != 3).collect();
        let proximal = Some(old.iter().zip(&reference).map(|(o, p)| 0.7 * o + 0.3 * p).collect());
        let advantages = PolicyTargets::spread(&offsets, advantages);
        PolicyTargets { offsets, mask, sampled: Some(old), proximal, reference: Some(reference), advantages }
    }

    /// Losses whose value is differentiable, that is without a weight that autodiff must not see.
    fn configs() -> Vec<LossConfig> {
        let sum = Normaliser::SequenceMeanTokenSumNorm { length: 9 };
        let kl = |estimator| KlTerm { estimator, ..KlTerm::trl(0.07) };
        let mut all = Vec::new();
        for base in [
            LossConfig::grpo(),
            LossConfig::dapo(),
            LossConfig::dr_grpo(9),
            LossConfig::sapo(),
            LossConfig { surrogate: Surrogate::Ratio, ..LossConfig::grpo() },
        ] {
            for level in [RatioLevel::Token, RatioLevel::Sequence] {
                all.push(LossConfig { level, ..base }.with_kl(kl(KlEstimator::K3)));
            }
        }
        let capped = Surrogate::Clip { low: 0.2, high: 0.2, dual: None, cap: Some(1.3) };
        all.push(LossConfig { surrogate: capped, ..LossConfig::grpo() });
        all.push(LossConfig { normaliser: sum, ..LossConfig::ppo() }.with_kl(kl(KlEstimator::K2)));
        all.push(LossConfig { normaliser: Normaliser::TokenSum, ..LossConfig::verl_dro(0.3) });
        all.push(LossConfig { normaliser: Normaliser::SequenceMeanTokenSum, ..LossConfig::verl_reinforce() });
        all.push(LossConfig::decoupled_ppo().with_kl(kl(KlEstimator::Abs)));
        all.push(LossConfig::ppo().decoupled(Correction::mis(0.5, 1.5)).with_kl(kl(KlEstimator::K1)));
        all
    }

    proptest! {
        #[test]
        fn the_derivative_is_that_of_finite_differences(
            values in proptest::collection::vec((-3.0..-0.1f64, -0.6..0.6f64, -0.6..0.6f64), 11),
            advantages in proptest::collection::vec(-2.0..2.0f64, 3),
        ) {
            let l: Vec<f64> = values.iter().map(|v| v.0).collect();
            let o = values.iter().map(|v| v.0 + v.1).collect();
            let p = values.iter().map(|v| v.0 + v.2).collect();
            let t = targets(&[5, 2, 4], o, p, &advantages);
            let h = 1e-6;
            for config in configs() {
                let at = policy_loss(&l, &t, &config).unwrap();
                for row in 0..l.len() {
                    let shifted = |by: f64| {
                        let mut x = l.clone();
                        x[row] += by;
                        policy_loss(&x, &t, &config).unwrap().loss
                    };
                    let (up, down) = ((shifted(h) - at.loss) / h, (at.loss - shifted(-h)) / h);
                    // At a clip's corner the two sides differ, and either is right.
                    let tolerance = 1e-5 + (up - down).abs();
                    prop_assert!((at.gradient[row] - up).abs() < tolerance, "{config:?} row {row}");
                }
            }
        }
    }

    #[test]
    fn on_policy_ratios_are_one_and_the_gradient_is_the_advantage() {
        let t = PolicyTargets {
            offsets: vec![0, 2],
            mask: vec![true, true],
            sampled: None,
            proximal: None,
            reference: None,
            advantages: vec![1.5; 2],
        };
        let loss = policy_loss(&[-0.5, -2.0], &t, &LossConfig::grpo()).unwrap();
        assert_eq!((loss.loss, loss.gradient), (-1.5, vec![-0.75, -0.75]));
        assert_eq!((loss.clip_fraction, loss.ratio_deviation_max), (0.0, 0.0));
    }

    #[test]
    fn lists_that_do_not_fit_and_missing_references_are_refused() {
        let t = targets(&[2], vec![-1.0; 2], vec![-1.0; 2], &[1.0]);
        assert!(matches!(
            policy_loss(&[-1.0; 3], &t, &LossConfig::grpo()),
            Err(LossError::Shape { what: "mask", got: 2, needed: 3 })
        ));
        let t = PolicyTargets { reference: None, ..t };
        let kl = LossConfig::grpo().with_kl(KlTerm::trl(0.1));
        assert_eq!(policy_loss(&[-1.0; 2], &t, &kl), Err(LossError::NoReference { weight: 0.1 }));
        assert!(matches!(
            policy_loss(&[-1.0, f64::NAN], &t, &LossConfig::grpo()),
            Err(LossError::NotFinite { row: 1, .. })
        ));
    }
}
