//! Policy losses over the log-probabilities of sampled tokens, put together from parts.
//!
//! A loss is `sum over rows of w_r rho_r token_loss_r + beta v_r kl_r`: [`config::Surrogate`] is the token loss,
//! [`config::RatioLevel`] and [`config::Anchor`] say what its ratio is, [`config::Normaliser`] gives `w`,
//! [`config::Correction`] gives `rho` and leaves tokens out, [`kl`] is the divergence. [`presets`] have the names that
//! papers and other trainers use; `settings` reads either from a file.
//!
//! Two implementations share [`LossConfig`], [`PolicyTargets`] and the row weights of [`plan`]: [`mod@reference`] is plain
//! f64 with the derivative written out, the specification and the test oracle; [`tensor`] is the one that trains, through
//! Burn's autodiff. The surprise: all ratios are against given log-probabilities; when none are given, the current ones
//! are taken without their gradient, so the ratio is exactly 1 but the gradient is not zero.
//!
//! | name | token loss | normaliser |
//! |---|---|---|
//! | `grpo` | `-min(r A, clip(r) A)` | mean over sequences of the mean over tokens |
//! | `bnpo`, `dapo`, `ppo` (dual clip) | same | all trainable tokens of the batch |
//! | `dr_grpo` | same | sequences times a constant length |
//! | `gspo`, `gspo_token` | same, `r = exp(mean_t(l - o))` | as `grpo` |
//! | `cispo` | `-sg(clip(r)) A l` | all trainable tokens |
//! | `sapo` | `-4/t sigmoid(t (r - 1)) A`, `t` by the sign of `A` | as `grpo` |
//! | `decoupled_ppo` | as `ppo` around the proximal policy, times `sg(min(rho, C))` | all trainable tokens |

pub mod cases;
pub mod config;
mod error;
pub mod kl;
pub mod plan;
pub mod presets;
pub mod reference;
mod settings;
pub mod tensor;

use std::ops::Range;

pub use config::LossConfig;
pub use error::LossError;
pub use presets::LossKind;

/// What the loss compares the current log-probabilities with. Ragged: sequence `i` owns the rows
/// `offsets[i]..offsets[i + 1]` of every per-token list.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PolicyTargets {
    /// `N + 1` row offsets, from 0 to the number of rows.
    pub offsets: Vec<usize>,
    /// Which rows are trained on: sampled tokens, not the prompt nor what a tool said.
    pub mask: Vec<bool>,
    /// Log-probabilities as sampled; `None` when the current ones are those.
    pub sampled: Option<Vec<f64>>,
    /// Log-probabilities under the proximal policy, for [`config::Anchor::Proximal`]; `None` when the current ones are
    /// those.
    pub proximal: Option<Vec<f64>>,
    /// Log-probabilities under the reference policy; needed by a divergence term.
    pub reference: Option<Vec<f64>>,
    /// One advantage for each row; rows outside of the mask may hold anything.
    pub advantages: Vec<f64>,
}

impl PolicyTargets {
    /// Rows of all sequences together.
    pub fn rows(&self) -> usize {
        self.mask.len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// The rows of sequence `index`.
    pub fn range(&self, index: usize) -> Range<usize> {
        self.offsets[index]..self.offsets[index + 1]
    }

    /// Trainable tokens of sequence `index`.
    pub fn trainable(&self, index: usize) -> usize {
        self.mask[self.range(index)].iter().filter(|m| **m).count()
    }

    /// Each sequence's advantage, repeated for all of its rows.
    pub fn spread(offsets: &[usize], advantages: &[f64]) -> Vec<f64> {
        let lengths = offsets.windows(2).map(|w| w[1] - w[0]);
        lengths.zip(advantages).flat_map(|(n, a)| std::iter::repeat_n(*a, n)).collect()
    }

    /// What the ratio of `config` is against; `None` when that is the current policy.
    pub fn anchor(&self, config: &LossConfig) -> Option<&[f64]> {
        match config.anchor {
            config::Anchor::Sampled => self.sampled.as_deref(),
            config::Anchor::Proximal => self.proximal.as_deref(),
        }
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
        fit("advantages", self.advantages.len(), rows)?;
        let ordered = self.offsets.windows(2).all(|w| w[0] <= w[1]);
        if self.offsets.first() != Some(&0) || self.offsets.last() != Some(&rows) || !ordered {
            return Err(LossError::Offsets { rows });
        }
        for (what, list) in [
            ("sampled log-probabilities", &self.sampled),
            ("proximal log-probabilities", &self.proximal),
            ("reference log-probabilities", &self.reference),
        ] {
            list.as_ref().map_or(Ok(()), |list| fit(what, list.len(), rows))?;
        }
        if let (Some(kl), None) = (config.divergence(), &self.reference) {
            return Err(LossError::NoReference { weight: kl.weight });
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
}
