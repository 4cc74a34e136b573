//! `training-swarm`: the learner of a swarm, and what the learner's side can do on one machine.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use swarm_examples::program;
use swarm_examples::training::{
    MakeArgs, assist, bench, exploitability, finetune, losses, pretrain, run, simulate, solo, staleness,
};

/// Train with rollouts from many machines (--config); pre-train and fine-tune on one, check losses, measure the training step.
///
/// Report of a run (--json): one line per event, {"event":"ready",peer,addrs,env}, {"event":"eval",version,eval,eval_greedy},
/// {"event":"step",version,reward,loss,ratio_deviation_max,grad_norm,staleness_max,staleness_mean,workers,ahead,
/// update_bytes,flat_groups,assisted,completion_tokens,rollouts_s,train_s,step_s}, {"event":"convicted",peer,audits},
/// {"event":"left_out",peer,reason,dismissed} of an assistant; the last line is the summary, in the fields of demo-swarm's report.
/// Plots (SVG) and report.html, one page with all of them, go into the run's directory.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Start here:\n  training-swarm --config examples/configs/training-swarm.toml\n  training-swarm assist --trainer ADDRESS\n  training-swarm bench --model tiny\n  training-swarm pretrain --config \
                  examples/configs/pretrain-tiny.toml --out tiny\n  training-swarm sft --config examples/configs/sft.toml --out sft-out\n  training-swarm dpo --config examples/configs/dpo.toml --out dpo-out\n  training-swarm reward --config examples/configs/dpo.toml --out reward-out\n  training-swarm simulate --scenario examples/configs/simulate.toml --curve 0,1,2,3,6,11\n  training-swarm pretrain --config examples/configs/pretrain-kuhn.toml --out kuhn\n  training-swarm solo --config examples/configs/kuhn.toml\n  training-swarm exploitability --env kuhn --model kuhn\n  training-swarm staleness --config examples/configs/staleness.toml\n\nWhat a command was asked for goes to stdout, how it gets on \
                  to stderr. Every command that takes --json prints one JSON object as the last line of stdout, and all words on stderr."
)]
struct Cli {
    #[command(flatten)]
    run: run::RunArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Assist(assist::AssistArgs),
    Losses(losses::LossesArgs),
    /// Make a tiny chat model from random weights
    #[command(
        after_help = "Report: {\"steps\",\"loss_before\",\"loss_after\",\"seconds\",\"held_out_reward\",\"parameters\",\"tokens\"}; losses in nats \
                      per answer token, held_out_reward the mean probability of exactly the right answer; \
                      in a game, of the teacher's best first word."
    )]
    Pretrain(MakeArgs),
    /// Fine-tune on right answers
    #[command(after_help = finetune::REPORT)]
    Sft(MakeArgs),
    /// Fine-tune on preferences (direct preference optimisation)
    #[command(after_help = finetune::REPORT)]
    Dpo(MakeArgs),
    /// Make a reward model from preferences, for `environment = "judged@TASKS:DIRECTORY"`
    #[command(after_help = finetune::REPORT)]
    Reward(MakeArgs),
    Bench(bench::BenchArgs),
    Simulate(simulate::SimulateArgs),
    Solo(solo::SoloArgs),
    Exploitability(exploitability::ExploitabilityArgs),
    Staleness(staleness::StalenessArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(|| match cli.command {
        Some(Command::Assist(args)) => assist::run(&args),
        Some(Command::Losses(args)) => losses::run(&args),
        Some(Command::Pretrain(args)) => pretrain::run(&args),
        Some(Command::Sft(args)) => finetune::sft(&args),
        Some(Command::Dpo(args)) => finetune::dpo(&args),
        Some(Command::Reward(args)) => finetune::reward(&args),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Simulate(args)) => simulate::run(&args),
        Some(Command::Solo(args)) => solo::run(&args),
        Some(Command::Exploitability(args)) => exploitability::run(&args),
        Some(Command::Staleness(args)) => staleness::run(&args),
        None => run::run(&cli.run),
    })
}
