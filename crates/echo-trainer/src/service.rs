//! The shell around the core: checkpoints on disk, pre-training and fine-tuning to a directory, the learner of a swarm, publication
//! over bitswap.

pub mod checkpoint_dir;
pub mod evaluation;
pub mod finetuning;
#[cfg(feature = "gateway")]
pub mod gateway;
pub mod learner;
pub mod pretraining;
pub mod publisher;

pub use evaluation::{Evaluation, SampleRequest, Sampler};
pub use learner::{Learner, LearnerError, LearnerEvent, Parts, RunSummary};
pub use publisher::{Publisher, Update};
