//! What the example binaries share: starting, logging, reports, the network; and the commands of `parallax`.

pub mod auditor;
pub mod demo;
pub mod gateway;
pub mod learner_args;
pub mod machine;
pub mod network;
pub mod parallax;
pub mod program;
pub mod rollouts;
pub mod training;
