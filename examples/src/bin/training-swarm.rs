//! `training-swarm`: what the learner side can do on one machine. The learner of a whole swarm is a role of `demo-swarm`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use swarm_examples::program;
use swarm_examples::training::{bench, losses, pretrain};

/// Pre-train tiny models, check losses, measure the training step.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Start here:\n  training-swarm bench --model tiny\n  training-swarm pretrain --config \
                  examples/configs/pretrain-tiny.toml --out tiny\n\nEvery command that takes --json prints one JSON object \
                  as the last line of stdout; all else goes to stderr."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Losses(losses::LossesArgs),
    Pretrain(pretrain::PretrainArgs),
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(|| match cli.command {
        Command::Losses(args) => losses::run(&args),
        Command::Pretrain(args) => pretrain::run(&args),
        Command::Bench(args) => bench::run(&args),
    })
}
