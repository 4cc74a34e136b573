//! A worker's role: sample what the learner leases. A cheater loads other weights than it says.

use echo_rollout::service::{InFlight, WorkerError};
use parallax_model::{BaseDtype, Checkpoint, WeightDtype};
use serde_json::json;

use super::process::say;
use super::role::NodeArgs;
use crate::rollouts::{WorkerOptions, start_worker};

/// Options of a worker.
#[derive(Debug, Clone, clap::Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// The learner's address.
    #[arg(long)]
    trainer: String,
    /// The model.
    #[arg(long)]
    model: String,
    /// The environment.
    #[arg(long)]
    env: String,
    /// Weights in memory. The learner asks for f32; a cheater computes with fewer bits and says nothing.
    #[arg(long, default_value = "f32")]
    dtype: WeightDtype,
}

/// Runs the worker until the learner has ended or has excluded it.
///
/// # Errors
/// A model that cannot be loaded, a learner that cannot be reached.
pub async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let node = args.node.start().await?;
    let options = WorkerOptions {
        trainer: args.trainer.clone(),
        patience: std::time::Duration::from_secs(60),
        environment: args.env.clone(),
        environment_program: Vec::new(),
        base_dtype: BaseDtype::F32,
        dtype: args.dtype,
        leases: 64,
        cache_tokens: 8192,
        in_flight: InFlight::default(),
    };
    let worker = start_worker(node.clone(), &checkpoint, &options).await?;
    let stats = worker.stats();
    say(&json!({"event": "ready", "peer": node.peer_id()}));
    let ended = worker.run().await;
    let reason = match ended {
        Ok(()) => "the run is finished".to_owned(),
        Err(error @ (WorkerError::Refused { .. } | WorkerError::TrainerLost { .. })) => error.to_string(),
        Err(error) => return Err(error.into()),
    };
    say(&json!({"event": "ended", "peer": node.peer_id(), "reason": reason, "stats": *stats.borrow()}));
    Ok(())
}
