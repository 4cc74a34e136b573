//! The auditor's role: recompute challenged rollouts with an own copy of the model, and sign verdicts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use echo_rollout::service::{Audited, AuditorConfig, PayloadSource, Spreads, run_auditor};
use lattica_bitswap::Blocks;
use parallax_model::{BaseDtype, Checkpoint};
use rand::RngExt as _;
use serde_json::json;

use super::process::say;
use super::role::NodeArgs;
use crate::rollouts::{ModelReplay, memory_blocks};

/// Longest answer, prompt included, that the auditor recomputes.
const MAX_TOKENS: usize = 1024;

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
    /// Format of the learner's frozen weights
    #[arg(long, default_value_t = BaseDtype::F32)]
    base_dtype: BaseDtype,
    /// Directory for the evidence against convicted workers, which `veri-audit check` reads
    #[arg(long)]
    evidence: PathBuf,
}

fn keep(audited: &Audited<'_>, path: &Path) -> anyhow::Result<()> {
    Ok(std::fs::write(path, serde_json::to_vec(&audited.evidence())?)?)
}

/// Runs the auditor until the learner has ended.
///
/// # Errors
/// A model that cannot be loaded, a learner that cannot be reached.
pub async fn run(args: AuditorArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let mut replay = ModelReplay::load(&checkpoint, args.base_dtype, MAX_TOKENS)?;
    let node = args.node.start().await?;
    let trainer = node.dial(&args.trainer).await?;
    let source: Arc<dyn PayloadSource> =
        Arc::new(Spreads::bystander(Blocks::start(node.clone(), memory_blocks())));
    say(&json!({"event": "ready", "peer": node.peer_id()}));
    let config = AuditorConfig::new(trainer);
    let randomness = || rand::rng().random();
    let ended = run_auditor(&node, &*source, &mut replay, &config, randomness, |audited| {
        let (trajectory, verdict) = (audited.trajectory, audited.verdict);
        let evidence = verdict.convicts().then_some(&args.evidence).and_then(|dir| {
            let path = dir.join(format!("evidence-{}.json", trajectory.id().0));
            match keep(audited, &path) {
                Ok(()) => Some(path),
                Err(error) => {
                    tracing::warn!(%error, "evidence not kept");
                    None
                }
            }
        });
        say(&json!({"event": "verdict", "worker": trajectory.worker(), "lease": trajectory.id().0,
            "verdict": verdict.word(), "reason": verdict.reason(), "evidence": evidence}));
    })
    .await;
    // The learner going away is how a run ends.
    if let Err(error) = ended {
        say(&json!({"event": "ended", "reason": error.to_string()}));
    }
    Ok(())
}
