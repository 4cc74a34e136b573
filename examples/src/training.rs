//! The commands of `training-swarm`.

pub mod bench;
pub mod finetune;
pub mod losses;
pub mod pretrain;
pub mod run;
pub mod simulate;
