//! Shared harness of the cross-crate tests.

pub mod swarm;
pub mod toy_server;
