//! Shared harness of the cross-crate tests.

pub mod script;
pub mod server;
pub mod swarm;
