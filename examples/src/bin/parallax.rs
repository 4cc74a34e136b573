//! `parallax`: run a language model, on this machine or on many.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use swarm_examples::parallax::{
    bench, bench_swarm, chat, devices, generate, hub, join, models, plan, run, score, serve, status,
};
use swarm_examples::program;

/// Run a language model, on this machine or on many.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Start here:\n  parallax generate --model tiny --prompt 'What is 1+2?' --chat\n  parallax models\n\nWhat a \
                  command was asked for goes to stdout, how it gets on to stderr. Every command that takes --json prints one JSON \
                  object as the last line of stdout, and all words on stderr."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(generate::GenerateArgs),
    Score(score::ScoreArgs),
    Bench(bench::BenchArgs),
    Models(models::ModelsArgs),
    Devices(devices::DevicesArgs),
    Fetch(hub::FetchArgs),
    Run(run::RunArgs),
    Chat(chat::ChatArgs),
    Serve(Box<serve::ServeArgs>),
    Join(join::JoinArgs),
    Status(status::StatusArgs),
    Plan(plan::PlanArgs),
    BenchSwarm(bench_swarm::BenchSwarmArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(|| match cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Score(args) => score::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Fetch(args) => hub::run(args),
        Command::Models(args) => models::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Serve(args) => serve::run(*args),
        Command::Join(args) => join::run(args),
        Command::Status(args) => status::run(args),
        Command::Plan(args) => plan::run(args),
        Command::BenchSwarm(args) => bench_swarm::run(args),
        Command::Run(args) => run::run(args),
        Command::Chat(args) => chat::run(args),
    })
}
