//! The auditor's role: recompute challenged rollouts with an own copy of the model, and sign verdicts.

use std::path::PathBuf;

use parallax_model::{BaseDtype, Checkpoint};
use serde_json::json;

use super::process::say;
use super::role::NodeArgs;
use crate::auditor::{MAX_TOKENS, audit};
use crate::rollouts::ModelReplay;

/// Options of the auditor.
#[derive(Debug, Clone, clap::Args)]
pub struct AuditorArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// The learner's address.
    #[arg(long)]
    trainer: String,
    /// The model.
    #[arg(long)]
    model: String,
    /// Directory for the evidence against convicted workers, which `veri-audit check` reads
    #[arg(long)]
    evidence: PathBuf,
}

/// Runs the auditor until the learner has ended.
///
/// # Errors
/// A model that cannot be loaded, a learner that cannot be reached.
pub async fn run(args: AuditorArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let mut replay = ModelReplay::load(&checkpoint, BaseDtype::F32, MAX_TOKENS)?;
    let node = args.node.start().await?;
    let trainer = node.dial(&args.trainer).await?;
    say(&json!({"event": "ready", "peer": node.peer_id()}));
    let ended = audit(&node, trainer, &mut replay, &args.evidence, |event, _| say(event)).await;
    // The learner going away is how a run ends.
    if let Err(error) = ended {
        say(&json!({"event": "ended", "reason": error.to_string()}));
    }
    Ok(())
}
