//! The learner's role: the settings of the demo, and what happens as lines for its parent.

use std::path::PathBuf;

use echo_trainer::{RunConfig, TrainerConfig};
use swarm_wire::PeerId;

use super::Mode;
use super::process::say;
use super::role::NodeArgs;
use crate::training::run::learn;

/// Options of the learner.
#[derive(Debug, Clone, clap::Args)]
pub struct LearnerArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// The model to train.
    #[arg(long, default_value = "tiny")]
    model: String,
    /// The environment.
    #[arg(long, default_value = "arithmetic")]
    env: String,
    /// Directory of the checkpoint and the journal.
    #[arg(long)]
    dir: PathBuf,
    /// Workers to wait for before the first lease.
    #[arg(long)]
    workers: usize,
    /// The auditor's peer id.
    #[arg(long)]
    auditor: PeerId,
    /// Share of trajectories that are audited.
    #[arg(long)]
    audit_fraction: f64,
    /// Trajectories of a new worker that are always audited.
    #[arg(long)]
    audit_first: u32,
    /// Seed of sampling and of the adapter's first values.
    #[arg(long)]
    seed: u64,
    /// How rollouts and training alternate.
    #[arg(long, value_enum, default_value = "sequential")]
    mode: Mode,
    /// Versions that a rollout may lag behind.
    #[arg(long, default_value_t = 0)]
    staleness: u64,
    /// Learner steps.
    #[arg(long)]
    steps: u64,
    /// Learning rate, when not the trainer's.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Most tokens of one episode, when not the trainer's.
    #[arg(long)]
    completion_tokens: Option<u32>,
    /// End before this many seconds have passed.
    #[arg(long)]
    seconds: u64,
    /// Held-out tasks of one evaluation.
    #[arg(long)]
    eval_tasks: u64,
}

/// Runs the learner until its steps or its time are over.
///
/// # Errors
/// No workers, a broken invariant, a full disk, a model that cannot be trained.
pub async fn run(args: LearnerArgs) -> anyhow::Result<()> {
    let mut trainer =
        TrainerConfig { steps: args.steps, max_staleness: args.staleness, ..TrainerConfig::default() };
    trainer.optim.learning_rate = args.learning_rate.unwrap_or(trainer.optim.learning_rate);
    trainer.max_completion_tokens = args.completion_tokens.unwrap_or(trainer.max_completion_tokens);
    let config = RunConfig {
        seed: args.seed,
        environment: args.env,
        mode: args.mode.into(),
        workers: args.workers,
        auditors: vec![args.auditor],
        audit_fraction: args.audit_fraction,
        audit_first: args.audit_first,
        eval_tasks: args.eval_tasks,
        seconds: args.seconds,
        trainer,
        ..RunConfig::default()
    };
    let node = args.node.start().await?;
    learn(node, &args.model, config, &args.dir, |event| {
        say(event);
        Ok(())
    })
    .await
}
