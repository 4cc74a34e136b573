//! Options of programs that a learner knows by their peer id: assistants and auditors.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use lattica_net::{Identity, NodeConfig};
use serde_json::json;

use crate::network::{EVERYWHERE, NetworkArgs};
use crate::program;

/// Which learner, over which network, and with what.
#[derive(Debug, Clone, Args)]
pub struct LearnerArgs {
    /// Address of the learner, with its /p2p/ part
    #[arg(long)]
    trainer: Option<String>,
    /// Print the peer id of --identity, for the learner's settings, and end
    #[arg(long)]
    show_peer: bool,
    /// How long to dial a learner that does not answer; an assistant also one that was lost
    #[arg(long, default_value_t = 60)]
    patience_s: u64,
    /// `tiny`, a directory, a .gguf file, or a repository in the local hub cache; the one that the learner has
    #[arg(long, default_value = "tiny")]
    pub model: String,
    /// Threads of the CPU kernels; 0: all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// The network's name, as the learner has it
    #[arg(long, default_value = "default")]
    network: String,
    #[command(flatten)]
    place: NetworkArgs,
    /// Print what happens as JSON lines
    #[arg(long)]
    pub json: bool,
}

/// What is needed to go to the learner.
#[derive(Debug)]
pub struct Prepared {
    /// Where the learner is.
    pub trainer: String,
    /// Who goes there.
    pub identity: Identity,
    /// How it is connected.
    pub config: NodeConfig,
}

impl LearnerArgs {
    /// How long to dial.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.patience_s)
    }

    /// Reads the key and sets the threads; `None` when all that was wanted is the line for `setting` of the learner's `[run]`.
    ///
    /// # Errors
    /// A key file that cannot be read or made, no learner, addresses or keys of the network that are none.
    pub fn prepare(&self, key: &Path, setting: &str) -> anyhow::Result<Option<Prepared>> {
        let identity = Identity::load_or_create(key)?;
        if self.show_peer {
            program::tell(&format!("{setting} = [\"{}\"]", identity.peer_id()), self.json)?;
            if self.json {
                program::report(&json!({"peer": identity.peer_id()}))?;
            }
            return Ok(None);
        }
        let trainer = self.trainer.clone().context("no learner named; give --trainer ADDRESS/p2p/PEER_ID")?;
        let config = self.place.config(&self.network, EVERYWHERE);
        let config = config.map_err(|faults| anyhow::anyhow!(faults.join("\n")))?;
        if self.threads > 0 {
            parallax_kernels::pool::set_threads(self.threads);
        }
        Ok(Some(Prepared { trainer, identity, config }))
    }
}
