//! `training-swarm pretrain`: makes a tiny model from a configuration.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use echo_trainer::PretrainConfig;
use echo_trainer::service::pretraining::pretrain;

use crate::program;

/// Make a tiny chat model from random weights.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Report: {\"steps\",\"loss_before\",\"loss_after\",\"seconds\",\"held_out_reward\",\"parameters\",\"tokens\"}; losses in nats \
                  per answer token, held_out_reward the mean probability of exactly the right answer."
)]
pub struct PretrainArgs {
    /// Settings, for example examples/configs/pretrain-tiny.toml
    #[arg(long)]
    config: PathBuf,
    /// Directory for the model
    #[arg(long)]
    out: PathBuf,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// A missing or malformed file, settings out of range, a full disk.
pub fn run(args: &PretrainArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("reading {}", args.config.display()))?;
    let config: PretrainConfig =
        toml::from_str(&text).with_context(|| format!("settings in {}", args.config.display()))?;
    let report = pretrain(&config, &args.out, |p| {
        program::say(&format!(
            "step {:5}  loss {:.4}  held-out reward {:.3}  {:.0} s",
            p.step, p.loss, p.held_out_reward, p.seconds
        ));
    })?;
    program::say(&format!(
        "{} parameters, loss {:.3} -> {:.3}, held-out reward {:.3}, {:.0} s: {}",
        report.parameters,
        report.loss_before,
        report.loss_after,
        report.held_out_reward,
        report.seconds,
        args.out.display()
    ));
    if args.json { program::report(&report) } else { Ok(()) }
}
