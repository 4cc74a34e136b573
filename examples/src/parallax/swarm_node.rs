//! The node behind `parallax serve` and `parallax join`: where it listens, who it is, where blocks are kept.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use clap::Args;
use lattica_bitswap::{Blocks, FsStore, StoreError};
use lattica_net::{Identity, Liveness, Node, NodeConfig};
use parallax_model::DeviceKind;
use swarm_wire::LayerRange;

use crate::network::{EVERYWHERE, NetworkArgs};

/// Name of the network that all swarms share; each looks for its own head in it.
const NETWORK: &str = "default";
/// Processes of one machine that share a cache directory; each has a block store of its own in it.
const MAX_STORES: usize = 64;

/// How this machine takes part in the network.
#[derive(Debug, Clone, Args)]
pub struct SwarmNodeArgs {
    /// Name of the swarm: everybody who gives the same one works together
    #[arg(long)]
    pub swarm: String,
    /// Without a bootstrap peer, peers on the local network are found by mDNS.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Key file: keeps the peer id over restarts [default: a new id each time]
    #[arg(long, value_name = "FILE")]
    pub identity: Option<PathBuf>,
    /// Where weights from peers are kept [default: the user's cache directory]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Memory for weights and cache, gigabytes [default: 70 % of what is available]. A GPU's has to be said
    #[arg(long, value_name = "G")]
    pub memory_gb: Option<f64>,
    /// Take exactly these layers
    #[arg(long, value_name = "A..B")]
    pub layers: Option<LayerRange>,
    /// Threads of the CPU kernels [default: all cores]. The result does not depend on it
    #[arg(long)]
    pub threads: Option<usize>,
}

impl SwarmNodeArgs {
    /// Starts the node and its block exchange.
    ///
    /// # Errors
    /// A taken port, a malformed address, a cache directory that cannot be written.
    pub async fn start(&self) -> anyhow::Result<(Node, Blocks)> {
        if let Some(threads) = self.threads {
            anyhow::ensure!(threads > 0, "--threads must be at least 1");
            parallax_kernels::pool::set_threads(threads);
        }
        let identity = match &self.identity {
            Some(path) => Identity::load_or_create(path)?,
            None => Identity::generate(),
        };
        let config = NodeConfig {
            mdns: self.network.bootstrap.is_empty(),
            // A dead stage has to be known within two seconds.
            liveness: Liveness {
                quic_idle: Duration::from_millis(1200),
                quic_keep_alive: Duration::from_millis(200),
                ..Liveness::default()
            },
            ..self.network.config(NETWORK, EVERYWHERE).map_err(|faults| anyhow!(faults.join("\n")))?
        };
        let node = Node::start(identity, config).await?;
        let blocks = Blocks::start(node.clone(), Arc::new(self.store()?));
        Ok((node, blocks))
    }

    /// The first store that no other process of this machine has open.
    fn store(&self) -> anyhow::Result<FsStore> {
        let base = self.cache_dir()?;
        for n in 1..=MAX_STORES {
            match FsStore::open(base.join(format!("blocks-{n}"))) {
                Err(StoreError::InUse { .. }) => {}
                opened => return Ok(opened?),
            }
        }
        anyhow::bail!(
            "{MAX_STORES} processes use {} already: give this one its own --cache-dir",
            base.display()
        )
    }

    /// The directory for weights from peers.
    ///
    /// # Errors
    /// When none was given and the user has no cache directory.
    pub fn cache_dir(&self) -> anyhow::Result<PathBuf> {
        if let Some(dir) = &self.cache_dir {
            return Ok(dir.clone());
        }
        let base = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
        Ok(base.context("no HOME to keep weights in: pass --cache-dir")?.join("open-intelligence-stack"))
    }

    /// Bytes for weights and cache on `device`.
    ///
    /// # Errors
    /// An impossible number; none for a GPU.
    pub fn memory_bytes(&self, device: DeviceKind) -> anyhow::Result<u64> {
        let Some(gb) = self.memory_gb else {
            anyhow::ensure!(
                device == DeviceKind::Cpu,
                "how much memory a GPU may give is not known here: say --memory-gb with --device {device}"
            );
            let mut system = sysinfo::System::new();
            system.refresh_memory();
            return Ok(system.available_memory() / 10 * 7);
        };
        anyhow::ensure!(gb.is_finite() && gb > 0.0, "--memory-gb must be above 0");
        Ok((gb * 1e9) as u64)
    }
}
