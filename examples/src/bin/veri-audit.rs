//! Audits: takes part in a training run as an auditor, and repeats an audit from its evidence, both with an own copy of the model.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use echo_rollout::Weights;
use echo_rollout::service::Replay as _;
use parallax_model::{BaseDtype, Checkpoint};
use serde_json::json;
use swarm_examples::auditor::{self, AuditArgs};
use swarm_examples::program;
use swarm_examples::rollouts::ModelReplay;
use veri_verify::verdict::{Opened, to_hex};
use veri_verify::{Evidence, Profile};

/// Audit the workers of a training run, or check the evidence of an audit without trusting the auditor.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<AuditArgs>),
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
    /// All weights of the policy version, where evidence names a file of them: the auditor kept it beside the evidence
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    program::run(|| match Cli::parse().command {
        Command::Run(args) => auditor::run(&args),
        Command::Check(args) => check(&args),
    })
}

/// What to recompute with.
fn weights(args: &CheckArgs, opened: &Opened) -> anyhow::Result<Weights> {
    let Some(hash) = opened.all_weights() else {
        return Ok(opened.adapter().map_or(Weights::Base, |file| Weights::Lora(file.to_vec().into())));
    };
    let path = args.weights.as_ref().with_context(|| {
        let hash = to_hex(&hash);
        format!(
            "the evidence is about all weights of a version, which it does not carry: name their file with --weights. Its BLAKE3 is \
             {hash}; the auditor kept it as weights-{}.safetensors beside the evidence",
            &hash[..16]
        )
    })?;
    let file = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let got = *blake3::hash(&file).as_bytes();
    anyhow::ensure!(
        got == hash,
        "{} is another file than the one that the evidence names: its BLAKE3 is {}, not {}",
        path.display(),
        to_hex(&got),
        to_hex(&hash)
    );
    Ok(Weights::Full(file.into()))
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
            let weights = weights(args, &opened)?;
            let mut replay = ModelReplay::load(&checkpoint, format, n_tokens)?;
            let again = replay.install(job.adapter_hash, weights);
            let again = again.and_then(|()| replay.replay(job, &evidence.answer));
            opened.judge(&again.map_err(anyhow::Error::msg)?, &profile)
        }
    };
    let (word, reason) = (verdict.word(), verdict.reason());
    let line = format!("{word}: {reason} (the auditor said {})", evidence.verdict.word());
    program::tell(&line, args.json)?;
    if !args.json {
        return Ok(());
    }
    program::report(&json!({
        "verdict": word, "reason": reason, "auditor_verdict": evidence.verdict.word(),
        "worker": evidence.worker(), "profile": profile.name
    }))
}
