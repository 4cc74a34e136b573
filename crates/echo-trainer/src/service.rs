//! The shell around the core: checkpoints on disk, pre-training to a model directory, publication over bitswap.

pub mod checkpoint_dir;
pub mod pretraining;
