//! How a program takes part in a network: where it listens, whom it joins through, the key of a private swarm. The same
//! settings as flags and in a file; all that is wrong with them is said at once.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use clap::Args;
use lattica_net::addr::{last_peer, scope};
use lattica_net::{Access, CallError, NetEvent, Node, NodeConfig, load_swarm_key};
use serde::Deserialize;
use swarm_wire::PeerId;
use tokio::sync::broadcast::error::RecvError;

/// QUIC and TCP on all interfaces, free ports.
pub const EVERYWHERE: [&str; 2] = ["/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/0.0.0.0/tcp/0"];
/// The same for programs of this machine only.
pub const THIS_MACHINE: [&str; 2] = ["/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"];
/// A method that nobody has. Its refusal shows that there is somebody who talks to us.
const KNOCK: &str = "examples/knock";
/// How long somebody who took a connection may be silent before that counts as an answer of a busy one.
const KNOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// A node's place in the network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Deserialize)]
#[serde(default)]
pub struct NetworkArgs {
    /// Address of a peer that is in the network already, with its /p2p/ part; repeat for more
    #[arg(long, value_name = "MULTIADDR")]
    pub bootstrap: Vec<String>,
    /// Where to listen; repeat for more [default: QUIC and TCP on all interfaces, free ports]
    #[arg(long, value_name = "MULTIADDR")]
    pub listen: Vec<String>,
    /// An address under which this node can be reached from outside, for example a forwarded port; repeat for more
    #[arg(long, value_name = "MULTIADDR")]
    pub external: Vec<String>,
    /// A relay at which to be reachable from behind a NAT, with its /p2p/ part; repeat for more
    #[arg(long, value_name = "MULTIADDR")]
    pub via: Vec<String>,
    /// Key of a private swarm (made by `lattica-node swarm-key FILE`): only peers that have it too are talked to
    #[arg(long, value_name = "FILE")]
    pub swarm_key: Option<PathBuf>,
}

impl NetworkArgs {
    /// What a node of `network` is started with; it listens at `otherwise` when nothing else was said.
    ///
    /// # Errors
    /// Everything that is wrong, one sentence each: addresses, the key's file, the network's name.
    pub fn config(&self, network: &str, otherwise: [&str; 2]) -> Result<NodeConfig, Vec<String>> {
        let mut faults = Vec::new();
        for (name, addresses, peer) in [
            ("bootstrap", &self.bootstrap, true),
            ("listen", &self.listen, false),
            ("external", &self.external, false),
            ("via", &self.via, true),
        ] {
            for address in addresses {
                if scope(address).is_none() {
                    faults.push(format!(
                        "{name} {address}: must be an address such as /ip4/192.0.2.1/tcp/4001"
                    ));
                } else if peer && last_peer(address).is_none() {
                    faults.push(format!("{name} {address}: must end with /p2p/PEER_ID"));
                }
            }
        }
        let key = self.swarm_key.as_deref().map(load_swarm_key).transpose().unwrap_or_else(|error| {
            faults.push(error.to_string());
            None
        });
        let listen =
            if self.listen.is_empty() { otherwise.map(str::to_owned).to_vec() } else { self.listen.clone() };
        let config = NodeConfig {
            listen,
            bootstrap: self.bootstrap.clone(),
            relays: self.via.clone(),
            external: self.external.clone(),
            network: network.to_owned(),
            access: Access { key, ..Access::default() },
            ..NodeConfig::default()
        };
        if faults.is_empty() {
            faults.extend(config.validate().err().map(|error| error.to_string()));
        }
        if faults.is_empty() { Ok(config) } else { Err(faults) }
    }

    /// The listen addresses with a port of their own, which only one node of a machine can have.
    pub fn fixed_ports(&self) -> impl Iterator<Item = &str> {
        self.listen.iter().map(String::as_str).filter(|address| {
            let parts: Vec<&str> = address.split('/').collect();
            parts.windows(2).any(|pair| matches!(pair[0], "tcp" | "udp") && pair[1] != "0")
        })
    }
}

/// Connects to `address` and waits for a sign that the peer there talks to us. A member of a private swarm hangs up on a
/// node without the key, and the node may see a connection before that.
///
/// # Errors
/// A [`lattica_net::DialError`] when there is no connection; a sentence with the remedy when it is hung up at once.
pub async fn contact(node: &Node, address: &str) -> anyhow::Result<PeerId> {
    let mut events = node.events();
    let peer = node.dial(address).await?;
    let hung_up = async {
        loop {
            match events.recv().await {
                Ok(NetEvent::Disconnected(gone)) if gone == peer => return,
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    };
    let lost = tokio::select! {
        () = hung_up => None,
        answer = node.call(&peer, KNOCK, Bytes::new(), KNOCK_TIMEOUT) => match answer {
            Err(error @ (CallError::Unreachable { .. } | CallError::ConnectionLost { .. })) => Some(error),
            // Any answer is one, and one who is silent may be busy.
            _ => return Ok(peer),
        },
    };
    match lost {
        Some(error) if !node.config().access.is_open() => Err(error.into()),
        _ => bail!(
            "{address} hangs up on this node: it belongs to a private swarm, whose key it needs (--swarm-key FILE; this node may \
             have another one), or it has just ended"
        ),
    }
}

#[cfg(test)]
mod tests {
    use lattica_net::{DialError, Identity, create_swarm_key};

    use super::*;

    const NOBODY: &str = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let args = NetworkArgs {
            bootstrap: vec!["/ip4/192.0.2.1/tcp/4001".to_owned(), NOBODY.to_owned()],
            listen: vec!["nonsense".to_owned(), "/ip4/1.2.3/tcp/0".to_owned()],
            swarm_key: Some(PathBuf::from("no/such/swarm.key")),
            ..NetworkArgs::default()
        };
        let faults = args.config("lab", EVERYWHERE).unwrap_err();
        let named = [
            "bootstrap /ip4/192.0.2.1/tcp/4001: must end",
            "listen nonsense",
            "listen /ip4/1.2.3",
            "swarm.key",
        ];
        assert_eq!(faults.len(), named.len(), "{faults:?}");
        for (fault, named) in faults.iter().zip(named) {
            assert!(fault.contains(named), "{named}: {fault}");
        }
        let name = NetworkArgs::default().config("no spaces here", EVERYWHERE).unwrap_err();
        assert!(name[0].contains("no spaces here"), "{name:?}");
    }

    #[test]
    fn nodes_listen_where_they_are_told_and_else_where_the_program_says() {
        let key = tempfile::tempdir().unwrap();
        let key = key.path().join("swarm.key");
        create_swarm_key(&key).unwrap();
        let mut args =
            NetworkArgs { via: vec![NOBODY.to_owned()], swarm_key: Some(key), ..NetworkArgs::default() };
        let config = args.config("lab", THIS_MACHINE).unwrap();
        assert_eq!(
            (&config.listen[..], &config.relays, &*config.network),
            (&THIS_MACHINE.map(str::to_owned)[..], &args.via, "lab")
        );
        assert!(!config.access.is_open());
        args.listen = ["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/4001/quic-v1"].map(str::to_owned).to_vec();
        assert_eq!(args.config("lab", THIS_MACHINE).unwrap().listen, args.listen);
        assert_eq!(args.fixed_ports().collect::<Vec<_>>(), ["/ip4/0.0.0.0/udp/4001/quic-v1"]);
    }

    #[tokio::test]
    async fn who_hangs_up_is_told_from_who_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let key = create_swarm_key(&dir.path().join("key")).unwrap();
        let access = Access { key: Some(key), ..Access::default() };
        let config = || NodeConfig::loopback("127.0.0.1", "network-test");
        let node = Node::start(Identity::generate(), config()).await.unwrap();
        let other = Node::start(Identity::generate(), config()).await.unwrap();
        let private = Node::start(Identity::generate(), NodeConfig { access, ..config() }).await.unwrap();
        assert_eq!(contact(&node, &other.listen_addrs().await[0]).await.unwrap(), other.peer_id());
        assert!(contact(&node, NOBODY).await.unwrap_err().is::<DialError>());
        for address in private.listen_addrs().await {
            let hung_up = contact(&node, &address).await.unwrap_err();
            assert!(hung_up.to_string().contains("--swarm-key"), "{address}: {hung_up}");
        }
    }
}
