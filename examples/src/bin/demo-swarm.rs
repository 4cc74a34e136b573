//! `demo-swarm`: the whole stack on one machine, in one command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use swarm_examples::demo::{self, DemoArgs, role::Role};
use swarm_examples::program;

/// Starts a swarm on this machine, every node a process of its own: a bootstrap node, workers that sample rollouts, a learner
/// that trains on them, an auditor that recomputes a part of them. Then the trained model answers a question through a pipeline
/// of two processes.
///
/// Report (--json, and report.json in --out): model, env, workers, versions, reward_before, reward_after (rollouts of the first
/// and last step), eval_before, eval_after (held-out tasks, sampled at temperature 1), eval_greedy_before, eval_greedy_after,
/// seconds, trajectories {leased, consumed, dropped_stale, dropped_flat, rejected, unproven, lost, duplicated, open}, staleness {budget, max, mean},
/// learner_utilisation, ratio_deviation_max, update_bytes, full_bytes, cheater {peer, detected, audits_until_detected,
/// poisoned_trained}, chat {prompt, reply, stages}, plots.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  demo-swarm\n  demo-swarm --cheater --json\n  demo-swarm --workers 2 --seed 7 --out results"
)]
struct Cli {
    #[command(flatten)]
    demo: DemoArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One process of the demo; the demo starts these itself.
    #[command(hide = true)]
    Role {
        #[command(subcommand)]
        role: Role,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(|| match cli.command {
        Some(Command::Role { role }) => role.play(),
        None => demo::run(&cli.demo),
    })
}
