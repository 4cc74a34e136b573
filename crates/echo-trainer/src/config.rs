//! Settings of a training run, of fine-tuning and of pre-training, with the defaults that the demo uses.

use parallax_model::BaseDtype;
use serde::{Deserialize, Serialize};

use crate::advantage::{AdvantageConfig, RewardShaping};
use crate::data::TeacherConfig;
use crate::dataset::BrokenLines;
use crate::loss::LossConfig;
use crate::loss::kl::KlTerm;
use crate::optim::{OptimConfig, Schedule};
use crate::preference::{PreferenceConfig, PreferenceError, RewardModelConfig};

/// One reinforcement-learning run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainerConfig {
    /// Groups of one step.
    pub groups_per_step: usize,
    /// Samples of one group; the dispatcher must use the same number.
    pub group_size: usize,
    /// Steps of the run; the schedule and the demo use it.
    pub steps: u64,
    /// Most tokens sampled for one answer.
    pub max_completion_tokens: u32,
    /// Versions that a rollout may lag behind; 0 is sequential mode.
    pub max_staleness: u64,
    /// Most tokens of one micro-batch; bounds memory.
    pub micro_batch_tokens: usize,
    /// Copies of the model that compute a step's gradients at the same time, each a share of the batch. They share the frozen
    /// weights of an adapter's model, and the threads of the kernels. For how many trainers the batch is cut (replicas and a run's
    /// assistants together) changes the last bits of a step; which of them compute it does not.
    pub replicas: usize,
    /// Keep only the layers' inputs for the backward pass and compute the rest again: less memory, 1.4 times the time.
    pub activation_checkpointing: bool,
    /// Most groups that wait for a step.
    pub max_pending_groups: usize,
    /// Train all weights instead of an adapter: 20 bytes a weight for masters, moments, gradients and the policy itself, and every
    /// update is a whole model, sent as a patch where that is smaller.
    pub full: bool,
    /// Inner width of the adapter.
    pub lora_rank: usize,
    /// Numerator of the adapter's scale.
    pub lora_alpha: f32,
    /// Which projections it is put on, for example `q_proj`; empty: all linear ones.
    pub lora_targets: Vec<String>,
    /// Format of the frozen weights under the adapter, at the learner, its assistants, workers and auditors: with the same one
    /// everywhere a fresh rollout's importance ratio is exactly 1. Adapter, gradients and optimiser are f32 with each.
    pub base_dtype: BaseDtype,
    /// Credit.
    pub advantage: AdvantageConfig,
    /// What is taken off rewards before credit is given.
    pub shaping: RewardShaping,
    /// DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): groups whose rewards are all equal are given up, and others made
    /// instead.
    pub dynamic_sampling: bool,
    /// Most groups of one step that dynamic sampling gives up; then the step is made with what there is.
    pub max_flat_groups: u64,
    /// The loss.
    pub loss: LossConfig,
    /// The optimiser.
    pub optim: OptimConfig,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        let optim = OptimConfig {
            learning_rate: 2e-3,
            schedule: Schedule { warmup_steps: 2, ..Schedule::default() },
            ..OptimConfig::default()
        };
        Self {
            groups_per_step: 32,
            group_size: 8,
            steps: 50,
            max_completion_tokens: 8,
            max_staleness: 0,
            micro_batch_tokens: 8192,
            replicas: 1,
            activation_checkpointing: false,
            max_pending_groups: 256,
            full: false,
            lora_rank: 8,
            lora_alpha: 16.0,
            lora_targets: Vec::new(),
            base_dtype: BaseDtype::F32,
            advantage: AdvantageConfig::grpo(),
            shaping: RewardShaping::default(),
            dynamic_sampling: false,
            max_flat_groups: 256,
            loss: LossConfig::grpo(),
            optim,
        }
    }
}

/// A setting of a run that is out of range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A number that must be at least one.
    #[error("{setting} must be at least {least}, not {value}")]
    TooSmall {
        /// Its name.
        setting: &'static str,
        /// Its lower bound.
        least: usize,
        /// Its value.
        value: usize,
    },
    /// A format of frozen weights where none are frozen.
    #[error(
        "base_dtype = \"{base_dtype}\" is the format of frozen weights, and full = true freezes none: set full to false, or \
         base_dtype to \"f32\""
    )]
    NothingFrozen {
        /// The format.
        base_dtype: BaseDtype,
    },
    /// The loss.
    #[error(transparent)]
    Loss(#[from] crate::loss::LossError),
    /// Credit or reward shaping.
    #[error(transparent)]
    Advantage(#[from] crate::advantage::AdvantageError),
    /// The preference loss.
    #[error(transparent)]
    Preference(#[from] PreferenceError),
    /// The optimiser.
    #[error(transparent)]
    Optim(#[from] crate::optim::OptimError),
}

/// What is wrong with the format of frozen weights.
fn not_frozen(full: bool, base_dtype: BaseDtype) -> Option<ConfigError> {
    (full && base_dtype != BaseDtype::F32).then_some(ConfigError::NothingFrozen { base_dtype })
}

impl TrainerConfig {
    /// The divergence from the policy of version 0 that is a cost of rewards or part of the loss.
    pub fn divergence(&self) -> Option<KlTerm> {
        self.shaping.divergence().or_else(|| self.loss.divergence())
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.faults().into_iter().next().map_or(Ok(()), Err)
    }

    /// Everything that is out of range.
    pub fn faults(&self) -> Vec<ConfigError> {
        let mut faults = Vec::new();
        for (setting, least, value) in [
            ("groups_per_step", 1, self.groups_per_step),
            ("group_size", 1, self.group_size),
            ("max_completion_tokens", 1, self.max_completion_tokens as usize),
            ("micro_batch_tokens", 2, self.micro_batch_tokens),
            ("replicas", 1, self.replicas),
            ("max_pending_groups", self.groups_per_step, self.max_pending_groups),
            ("lora_rank", 1, self.lora_rank),
        ] {
            if value < least {
                faults.push(ConfigError::TooSmall { setting, least, value });
            }
        }
        faults.extend(not_frozen(self.full, self.base_dtype));
        faults.extend(self.advantage.validate().err().map(ConfigError::from));
        faults.extend(self.shaping.validate().err().map(ConfigError::from));
        faults.extend(self.loss.validate().err().map(ConfigError::from));
        faults.extend(self.optim.validate().err().map(ConfigError::from));
        faults
    }
}

/// How the tiny model is made: shape, data, optimiser. `examples/configs/pretrain-tiny.toml` is one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainConfig {
    /// Seeds weights and data.
    pub seed: u64,
    /// Updates.
    pub steps: u64,
    /// Chat lines of one update.
    pub batch: u64,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward block.
    pub ffn: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads of 32.
    pub heads: usize,
    /// Key-value heads of 32.
    pub kv_heads: usize,
    /// Longest sequence.
    pub max_context: usize,
    /// What is learnt: questions with one answer such as `arithmetic` or `countdown-sums`, or a game such as `kuhn` or
    /// `holdem:station`, in which the teacher is a beginner that plays by its cards.
    pub environment: String,
    /// Largest number in the questions of `arithmetic` and `countdown-sums`; `None`: the environment's own. What is held out by
    /// the environment is held out of a wider range, too.
    pub max_operand: Option<u32>,
    /// The teacher.
    pub teacher: TeacherConfig,
    /// The optimiser.
    pub optim: OptimConfig,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            steps: 2000,
            batch: 128,
            hidden: 128,
            ffn: 256,
            layers: 4,
            heads: 4,
            kv_heads: 2,
            max_context: 512,
            environment: "arithmetic".to_owned(),
            max_operand: None,
            teacher: TeacherConfig::default(),
            optim: OptimConfig::default(),
        }
    }
}

/// Supervised fine-tuning, preference optimisation, or a reward model. `examples/configs/sft.toml` and `dpo.toml` are two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FinetuneConfig {
    /// Seeds the order of the examples and the adapter's first values.
    pub seed: u64,
    /// Updates; 0: as many as `epochs` needs.
    pub steps: u64,
    /// Passes over the data, where `steps` is 0.
    pub epochs: u64,
    /// Examples of one update.
    pub batch: usize,
    /// Most tokens of one example, prompt included; a longer one counts as broken.
    pub max_tokens: usize,
    /// Most tokens of one micro-batch; bounds memory.
    pub micro_batch_tokens: usize,
    /// Keep only the layers' inputs for the backward pass and compute the rest again: less memory, 1.4 times the time.
    pub activation_checkpointing: bool,
    /// What to do about lines that cannot be used.
    pub on_broken: BrokenLines,
    /// Supervised: learn the prompts' tokens too.
    pub learn_prompt: bool,
    /// Train all weights instead of an adapter.
    pub full: bool,
    /// Inner width of the adapter.
    pub lora_rank: usize,
    /// Numerator of the adapter's scale.
    pub lora_alpha: f32,
    /// Which projections it is put on, for example `q_proj`; empty: all linear ones.
    pub lora_targets: Vec<String>,
    /// Format of the frozen weights under the adapter; the adapter, gradients and optimiser are f32 with each.
    pub base_dtype: BaseDtype,
    /// Preferences: the loss.
    pub preference: PreferenceConfig,
    /// Reward models: the loss.
    pub reward: RewardModelConfig,
    /// The optimiser.
    pub optim: OptimConfig,
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            steps: 0,
            epochs: 1,
            batch: 16,
            max_tokens: 1024,
            micro_batch_tokens: 8192,
            activation_checkpointing: false,
            on_broken: BrokenLines::default(),
            learn_prompt: false,
            full: false,
            lora_rank: 8,
            lora_alpha: 16.0,
            lora_targets: Vec::new(),
            base_dtype: BaseDtype::F32,
            preference: PreferenceConfig::dpo(0.1),
            reward: RewardModelConfig::default(),
            optim: OptimConfig::default(),
        }
    }
}

impl FinetuneConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let passes = usize::try_from(self.steps.max(self.epochs)).unwrap_or(usize::MAX);
        for (setting, least, value) in [
            ("epochs", 1, passes),
            ("batch", 1, self.batch),
            ("max_tokens", 2, self.max_tokens),
            ("micro_batch_tokens", 2, self.micro_batch_tokens),
            ("lora_rank", 1, self.lora_rank),
        ] {
            if value < least {
                return Err(ConfigError::TooSmall { setting, least, value });
            }
        }
        if let Some(fault) = not_frozen(self.full, self.base_dtype) {
            return Err(fault);
        }
        self.preference.validate()?;
        self.reward.validate()?;
        Ok(self.optim.validate()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_nonsense_is_named() {
        TrainerConfig::default().validate().unwrap();
        let none = TrainerConfig { groups_per_step: 0, ..TrainerConfig::default() };
        assert!(none.validate().unwrap_err().to_string().contains("groups_per_step"));
        let full = TrainerConfig { max_pending_groups: 3, ..TrainerConfig::default() };
        assert!(full.validate().unwrap_err().to_string().contains("max_pending_groups"));
        let thin = TrainerConfig { full: true, base_dtype: BaseDtype::Bf16, ..TrainerConfig::default() };
        let fault = thin.validate().unwrap_err().to_string();
        assert!(fault.contains("base_dtype = \"bf16\"") && fault.contains("set full to false"), "{fault}");
        TrainerConfig { full: false, ..thin }.validate().unwrap();
        FinetuneConfig::default().validate().unwrap();
        let thin = FinetuneConfig { full: true, base_dtype: BaseDtype::Q8_0, ..FinetuneConfig::default() };
        assert!(thin.validate().unwrap_err().to_string().contains("q8_0"));
        let never = FinetuneConfig { epochs: 0, ..FinetuneConfig::default() };
        assert!(never.validate().unwrap_err().to_string().contains("epochs"));
        FinetuneConfig { steps: 3, ..never }.validate().unwrap();
        let loose = FinetuneConfig { preference: PreferenceConfig::dpo(0.0), ..FinetuneConfig::default() };
        assert!(loose.validate().unwrap_err().to_string().contains("beta"));
    }
}
