//! The wide swarm of reinforcement learning: environments, leases, trajectories, policy snapshots.
pub mod environment;
