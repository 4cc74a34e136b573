//! The parts of a policy loss as settings: surrogate, ratio, normaliser, correction, divergence.
//!
//! Every choice on which public trainers differ is a field here with its source; [`super::presets`] fills them in as
//! TRL or verl do, `loss/settings.rs` reads them from files.

use serde::{Deserialize, Serialize};

use super::LossError;
use super::kl::KlTerm;
use super::settings::LossSettings;

/// The token loss, before weights. `r` is the importance ratio, `A` the advantage, `l` the current log-probability, `sg`
/// a value without gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Surrogate {
    /// `-min(r A, clip(r, 1 - low, 1 + high) A)` (PPO, arXiv 1707.06347; clip-higher is DAPO's, arXiv 2503.14476).
    Clip {
        /// Ratios below `1 - low` are clipped.
        low: f64,
        /// Ratios above `1 + high` are clipped.
        high: f64,
        /// Dual clip (arXiv 1912.09729): where `A < 0` the loss is at most `-dual A`. verl: 3.
        #[serde(default)]
        dual: Option<f64>,
        /// Two-sided clip (INTELLECT-2, arXiv 2505.07291): `r` in the unclipped product is at most this. TRL: `delta`.
        #[serde(default)]
        cap: Option<f64>,
    },
    /// `-sg(clip(r)) A l` (CISPO, MiniMax-M1, arXiv 2506.13585). Nothing is left without a gradient.
    Cispo {
        /// Smallest weight; `None` clips above only, as TRL does. verl: `1 - clip_ratio_low`.
        #[serde(default)]
        least: Option<f64>,
        /// Largest weight. TRL: `epsilon_high` itself; verl: `1 + clip_ratio_high`.
        most: f64,
    },
    /// `-4/t sigmoid(t (r - 1)) A`: a soft gate instead of a clip (SAPO, arXiv 2511.20347).
    Sapo {
        /// `t` where `A > 0`.
        temperature_positive: f64,
        /// `t` elsewhere.
        temperature_negative: f64,
    },
    /// `-(l A - beta/2 (l - o)^2)` (direct reward optimisation, arXiv 2405.19107).
    Dro {
        /// Weight of the square.
        beta: f64,
    },
    /// `-sg(min(r, most)) A l` where the token's probability moved by at most `low`/`high` against the advantage's sign,
    /// else 0 (DPPO with total variation, arXiv 2602.04879).
    DppoTv {
        /// Bound on the fall of the probability where `A <= 0`.
        low: f64,
        /// Bound on the rise where `A > 0`.
        high: f64,
        /// Largest weight. verl: 20.
        most: f64,
    },
    /// `-r A`, no clip: plain importance sampling.
    Ratio,
    /// `-A l` (REINFORCE); with an importance weight from the correction, truncated off-policy REINFORCE.
    Reinforce,
}

/// Where the importance ratio is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RatioLevel {
    /// One ratio per token.
    #[default]
    Token,
    /// The geometric mean over a sequence's tokens (GSPO, arXiv 2507.18071); its gradient reaches all of them.
    Sequence,
    /// GSPO-token: the value is the sequence's, the gradient each token's own.
    SequenceToken,
}

/// What the summed token losses are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Normaliser {
    /// Mean over sequences of the mean over their tokens (GRPO).
    SequenceMeanTokenMean {
        /// Added to each sequence's token count. verl: 1e-8; TRL: 0.
        #[serde(default)]
        epsilon: f64,
    },
    /// All trainable tokens of the batch (DAPO, BNPO).
    TokenMean,
    /// Nothing.
    TokenSum,
    /// Mean over sequences of the sum over their tokens.
    SequenceMeanTokenSum,
    /// The same, over a constant length too: no length bias (Dr. GRPO, arXiv 2503.20783).
    SequenceMeanTokenSumNorm {
        /// The constant, usually the longest completion.
        length: u32,
    },
}

impl Normaliser {
    /// GRPO's, without epsilon.
    pub fn sequence_mean() -> Self {
        Self::SequenceMeanTokenMean { epsilon: 0.0 }
    }
}

/// What the ratio's denominator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Anchor {
    /// The policy as sampled ("bypass": two policies).
    #[default]
    Sampled,
    /// The proximal policy, recomputed when the step began (decoupled PPO, arXiv 2110.00641: three policies). Where the
    /// batch brings none, the current values are it, which is exact for one update per batch.
    Proximal,
}

/// How far a log ratio may go before the exponential; outside there is no gradient.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogRatioLimits {
    /// Smallest. verl: -20 (none for GSPO); TRL: none.
    pub low: Option<f64>,
    /// Largest. verl: 20 (10 for GSPO); TRL: none.
    pub high: Option<f64>,
}

impl LogRatioLimits {
    /// Plus and minus `limit`.
    pub fn both(limit: f64) -> Self {
        Self { low: Some(-limit), high: Some(limit) }
    }

    pub(super) fn low(&self) -> f64 {
        self.low.unwrap_or(f64::NEG_INFINITY)
    }

    pub(super) fn high(&self) -> f64 {
        self.high.unwrap_or(f64::INFINITY)
    }
}

/// Over what an importance weight is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WeightLevel {
    /// Each token's own ratio: biased, little variance.
    #[default]
    Token,
    /// The product over the sequence: unbiased, much variance.
    Sequence,
}

/// What happens to an importance weight outside of its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outside {
    /// It becomes the bound (truncated importance sampling, TIS).
    #[default]
    Truncate,
    /// It becomes 0: the token teaches nothing (masked importance sampling, MIS; IcePop).
    Zero,
}

/// The weight `rho = exp(o - q)` between the anchor and the policy as sampled; never differentiated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportanceWeight {
    /// Over what.
    #[serde(default)]
    pub level: WeightLevel,
    /// Lower bound, if any.
    #[serde(default)]
    pub lower: Option<f64>,
    /// Upper bound. Usual: 2.
    pub upper: f64,
    /// What happens outside.
    #[serde(default)]
    pub outside: Outside,
    /// Whether the weights are divided by their mean over the batch.
    #[serde(default)]
    pub batch_normalise: bool,
}

/// Bounds on a ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Band {
    /// Smallest that is kept.
    pub low: f64,
    /// Largest that is kept.
    pub high: f64,
}

/// Bounds on divergences between anchor and sampling policy, with `x = o - q`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Bounds {
    /// On `exp(x)`, where sums and means are taken of `x`. verl's `k1` bounds the inverse ratio.
    pub ratio: Option<Band>,
    /// Largest `x^2 / 2`.
    pub k2: Option<f64>,
    /// Largest `exp(x) - x - 1`.
    pub k3: Option<f64>,
}

/// Which tokens and sequences are left out because the policies differ too much there. All bounds must hold.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filters {
    /// On each token; only that token is left out.
    pub token: Bounds,
    /// On a sequence's sum; the whole sequence is left out, as with the following ones.
    pub sequence_sum: Bounds,
    /// On its mean; `ratio` is the geometric mean.
    pub sequence_mean: Bounds,
    /// On its worst token.
    pub sequence_worst: Bounds,
}

/// What is done about samples of another policy than the anchor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Correction {
    /// The weight on the token loss; `None`: 1.
    pub weight: Option<ImportanceWeight>,
    /// What is left out.
    pub filters: Filters,
    /// Whether tokens that filters leave out still count in the normaliser (TRL, AReaL: yes; verl: no).
    pub count_filtered: bool,
    /// Whether filters leave tokens out of the divergence term too (verl: yes; TRL: no).
    pub filter_kl: bool,
    /// `o - q` is clamped to plus and minus this. verl: 20.
    pub log_limit: f64,
}

impl Default for Correction {
    fn default() -> Self {
        Self {
            weight: None,
            filters: Filters::default(),
            count_filtered: true,
            filter_kl: false,
            log_limit: 20.0,
        }
    }
}

impl Correction {
    /// Truncated importance sampling per token.
    pub fn tis(upper: f64) -> Self {
        let weight = ImportanceWeight {
            level: WeightLevel::Token,
            lower: None,
            upper,
            outside: Outside::Truncate,
            batch_normalise: false,
        };
        Self { weight: Some(weight), ..Self::default() }
    }

    /// Masked importance sampling per token: 0 outside of `lower..=upper` (IcePop).
    pub fn mis(lower: f64, upper: f64) -> Self {
        let mut this = Self::tis(upper);
        if let Some(weight) = &mut this.weight {
            (weight.lower, weight.outside) = (Some(lower), Outside::Zero);
        }
        this
    }

    /// Whether anything is corrected at all.
    pub fn is_none(&self) -> bool {
        self.weight.is_none() && self.filters == Filters::default()
    }
}

/// Everything that a policy loss depends on besides the batch. A file may begin with `preset = "dapo"` and change parts of it,
/// see [`LossConfig::preset`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "LossSettings")]
pub struct LossConfig {
    /// The token loss.
    pub surrogate: Surrogate,
    /// What the sum is divided by.
    pub normaliser: Normaliser,
    /// Whether sequences without a trainable token count where sequences are counted (TRL: yes; verl: no).
    pub count_empty: bool,
    /// Where the ratio is taken.
    pub level: RatioLevel,
    /// What the ratio is against.
    pub anchor: Anchor,
    /// Bounds on the log ratio.
    pub log_ratio: LogRatioLimits,
    /// What is done about samples of other policies.
    pub correction: Correction,
    /// The divergence term; `None` needs no reference policy.
    pub kl: Option<KlTerm>,
}

impl LossConfig {
    /// The divergence term, unless its weight is 0.
    pub fn divergence(&self) -> Option<KlTerm> {
        self.kl.filter(|term| term.weight > 0.0)
    }

    /// The same with the divergence term `kl`.
    #[must_use]
    pub fn with_kl(self, kl: KlTerm) -> Self {
        Self { kl: Some(kl), ..self }
    }

    /// The same with the correction `correction` against the proximal policy.
    #[must_use]
    pub fn decoupled(self, correction: Correction) -> Self {
        Self { anchor: Anchor::Proximal, correction, ..self }
    }

    /// Checks ranges and contradictions.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), LossError> {
        let check = |setting, value: f64, fine: bool| {
            if fine && value.is_finite() { Ok(()) } else { Err(LossError::Setting { setting, value }) }
        };
        let positive = |setting, value: f64| check(setting, value, value > 0.0);
        match self.surrogate {
            Surrogate::Clip { low, high, dual, cap } => {
                check("clip low", low, (0.0..1.0).contains(&low))?;
                check("clip high", high, high >= 0.0)?;
                dual.map_or(Ok(()), |c| check("dual", c, c > 1.0))?;
                cap.map_or(Ok(()), |c| positive("cap", c))?;
            }
            Surrogate::Cispo { least, most } => {
                positive("most", most)?;
                least.map_or(Ok(()), |l| check("least", l, (0.0..=most).contains(&l)))?;
            }
            Surrogate::Sapo { temperature_positive, temperature_negative } => {
                positive("temperature_positive", temperature_positive)?;
                positive("temperature_negative", temperature_negative)?;
            }
            Surrogate::Dro { beta } => positive("beta", beta)?,
            Surrogate::DppoTv { low, high, most } => {
                check("low", low, low >= 0.0)?;
                check("high", high, high >= 0.0)?;
                positive("most", most)?;
            }
            Surrogate::Ratio | Surrogate::Reinforce => {}
        }
        match self.normaliser {
            Normaliser::SequenceMeanTokenMean { epsilon } => check("epsilon", epsilon, epsilon >= 0.0)?,
            Normaliser::SequenceMeanTokenSumNorm { length } => positive("length", f64::from(length))?,
            _ => {}
        }
        self.log_ratio.low.map_or(Ok(()), |v| check("log_ratio low", v, v < 0.0))?;
        self.log_ratio.high.map_or(Ok(()), |v| positive("log_ratio high", v))?;
        if let Some(kl) = self.kl {
            check("kl weight", kl.weight, kl.weight >= 0.0)?;
            kl.log_limit.map_or(Ok(()), |v| positive("kl log_limit", v))?;
            kl.value_limit.map_or(Ok(()), |v| positive("kl value_limit", v))?;
        }
        self.validate_correction()
    }

    fn validate_correction(&self) -> Result<(), LossError> {
        let fault = |setting, value| Err(LossError::Setting { setting, value });
        let c = &self.correction;
        if !(c.log_limit > 0.0 && c.log_limit.is_finite()) {
            return fault("correction log_limit", c.log_limit);
        }
        if let Some(weight) = c.weight {
            let lower = weight.lower.unwrap_or(0.0);
            if !(weight.upper > 0.0 && weight.upper.is_finite()) {
                return fault("correction upper", weight.upper);
            }
            if !(0.0..=weight.upper).contains(&lower) {
                return fault("correction lower", lower);
            }
            if self.anchor == Anchor::Sampled && self.surrogate != Surrogate::Reinforce {
                return Err(LossError::Conflict {
                    reason: "an importance weight on a ratio that is already against the sampling policy counts it \
                             twice; set anchor = \"proximal\" or surrogate kind = \"reinforce\"",
                });
            }
        }
        for bounds in
            [c.filters.token, c.filters.sequence_sum, c.filters.sequence_mean, c.filters.sequence_worst]
        {
            if let Some(band) = bounds.ratio
                && !(band.low >= 0.0 && band.low < band.high && band.high.is_finite())
            {
                return fault("filter ratio", band.low);
            }
            for (setting, bound) in [("filter k2", bounds.k2), ("filter k3", bounds.k3)] {
                if let Some(value) = bound.filter(|b| !(*b > 0.0 && b.is_finite())) {
                    return fault(setting, value);
                }
            }
        }
        Ok(())
    }
}
