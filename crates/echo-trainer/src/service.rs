//! The shell around the core: checkpoints on disk, pre-training and fine-tuning to a directory, the learner of a swarm and its
//! assistants, a learner that samples for itself, publication over bitswap.

pub mod assistant;
pub mod assistants;
pub mod checkpoint_dir;
pub mod evaluation;
pub mod finetuning;
#[cfg(feature = "gateway")]
pub mod gateway;
pub mod judge;
pub mod learner;
pub mod pretraining;
pub mod publisher;
pub mod solo;

pub use assistant::{Assistant, AssistantError, AssistantEvent};
pub use assistants::{Assistants, AssistantsConfig};
pub use evaluation::{Evaluation, Player, SampleRequest, Sampled, Sampler};
pub use judge::{Judge, JudgeError, Judged};
pub use learner::{Learner, LearnerError, LearnerEvent, Parts, RunSummary};
pub use publisher::{Publisher, Update};
pub use solo::{Solo, SoloError, SoloStep};
