//! The commands of the `parallax` binary, one file each.

pub mod bench;
pub mod generate;
pub mod known;
pub mod model;
pub mod models;
pub mod score;
