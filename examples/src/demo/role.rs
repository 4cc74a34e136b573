//! The processes of the demo and what they are started with. Each is this binary with `role NAME`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use lattica_net::{Identity, Liveness, Node, NodeConfig};
use serde_json::json;

use super::auditor::{self, AuditorArgs};
use super::learner::{self, LearnerArgs};
use super::process::say;
use super::worker::{self, WorkerArgs};
use crate::parallax::join::{self, JoinArgs};
use crate::parallax::serve::{self, ServeArgs};

/// Name of the demo's network.
pub const NETWORK: &str = "demo";

/// A process of the demo.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// The node that everyone finds the others through.
    Bootstrap(NodeArgs),
    /// Trains.
    Learner(LearnerArgs),
    /// Samples rollouts.
    Worker(WorkerArgs),
    /// Recomputes challenged rollouts.
    Auditor(AuditorArgs),
    /// Head of the chat pipeline.
    Serve(Box<ServeArgs>),
    /// A stage of the chat pipeline.
    Join(JoinArgs),
}

/// Who a process is in the network, and whom it knows.
#[derive(Debug, Clone, Args)]
pub struct NodeArgs {
    /// Key file.
    #[arg(long)]
    identity: PathBuf,
    /// Loopback address to listen on; every process has its own.
    #[arg(long)]
    ip: String,
    /// Addresses of known peers.
    #[arg(long)]
    bootstrap: Vec<String>,
    /// Threads of the CPU kernels.
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

impl NodeArgs {
    /// Starts the node.
    ///
    /// # Errors
    /// A key file that cannot be read, an address that cannot be listened on.
    pub async fn start(&self) -> anyhow::Result<Node> {
        parallax_kernels::pool::set_threads(self.threads);
        let config = NodeConfig {
            bootstrap: self.bootstrap.clone(),
            // Everything runs on a few busy cores: be slow to call a silent peer dead.
            liveness: Liveness { quic_idle: Duration::from_secs(8), ..Liveness::default() },
            ..NodeConfig::loopback(&self.ip, NETWORK)
        };
        Node::start(Identity::load_or_create(&self.identity)?, config)
            .await
            .context("starting the network node")
    }
}

impl Role {
    /// Plays the role until it is over or the process is told to end.
    ///
    /// # Errors
    /// What the role cannot do.
    pub fn play(self) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        match self {
            Self::Bootstrap(args) => runtime.block_on(bootstrap(args)),
            Self::Learner(args) => runtime.block_on(learner::run(args)),
            Self::Worker(args) => runtime.block_on(worker::run(args)),
            Self::Auditor(args) => runtime.block_on(auditor::run(args)),
            Self::Serve(args) => serve::run(*args),
            Self::Join(args) => join::run(args),
        }
    }
}

async fn bootstrap(args: NodeArgs) -> anyhow::Result<()> {
    let node = args.start().await?;
    say(&json!({"event": "ready", "peer": node.peer_id(), "addrs": node.listen_addrs().await}));
    std::future::pending::<()>().await;
    Ok(())
}
