//! `parallax score`: log-probabilities of given tokens.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::model::ModelArgs;
use crate::program;

/// Log-probabilities of given token sequences, by one prefill each. Needs no tokenizer.
///
/// Report (--json): `logprobs[i][t]` = log p(ids[t+1] | ids[..=t]), `argmax[i][t]` = likeliest token after position t,
/// `last_logits_argmax[i]` = likeliest token after the sequence.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  echo '{\"sequences\":[[1,2,3],[4,5]]}' > ids.json\n  parallax score --model tiny --ids \
                        ids.json --dtype f32 --json"
)]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// JSON file {"sequences": [[ids], ...]}
    #[arg(long)]
    ids: PathBuf,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Deserialize)]
struct Sequences {
    sequences: Vec<Vec<u32>>,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    logprobs: Vec<Vec<f32>>,
    last_logits_argmax: Vec<u32>,
    argmax: Vec<Vec<u32>>,
}

/// Runs the command.
///
/// # Errors
/// A file or model that cannot be read, a sequence that does not fit.
pub fn run(args: ScoreArgs) -> anyhow::Result<()> {
    let path = args.ids.display();
    let text = std::fs::read_to_string(&args.ids).with_context(|| format!("{path}"))?;
    let Sequences { sequences } = serde_json::from_str(&text)
        .with_context(|| format!("{path}: expected {{\"sequences\": [[ids], ...]}}"))?;
    let Some(longest) = sequences.iter().map(Vec::len).max() else { bail!("{path}: no sequences to score") };
    let checkpoint = args.model.open()?;
    // A sequence past the context is refused by name below; do not reserve memory for it.
    let cache_tokens = longest.min(checkpoint.config().max_context);
    let mut loaded = args.model.load(checkpoint, cache_tokens)?;
    let mut report = Report::default();
    for (i, ids) in sequences.iter().enumerate() {
        let scored = parallax_engine::score(&mut loaded.pipeline, ids)
            .with_context(|| format!("{path}: sequence {i}"))?;
        let sum: f64 = scored.logprobs.iter().map(|l| f64::from(*l)).sum();
        let line = format!("sequence {i}: {} tokens, log-probability {sum:.4}", ids.len());
        program::tell(&line, args.json)?;
        report.last_logits_argmax.extend(scored.argmax.last());
        report.logprobs.push(scored.logprobs);
        report.argmax.push(scored.argmax);
    }
    if args.json { program::report(&report) } else { Ok(()) }
}
