//! `parallax join`: one stage of a swarm.

use std::time::Duration;

use clap::Args;
use parallax_engine::service::membership::{self, JoinOptions, MemberNews};
use parallax_model::DeviceKind;

use super::swarm_node::SwarmNodeArgs;
use crate::program;

/// Take part in a swarm: get some layers of its model, load only those, and compute them for everybody.
///
/// Weights come from the other machines, every block checked, unless --model names a local copy. Without --bootstrap the
/// machines of the local network find each other.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  parallax join --swarm home --bootstrap /ip4/192.168.1.2/tcp/4001/p2p/12D3KooW..."
)]
pub struct JoinArgs {
    #[command(flatten)]
    node: SwarmNodeArgs,
    /// A local copy of the model that the swarm serves
    #[arg(long)]
    model: Option<String>,
    /// Where to compute: cpu, cuda or wgpu (the latter two when compiled in)
    #[arg(long, default_value = "cpu")]
    device: DeviceKind,
    /// How long to look for the head
    #[arg(long, default_value_t = 60)]
    patience_s: u64,
}

/// Runs the command: until ctrl-c or SIGTERM, which tells the head first; a second one ends it at once.
///
/// # Errors
/// No head of that swarm, another model than the local copy, weights that cannot be had or loaded.
pub fn run(args: JoinArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let done = runtime.block_on(join(args));
    // Weights that are being read cannot be stopped, and nobody waits for them.
    runtime.shutdown_background();
    done
}

async fn join(args: JoinArgs) -> anyhow::Result<()> {
    let (node, blocks) = args.node.start().await?;
    let options = JoinOptions {
        swarm: args.node.swarm.clone(),
        bootstrap: args.node.network.bootstrap.clone(),
        memory_bytes: args.node.memory_bytes(args.device)?,
        device: args.device,
        pinned: args.node.layers,
        model: args.model.as_deref().map(super::hub::obtain).transpose()?,
        cache_dir: args.node.cache_dir()?,
        patience: Duration::from_secs(args.patience_s),
    };
    for addr in node.listen_addrs().await {
        program::say(&format!("listening on {addr}"));
    }
    program::say(&format!("peer {}, looking for the head of swarm {}", node.peer_id(), options.swarm));
    let mut last_percent = u64::MAX;
    let tell = move |news| {
        let line = match news {
            MemberNews::Joined { head, model } => format!("joined {head}, which serves {model}"),
            MemberNews::Fetching { done_bytes, total_bytes } => {
                let percent = done_bytes * 100 / total_bytes.max(1);
                if percent / 10 == last_percent / 10 {
                    return;
                }
                last_percent = percent;
                format!("weights: {percent} % of {:.1} MB", total_bytes as f64 / 1e6)
            }
            MemberNews::Loading { layers, from } => format!("loading layers {layers} from {from}"),
            MemberNews::Ready { layers } => format!("ready with layers {layers}"),
            MemberNews::Staging { layers } => format!("getting the next weights of layers {layers}"),
            MemberNews::Staged { failure: None } => "the next weights are here".to_owned(),
            MemberNews::Staged { failure: Some(reason) } => {
                format!("the next weights cannot be had: {reason}")
            }
            MemberNews::Standby => "standing by".to_owned(),
            MemberNews::Failed { reason } => format!("failed: {reason}"),
            other => format!("{other:?}"),
        };
        program::say(&line);
    };
    let outcome = membership::join(&node, Some(&blocks), &options, program::stopping(), tell).await;
    // Others may be fetching weights from here.
    node.drain(program::DRAIN).await;
    Ok(outcome?)
}
