//! A stock libp2p node that knows nothing of ours but identify and ping.

use libp2p::swarm::NetworkBehaviour;
use libp2p::{Swarm, identify, ping};

#[derive(NetworkBehaviour)]
pub(crate) struct Stock {
    identify: identify::Behaviour,
    ping: ping::Behaviour,
}

/// One over TCP and QUIC.
pub(crate) fn stock() -> Swarm<Stock> {
    libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(libp2p::tcp::Config::default(), libp2p::noise::Config::new, libp2p::yamux::Config::default)
        .unwrap()
        .with_quic()
        .with_behaviour(|key| Stock {
            identify: identify::Behaviour::new(identify::Config::new("somebody/1".to_owned(), key.public())),
            ping: ping::Behaviour::default(),
        })
        .unwrap()
        .build()
}
