//! Relays, hole punching, the DHT, bootstrap peers: how nodes find and reach each other.

use std::time::Duration;

use bytes::Bytes;
use lattica_net::{CallError, DhtError, DialError, Mapping, NetEvent, Node, NodeConfig, StartError};

use super::{PATIENCE, Transport, config, connect, eventually, hang, pair, reserved, start, stranger, until};

/// A relay, and a node that can only be reached through it.
async fn relayed(transport: Transport, hole_punching: bool) -> (Node, Node, String) {
    let relay = start(NodeConfig { relay_server: true, ..config(transport) }).await;
    let relay_address = relay.listen_addrs().await.remove(0);
    let hidden_config =
        NodeConfig { listen: vec![], relays: vec![relay_address], hole_punching, ..config(transport) };
    let hidden = start(hidden_config).await;
    let address = reserved(&hidden).await;
    (relay, hidden, address)
}

async fn calls_work_over_a_relay(transport: Transport) {
    let (relay, hidden, address) = relayed(transport, false).await;
    hidden.handle("echo", |_, body| async move { Ok(body) });
    // Nobody listens but the relay: whatever arrives came through it.
    let client = start(NodeConfig { listen: vec![], hole_punching: false, ..config(transport) }).await;
    assert_eq!(client.dial(&address).await.unwrap(), hidden.peer_id());
    let info = client.peers().into_iter().find(|p| p.peer == hidden.peer_id()).unwrap();
    assert!(info.connected && info.relayed, "{info:?}");
    for n_bytes in [10usize, 1_000_000] {
        let body = Bytes::from(vec![7; n_bytes]);
        let answer = client.call(&hidden.peer_id(), "echo", body.clone(), PATIENCE).await.unwrap();
        assert_eq!(answer, body);
    }
    assert!(client.link(&hidden.peer_id()).unwrap().path.is_relayed());
    let counted = relay.counters();
    assert_eq!((counted.relay_slots, counted.relay_circuits, counted.relay_circuits_opened), (1, 1, 1));
    assert!(counted.connections_opened >= 2 && counted.relay_refusals == 0, "{counted:?}");
    assert_eq!(hidden.counters().calls_admitted, 2);

    // The relay goes: the call that hangs ends, and both learn that the other is gone.
    let hanging = hang(&hidden, "hang");
    let mut events = client.events();
    let call = {
        let (client, peer) = (client.clone(), hidden.peer_id());
        tokio::spawn(async move { client.call(&peer, "hang", Bytes::new(), Duration::from_secs(600)).await })
    };
    hanging.started.notified().await;
    relay.shutdown().await;
    let error = tokio::time::timeout(PATIENCE, call).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
    until(&mut events, &NetEvent::Disconnected(hidden.peer_id())).await;
}

over_quic_and_tcp!(calls_work_over_a_relay);

#[tokio::test]
async fn a_lost_relay_is_replaced_by_another_one() {
    let relay = || async { start(NodeConfig { relay_server: true, ..config(Transport::Tcp) }).await };
    let relays = [relay().await, relay().await, relay().await];
    let mut addresses = Vec::new();
    for relay in &relays {
        addresses.push(relay.listen_addrs().await.remove(0));
    }
    let hidden =
        start(NodeConfig { listen: vec![], relays: addresses.clone(), ..config(Transport::Tcp) }).await;
    hidden.handle("echo", |_, body| async move { Ok(body) });
    let held =
        || async { hidden.listen_addrs().await.into_iter().filter(|a| a.contains("p2p-circuit")).count() };
    let mut events = hidden.events();
    let two = async {
        while held().await < 2 {
            events.recv().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, two).await.expect("two slots");
    assert!(!hidden.is_connected(&relays[2].peer_id()), "the third one is not asked");
    let mut events = hidden.events();
    relays[0].shutdown().await;
    until(&mut events, &NetEvent::RelayReserved(relays[2].peer_id())).await;
    let client = start(NodeConfig { listen: vec![], hole_punching: false, ..config(Transport::Tcp) }).await;
    let circuit = format!("{}/p2p-circuit/p2p/{}", addresses[2], hidden.peer_id());
    client.dial(&circuit).await.unwrap();
    client.call(&hidden.peer_id(), "echo", Bytes::new(), PATIENCE).await.unwrap();
}

#[tokio::test]
async fn bootstrap_peers_are_found_again_when_they_come_back() {
    let first = start(config(Transport::Tcp)).await;
    let address = first.listen_addrs().await.remove(0);
    let identity = first.identity().clone();
    let node = start(NodeConfig { bootstrap: vec![address.clone()], ..config(Transport::Tcp) }).await;
    let mut events = node.events();
    if !node.is_connected(&first.peer_id()) {
        until(&mut events, &NetEvent::Connected(first.peer_id())).await;
    }
    first.shutdown().await;
    until(&mut events, &NetEvent::Disconnected(first.peer_id())).await;
    let listen = vec![address.split("/p2p/").next().unwrap().to_owned()];
    let again = Node::start(identity, NodeConfig { listen, ..config(Transport::Tcp) }).await.unwrap();
    until(&mut events, &NetEvent::Connected(again.peer_id())).await;
}

#[tokio::test]
async fn providers_records_and_peers_are_found_through_the_dht() {
    let hub = start(config(Transport::Quic)).await;
    let bootstrap = hub.listen_addrs().await;
    let spoke =
        || async { start(NodeConfig { bootstrap: bootstrap.clone(), ..config(Transport::Quic) }).await };
    let (a, b) = (spoke().await, spoke().await);
    // Announced while alone: made when the hub is there.
    a.provide(b"the thing").await.unwrap();
    b.handle("echo", |_, body| async move { Ok(body) });
    let found = async {
        while b.providers(b"the thing").await.unwrap() != [a.peer_id()] {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("the provider is found");
    assert_eq!(b.providers(b"another thing").await.unwrap(), []);

    a.put_record(b"key", b"value".to_vec()).await.unwrap();
    assert_eq!(b.get_record(b"key").await.unwrap(), Some(b"value".to_vec()));
    assert_eq!(b.get_record(b"no key").await.unwrap(), None);
    let error = a.put_record(b"key", vec![0; 100_000]).await.unwrap_err();
    assert!(matches!(error, DhtError::Store { .. }), "{error}");

    // The spokes never met, but each can be called.
    assert_eq!(a.call(&b.peer_id(), "echo", Bytes::from_static(b"hi"), PATIENCE).await.unwrap(), "hi");
}

#[tokio::test]
async fn a_lone_node_says_that_nobody_can_be_asked() {
    let node = start(config(Transport::Quic)).await;
    assert_eq!(node.put_record(b"key", vec![1]).await, Err(DhtError::NoPeers));
    assert_eq!(node.providers(b"key").await, Ok(vec![]));
    let error = node.connect(&stranger()).await.unwrap_err();
    assert!(matches!(error, DialError::NoAddress { .. }), "{error}");
}

#[tokio::test]
async fn a_node_without_a_nat_is_seen_where_it_listens() {
    let (a, b) = pair(Transport::Quic).await;
    let seen = async {
        loop {
            match b.reachability().await.quic {
                Some(report) => return report,
                None => tokio::task::yield_now().await,
            }
        }
    };
    let report = tokio::time::timeout(PATIENCE, seen).await.expect("the peer tells");
    assert_eq!((report.mapping, report.keeps_port, report.n_observers), (Mapping::None, true, 1));
    assert_eq!(a.reachability().await.tcp, None);
}

#[tokio::test]
async fn dials_that_cannot_work_say_why() {
    let (a, b) = pair(Transport::Tcp).await;
    let listening = b.listen_addrs().await.remove(0);
    let base = listening.split("/p2p/").next().unwrap();
    let other = start(config(Transport::Tcp)).await;
    let error = other.dial(&format!("{base}/p2p/{}", stranger())).await.unwrap_err();
    assert!(matches!(&error, DialError::WrongPeer { expected, .. } if *expected == stranger()), "{error}");
    let error = a.dial("not an address").await.unwrap_err();
    assert!(matches!(error, DialError::Address { .. }), "{error}");
    b.shutdown().await;
    let error = other.dial(base).await.unwrap_err();
    assert!(matches!(&error, DialError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn a_taken_port_is_named_with_the_remedy() {
    for transport in [Transport::Quic, Transport::Tcp] {
        let first = start(config(transport)).await;
        let taken = first.listen_addrs().await[0].split("/p2p/").next().unwrap().to_owned();
        let config = NodeConfig { listen: vec![taken.clone()], ..config(transport) };
        let error = Node::start(lattica_net::Identity::generate(), config).await.unwrap_err();
        assert!(matches!(error, StartError::PortInUse { .. }), "{error}");
        assert!(error.to_string().contains(&taken) && error.to_string().contains("another port"), "{error}");
    }
}

#[tokio::test]
async fn addresses_that_lead_nowhere_are_named_at_the_start() {
    let malformed = format!("/ip4/300.0.0.1/tcp/1/p2p/{}", stranger());
    let addresses = || vec![malformed.clone()];
    let base = || config(Transport::Quic);
    for config in [
        NodeConfig { bootstrap: addresses(), ..base() },
        NodeConfig { relays: addresses(), ..base() },
        NodeConfig { rendezvous: addresses(), ..base() },
    ] {
        let error = Node::start(lattica_net::Identity::generate(), config).await.unwrap_err();
        assert!(matches!(&error, StartError::Address { address, .. } if *address == malformed), "{error}");
    }
}

#[tokio::test]
async fn networks_do_not_share_a_dht() {
    let hub = start(config(Transport::Quic)).await;
    let stranger = start(NodeConfig { network: "other".to_owned(), ..config(Transport::Quic) }).await;
    connect(&stranger, &hub).await;
    eventually("the link is measured", || stranger.link(&hub.peer_id()).is_some()).await;
    // Connected, and calls work, but neither serves as the other's table.
    assert_eq!(stranger.put_record(b"key", vec![1]).await, Err(DhtError::NoPeers));
}
