//! Policy losses over the log-probabilities of sampled tokens: what each is, and its settings.
//!
//! Two implementations share [`LossConfig`] and [`PolicyTargets`]: [`mod@reference`] is plain f64 with the derivative
//! written out, the specification and the test oracle; [`tensor`] is the one that trains, through Burn's autodiff. The
//! surprise: all ratios are against the log-probability *as sampled*; when none is given, the current one is taken
//! without its gradient, so the ratio is exactly 1 but the gradient is not zero.
//!
//! Notation: `l` current, `o` sampled, `p` reference log-probability, `r = exp(l - o)`, `A` the sequence's advantage,
//! `n_i` trainable tokens of sequence `i`, `N` sequences.
//!
//! | kind | token loss | normaliser |
//! |---|---|---|
//! | `grpo` | `-min(r A, clip(r) A)` | mean over sequences of the mean over tokens |
//! | `bnpo`, `dapo` | same | all trainable tokens of the batch |
//! | `dr_grpo` | same | `N * max_completion_tokens` |
//! | `cispo` | `-sg(min(r, clip_high)) A l` | all trainable tokens |
//! | `sapo` | `-4/t sigmoid(t (r - 1)) A`, `t` by the sign of `A` | as `grpo` |
//!
//! Level `sequence` (GSPO) replaces `r` by `exp(mean_t(l - o))`. `beta` adds `beta (exp(p - l) - (p - l) - 1)` per token.

pub mod cases;
pub mod reference;
pub mod tensor;

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The token loss and its normaliser; the table is in the [module's documentation](self).
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
    /// Clipped importance weight without gradient (MiniMax-M1, arXiv 2506.13585), as TRL reads it.
    Cispo,
    /// Soft gate instead of a clip (arXiv 2511.20347).
    Sapo,
}

/// Where the importance ratio is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RatioLevel {
    /// One ratio per token.
    #[default]
    Token,
    /// The geometric mean over a sequence's tokens (GSPO, arXiv 2507.18071).
    Sequence,
}

/// Everything that a policy loss depends on besides the batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossConfig {
    /// Token loss and normaliser.
    pub kind: LossKind,
    /// Where the ratio is taken.
    #[serde(default)]
    pub level: RatioLevel,
    /// Ratios below `1 - clip_low` are clipped.
    pub clip_low: f64,
    /// Ratios above `1 + clip_high` are clipped; `cispo` clips at `clip_high` itself.
    pub clip_high: f64,
    /// Two-sided clip: an upper bound on the unclipped ratio too.
    #[serde(default)]
    pub delta: Option<f64>,
    /// Weight of the k3 divergence from the reference policy; 0 needs no reference.
    #[serde(default)]
    pub beta: f64,
    /// `dr_grpo`'s constant length.
    #[serde(default = "default_max_completion_tokens")]
    pub max_completion_tokens: u32,
    /// `sapo`'s temperature where the advantage is positive.
    #[serde(default = "default_temperature_positive")]
    pub sapo_temperature_positive: f64,
    /// `sapo`'s temperature elsewhere.
    #[serde(default = "default_temperature_negative")]
    pub sapo_temperature_negative: f64,
}

fn default_max_completion_tokens() -> u32 {
    256
}

fn default_temperature_positive() -> f64 {
    1.0
}

fn default_temperature_negative() -> f64 {
    1.05
}

impl LossConfig {
    /// The usual clip of 0.2 on both sides, no divergence term.
    pub fn new(kind: LossKind) -> Self {
        Self {
            kind,
            level: RatioLevel::Token,
            clip_low: 0.2,
            clip_high: 0.2,
            delta: None,
            beta: 0.0,
            max_completion_tokens: default_max_completion_tokens(),
            sapo_temperature_positive: default_temperature_positive(),
            sapo_temperature_negative: default_temperature_negative(),
        }
    }

    /// GRPO with a clip of 0.2.
    pub fn grpo() -> Self {
        Self::new(LossKind::Grpo)
    }

    /// Dr. GRPO, normalised by `max_completion_tokens`.
    pub fn dr_grpo(max_completion_tokens: u32) -> Self {
        Self { max_completion_tokens, ..Self::new(LossKind::DrGrpo) }
    }

    /// DAPO's clip-higher: 0.2 below, 0.28 above.
    pub fn dapo() -> Self {
        Self { clip_high: 0.28, ..Self::new(LossKind::Dapo) }
    }

    /// GSPO with the paper's narrow clip.
    pub fn gspo() -> Self {
        Self { level: RatioLevel::Sequence, clip_low: 3e-4, clip_high: 4e-4, ..Self::new(LossKind::Grpo) }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), LossError> {
        let fault = |setting, value| Err(LossError::Setting { setting, value });
        if !(0.0..1.0).contains(&self.clip_low) {
            return fault("clip_low", self.clip_low);
        }
        if !(self.clip_high >= 0.0 && self.clip_high.is_finite()) {
            return fault("clip_high", self.clip_high);
        }
        if let Some(delta) = self.delta.filter(|d| !(*d > 0.0 && d.is_finite())) {
            return fault("delta", delta);
        }
        if !(self.beta >= 0.0 && self.beta.is_finite()) {
            return fault("beta", self.beta);
        }
        if self.max_completion_tokens == 0 {
            return fault("max_completion_tokens", 0.0);
        }
        for (setting, t) in [
            ("sapo_temperature_positive", self.sapo_temperature_positive),
            ("sapo_temperature_negative", self.sapo_temperature_negative),
        ] {
            if !(t > 0.0 && t.is_finite()) {
                return fault(setting, t);
            }
        }
        Ok(())
    }
}

/// What the loss compares the current log-probabilities with. Ragged: sequence `i` owns the rows
/// `offsets[i]..offsets[i + 1]` of every per-token list.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PolicyTargets {
    /// `N + 1` row offsets, from 0 to the number of rows.
    pub offsets: Vec<usize>,
    /// Which rows are trained on: sampled tokens, not the prompt.
    pub mask: Vec<bool>,
    /// Log-probabilities as sampled; `None` when the current ones are those.
    pub sampled: Option<Vec<f64>>,
    /// Log-probabilities under the reference policy; needed when `beta` is not zero.
    pub reference: Option<Vec<f64>>,
    /// One advantage for each sequence.
    pub advantages: Vec<f64>,
}

impl PolicyTargets {
    /// Rows of all sequences together.
    pub fn rows(&self) -> usize {
        self.mask.len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.advantages.len()
    }

    /// The rows of sequence `index`.
    pub fn range(&self, index: usize) -> Range<usize> {
        self.offsets[index]..self.offsets[index + 1]
    }

    /// Trainable tokens of sequence `index`.
    pub fn trainable(&self, index: usize) -> usize {
        self.mask[self.range(index)].iter().filter(|m| **m).count()
    }

    /// Checks that all lists fit each other and `rows` current log-probabilities.
    ///
    /// # Errors
    /// Names the first list that does not fit, or the missing reference.
    pub fn validate(&self, rows: usize, config: &LossConfig) -> Result<(), LossError> {
        let fit = |what, got, needed| {
            if got == needed { Ok(()) } else { Err(LossError::Shape { what, got, needed }) }
        };
        fit("mask", self.mask.len(), rows)?;
        fit("offsets", self.offsets.len(), self.advantages.len() + 1)?;
        let ordered = self.offsets.windows(2).all(|w| w[0] <= w[1]);
        if self.offsets.first() != Some(&0) || self.offsets.last() != Some(&rows) || !ordered {
            return Err(LossError::Offsets { rows });
        }
        if let Some(sampled) = &self.sampled {
            fit("sampled log-probabilities", sampled.len(), rows)?;
        }
        match &self.reference {
            Some(reference) => fit("reference log-probabilities", reference.len(), rows)?,
            None if config.beta > 0.0 => return Err(LossError::NoReference { beta: config.beta }),
            None => {}
        }
        config.validate()
    }

    /// Each row's sequence.
    pub fn sequence_of_rows(&self) -> Vec<usize> {
        let mut of = vec![0; self.rows()];
        for i in 0..self.sequences() {
            of[self.range(i)].fill(i);
        }
        of
    }

    /// Each row's share in the loss: 0 outside the mask, else one over the normaliser of `config`.
    pub fn row_weights(&self, config: &LossConfig) -> Vec<f64> {
        let n = self.sequences() as f64;
        let total = self.mask.iter().filter(|m| **m).count().max(1) as f64;
        let mut weights = vec![0.0; self.rows()];
        for i in 0..self.sequences() {
            let weight = match config.kind {
                LossKind::Grpo | LossKind::Sapo => 1.0 / (n * self.trainable(i).max(1) as f64),
                LossKind::Bnpo | LossKind::Dapo | LossKind::Cispo => 1.0 / total,
                LossKind::DrGrpo => 1.0 / (n * f64::from(config.max_completion_tokens)),
            };
            for row in self.range(i).filter(|row| self.mask[*row]) {
                weights[row] = weight;
            }
        }
        weights
    }
}

/// Why a loss could not be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// A setting out of range.
    #[error("loss setting {setting} = {value} is out of range")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Its value.
        value: f64,
    },
    /// A list of the wrong length.
    #[error("{what} has {got} entries where {needed} are needed")]
    Shape {
        /// Which list.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that fits.
        needed: usize,
    },
    /// Offsets that do not cover the rows in order.
    #[error("sequence offsets must rise from 0 to {rows}")]
    Offsets {
        /// The number of rows.
        rows: usize,
    },
    /// A divergence term without a reference policy.
    #[error("beta is {beta} but no reference log-probabilities are given; set beta to 0 or provide them")]
    NoReference {
        /// The weight.
        beta: f64,
    },
    /// NaN or infinity in what the model returned.
    #[error("log-probability of row {row} is {value}; the forward pass diverged, lower the learning rate")]
    NotFinite {
        /// The first such row.
        row: usize,
        /// Its value.
        value: f64,
    },
}
