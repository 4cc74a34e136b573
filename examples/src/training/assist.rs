//! `training-swarm assist`: computes shares of a learner's steps on this machine.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use echo_trainer::RunConfig;
use echo_trainer::service::{Assistant, AssistantError, AssistantEvent};
use lattica_net::Node;
use parallax_model::Checkpoint;
use serde_json::json;

use crate::learner_args::{LearnerArgs, Prepared};
use crate::program;
use crate::rollouts::{reach, trainable};

/// Compute shares of a learner's steps: the learner names this machine's peer id in run.assistants.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "The learner's batch is cut for itself and everybody in run.assistants; gradients are added in the order of the shares, so that the \
                  weights are the same, bit for bit, whether an assistant is there or not. One that is late, dies or sends what is no answer is left out, \
                  and its share is computed by the others.\n\nReport (--json): {\"event\":\"ready\",peer,run}, {\"event\":\"holds\",version,hash} for weights, \
                  {\"event\":\"share\",step,share,seconds}; the last line is {\"event\":\"done\",shares,version,hash}.\n\nExample:\n  training-swarm assist \
                  --trainer /ip4/192.0.2.1/udp/4001/quic-v1/p2p/12D3KooW... --identity assistant.key"
)]
pub struct AssistArgs {
    #[command(flatten)]
    learner: LearnerArgs,
    /// Key file; made when it does not exist. The learner knows this machine by its peer id
    #[arg(long, default_value = "assistant.key")]
    identity: PathBuf,
}

/// Between two tries to be let in.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs it.
///
/// # Errors
/// A learner that cannot be reached or refuses, a model that is not the learner's.
pub fn run(args: &AssistArgs) -> anyhow::Result<()> {
    match args.learner.prepare(&args.identity, "assistants")? {
        Some(prepared) => tokio::runtime::Runtime::new()?.block_on(assist(&args.learner, prepared)),
        None => Ok(()),
    }
}

/// What it has done.
#[derive(Default)]
struct Done {
    shares: u64,
    /// The newest weights, as the event says it.
    holds: serde_json::Value,
    /// When the learner was there last.
    served: Option<Instant>,
}

async fn assist(args: &LearnerArgs, prepared: Prepared) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let id = checkpoint.id()?;
    let node = Node::start(prepared.identity, prepared.config).await?;
    program::say(&format!("this assistant is {}", node.peer_id()));
    let mut done = Done::default();
    let mut signal = Box::pin(program::asked_to_stop());
    // A learner that was lost may come back, and one that is there may not be ready.
    let patience = args.patience();
    let mut missed = Instant::now();
    let ended = loop {
        let error = tokio::select! {
            served = serve(args, &prepared.trainer, &node, &checkpoint, &id, &mut done) => match served {
                Ok(()) => break Ok("the run is finished"),
                Err(error) => error,
            },
            asked = &mut signal => break asked.map(|()| "asked to stop").map_err(Into::into),
        };
        if let Some(served) = done.served.take() {
            missed = served;
        }
        let passing = error.downcast_ref().is_some_and(AssistantError::may_pass);
        if !passing || missed.elapsed() >= patience {
            break Err(error);
        }
        program::say(&format!("{error}; next try in {} s", PAUSE.as_secs()));
        tokio::time::sleep(PAUSE).await;
    };
    node.shutdown().await;
    let ended = ended?;
    program::say(&format!("{ended}; {} shares computed", done.shares));
    if !args.json {
        return Ok(());
    }
    let (version, hash) = (&done.holds["version"], &done.holds["hash"]);
    program::report(&json!({"event": "done", "shares": done.shares, "version": version, "hash": hash}))
}

/// Takes part until the run is over.
async fn serve(
    args: &LearnerArgs,
    trainer: &str,
    node: &Node,
    checkpoint: &Checkpoint,
    id: &str,
    done: &mut Done,
) -> anyhow::Result<()> {
    let learner = reach(node, trainer, args.patience()).await?;
    let assistant = Assistant::join(node, &learner, id).await?;
    let (run, settings) = (assistant.run(), assistant.trainer().clone());
    if args.json {
        program::report(&json!({"event": "ready", "peer": node.peer_id(), "run": run}))?;
    }
    let config = RunConfig { seed: run.0, trainer: settings, ..RunConfig::default() };
    let policy = trainable(checkpoint, &config)?;
    program::say(&format!("assisting run {run} at {learner}"));
    let mut told = Ok(());
    let mut tell = |event: AssistantEvent| -> anyhow::Result<()> {
        let line = serde_json::to_value(event)?;
        match event {
            AssistantEvent::Holds { .. } => done.holds = line.clone(),
            _ => done.shares += 1,
        }
        if args.json { program::report(&line) } else { Ok(()) }
    };
    let served = assistant.serve(policy, |event| {
        if told.is_ok() {
            told = tell(event);
        }
    });
    let served = served.await;
    done.served = Some(Instant::now());
    told?;
    Ok(served?)
}
