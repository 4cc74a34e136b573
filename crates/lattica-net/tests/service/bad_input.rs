//! What is wrong from the outside: records that are forged, expired or from another time, two nodes with one key, addresses
//! that lead elsewhere, nobody at an address. Each is refused, nothing else is lost, and a log line names peer and reason.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use lattica_net::news::wire::Reply;
use lattica_net::{DialError, Identity, Node, NodeConfig, read_frame};
use libp2p::Multiaddr;
use libp2p::core::SignedEnvelope;
use libp2p::identity::Keypair;
use swarm_wire::{PeerId, frame};
use tokio::io::AsyncWriteExt as _;

use super::log::{keep, logged};
use super::{Transport, config, connect, eventually, start, stranger};

const NEWS: &str = "/lattica/news/1.0.0/test";
const HOUR: u64 = 3600;

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn id(key: &Keypair) -> PeerId {
    PeerId::from_bytes(&key.public().to_peer_id().to_bytes()).unwrap()
}

/// A record that `key` signs for `peer`, written at a time of anybody's choice.
fn record(key: &Keypair, peer: &PeerId, written_s: u64) -> Vec<u8> {
    let mut payload = Vec::new();
    let mut part = |number: u8, bytes: &[u8]| {
        payload.push(number << 3 | 2);
        frame::encode(bytes, &mut payload);
    };
    let address: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
    let mut field = vec![10];
    frame::encode(&address.to_vec(), &mut field);
    part(1, peer.as_bytes());
    part(3, &field);
    payload.push(16);
    frame::encode_length(written_s as usize, &mut payload);
    let envelope = SignedEnvelope::new(key, "libp2p-peer-record".to_owned(), vec![3, 1], payload).unwrap();
    envelope.into_protobuf_encoding()
}

/// A node that answers every question for news with this record, and one that asks it.
async fn told(record: Vec<u8>, age: Duration) -> (Node, Node) {
    keep();
    let quick = || NodeConfig {
        news_interval: Duration::from_millis(20),
        keep_peers: 0,
        dht_server: false,
        ..config(Transport::Quic)
    };
    let (teller, asker) = (start(quick()).await, start(quick()).await);
    let reply = Reply { records: vec![(record.into(), age)], ..Reply::default() }.encode();
    teller
        .handle_stream(NEWS, move |_, mut stream| {
            let reply = reply.clone();
            async move {
                let _ = read_frame(&mut stream, "question", 1 << 16).await;
                let mut bytes = Vec::new();
                frame::encode(&reply, &mut bytes);
                let _ = stream.write_all(&bytes).await;
                let _ = stream.shutdown().await;
            }
        })
        .unwrap();
    connect(&asker, &teller).await;
    (teller, asker)
}

#[tokio::test]
async fn records_are_used_when_they_are_right_and_refused_with_a_reason_when_not() {
    let (key, other) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
    let author = id(&key);
    let (_teller, asker) = told(record(&key, &author, now_s()), Duration::ZERO).await;
    eventually("a good one is used", || asker.addresses(&author) == ["/ip4/127.0.0.1/tcp/1"]).await;

    let mut damaged = record(&key, &author, now_s());
    *damaged.last_mut().unwrap() ^= 1;
    let of_another = record(&other, &author, now_s());
    for (what, record, age, reason) in [
        ("forged", damaged, Duration::ZERO, "news refused"),
        ("signed by another peer", of_another, Duration::ZERO, "news refused"),
        ("no record at all", vec![7; 40], Duration::ZERO, "news refused"),
        ("of tomorrow", record(&key, &author, now_s() + 3 * HOUR), Duration::ZERO, "clock"),
        ("of yesterday", record(&key, &author, now_s() - 3 * HOUR), Duration::ZERO, "clock"),
        ("expired", record(&key, &author, now_s()), Duration::from_secs(2 * HOUR), "too old"),
    ] {
        let (teller, asker) = told(record, age).await;
        logged(&[&teller.peer_id().short(), reason]).await;
        assert!(asker.addresses(&author).is_empty(), "{what}");
        assert!(asker.is_connected(&teller.peer_id()), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_with_one_key_are_told_of_each_other() {
    keep();
    let identity = Identity::generate();
    let quick = || NodeConfig { news_interval: Duration::from_millis(20), ..config(Transport::Tcp) };
    let hub = start(quick()).await;
    let address = hub.listen_addrs().await.remove(0);
    let (a, b) = (
        Node::start(identity.clone(), quick()).await.unwrap(),
        Node::start(identity.clone(), quick()).await.unwrap(),
    );
    for node in [&a, &b] {
        node.handle("echo", |_, body| async move { Ok(body) });
        node.dial(&address).await.unwrap();
    }
    logged(&[&hub.peer_id().short(), "this node's key signed news that it did not make"]).await;
    // Whichever of them is called, it answers.
    let answer = hub.call(&identity.peer_id(), "echo", Bytes::from_static(b"x"), super::PATIENCE).await;
    assert_eq!(answer.unwrap(), "x");
}

#[tokio::test]
async fn who_is_sent_to_somebody_else_says_so_and_finds_the_right_one_later() {
    keep();
    let (a, liar) = (start(config(Transport::Tcp)).await, start(config(Transport::Tcp)).await);
    let (wanted, somebody) = (start(config(Transport::Tcp)).await, start(config(Transport::Tcp)).await);
    connect(&a, &liar).await;
    let wrong = somebody.listen_addrs().await.remove(0);
    a.learn_address(&wanted.peer_id(), &wrong, &liar.peer_id()).unwrap();
    let error = a.connect(&wanted.peer_id()).await.unwrap_err();
    assert!(error.to_string().contains(&somebody.peer_id().to_string()), "{error}");
    logged(&[&wanted.peer_id().short(), &somebody.peer_id().to_string(), "forgotten"]).await;
    assert!(a.addresses(&wanted.peer_id()).is_empty());
    a.add_address(&wanted.peer_id(), &wanted.listen_addrs().await[0]).unwrap();
    a.connect(&wanted.peer_id()).await.unwrap();
}

#[tokio::test]
async fn a_bootstrap_peer_that_does_not_answer_is_named() {
    keep();
    let gone = start(config(Transport::Tcp)).await;
    let address = gone.listen_addrs().await.remove(0);
    gone.shutdown().await;
    let node = start(NodeConfig { bootstrap: vec![address.clone()], ..config(Transport::Tcp) }).await;
    let place = address.split("/p2p/").next().unwrap();
    logged(&[place, "a bootstrap peer does not answer"]).await;
    let error = node.connect(&stranger()).await.unwrap_err();
    assert!(matches!(error, DialError::NoAddress { .. }), "it goes on: {error}");
}
