//! Direct connections in place of relayed ones, between our own nodes and with stock libp2p nodes on either side. What real NATs
//! do to them, `cargo xtask netlab` tries.

use bytes::Bytes;
use futures::StreamExt;
use lattica_net::{NetEvent, Node, NodeConfig};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, Swarm, dcutr, identify, noise, relay, tcp, yamux};
use swarm_wire::PeerId;

use crate::stock::{beside, listening, loopback};
use crate::{PATIENCE, Transport, config, eventually, reserved, start, until};

/// Our own relay over a transport, and its address.
async fn relay_over(transport: Transport) -> (Node, String) {
    let relay = start(NodeConfig { relay_server: true, ..config(transport) }).await;
    let address = relay.listen_addrs().await.remove(0);
    (relay, address)
}

/// A node that dials nobody by itself. On an address of its own in 127/8 it would not be reachable where it is seen over TCP: a
/// dial that shares the listener's port leaves from 127.0.0.1.
fn quiet(transport: Transport) -> NodeConfig {
    NodeConfig { listen: vec![loopback(transport).to_owned()], autonat: false, ..config(transport) }
}

async fn a_relayed_connection_becomes_direct_and_calls_go_on(transport: Transport) {
    let (relay, via) = relay_over(transport).await;
    let hidden = start(NodeConfig { relays: vec![via.clone()], ..quiet(transport) }).await;
    hidden.handle("echo", |_, body| async move { Ok(body) });
    let address = reserved(&hidden).await;
    let client = start(NodeConfig { bootstrap: vec![via], ..quiet(transport) }).await;
    eventually("the client knows the relay", || client.is_connected(&relay.peer_id())).await;
    let mut events = client.events();
    client.dial(&address).await.unwrap();
    let became_direct = NetEvent::DirectPath(hidden.peer_id());
    let calling = async {
        loop {
            client.call(&hidden.peer_id(), "echo", Bytes::from_static(b"x"), PATIENCE).await.unwrap();
        }
    };
    tokio::select! {
        () = calling => {}
        () = until(&mut events, &became_direct) => {}
    }
    let stream = client.open_stream(&hidden.peer_id(), "/lattica/link/1.0.0").await.unwrap();
    assert!(!stream.is_relayed());
    // Either path is measured for itself.
    let relayed = || -> Vec<bool> {
        client.links(&hidden.peer_id()).iter().map(|link| link.path.is_relayed()).collect()
    };
    eventually("both paths are measured", || relayed() == [false, true]).await;
    client.call(&hidden.peer_id(), "echo", Bytes::from_static(b"x"), PATIENCE).await.unwrap();
}

over_quic_and_tcp!(a_relayed_connection_becomes_direct_and_calls_go_on);

#[derive(NetworkBehaviour)]
struct Stock {
    relay: relay::client::Behaviour,
    dcutr: dcutr::Behaviour,
    identify: identify::Behaviour,
}

/// A stock libp2p node that listens and has met the relay.
async fn stock(relay: &Node, via: &str) -> Swarm<Stock> {
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_relay_client(noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|key, relay| Stock {
            relay,
            dcutr: dcutr::Behaviour::new(key.public().to_peer_id()),
            identify: identify::Behaviour::new(identify::Config::new("somebody/1".to_owned(), key.public())),
        })
        .unwrap()
        .build();
    listening(&mut swarm, Transport::Tcp).await;
    swarm.dial(via.parse::<Multiaddr>().unwrap()).unwrap();
    let relay = relay.peer_id().to_string();
    // It names addresses only once the relay has told where it is seen.
    drive(&mut swarm, |event| {
        let SwarmEvent::Behaviour(StockEvent::Identify(identify::Event::Received { peer_id, .. })) = event
        else {
            return false;
        };
        peer_id.to_string() == relay
    })
    .await;
    swarm
}

/// Runs it until something happens.
async fn drive(swarm: &mut Swarm<Stock>, mut wanted: impl FnMut(&SwarmEvent<StockEvent>) -> bool) {
    let found = async { while !wanted(&swarm.select_next_some().await) {} };
    tokio::time::timeout(PATIENCE, found).await.expect("the stock node gets on");
}

fn id(swarm: &Swarm<Stock>) -> PeerId {
    swarm.local_peer_id().to_string().parse().unwrap()
}

fn is_direct(event: &SwarmEvent<StockEvent>, peer: &PeerId) -> bool {
    matches!(event, SwarmEvent::ConnectionEstablished { peer_id, endpoint, .. }
        if peer_id.to_string() == peer.to_string() && !endpoint.is_relayed())
}

#[tokio::test]
async fn a_stock_node_that_dials_us_over_a_relay_is_punched_through_to() {
    let (relay, via) = relay_over(Transport::Tcp).await;
    let hidden = start(NodeConfig { relays: vec![via.clone()], ..quiet(Transport::Tcp) }).await;
    let address = reserved(&hidden).await;
    let mut stock = stock(&relay, &via).await;
    let peer = id(&stock);
    stock.dial(address.parse::<Multiaddr>().unwrap()).unwrap();
    drive(&mut stock, |event| is_direct(event, &hidden.peer_id())).await;
    let known = eventually("we see it, too", || hidden.paths(&peer).iter().any(|path| !path.relayed));
    beside(&mut stock, known).await;
}

#[tokio::test]
async fn a_stock_node_that_we_dial_over_a_relay_punches_through_to_us() {
    let (relay, via) = relay_over(Transport::Tcp).await;
    let mut stock = stock(&relay, &via).await;
    let peer = id(&stock);
    let circuit = format!("{via}/p2p-circuit");
    stock.listen_on(circuit.parse().unwrap()).unwrap();
    drive(&mut stock, |event| {
        matches!(event, SwarmEvent::NewListenAddr { address, .. } if address.to_string().contains("p2p-circuit"))
    })
    .await;
    let client = start(NodeConfig { bootstrap: vec![via], ..quiet(Transport::Tcp) }).await;
    eventually("the client knows the relay", || client.is_connected(&relay.peer_id())).await;
    let local = client.peer_id();
    let dialling = async {
        client.dial(&format!("{circuit}/p2p/{peer}")).await.unwrap();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = dialling => {}
        () = drive(&mut stock, |event| is_direct(event, &local)) => {}
    }
}
