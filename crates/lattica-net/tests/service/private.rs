//! Private swarms: members work together over every transport, and whoever cannot prove the key is served nothing.

use bytes::Bytes;
use futures::StreamExt;
use lattica_net::access::Refusal;
use lattica_net::{Access, DialError, NetEvent, Node, NodeConfig, SwarmKey};
use libp2p::swarm::SwarmEvent;
use libp2p::{identify, ping};

use super::stock::{StockEvent, stock};
use super::{PATIENCE, Transport, config, connect, eventually, reserved, start, until};

fn keyed(transport: Transport, key: u8) -> NodeConfig {
    let access = Access { key: Some(SwarmKey::from_bytes([key; 32])), ..Access::default() };
    NodeConfig { access, ..config(transport) }
}

async fn refuses(dialler: &Node, listener: &Node, expected: Refusal) {
    let address = listener.listen_addrs().await.remove(0);
    let error = dialler.dial(&address).await.unwrap_err();
    assert_eq!(error, DialError::Refused { peer: listener.peer_id().to_string(), refusal: expected });
    assert!(!dialler.is_connected(&listener.peer_id()));
    // An open listener sees a connection that ends at once; a private one never sees any.
    eventually("it is gone", || !listener.is_connected(&dialler.peer_id())).await;
}

async fn only_members_get_in(transport: Transport) {
    let (a, b) = (start(keyed(transport, 1)).await, start(keyed(transport, 1)).await);
    b.handle("echo", |_, body| async move { Ok(body) });
    connect(&a, &b).await;
    assert_eq!(a.call(&b.peer_id(), "echo", Bytes::from_static(b"in"), PATIENCE).await.unwrap(), "in");
    let other_key = start(keyed(transport, 2)).await;
    refuses(&other_key, &b, Refusal::WrongKey).await;
    refuses(&b, &other_key, Refusal::WrongKey).await;
    // The name of the network is part of the proof.
    let other_network = start(NodeConfig { network: "other".to_owned(), ..keyed(transport, 1) }).await;
    refuses(&other_network, &b, Refusal::WrongKey).await;
    // A member that meets an open node refuses it, and the other way round.
    let open = start(config(transport)).await;
    refuses(&b, &open, Refusal::NoProof).await;
    let mut events = open.events();
    let address = b.listen_addrs().await.remove(0);
    if open.dial(&address).await.is_ok() {
        until(&mut events, &NetEvent::Disconnected(b.peer_id())).await;
    }
    assert!(!b.is_connected(&open.peer_id()));
    assert_eq!(a.call(&b.peer_id(), "echo", Bytes::from_static(b"on"), PATIENCE).await.unwrap(), "on");
}

over_quic_and_tcp!(only_members_get_in);

async fn narrows(transport: Transport, key: Option<SwarmKey>) {
    let (friend, stranger) = (lattica_net::Identity::generate(), lattica_net::Identity::generate());
    let access = Access { key: key.clone(), allow: Some([friend.peer_id()].into()) };
    let node = start(NodeConfig { access, ..config(transport) }).await;
    node.handle("echo", |_, body| async move { Ok(body) });
    let member = || NodeConfig { access: Access { key: key.clone(), allow: None }, ..config(transport) };
    let friend = Node::start(friend, member()).await.unwrap();
    let stranger = Node::start(stranger, member()).await.unwrap();
    connect(&friend, &node).await;
    friend.call(&node.peer_id(), "echo", Bytes::new(), PATIENCE).await.unwrap();
    if key.is_some() {
        refuses(&stranger, &node, Refusal::NotAllowedThere).await;
    } else {
        // Without a key there is no handshake in which the reason could be told: the connection just ends.
        let address = node.listen_addrs().await.remove(0);
        let mut events = stranger.events();
        if stranger.dial(&address).await.is_ok() {
            until(&mut events, &NetEvent::Disconnected(node.peer_id())).await;
        }
        assert!(!node.is_connected(&stranger.peer_id()));
    }
    refuses(&node, &stranger, Refusal::NotAllowed).await;
}

#[tokio::test]
async fn an_allow_list_narrows_the_circle() {
    for transport in [Transport::Quic, Transport::Tcp] {
        narrows(transport, Some(SwarmKey::from_bytes([4; 32]))).await;
        narrows(transport, None).await;
    }
}

async fn members_meet_over_a_relay_of_their_swarm(transport: Transport) {
    let relay = start(NodeConfig { relay_server: true, ..keyed(transport, 7) }).await;
    let relays = relay.listen_addrs().await;
    let hidden = start(NodeConfig { listen: vec![], relays: relays.clone(), ..keyed(transport, 7) }).await;
    hidden.handle("echo", |_, body| async move { Ok(body) });
    reserved(&hidden).await;
    let address = format!("{}/p2p-circuit/p2p/{}", relays[0], hidden.peer_id());
    let client = start(NodeConfig { listen: vec![], hole_punching: false, ..keyed(transport, 7) }).await;
    client.dial(&address).await.unwrap();
    let answer = client.call(&hidden.peer_id(), "echo", Bytes::from_static(b"x"), PATIENCE).await.unwrap();
    assert_eq!(answer, "x");
}

over_quic_and_tcp!(members_meet_over_a_relay_of_their_swarm);

/// A stock libp2p node speaks identify and ping as soon as it is connected: it must get no answer to either.
#[tokio::test]
async fn a_stranger_is_told_nothing_not_even_who_we_are() {
    let node = start(keyed(Transport::Tcp, 3)).await;
    let mut stock = stock();
    let mut events = node.events();
    stock.dial(node.listen_addrs().await[0].parse::<libp2p::Multiaddr>().unwrap()).unwrap();
    let talking = async {
        loop {
            match stock.select_next_some().await {
                SwarmEvent::Behaviour(StockEvent::Identify(identify::Event::Received { info, .. })) => {
                    panic!("told: {info:?}")
                }
                SwarmEvent::Behaviour(StockEvent::Ping(ping::Event { result: Ok(_), .. })) => {
                    panic!("ponged")
                }
                SwarmEvent::ConnectionClosed { .. } => return,
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, talking).await.expect("the connection is closed");
    assert!(node.connected_peers().is_empty());
    assert!(!matches!(events.try_recv(), Ok(NetEvent::Connected(_))), "the swarm never saw the connection");
    eventually("nothing is remembered", || node.peers().is_empty()).await;
}
