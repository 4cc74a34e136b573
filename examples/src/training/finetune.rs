//! `training-swarm sft`, `dpo` and `reward`: fine-tunes a model on JSON lines, or makes a reward model from them.

use std::path::PathBuf;

use anyhow::Context as _;
use echo_trainer::FinetuneConfig;
use echo_trainer::service::finetuning::{self, FinetuneError, FinetuneReport, Job, Progress};
use parallax_model::{Adapter, Checkpoint};
use serde::Deserialize;

use super::MakeArgs;
use crate::program;

/// What the commands print with `--json`.
pub const REPORT: &str = "Report: {\"steps\",\"loss_before\",\"loss_after\",\"seconds\",\"examples\",\"tokens\",\"broken_lines\",\"broken\":[{\"line\",\"reason\"}]}, with \
                          dpo and reward \"accuracy_after\" and \"margin_after\" as well; the losses are means over the first 256 examples, in nats per learnt token or \
                          of the loss of pairs.";

/// Updates between two lines of progress.
const SAY_EVERY: u64 = 10;

/// The file: what is trained on what, and how.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// `tiny`, a directory, a .gguf file, or a repository in the local hub cache.
    model: String,
    /// JSON lines.
    data: PathBuf,
    /// Directory or file of an adapter to go on with.
    adapter: Option<PathBuf>,
    /// Threads of the CPU kernels; 0: all cores.
    #[serde(default)]
    threads: usize,
    #[serde(default)]
    train: FinetuneConfig,
}

/// Fine-tunes on right answers.
///
/// # Errors
/// A missing or malformed file, settings out of range, data that cannot be used, a full disk.
pub fn sft(args: &MakeArgs) -> anyhow::Result<()> {
    run(args, finetuning::sft)
}

/// Fine-tunes on preferences.
///
/// # Errors
/// As [`sft`].
pub fn dpo(args: &MakeArgs) -> anyhow::Result<()> {
    run(args, finetuning::dpo)
}

/// Makes a reward model from preferences.
///
/// # Errors
/// As [`sft`].
pub fn reward(args: &MakeArgs) -> anyhow::Result<()> {
    run(args, finetuning::reward)
}

fn run(
    args: &MakeArgs,
    train: impl Fn(&Job<'_>, fn(Progress)) -> Result<FinetuneReport, FinetuneError>,
) -> anyhow::Result<()> {
    let settings: Settings = program::settings(&args.config)?;
    let lines =
        std::fs::read(&settings.data).with_context(|| format!("reading {}", settings.data.display()))?;
    let adapter = settings.adapter.as_deref().map(Adapter::load).transpose()?;
    let checkpoint = Checkpoint::resolve(&settings.model)?;
    if settings.threads > 0 {
        parallax_kernels::pool::set_threads(settings.threads);
    }
    let job = Job {
        config: &settings.train,
        model: &settings.model,
        checkpoint: &checkpoint,
        adapter: adapter.as_ref(),
        lines: &lines,
        out: &args.out,
    };
    let report = train(&job, |p: Progress| {
        if p.step.is_multiple_of(SAY_EVERY) || p.step == p.steps {
            program::say(&format!(
                "step {:5} of {}  loss {:.4}  {:.0} s",
                p.step, p.steps, p.loss, p.seconds
            ));
        }
    })
    .with_context(|| format!("with {}", settings.data.display()))?;
    for fault in &report.broken {
        program::say(&format!("left out: line {}: {}", fault.line, fault.reason));
    }
    let line = format!(
        "{} examples ({} lines left out), {} steps, loss {:.4} -> {:.4}, {:.0} s: {}",
        report.examples,
        report.broken_lines,
        report.steps,
        report.loss_before,
        report.loss_after,
        report.seconds,
        args.out.display()
    );
    program::tell(&line, args.json)?;
    if args.json { program::report(&report) } else { Ok(()) }
}
