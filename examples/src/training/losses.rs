//! `training-swarm losses`: policy losses and gradients of cases in a file.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use echo_trainer::loss::cases::CaseFile;
use echo_trainer::policy::training_device;
use serde_json::json;

use crate::program;

/// Compute policy losses and their gradients; expected numbers in the file are not read.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Report: {\"cases\":[{\"name\",\"loss\",\"grad\":[[...]],\"reference_difference_max\"}]}. loss and grad come from the \
                  tensors that train; reference_difference_max is their largest distance from the f64 derivation."
)]
pub struct LossesArgs {
    /// Inputs and cases, in the shape of tests/golden/golden-rl-losses.json
    #[arg(long)]
    cases: PathBuf,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// A file that is missing or malformed.
pub fn run(args: &LossesArgs) -> anyhow::Result<()> {
    let text =
        std::fs::read_to_string(&args.cases).with_context(|| format!("reading {}", args.cases.display()))?;
    let cases = CaseFile::parse(&text)?.run(&training_device())?;
    for case in &cases {
        program::tell(&format!("{:18} loss {:+.9}", case.name, case.loss), args.json)?;
    }
    if args.json { program::report(&json!({ "cases": cases })) } else { Ok(()) }
}
