//! A node as the command line describes it.

use std::path::PathBuf;

use clap::Args;
use lattica_net::{Access, Identity, Node, NodeConfig, load_swarm_key};
use swarm_wire::PeerId;

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// Address to listen on; may be given several times. Port 0 picks a free one.
    #[arg(long, value_name = "MULTIADDR", default_values = ["/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/0.0.0.0/tcp/0"])]
    listen: Vec<String>,
    /// Carry connections of peers that cannot reach each other, and be a rendezvous point: tell who is where to those who
    /// name the same network. The listen addresses (or --external) must be reachable.
    #[arg(long)]
    relay: bool,
    /// A node to join through, with its /p2p/ part; may be given several times.
    #[arg(long, value_name = "ADDR")]
    pub(crate) bootstrap: Vec<String>,
    /// A relay at which to be reachable, with its /p2p/ part; may be given several times.
    #[arg(long, value_name = "ADDR")]
    via: Vec<String>,
    /// A rendezvous point, with its /p2p/ part, at which to register and to look for peers of the network, whatever the point's
    /// own network is (with --swarm-key the same one); may be given several times.
    #[arg(long, value_name = "ADDR")]
    rendezvous: Vec<String>,
    /// An address under which this node can be reached from outside; may be given several times.
    #[arg(long, value_name = "MULTIADDR")]
    external: Vec<String>,
    /// Name of the network; its DHT holds only nodes with the same name.
    #[arg(long, default_value = "default")]
    network: String,
    /// Key of a private swarm (made by `lattica-node swarm-key FILE`): only peers that have it too are talked to.
    #[arg(long, value_name = "FILE")]
    swarm_key: Option<PathBuf>,
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
        let config = NodeConfig {
            listen: self.listen,
            bootstrap: self.bootstrap,
            relays: self.via,
            rendezvous: self.rendezvous,
            rendezvous_point: self.relay,
            external: self.external,
            network: self.network,
            access: Access {
                key: self.swarm_key.as_deref().map(load_swarm_key).transpose()?,
                allow: (!self.allow.is_empty()).then(|| self.allow.into_iter().collect()),
            },
            mdns: self.mdns,
            upnp: self.upnp,
            relay_server: self.relay,
            peers_file: self.peers_file,
            ..NodeConfig::default()
        };
        Ok(Node::start(identity, config).await?)
    }
}
