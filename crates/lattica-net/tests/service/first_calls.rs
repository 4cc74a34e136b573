//! First calls, which leave before the peer has agreed to their stream: over fresh circuits, to peers that do not know the protocol,
//! and over a relay that is not ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lattica_net::{CallError, CallOptions, DialError, Node, NodeConfig};
use libp2p::swarm::NetworkBehaviour;
use libp2p::{Multiaddr, Swarm, identify, noise, relay, tcp, yamux};
use swarm_wire::PeerId;

use super::stock::{beside, listening, stock};
use super::{PATIENCE, RPC, Transport, config, eventually, pair, reserved, start};

/// A call that the peer refuses is over after this long; it need not wait for anything.
const PROMPTLY: Duration = Duration::from_secs(5);

fn quiet(transport: Transport) -> NodeConfig {
    NodeConfig { hole_punching: false, autonat: false, ..config(transport) }
}

async fn calls_at_once_over_fresh_circuits_are_all_answered(transport: Transport) {
    const SERVERS: usize = 8;
    const CLIENTS: usize = 8;
    const CALLS: usize = 8;
    let relay = start(NodeConfig { relay_server: true, ..quiet(transport) }).await;
    let via = relay.listen_addrs().await.remove(0);
    let mut servers = Vec::new();
    for _ in 0..SERVERS {
        let server =
            start(NodeConfig { listen: vec![], relays: vec![via.clone()], ..quiet(transport) }).await;
        server.handle("echo", |_, body| async move { Ok(body) });
        reserved(&server).await;
        servers.push(server);
    }
    let peers: Arc<[PeerId]> = servers.iter().map(Node::peer_id).collect();
    let clients = (0..CLIENTS).map(|n| {
        let (peers, via) = (Arc::clone(&peers), via.clone());
        tokio::spawn(async move {
            let client = start(NodeConfig { listen: vec![], ..quiet(transport) }).await;
            // A relay opens no more than ten circuits to one peer at the same time.
            for peer in peers.iter().cycle().skip(n).take(SERVERS) {
                client.dial(&format!("{via}/p2p-circuit/p2p/{peer}")).await.unwrap();
                let calls = (0..CALLS).map(|i| {
                    // One of them on a stream of its own.
                    let body = Bytes::from(vec![i as u8; if i == 0 { 100_000 } else { 10 * i }]);
                    let (client, peer) = (client.clone(), peer.clone());
                    tokio::spawn(async move {
                        let answer = client.call(&peer, "echo", body.clone(), PATIENCE).await;
                        assert_eq!(answer.as_ref(), Ok(&body), "call {i}");
                    })
                });
                for call in calls.collect::<Vec<_>>() {
                    call.await.unwrap();
                }
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
}

over_quic_and_tcp!(
    calls_at_once_over_fresh_circuits_are_all_answered,
    flavor = "multi_thread",
    worker_threads = 2
);

/// Dials an address that cannot be reached; why.
async fn unreachable(node: &Node, address: &str) -> String {
    match node.dial(address).await {
        Err(DialError::Unreachable { reason, .. }) => reason,
        other => panic!("{address}: {other:?}"),
    }
}

async fn a_stock_peer_that_knows_no_calls_refuses_them_at_once(transport: Transport) {
    let node = start(config(transport)).await;
    let mut stock = stock();
    let address: Multiaddr = node.listen_addrs().await[0].parse().unwrap();
    stock.dial(address).unwrap();
    let peer: PeerId = stock.local_peer_id().to_string().parse().unwrap();
    beside(&mut stock, async {
        eventually("they are connected", || node.is_connected(&peer)).await;
        let begun = Instant::now();
        for n_bytes in [0, 100_000, 0] {
            let call = || node.call(&peer, "echo", Bytes::from(vec![7; n_bytes]), PATIENCE);
            for result in <[_; 3]>::from(tokio::join!(call(), call(), call())) {
                let error = result.unwrap_err();
                assert!(
                    matches!(&error, CallError::Unreachable { reason, .. } if reason.contains("does not speak /lattica/rpc")),
                    "{error}"
                );
            }
        }
        assert!(begun.elapsed() < PROMPTLY, "{:?}", begun.elapsed());
        assert!(node.is_connected(&peer), "the connection is none the worse");
    })
    .await;
}

over_quic_and_tcp!(a_stock_peer_that_knows_no_calls_refuses_them_at_once);

/// What a peer of another kind seems to do where its refusal is lost with the stream.
async fn a_peer_that_ends_every_stream_of_calls_is_not_asked_for_long(transport: Transport) {
    let (client, server) = pair(transport).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let ends_it = move |_, _stream| {
        count.fetch_add(1, Ordering::SeqCst);
        async {}
    };
    server.handle_stream(RPC, ends_it).unwrap();
    let peer = server.peer_id();
    for idempotent in [false, true] {
        let begun = Instant::now();
        let options = CallOptions { idempotent, ..CallOptions::new(PATIENCE) };
        let error = client.call_with(&peer, "echo", Bytes::new(), &options).await.unwrap_err();
        assert!(matches!(&error, CallError::Unreachable { reason, .. } if reason.contains(RPC)), "{error}");
        assert!(begun.elapsed() < PROMPTLY, "{:?}", begun.elapsed());
        assert_eq!(asked.swap(0, Ordering::SeqCst), 3);
    }
}

over_quic_and_tcp!(a_peer_that_ends_every_stream_of_calls_is_not_asked_for_long);

#[derive(NetworkBehaviour)]
struct Relay {
    relay: relay::Behaviour,
    identify: identify::Behaviour,
}

/// libp2p's own relay, at a loopback address.
async fn stock_relay(transport: Transport) -> (Swarm<Relay>, String) {
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_quic()
        .with_behaviour(|key| Relay {
            relay: relay::Behaviour::new(key.public().to_peer_id(), relay::Config::default()),
            identify: identify::Behaviour::new(identify::Config::new("somebody/1".to_owned(), key.public())),
        })
        .unwrap()
        .build();
    let address = listening(&mut swarm, transport).await;
    swarm.add_external_address(address.clone());
    let address = format!("{address}/p2p/{}", swarm.local_peer_id());
    (swarm, address)
}

async fn a_relay_that_is_not_ours_carries_calls(transport: Transport) {
    let (mut relay, via) = stock_relay(transport).await;
    let calling = async {
        let hidden = NodeConfig { listen: vec![], relays: vec![via.clone()], ..quiet(transport) };
        let server = start(hidden).await;
        server.handle("echo", |_, body| async move { Ok(body) });
        reserved(&server).await;
        let client = start(NodeConfig { listen: vec![], ..quiet(transport) }).await;
        let circuit = |node: &Node| format!("{via}/p2p-circuit/p2p/{}", node.peer_id());
        client.dial(&circuit(&server)).await.unwrap();
        let answer = client.call(&server.peer_id(), "echo", Bytes::from_static(b"x"), PATIENCE).await;
        assert_eq!(answer.unwrap(), "x");
        // Who has no slot there is not found.
        let stranger = start(NodeConfig { listen: vec![], ..quiet(transport) }).await;
        let reason = unreachable(&client, &circuit(&stranger)).await;
        assert!(reason.contains("Relay has no reservation for destination"), "{reason}");
    };
    let relaying = beside(&mut relay, calling);
    tokio::time::timeout(PATIENCE, relaying).await.expect("the calls are answered");
}

over_quic_and_tcp!(a_relay_that_is_not_ours_carries_calls);

async fn a_node_that_is_no_relay_refuses_a_circuit_at_once(transport: Transport) {
    let (client, other) = pair(transport).await;
    let circuit = format!("{}/p2p-circuit/p2p/{}", other.listen_addrs().await[0], super::stranger());
    let begun = Instant::now();
    let reason = unreachable(&client, &circuit).await;
    // An I/O error in place of libp2p's own words (0023).
    assert!(reason.contains("the peer does not speak the protocol"), "{reason}");
    assert!(begun.elapsed() < PROMPTLY, "{:?}", begun.elapsed());
    assert!(client.is_connected(&other.peer_id()), "the connection is none the worse");
}

over_quic_and_tcp!(a_node_that_is_no_relay_refuses_a_circuit_at_once);
