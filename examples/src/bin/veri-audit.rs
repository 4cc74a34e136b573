//! Checks what auditors claim: repeats an audit from its evidence, with an own copy of the model.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use echo_rollout::service::Replay as _;
use parallax_model::{BaseDtype, Checkpoint};
use serde_json::json;
use swarm_examples::program;
use swarm_examples::rollouts::ModelReplay;
use veri_verify::{Evidence, Profile};

/// Check the evidence of an audit without trusting the auditor.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Check(CheckArgs),
}

/// Repeat an audit offline.
#[derive(Debug, Args)]
#[command(
    after_help = "Report: {\"verdict\":\"pass|fail|inconclusive|withheld|malformed\",\"reason\",\"auditor_verdict\",\"worker\",\"profile\"}.\n\
                  The exit code says whether the check could be made, not what came out."
)]
struct CheckArgs {
    /// The evidence, as an auditor wrote it
    #[arg(long)]
    evidence: PathBuf,
    /// The model that the job names
    #[arg(long)]
    model: String,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    program::run(|| match Cli::parse().command {
        Command::Check(args) => check(&args),
    })
}

fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let reading = || format!("reading {}", args.evidence.display());
    let text = std::fs::read_to_string(&args.evidence).with_context(reading)?;
    let evidence: Evidence = serde_json::from_str(&text).with_context(reading)?;
    let profile = Profile::f32();
    let verdict = match evidence.open() {
        Err(verdict) => verdict,
        Ok(opened) => {
            let checkpoint = Checkpoint::resolve(&args.model)?;
            let (id, job) = (checkpoint.id()?, &evidence.job);
            let format = BaseDtype::ALL.into_iter().find(|format| format.model_id(&id) == job.model_id);
            let format = format.with_context(|| {
                let other = &job.model_id;
                format!("the evidence is about model {other}, not {id}; name the right one with --model")
            })?;
            let n_tokens = job.prompt.len() + evidence.answer.tokens.len();
            let mut replay = ModelReplay::load(&checkpoint, format, n_tokens)?;
            let again = replay.replay(opened.adapter(), job, &evidence.answer);
            opened.judge(&again.map_err(anyhow::Error::msg)?, &profile)
        }
    };
    program::say(&format!(
        "{}: {} (the auditor said {})",
        verdict.word(),
        verdict.reason(),
        evidence.verdict.word()
    ));
    if !args.json {
        return Ok(());
    }
    program::report(&json!({
        "verdict": verdict.word(), "reason": verdict.reason(), "auditor_verdict": evidence.verdict.word(),
        "worker": evidence.worker(), "profile": profile.name
    }))
}
