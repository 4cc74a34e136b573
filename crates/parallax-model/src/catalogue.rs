//! Known checkpoints: enough of each configuration to compute what it needs in memory.
