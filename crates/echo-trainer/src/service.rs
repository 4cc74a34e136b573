//! The shell around the core: checkpoints on disk, publication over bitswap.

pub mod checkpoint_dir;
