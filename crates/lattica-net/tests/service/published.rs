//! Signed records of the DHT: only their publisher can change them, and the newest counts, whoever answers what.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::FutureExt as _;
use lattica_net::dht::{self, Refusal, SignedRecord, wire};
use lattica_net::{DhtError, Identity, Node, NodeConfig, read_frame};
use swarm_wire::frame;
use tokio::io::AsyncWriteExt as _;

use super::dht::{GET_VALUE, KAD, PUT_VALUE};
use super::log::{keep, logged};
use super::{PATIENCE, Transport, config, connect, start};

const HOUR: Duration = Duration::from_secs(3600);
const NAME: &str = "models/small";

fn unix_now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

/// A record as `identity` says it.
fn said(identity: &Identity, sequence: u64, ttl: Duration, value: &'static str) -> SignedRecord {
    SignedRecord {
        publisher: identity.peer_id(),
        network: "test".to_owned(),
        name: NAME.to_owned(),
        sequence,
        expires_s: (unix_now() + ttl).as_secs(),
        value: Bytes::from_static(value.as_bytes()),
    }
}

fn signed(identity: &Identity, sequence: u64, ttl: Duration, value: &'static str) -> Vec<u8> {
    wire::encode(&said(identity, sequence, ttl, value), identity)
}

/// With another signature than its publisher's.
fn damaged(mut statement: Vec<u8>) -> Vec<u8> {
    *statement.last_mut().unwrap() ^= 1;
    statement
}

/// A message of the DHT that carries a record, with its length.
fn message(kind: u8, key: &[u8], value: &[u8]) -> Vec<u8> {
    let field = |number: u8, bytes: &[u8]| {
        let mut field = vec![number << 3 | 2];
        frame::encode(bytes, &mut field);
        field
    };
    let record = [field(1, key), field(2, value)].concat();
    let mut framed = Vec::new();
    frame::encode(&[vec![8, kind], field(2, key), field(3, &record)].concat(), &mut framed);
    framed
}

/// Has `peer` store something; whether it says that it did.
async fn put(from: &Node, to: &Node, key: &[u8], value: &[u8]) -> bool {
    let mut stream = from.open_stream(&to.peer_id(), KAD).await.unwrap();
    stream.write_all(&message(PUT_VALUE, key, value)).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, read_frame(&mut stream, "answer", 1 << 17)).await.unwrap();
    matches!(answer, Ok(Some(_)))
}

/// Has `peer` refuse something, which it does without a word; whether it has said nothing when it answers the next question.
async fn refused(from: &Node, to: &Node, key: &[u8], value: &[u8]) -> bool {
    let mut stream = from.open_stream(&to.peer_id(), KAD).await.unwrap();
    stream.write_all(&message(PUT_VALUE, key, value)).await.unwrap();
    assert!(put(from, to, b"next", b"question").await);
    !matches!(read_frame(&mut stream, "answer", 1 << 17).now_or_never(), Some(Ok(Some(_))))
}

/// Whether `to` itself has this statement when it is asked for the record.
async fn kept(from: &Node, to: &Node, key: &[u8], statement: &[u8]) -> bool {
    let mut stream = from.open_stream(&to.peer_id(), KAD).await.unwrap();
    stream.write_all(&message(GET_VALUE, key, b"")).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, read_frame(&mut stream, "answer", 1 << 17)).await.unwrap();
    answer.unwrap().expect("an answer").windows(statement.len()).any(|part| part == statement)
}

/// What `reader` finds.
async fn found(reader: &Node, publisher: &Node) -> Option<SignedRecord> {
    let publisher = publisher.peer_id();
    let asked = reader.published_record(&publisher, NAME);
    tokio::time::timeout(PATIENCE, asked).await.unwrap().unwrap()
}

async fn found_value(reader: &Node, publisher: &Node) -> Option<Bytes> {
    found(reader, publisher).await.map(|record| record.value)
}

/// A node that does not keep records for others.
async fn client() -> Node {
    start(NodeConfig { dht_server: false, ..config(Transport::Quic) }).await
}

async fn a_publisher_is_heard_and_replaces_what_it_said(transport: Transport) {
    let (a, b) = (start(config(transport)).await, start(config(transport)).await);
    let address = b.listen_addrs().await.remove(0);
    a.dial(&address).await.unwrap();
    a.publish_record(NAME, Bytes::from_static(b"one"), HOUR).await.unwrap();
    let c = start(config(transport)).await;
    c.dial(&address).await.unwrap();
    let one = found(&c, &a).await.unwrap();
    assert_eq!((&one.publisher, &one.name[..], &one.value[..]), (&a.peer_id(), NAME, &b"one"[..]));
    let left = one.expires().saturating_sub(unix_now());
    assert!(left > HOUR / 2 && left <= HOUR, "{left:?}");
    a.publish_record(NAME, Bytes::from_static(b"two"), HOUR).await.unwrap();
    let two = found(&a, &a).await.unwrap();
    assert_eq!(two.value, "two");
    assert!(two.sequence > one.sequence);
    // Another name, and another peer's record of the same name.
    assert_eq!(c.published_record(&a.peer_id(), "another").await, Ok(None));
    assert_eq!(c.published_record(&b.peer_id(), NAME).await, Ok(None));
}

over_quic_and_tcp!(a_publisher_is_heard_and_replaces_what_it_said);

#[tokio::test]
async fn nodes_keep_the_newest_of_the_publisher_and_refuse_everything_else() {
    let b = start(config(Transport::Quic)).await;
    let (a, forger, reader) = (client().await, client().await, client().await);
    for node in [&a, &forger, &reader] {
        connect(node, &b).await;
    }
    let key = dht::key("test", &a.peer_id(), NAME);
    a.publish_record(NAME, Bytes::from_static(b"good"), HOUR).await.unwrap();
    let good = found(&reader, &a).await.unwrap();
    assert_eq!(good.value, "good");
    let (id, next) = (a.identity(), good.sequence + 1);
    for (what, statement) in [
        ("no record", b"anything".to_vec()),
        ("of somebody else", signed(forger.identity(), next, HOUR, "bad")),
        ("forged", damaged(signed(id, next, HOUR, "bad"))),
        ("older", signed(id, good.sequence - 1, HOUR, "bad")),
        ("expired", signed(id, next, Duration::ZERO, "bad")),
        ("from too far ahead", signed(id, next, 25 * HOUR, "bad")),
    ] {
        assert!(refused(&forger, &b, &key, &statement).await, "{what}");
        assert_eq!(found(&reader, &a).await, Some(good.clone()), "{what}");
    }
    // What is right is kept, whoever brings it, and keys of other kinds are anybody's.
    assert!(put(&forger, &b, &key, &signed(id, next, HOUR, "newer")).await);
    assert_eq!(found_value(&reader, &a).await.unwrap(), "newer");
    let own = dht::key("test", &forger.peer_id(), NAME);
    assert!(put(&forger, &b, &own, &signed(forger.identity(), 1, HOUR, "own")).await);
    assert_eq!(found_value(&reader, &forger).await.unwrap(), "own");
    assert!(put(&forger, &b, b"key", b"one").await && put(&forger, &b, b"key", b"two").await);
    assert_eq!(reader.get_record(b"key").await, Ok(Some(b"two".to_vec())));
}

/// A peer that takes part in the DHT and answers every question for a record with this one; and how often it did.
async fn liar(key: Vec<u8>, value: Vec<u8>) -> (Node, Arc<AtomicUsize>) {
    let node = client().await;
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    node.handle_stream(KAD, move |_, mut stream| {
        let (answer, count) = (message(GET_VALUE, &key, &value), Arc::clone(&count));
        async move {
            let Ok(Some(question)) = read_frame(&mut stream, "message", 1 << 16).await else { return };
            let asked_for_a_record = question.starts_with(&[8, GET_VALUE]);
            let answer = if asked_for_a_record {
                count.fetch_add(1, Ordering::SeqCst);
                answer
            } else {
                // A question is a well-formed answer to most kinds.
                let mut same = Vec::new();
                frame::encode(&question, &mut same);
                same
            };
            let _ = stream.write_all(&answer).await;
            let _ = stream.shutdown().await;
        }
    })
    .unwrap();
    (node, told)
}

#[tokio::test]
async fn the_newest_good_answer_is_taken_whatever_others_say() {
    keep();
    let b = start(config(Transport::Quic)).await;
    let a = client().await;
    connect(&a, &b).await;
    let key = dht::key("test", &a.peer_id(), NAME);
    a.publish_record(NAME, Bytes::from_static(b"good"), HOUR).await.unwrap();
    let sequence = found(&a, &a).await.unwrap().sequence;
    let stranger = Identity::generate();
    let (id, next) = (a.identity(), sequence + 1);
    for (what, lie, reason, expected) in [
        ("forged", damaged(signed(id, next, HOUR, "bad")), Some("signature"), "good"),
        ("of somebody else", signed(&stranger, next, HOUR, "bad"), Some("another key"), "good"),
        ("expired", signed(id, next, Duration::ZERO, "bad"), Some("expired"), "good"),
        ("from too far ahead", signed(id, next, 25 * HOUR, "bad"), Some("longer than"), "good"),
        ("older", signed(id, sequence - 1, HOUR, "bad"), None, "good"),
        ("newer, which is no lie", signed(id, next, HOUR, "newer"), None, "newer"),
    ] {
        let reader = client().await;
        connect(&reader, &b).await;
        assert_eq!(found_value(&reader, &a).await.unwrap(), "good", "{what}");
        let (liar, told) = liar(key.clone(), lie).await;
        connect(&reader, &liar).await;
        let heard = async {
            loop {
                let before = told.load(Ordering::SeqCst);
                let value = found_value(&reader, &a).await.unwrap();
                assert!(value == "good" || value == expected, "{what}: {value:?}");
                // Until then it is not known to take part.
                if told.load(Ordering::SeqCst) > before && value == expected {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, heard).await.unwrap_or_else(|_| panic!("not heard: {what}"));
        if let Some(reason) = reason {
            logged(&[&liar.peer_id().to_string(), "DHT record not used", reason]).await;
        }
    }
}

#[tokio::test]
async fn what_nobody_could_store_is_put_when_somebody_comes() {
    let (a, b) = (start(config(Transport::Tcp)).await, start(config(Transport::Tcp)).await);
    let published = a.publish_record(NAME, Bytes::from_static(b"early"), HOUR).await;
    assert_eq!(published, Err(DhtError::NoPeers));
    a.publish_record("taken back", Bytes::from_static(b"early"), HOUR).await.unwrap_err();
    a.unpublish_record("taken back").await;
    connect(&a, &b).await;
    let reader = start(NodeConfig { dht_server: false, ..config(Transport::Tcp) }).await;
    connect(&reader, &b).await;
    let stored = async { while found(&reader, &a).await.is_none() {} };
    tokio::time::timeout(PATIENCE, stored).await.expect("it is put");
    assert_eq!(reader.published_record(&a.peer_id(), "taken back").await, Ok(None));
}

#[tokio::test]
async fn what_is_taken_back_is_not_told_any_more_although_somebody_put_it_here_again() {
    let (a, b) = (start(config(Transport::Quic)).await, start(config(Transport::Quic)).await);
    connect(&a, &b).await;
    a.publish_record(NAME, Bytes::from_static(b"one"), HOUR).await.unwrap();
    let record = found(&b, &a).await.unwrap();
    let (key, statement) = (record.key(), wire::encode(&record, a.identity()));
    assert!(put(&b, &a, &key, &statement).await);
    assert!(kept(&b, &a, &key, &statement).await);
    a.unpublish_record(NAME).await;
    // Asked of the swarm after that.
    a.listen_addrs().await;
    assert!(!kept(&b, &a, &key, &statement).await);
}

#[tokio::test]
async fn what_cannot_be_published_is_refused_at_once() {
    let (a, b) = (start(config(Transport::Quic)).await, start(config(Transport::Quic)).await);
    connect(&a, &b).await;
    let publish = async |name: &str, n_bytes: usize, ttl: Duration| {
        a.publish_record(name, vec![7; n_bytes].into(), ttl).await
    };
    assert_eq!(publish("", 1, HOUR).await, Err(DhtError::Unfit(Refusal::Name { got_bytes: 0 })));
    let long = "x".repeat(256);
    assert_eq!(publish(&long, 1, HOUR).await, Err(DhtError::Unfit(Refusal::Name { got_bytes: 256 })));
    let got_bytes = dht::VALUE_MAX_BYTES + 1;
    assert_eq!(publish("a", got_bytes, HOUR).await, Err(DhtError::Unfit(Refusal::Value { got_bytes })));
    let ttl = 25 * HOUR;
    assert_eq!(publish("a", 1, ttl).await, Err(DhtError::Unfit(Refusal::Ttl { ttl })));
    assert_eq!(publish("a", dht::VALUE_MAX_BYTES, 24 * HOUR).await, Ok(()), "the largest");
    let error = a.put_record(&dht::key("test", &a.peer_id(), "a"), vec![1]).await.unwrap_err();
    assert!(error.to_string().contains("publish_record"), "{error}");
}
