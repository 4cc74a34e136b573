//! The commands of the `parallax` binary, one file each.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a command consumes its arguments, whatever it does with them"
)]

pub mod adapters;
pub mod bench;
pub mod bench_swarm;
pub mod chat;
pub mod devices;
pub mod engine;
pub mod generate;
pub mod hub;
pub mod join;
pub mod model;
pub mod models;
pub mod plan;
pub mod run;
pub mod score;
pub mod serve;
pub mod status;
pub mod swarm_node;
