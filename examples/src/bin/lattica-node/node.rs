//! A node as the command line describes it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use lattica_net::{Access, Identity, Limits, Node, NodeConfig};
use swarm_examples::network::{EVERYWHERE, NetworkArgs};
use swarm_wire::PeerId;

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    #[command(flatten)]
    place: NetworkArgs,
    /// Carry connections of peers that cannot reach each other, and be a rendezvous point: tell who is where to those who
    /// name the same network. The listen addresses (or --external) must be reachable.
    #[arg(long)]
    relay: bool,
    /// Peers that a relay keeps a slot for, so that they can be reached through it [default: 256]
    #[arg(long, value_name = "N", requires = "relay")]
    relay_slots: Option<usize>,
    /// Connections that a relay carries at the same time [default: 128]
    #[arg(long, value_name = "N", requires = "relay")]
    relay_circuits: Option<usize>,
    /// MB (10^6 bytes) that a relay carries over one connection before it ends it; 0 is no limit [default: 0]
    #[arg(long, value_name = "MB", requires = "relay")]
    relay_circuit_mb: Option<u64>,
    /// Hours after which a relay ends a connection that it carries [default: 24]
    #[arg(long, value_name = "HOURS", requires = "relay", value_parser = clap::value_parser!(u64).range(1..=8760))]
    relay_circuit_hours: Option<u64>,
    /// A rendezvous point, with its /p2p/ part, at which to register and to look for peers of the network, whatever the point's
    /// own network is (with --swarm-key the same one); may be given several times.
    #[arg(long, value_name = "ADDR")]
    rendezvous: Vec<String>,
    /// Name of the network; its DHT holds only nodes with the same name.
    #[arg(long, default_value = "default")]
    network: String,
    /// Talk to this peer and the others named like this only; may be given several times.
    #[arg(long, value_name = "PEER_ID")]
    allow: Vec<PeerId>,
    /// Look for peers on the local network.
    #[arg(long)]
    mdns: bool,
    /// Ask the router for a port (UPnP).
    #[arg(long)]
    upnp: bool,
    /// Key file; made when it does not exist. Without it the node has a new identity each time.
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Remember peers here, and find back through them when no bootstrap peer is left.
    #[arg(long, value_name = "FILE")]
    peers_file: Option<PathBuf>,
}

impl NodeArgs {
    /// Starts it.
    pub(crate) async fn start(self) -> anyhow::Result<Node> {
        let identity = match &self.identity {
            Some(path) => Identity::load_or_create(path)?,
            None => Identity::generate(),
        };
        let place = self.place.config(&self.network, EVERYWHERE);
        let place = place.map_err(|faults| anyhow::anyhow!(faults.join("\n")))?;
        let allow = (!self.allow.is_empty()).then(|| self.allow.into_iter().collect());
        let usual = place.limits.clone();
        let hours = |hours| Duration::from_secs(hours * 3600);
        let limits = Limits {
            relay_reservations: self.relay_slots.unwrap_or(usual.relay_reservations),
            relay_circuits: self.relay_circuits.unwrap_or(usual.relay_circuits),
            relay_circuit_bytes: self
                .relay_circuit_mb
                .map_or(usual.relay_circuit_bytes, |mb| mb.saturating_mul(1_000_000)),
            relay_circuit_duration: self.relay_circuit_hours.map_or(usual.relay_circuit_duration, hours),
            ..usual
        };
        let config = NodeConfig {
            limits,
            access: Access { allow, ..place.access },
            rendezvous: self.rendezvous,
            rendezvous_point: self.relay,
            mdns: self.mdns,
            upnp: self.upnp,
            relay_server: self.relay,
            peers_file: self.peers_file,
            ..place
        };
        Ok(Node::start(identity, config).await?)
    }
}
