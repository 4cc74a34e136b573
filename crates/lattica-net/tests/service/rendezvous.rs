//! Rendezvous points: a swarm that has nothing else finds itself there, and libp2p's own understand ours and the other way
//! round.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use lattica_net::rendezvous::Refusal;
use lattica_net::rendezvous::wire::{Answer, Question};
use lattica_net::{Access, Node, NodeConfig, SwarmKey, read_frame};
use libp2p::core::PeerRecord;
use libp2p::core::multiaddr::Protocol;
use libp2p::identity::Keypair;
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{Multiaddr, Swarm, identify};
use libp2p_rendezvous::{Namespace, client, server};
use swarm_wire::frame;
use tokio::io::AsyncWriteExt as _;

use super::log::{keep, logged};
use super::stock::{beside, listening};
use super::{PATIENCE, Transport, config, eventually, start};

/// What the nodes of these tests register under.
const NAMESPACE: &str = "/lattica/test";

/// A point of a network that nobody else belongs to: neither its DHT nor its news are of use to others.
async fn point(transport: Transport) -> (Node, String) {
    serving(NodeConfig { network: "meeting".to_owned(), ..config(transport) }).await
}

async fn serving(config: NodeConfig) -> (Node, String) {
    let point = start(NodeConfig { rendezvous_point: true, ..config }).await;
    let address = point.listen_addrs().await.remove(0);
    (point, address)
}

fn visitor(transport: Transport, point: &str) -> NodeConfig {
    let news_interval = Duration::from_millis(50);
    NodeConfig { rendezvous: vec![point.to_owned()], news_interval, ..config(transport) }
}

async fn a_swarm_finds_itself_at_a_rendezvous_point_alone(transport: Transport) {
    let (point, address) = point(transport).await;
    let other = NodeConfig { network: "other".to_owned(), ..visitor(transport, &address) };
    let other = start(other).await;
    let (a, b, c) = (
        start(visitor(transport, &address)).await,
        start(visitor(transport, &address)).await,
        start(visitor(transport, &address)).await,
    );
    for (from, to) in [(&a, &b), (&b, &c), (&c, &a)] {
        eventually("they meet", || from.is_connected(&to.peer_id())).await;
    }
    // Nobody was told of the node of another network, which was there first.
    assert_eq!(other.connected_peers(), [point.peer_id()]);
    // They do not need the point any more.
    point.shutdown().await;
    a.put_record(b"key", b"value".to_vec()).await.unwrap();
    assert_eq!(c.get_record(b"key").await, Ok(Some(b"value".to_vec())));
}

over_quic_and_tcp!(
    a_swarm_finds_itself_at_a_rendezvous_point_alone,
    flavor = "multi_thread",
    worker_threads = 2
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_private_swarms_point_serves_members_only() {
    let access = |byte| Access { key: Some(SwarmKey::from_bytes([byte; 32])), allow: None };
    let (point, address) = serving(NodeConfig { access: access(1), ..config(Transport::Quic) }).await;
    let member = |byte| NodeConfig { access: access(byte), ..visitor(Transport::Quic, &address) };
    // The stranger has a key of the wrong kind, and asks as long as the members need to meet.
    let stranger = start(member(2)).await;
    let (a, b) = (start(member(1)).await, start(member(1)).await);
    eventually("they meet", || a.is_connected(&b.peer_id())).await;
    assert!(stranger.connected_peers().is_empty() && stranger.addresses(&a.peer_id()).is_empty());
    assert!(!point.is_connected(&stranger.peer_id()));
}

#[tokio::test]
async fn a_point_writes_down_what_peers_say_of_themselves_and_nothing_else() {
    keep();
    let (point, address) = point(Transport::Quic).await;
    let node = start(config(Transport::Quic)).await;
    node.dial(&address).await.unwrap();
    let of = |key: &Keypair| {
        let record = PeerRecord::new_interop(key, vec!["/ip4/127.0.0.1/tcp/1".parse().unwrap()]).unwrap();
        Bytes::from(record.into_signed_envelope().into_protobuf_encoding())
    };
    for (record, refusal) in [
        (of(&Keypair::generate_ed25519()), Refusal::NotAuthorized),
        (Bytes::from_static(b"no record"), Refusal::InvalidRecord),
    ] {
        let question = Question::Register { namespace: NAMESPACE.to_owned(), record, ttl_s: None };
        let mut stream = node.open_stream(&point.peer_id(), "/rendezvous/1.0.0").await.unwrap();
        let mut bytes = Vec::new();
        frame::encode(&question.encode(), &mut bytes);
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let answer = read_frame(&mut stream, "answer", 1 << 16).await.unwrap().unwrap();
        assert_eq!(Answer::decode(answer), Ok(Answer::Registered(Err(refusal))));
        logged(&[&node.peer_id().short(), &refusal.to_string(), "not registered"]).await;
    }
}

#[derive(NetworkBehaviour)]
struct Theirs {
    identify: identify::Behaviour,
    client: client::Behaviour,
    server: server::Behaviour,
}

/// libp2p's own parts, that listen on a loopback address.
async fn theirs() -> (Swarm<Theirs>, Multiaddr) {
    let mut swarm = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(libp2p::tcp::Config::default(), libp2p::noise::Config::new, libp2p::yamux::Config::default)
        .unwrap()
        .with_behaviour(|key| Theirs {
            identify: identify::Behaviour::new(identify::Config::new("somebody/1".to_owned(), key.public())),
            client: client::Behaviour::new(key.clone()),
            server: server::Behaviour::new(server::Config::default()),
        })
        .unwrap()
        .build();
    let address = listening(&mut swarm, Transport::Tcp).await;
    swarm.add_external_address(address.clone());
    let peer = *swarm.local_peer_id();
    (swarm, address.with(Protocol::P2p(peer)))
}

/// Runs the swarm until `wanted` is found in what happens.
async fn happens<T>(swarm: &mut Swarm<Theirs>, mut wanted: impl FnMut(TheirsEvent) -> Option<T>) -> T {
    let found = async {
        loop {
            if let SwarmEvent::Behaviour(event) = swarm.select_next_some().await
                && let Some(found) = wanted(event)
            {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("it happens")
}

#[tokio::test]
async fn libp2ps_own_clients_register_and_find_our_nodes_here() {
    let (point, address) = point(Transport::Tcp).await;
    let ours = start(visitor(Transport::Tcp, &address)).await;
    let (mut swarm, _) = theirs().await;
    let (namespace, point) = (Namespace::from_static(NAMESPACE), point.peer_id().to_string());
    let point = point.parse().unwrap();
    swarm.dial(address.parse::<Multiaddr>().unwrap()).unwrap();
    happens(&mut swarm, |event| {
        matches!(event, TheirsEvent::Identify(identify::Event::Received { .. })).then_some(())
    })
    .await;
    swarm.behaviour_mut().client.register(namespace.clone(), point, None).unwrap();
    let ttl_s = happens(&mut swarm, |event| match event {
        TheirsEvent::Client(client::Event::Registered { ttl, .. }) => Some(ttl),
        TheirsEvent::Client(client::Event::RegisterFailed { error, .. }) => panic!("{error:?}"),
        _ => None,
    })
    .await;
    assert_eq!(ttl_s, 7200);
    let (peer, mut cookie) = (ours.peer_id().to_string().parse().unwrap(), None);
    loop {
        swarm.behaviour_mut().client.discover(Some(namespace.clone()), cookie, None, point);
        let (found, next) = happens(&mut swarm, |event| match event {
            TheirsEvent::Client(client::Event::Discovered { registrations, cookie, .. }) => {
                Some((registrations, cookie))
            }
            TheirsEvent::Client(client::Event::DiscoverFailed { error, .. }) => panic!("{error:?}"),
            _ => None,
        })
        .await;
        cookie = Some(next);
        if found.iter().any(|found| found.record.peer_id() == peer) {
            break;
        }
    }
    // Ours was told of theirs, and dials it.
    let theirs = swarm_wire::PeerId::from_bytes(&swarm.local_peer_id().to_bytes()).unwrap();
    beside(&mut swarm, eventually("ours dials theirs", || ours.is_connected(&theirs))).await;
}

#[tokio::test]
async fn our_nodes_register_and_find_others_at_libp2ps_own_points() {
    let (mut swarm, address) = theirs().await;
    let address = address.to_string();
    let meeting = async {
        let visitor = || start(visitor(Transport::Tcp, &address));
        let (a, b) = (visitor().await, visitor().await);
        eventually("they meet", || a.is_connected(&b.peer_id())).await;
    };
    beside(&mut swarm, meeting).await;
}
