//! Losses by name, with the choices of the trainer that the name comes from.
//!
//! `trl` constructors follow TRL 1.16's `GRPOTrainer`, `verl` ones verl 0.9's `core_algos`; golden numbers made by both
//! hold them to it. Our own short names ([`LossConfig::grpo`] and so on) are TRL's.

use serde::{Deserialize, Serialize};

use super::config::{Anchor, Correction, LogRatioLimits, LossConfig, Normaliser, RatioLevel, Surrogate};

/// TRL's `loss_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LossKind {
    /// Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300).
    Grpo,
    /// Batch-normalised: every token weighs alike.
    Bnpo,
    /// As BNPO, usually with a higher upper clip (arXiv 2503.14476).
    Dapo,
    /// Constant normaliser, no length bias (arXiv 2503.20783).
    DrGrpo,
    /// Clipped importance weight without gradient (arXiv 2506.13585); clips above only, at `epsilon_high` itself.
    Cispo,
    /// Soft gate instead of a clip (arXiv 2511.20347).
    Sapo,
}

impl LossConfig {
    /// Nothing but a surrogate and what the sum is divided by: ratios of tokens to what was sampled, no correction, no KL.
    pub(crate) fn with(surrogate: Surrogate, normaliser: Normaliser) -> Self {
        Self {
            surrogate,
            normaliser,
            count_empty: true,
            level: RatioLevel::Token,
            anchor: Anchor::Sampled,
            log_ratio: LogRatioLimits::default(),
            correction: Correction::default(),
            kl: None,
        }
    }

    /// TRL's `loss_type` with its `epsilon`, `epsilon_high` and `delta`; `max_completion_tokens` is Dr. GRPO's constant.
    pub fn trl(kind: LossKind, low: f64, high: f64, delta: Option<f64>, max_completion_tokens: u32) -> Self {
        let clip = Surrogate::Clip { low, high, dual: None, cap: delta };
        match kind {
            LossKind::Grpo => Self::with(clip, Normaliser::sequence_mean()),
            LossKind::Bnpo | LossKind::Dapo => Self::with(clip, Normaliser::TokenMean),
            LossKind::DrGrpo => {
                Self::with(clip, Normaliser::SequenceMeanTokenSumNorm { length: max_completion_tokens })
            }
            LossKind::Cispo => {
                Self::with(Surrogate::Cispo { least: None, most: high }, Normaliser::TokenMean)
            }
            LossKind::Sapo => Self::with(
                Surrogate::Sapo { temperature_positive: 1.0, temperature_negative: 1.05 },
                Normaliser::sequence_mean(),
            ),
        }
    }

    /// verl's conventions: log ratios within 20, sequences without tokens not counted, filtered tokens not counted.
    fn verl(surrogate: Surrogate, normaliser: Normaliser) -> Self {
        Self {
            count_empty: false,
            log_ratio: LogRatioLimits::both(20.0),
            correction: Correction { count_filtered: false, filter_kl: true, ..Correction::default() },
            ..Self::with(surrogate, normaliser)
        }
    }

    /// verl's `vanilla`: PPO clip with dual clip 3, token mean.
    pub fn verl_vanilla(low: f64, high: f64) -> Self {
        Self::verl(Surrogate::Clip { low, high, dual: Some(3.0), cap: None }, Normaliser::TokenMean)
    }

    /// verl's `gspo`: the sequence's ratio with each token's own gradient, log ratio at most 10.
    pub fn verl_gspo(low: f64, high: f64) -> Self {
        Self {
            level: RatioLevel::SequenceToken,
            log_ratio: LogRatioLimits { low: None, high: Some(10.0) },
            ..Self::verl(
                Surrogate::Clip { low, high, dual: None, cap: None },
                Normaliser::SequenceMeanTokenMean { epsilon: 1e-8 },
            )
        }
    }

    /// verl's `cispo`: the weight is clipped on both sides.
    pub fn verl_cispo(low: f64, high: f64) -> Self {
        let surrogate = Surrogate::Cispo { least: Some(1.0 - low), most: 1.0 + high };
        Self::verl(surrogate, Normaliser::TokenMean)
    }

    /// verl's `sapo`.
    pub fn verl_sapo(temperature_positive: f64, temperature_negative: f64) -> Self {
        Self::verl(
            Surrogate::Sapo { temperature_positive, temperature_negative },
            Normaliser::SequenceMeanTokenMean { epsilon: 1e-8 },
        )
    }

    /// verl's `dppo_tv` with its weight bound of 20.
    pub fn verl_dppo_tv(low: f64, high: f64) -> Self {
        Self::verl(Surrogate::DppoTv { low, high, most: 20.0 }, Normaliser::TokenMean)
    }

    /// verl's `dro`.
    pub fn verl_dro(beta: f64) -> Self {
        Self {
            log_ratio: LogRatioLimits::default(),
            ..Self::verl(Surrogate::Dro { beta }, Normaliser::TokenMean)
        }
    }

    /// verl's `gpg` and, with [`Correction::tis`], its bypass mode with `reinforce`.
    pub fn verl_reinforce() -> Self {
        Self::verl(Surrogate::Reinforce, Normaliser::TokenMean)
    }

    /// GRPO with a clip of 0.2.
    pub fn grpo() -> Self {
        Self::trl(LossKind::Grpo, 0.2, 0.2, None, 1)
    }

    /// Dr. GRPO, normalised by `max_completion_tokens`.
    pub fn dr_grpo(max_completion_tokens: u32) -> Self {
        Self::trl(LossKind::DrGrpo, 0.2, 0.2, None, max_completion_tokens)
    }

    /// DAPO's clip-higher: 0.2 below, 0.28 above, token mean. Its dynamic sampling is
    /// [`TrainerConfig::dynamic_sampling`](crate::config::TrainerConfig), its length penalty
    /// [`OverlongPenalty`](crate::advantage::OverlongPenalty).
    pub fn dapo() -> Self {
        Self::trl(LossKind::Dapo, 0.2, 0.28, None, 1)
    }

    /// GSPO with the paper's narrow clip, its gradient shared by the sequence.
    pub fn gspo() -> Self {
        Self { level: RatioLevel::Sequence, ..Self::trl(LossKind::Grpo, 3e-4, 4e-4, None, 1) }
    }

    /// GSPO-token.
    pub fn gspo_token() -> Self {
        Self { level: RatioLevel::SequenceToken, ..Self::gspo() }
    }

    /// CISPO, clipped above at 5 (the paper leaves the lower side open).
    pub fn cispo() -> Self {
        Self::trl(LossKind::Cispo, 0.2, 5.0, None, 1)
    }

    /// SAPO with temperatures 1.0 and 1.05.
    pub fn sapo() -> Self {
        Self::trl(LossKind::Sapo, 0.2, 0.2, None, 1)
    }

    /// PPO's clip with dual clip 3, token mean.
    pub fn ppo() -> Self {
        Self::verl_vanilla(0.2, 0.2)
    }

    /// Decoupled PPO: the clip around the proximal policy, samples of older policies weighted by TIS with a bound of 2.
    pub fn decoupled_ppo() -> Self {
        Self::verl_vanilla(0.2, 0.2).decoupled(Correction::tis(2.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_survive_a_config_file() {
        let all = [
            LossConfig::grpo(),
            LossConfig::dr_grpo(64),
            LossConfig::dapo(),
            LossConfig::gspo(),
            LossConfig::gspo_token(),
            LossConfig::cispo(),
            LossConfig::sapo(),
            LossConfig::ppo(),
            LossConfig::decoupled_ppo(),
            LossConfig::verl_gspo(3e-4, 4e-4),
            LossConfig::verl_cispo(0.2, 0.2),
            LossConfig::verl_sapo(1.0, 1.05),
            LossConfig::verl_dppo_tv(0.2, 0.2),
            LossConfig::verl_dro(0.1),
            LossConfig::verl_reinforce(),
        ];
        for config in all {
            config.validate().unwrap();
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<LossConfig>(&text).unwrap(), config);
        }
    }

    #[test]
    fn a_weight_that_counts_twice_and_wrong_ranges_are_refused() {
        let twice = LossConfig { correction: Correction::tis(2.0), ..LossConfig::grpo() };
        assert!(twice.validate().unwrap_err().to_string().contains("twice"));
        let dual = Surrogate::Clip { low: 0.2, high: 0.2, dual: Some(0.9), cap: None };
        let wrong = LossConfig { surrogate: dual, ..LossConfig::grpo() };
        assert!(wrong.validate().unwrap_err().to_string().contains("dual"));
        let band = LossConfig::grpo().decoupled(Correction::mis(3.0, 2.0));
        assert!(band.validate().unwrap_err().to_string().contains("lower"));
    }
}
