//! The dense swarm of reinforcement learning: losses, LoRA and full training, checkpoints, policy publication.
//!
//! The core is pure: rollouts in, gradients and the next parameters out; clocks, files and the network are in
//! [`service`].
//!
//! ```
//! use echo_trainer::advantage::{AdvantageConfig, group_advantages};
//! use echo_trainer::loss::{LossConfig, PolicyTargets, reference::policy_loss};
//!
//! let advantages = group_advantages(&[1.0, 0.0], &AdvantageConfig::dr_grpo())?;
//! let targets = PolicyTargets {
//!     offsets: vec![0, 1, 2],
//!     mask: vec![true, true],
//!     sampled: Some(vec![-0.7, -0.7]),
//!     proximal: None,
//!     reference: None,
//!     advantages,
//! };
//! let loss = policy_loss(&[-0.7, -0.7], &targets, &LossConfig::grpo())?;
//! assert_eq!(loss.gradient, [-0.25, 0.25]); // the good token becomes more likely, the bad one less
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Map: [`advantage`] (credit within a group), [`averaging`] (several trainers make one step), [`loss`] (policy losses, f64 and tensors),
//! [`preference`] (pairs: DPO, reward models), [`packing`] (rollouts to one
//! ragged batch), [`policy`] (what is needed of a model), [`parameters`], [`shares`] (a step's gradients, in shares), [`step`] (what a policy
//! says about sequences), [`optim`] (AdamW,
//! clipping, schedules), [`trainer`] (rounds and versions), [`lease_set`] (what was trained on), [`checkpoint`] (resume
//! bit for bit), [`pretrain`] and [`data`] (learning from text), [`dataset`] (JSON lines), [`vocabulary`] (the tiny model's tokenizer),
//! [`exploitability`] (what a policy gives away in a small card game), [`config`], [`run`] (a whole run's settings), [`metrics`], [`error`]; with feature
//! `service`: checkpoints on disk, the learner of a swarm, publication over bitswap; with feature `gateway`: a service that the PyPI client `tinker` trains with.

pub mod advantage;
pub mod averaging;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod dataset;
pub mod error;
pub mod exploitability;
pub mod lease_set;
pub mod loss;
pub mod metrics;
pub mod optim;
pub mod packing;
pub mod parameters;
pub mod policy;
pub mod preference;
pub mod pretrain;
pub mod run;
#[cfg(feature = "service")]
pub mod service;
pub mod shares;
pub mod step;
pub mod trainer;
pub mod vocabulary;

pub use config::{FinetuneConfig, PretrainConfig, TrainerConfig};
pub use error::{AddError, StepError};
pub use loss::{LossConfig, LossKind};
pub use run::RunConfig;
pub use trainer::{Group, Rollout, Trainer};
