//! The commands of `training-swarm`.

use std::path::PathBuf;

pub mod assist;
pub mod bench;
pub mod exploitability;
pub mod finetune;
pub mod losses;
pub mod pretrain;
pub mod run;
pub mod simulate;
pub mod solo;
pub mod staleness;

/// What the commands that make something take.
#[derive(Debug, Clone, clap::Args)]
pub struct MakeArgs {
    /// Settings; examples are in examples/configs
    #[arg(long)]
    config: PathBuf,
    /// Directory for what is made: a model, or an adapter as PEFT writes it
    #[arg(long)]
    out: PathBuf,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}
