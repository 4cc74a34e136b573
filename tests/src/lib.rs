//! Shared harness of the cross-crate tests.

pub mod server;
pub mod swarm;
