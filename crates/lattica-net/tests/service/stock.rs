//! A stock libp2p node that knows nothing of ours but identify and ping, and what every stock node of these tests needs.

use futures::StreamExt as _;
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, Swarm, identify, ping};

use super::{PATIENCE, Transport};

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

/// The loopback address that all share, and a free port.
pub(crate) fn loopback(transport: Transport) -> &'static str {
    match transport {
        Transport::Quic => "/ip4/127.0.0.1/udp/0/quic-v1",
        Transport::Tcp => "/ip4/127.0.0.1/tcp/0",
    }
}

/// Has a swarm listen there; its address, without its peer.
pub(crate) async fn listening<B: NetworkBehaviour>(swarm: &mut Swarm<B>, transport: Transport) -> Multiaddr {
    swarm.listen_on(loopback(transport).parse().unwrap()).unwrap();
    let address = async {
        loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                return address;
            }
        }
    };
    tokio::time::timeout(PATIENCE, address).await.expect("it listens")
}

/// Runs a swarm beside `work`.
pub(crate) async fn beside<B: NetworkBehaviour, T>(swarm: &mut Swarm<B>, work: impl Future<Output = T>) -> T {
    let driving = async {
        loop {
            swarm.select_next_some().await;
        }
    };
    tokio::select! {
        () = driving => unreachable!("it has no end"),
        done = work => done,
    }
}
