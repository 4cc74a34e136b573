//! An auditor of a training run: recomputes drawn rollouts with an own copy of the model, signs verdicts, and keeps evidence against
//! whoever is convicted. `veri-audit run`, and a role of the demo.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use echo_rollout::service::{Audited, AuditorConfig, AuditorError, Spreads, run_auditor};
use echo_trainer::service::checkpoint_dir;
use lattica_bitswap::Blocks;
use lattica_net::Node;
use parallax_model::{BaseDtype, Checkpoint};
use rand::RngExt as _;
use serde_json::{Value, json};
use swarm_wire::PeerId;
use veri_verify::verdict::to_hex;

use crate::learner_args::{LearnerArgs, Prepared};
use crate::program;
use crate::rollouts::{ModelReplay, memory_blocks, reach};

/// Longest answer, prompt included, that is recomputed unless something else is said.
pub const MAX_TOKENS: usize = 1024;
/// Files of all weights that are kept for evidence in one directory.
const WEIGHTS_KEPT: usize = 8;

/// Recompute drawn rollouts of a training run: the learner names this machine's peer id in run.auditors.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "The learner says how much is audited (audit_fraction, audit_first); what is drawn waits for its verdict before it is trained on. \
                  Each rollout is recomputed with the version that its lease names: an adapter on the base model, or, where all weights are \
                  trained, the whole model of that version, of which one is in memory at a time.\n\nReport (--json): {\"event\":\"ready\",peer}, \
                  {\"event\":\"verdict\",worker,lease,version,verdict,reason,evidence,weights}, the last two the files that a conviction left behind; \
                  the last line is {\"event\":\"done\",audits,convictions}.\n\nExample:\n  veri-audit run --identity auditor.key --show-peer\n  veri-audit \
                  run --trainer /ip4/192.0.2.1/udp/4001/quic-v1/p2p/12D3KooW... --identity auditor.key"
)]
pub struct AuditArgs {
    #[command(flatten)]
    learner: LearnerArgs,
    /// Format of the learner's frozen weights (its run.trainer.base_dtype)
    #[arg(long, default_value_t = BaseDtype::F32, value_name = "f32|bf16|f16|q8_0")]
    base_dtype: BaseDtype,
    /// Longest answer, prompt included, that is recomputed; a longer one gets no verdict and is not trained on
    #[arg(long, default_value_t = MAX_TOKENS)]
    max_tokens: usize,
    /// Directory for the evidence against convicted workers, which `veri-audit check` reads
    #[arg(long, default_value = "evidence")]
    evidence: PathBuf,
    /// Key file; made when it does not exist. The learner knows this machine by its peer id
    #[arg(long, default_value = "auditor.key")]
    identity: PathBuf,
}

/// Runs it.
///
/// # Errors
/// A learner that cannot be reached or does not know this auditor, weights that cannot be read.
pub fn run(args: &AuditArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.max_tokens > 0, "--max-tokens must be at least 1");
    match args.learner.prepare(&args.identity, "auditors")? {
        Some(prepared) => tokio::runtime::Runtime::new()?.block_on(serve(args, prepared)),
        None => Ok(()),
    }
}

async fn serve(args: &AuditArgs, prepared: Prepared) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::resolve(&args.learner.model)?;
    let mut replay = ModelReplay::load(&checkpoint, args.base_dtype, args.max_tokens)?;
    let json = args.learner.json;
    let node = Node::start(prepared.identity, prepared.config).await?;
    let learner = reach(&node, &prepared.trainer, args.learner.patience()).await?;
    program::say(&format!("{} audits for {learner}", node.peer_id()));
    if json {
        program::report(&json!({"event": "ready", "peer": node.peer_id()}))?;
    }
    let (mut audits, mut convictions, mut told) = (0_u64, 0_u64, Ok(()));
    let auditing = audit(&node, learner, &mut replay, &args.evidence, |event, convicts| {
        audits += 1;
        convictions += u64::from(convicts);
        if convicts {
            let said = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
            program::say(&format!("worker {} is convicted: {}", said("worker"), said("reason")));
        }
        if json && told.is_ok() {
            told = program::report(event);
        }
    });
    let ended = tokio::select! {
        ended = auditing => ended.map(|()| "the run is finished").map_err(anyhow::Error::from),
        asked = program::asked_to_stop() => asked.map(|()| "asked to stop").map_err(Into::into),
    };
    node.shutdown().await;
    told?;
    program::say(&format!("{}; {audits} audits, {convictions} convictions", ended?));
    if json {
        program::report(&json!({"event": "done", "audits": audits, "convictions": convictions}))?;
    }
    Ok(())
}

/// Audits until the run is over; `tell` is given each verdict as an event, and whether it convicts. Evidence goes into the directory.
///
/// # Errors
/// A learner that does not know this auditor, or is gone for long.
pub async fn audit(
    node: &Node,
    learner: PeerId,
    replay: &mut ModelReplay,
    evidence: &Path,
    mut tell: impl FnMut(&Value, bool),
) -> Result<(), AuditorError> {
    let source = Spreads::bystander(Blocks::start(node.clone(), memory_blocks()));
    let config = AuditorConfig::new(learner);
    let randomness = || rand::rng().random();
    run_auditor(node, &source, replay, &config, randomness, |audited| {
        let (trajectory, verdict) = (audited.trajectory, audited.verdict);
        let mut event = json!({"event": "verdict", "worker": trajectory.worker(), "lease": trajectory.id().0,
            "version": trajectory.lease().version.0, "verdict": verdict.word(), "reason": verdict.reason(),
            "evidence": null, "weights": null});
        if verdict.convicts() {
            match keep(audited, evidence) {
                Ok((file, weights)) => (event["evidence"], event["weights"]) = (json!(file), json!(weights)),
                Err(error) => tracing::warn!(%error, "evidence not kept"),
            }
        }
        tell(&event, verdict.convicts());
    })
    .await
}

/// Writes evidence, and beside it the file of all weights that it names, unless that is there or there are many. Both paths.
fn keep(audited: &Audited<'_>, dir: &Path) -> anyhow::Result<(PathBuf, Option<PathBuf>)> {
    std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let evidence = audited.evidence();
    let mut kept = None;
    if let (Some(weights), Some(hash)) = (audited.all_weights(), &evidence.job.adapter_hash) {
        let path = dir.join(format!("weights-{}.safetensors", to_hex(&hash[..8])));
        let others = std::fs::read_dir(dir)?.flatten().map(|entry| entry.file_name());
        let others = others.filter(|name| name.to_string_lossy().starts_with("weights-")).count();
        if path.exists() || others < WEIGHTS_KEPT {
            if !path.exists() {
                checkpoint_dir::write(&path, weights)?;
            }
            kept = Some(path);
        } else {
            tracing::warn!(others, dir = %dir.display(), "so many files of weights are kept, and no more");
        }
    }
    let told = serde_json::to_vec(&evidence)?;
    // Leases of another run that is audited into the same directory have the same numbers.
    let hash = to_hex(&blake3::hash(&told).as_bytes()[..4]);
    let path = dir.join(format!("evidence-{}-{hash}.json", audited.trajectory.id().0));
    checkpoint_dir::write(&path, &told)?;
    Ok((path, kept))
}
