//! Policy losses in f64 with the derivative by hand: the specification that the tensor version is tested against.

use super::{LossConfig, LossError, LossKind, PolicyTargets, RatioLevel};

/// A loss, its derivative, and what it says about the batch.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyLoss {
    /// The loss.
    pub loss: f64,
    /// Its derivative by each row's current log-probability; 0 outside the mask.
    pub gradient: Vec<f64>,
    /// Share of trainable tokens whose ratio was clipped, that is whose policy gradient is zero although `A` is not.
    pub clip_fraction: f64,
    /// Mean of `exp(o - l) - (o - l) - 1` over trainable tokens: how far the policy moved since sampling.
    pub sampled_kl: f64,
    /// Largest `|exp(l - o) - 1|` over trainable tokens; 0 when the sampler and the trainer agree bit for bit.
    pub ratio_deviation_max: f64,
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
    targets.validate(logprobs.len(), config)?;
    if let Some(row) = (0..logprobs.len()).find(|r| targets.mask[*r] && !logprobs[*r].is_finite()) {
        return Err(LossError::NotFinite { row, value: logprobs[row] });
    }
    let sampled = targets.sampled.as_deref().unwrap_or(logprobs);
    let weights = targets.row_weights(config);
    let mut out = PolicyLoss {
        loss: 0.0,
        gradient: vec![0.0; logprobs.len()],
        clip_fraction: 0.0,
        sampled_kl: 0.0,
        ratio_deviation_max: 0.0,
    };
    let mut clipped = 0_usize;
    for i in 0..targets.sequences() {
        let rows: Vec<usize> = targets.range(i).filter(|r| targets.mask[*r]).collect();
        let n = rows.len().max(1) as f64;
        let advantage = targets.advantages[i];
        let mean_log_ratio = rows.iter().map(|&r| logprobs[r] - sampled[r]).sum::<f64>() / n;
        // Sum over the sequence of weight * d token_loss / d log ratio: what a shared ratio spreads over its tokens.
        let mut shared = 0.0;
        for &r in &rows {
            let own_log_ratio = logprobs[r] - sampled[r];
            let log_ratio = match config.level {
                RatioLevel::Token => own_log_ratio,
                RatioLevel::Sequence => mean_log_ratio,
            };
            let token = token_loss(log_ratio.exp(), logprobs[r], advantage, config);
            out.loss += weights[r] * token.value;
            out.gradient[r] += weights[r] * token.by_logprob;
            match config.level {
                RatioLevel::Token => out.gradient[r] += weights[r] * token.by_log_ratio,
                RatioLevel::Sequence => shared += weights[r] * token.by_log_ratio,
            }
            if let (true, Some(reference)) = (config.beta > 0.0, &targets.reference) {
                let d = reference[r] - logprobs[r];
                out.loss += weights[r] * config.beta * (d.exp() - d - 1.0);
                out.gradient[r] += weights[r] * config.beta * (1.0 - d.exp());
            }
            clipped += usize::from(token.clipped);
            out.sampled_kl += (-own_log_ratio).exp() + own_log_ratio - 1.0;
            out.ratio_deviation_max = out.ratio_deviation_max.max((own_log_ratio.exp() - 1.0).abs());
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

struct TokenLoss {
    value: f64,
    by_log_ratio: f64,
    by_logprob: f64,
    clipped: bool,
}

fn token_loss(ratio: f64, logprob: f64, advantage: f64, config: &LossConfig) -> TokenLoss {
    match config.kind {
        LossKind::Grpo | LossKind::Bnpo | LossKind::Dapo | LossKind::DrGrpo => {
            let bounded = config.delta.map_or(ratio, |delta| ratio.min(delta));
            let inside = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high);
            let (free, clip) = (bounded * advantage, inside * advantage);
            // Whichever product is the smaller one carries the gradient; it has one where its own clamp is inactive.
            let moves = if free <= clip { bounded >= ratio } else { inside.to_bits() == ratio.to_bits() };
            TokenLoss {
                value: -free.min(clip),
                by_log_ratio: if moves { -ratio * advantage } else { 0.0 },
                by_logprob: 0.0,
                clipped: !moves && advantage != 0.0,
            }
        }
        LossKind::Cispo => {
            let weight = ratio.min(config.clip_high);
            TokenLoss {
                value: -weight * advantage * logprob,
                by_log_ratio: 0.0,
                by_logprob: -weight * advantage,
                clipped: ratio > config.clip_high,
            }
        }
        LossKind::Sapo => {
            let t = if advantage > 0.0 {
                config.sapo_temperature_positive
            } else {
                config.sapo_temperature_negative
            };
            let gate = 1.0 / (1.0 + (-t * (ratio - 1.0)).exp());
            TokenLoss {
                value: -gate * 4.0 / t * advantage,
                by_log_ratio: -4.0 * gate * (1.0 - gate) * advantage * ratio,
                by_logprob: 0.0,
                clipped: false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn targets(lengths: &[usize], old: Vec<f64>, reference: Vec<f64>, advantages: Vec<f64>) -> PolicyTargets {
        let mut offsets = vec![0];
        for n in lengths {
            offsets.push(offsets[offsets.len() - 1] + n);
        }
        let rows = offsets[offsets.len() - 1];
        // Every fourth row is a prompt row.
        let mask = (0..rows).map(|r| r % 4 != 3).collect();
        PolicyTargets { offsets, mask, sampled: Some(old), reference: Some(reference), advantages }
    }

    fn configs() -> Vec<LossConfig> {
        let base = LossConfig { beta: 0.07, max_completion_tokens: 9, ..LossConfig::grpo() };
        let mut all = Vec::new();
        for kind in [LossKind::Grpo, LossKind::Bnpo, LossKind::Dapo, LossKind::DrGrpo, LossKind::Sapo] {
            for level in [RatioLevel::Token, RatioLevel::Sequence] {
                all.push(LossConfig { kind, level, ..base });
                all.push(LossConfig { kind, level, delta: Some(1.3), ..base });
            }
        }
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
            let t = targets(&[5, 2, 4], o, p, advantages);
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
            reference: None,
            advantages: vec![1.5],
        };
        let loss = policy_loss(&[-0.5, -2.0], &t, &LossConfig::grpo()).unwrap();
        assert_eq!((loss.loss, loss.gradient), (-1.5, vec![-0.75, -0.75]));
        assert_eq!((loss.clip_fraction, loss.ratio_deviation_max), (0.0, 0.0));
    }

    #[test]
    fn lists_that_do_not_fit_and_missing_references_are_refused() {
        let t = targets(&[2], vec![-1.0; 2], vec![-1.0; 2], vec![1.0]);
        assert!(matches!(
            policy_loss(&[-1.0; 3], &t, &LossConfig::grpo()),
            Err(LossError::Shape { what: "mask", got: 2, needed: 3 })
        ));
        let t = PolicyTargets { reference: None, ..t };
        let kl = LossConfig { beta: 0.1, ..LossConfig::grpo() };
        assert_eq!(policy_loss(&[-1.0; 2], &t, &kl), Err(LossError::NoReference { beta: 0.1 }));
        assert!(matches!(
            policy_loss(&[-1.0, f64::NAN], &t, &LossConfig::grpo()),
            Err(LossError::NotFinite { row: 1, .. })
        ));
    }
}
