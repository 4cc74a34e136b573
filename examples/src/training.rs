//! The commands of `training-swarm`.

pub mod bench;
pub mod losses;
pub mod pretrain;
pub mod run;
