//! The DHT where peers are new or their answers get lost.

use std::sync::{Arc, Mutex};

use lattica_net::{DhtError, Node, NodeConfig, read_frame};
use tokio::io::AsyncWriteExt;

use super::{PATIENCE, Transport, config, connect, eventually, start};

/// The DHT's protocol in the network of these tests.
pub(crate) const KAD: &str = "/lattica/kad/2.0.0/test";

/// Kinds of questions, as the protocol numbers them.
pub(crate) const PUT_VALUE: u8 = 0;
pub(crate) const GET_VALUE: u8 = 1;
const ADD_PROVIDER: u8 = 2;

/// A DHT server by hand.
struct Server {
    node: Node,
    address: String,
    /// The kind of each question so far.
    asked: Arc<Mutex<Vec<u8>>>,
}

/// A server that keeps one record and breaks the first `broken` streams instead of answering.
async fn forgetful(broken: usize) -> Server {
    let node = start(NodeConfig { dht_server: false, ..config(Transport::Quic) }).await;
    let (asked, record) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(None)));
    let kinds = Arc::clone(&asked);
    node.handle_stream(KAD, move |_, mut stream| {
        let (record, kinds) = (Arc::clone(&record), Arc::clone(&kinds));
        async move {
            let mut message = read_frame(&mut stream, "message", 1 << 16).await.unwrap().unwrap().to_vec();
            // Field 1 is the kind, missing where it is zero.
            let kind = if message[0] == 8 { message[1] } else { PUT_VALUE };
            let n_asked = {
                let mut kinds = kinds.lock().unwrap();
                kinds.push(kind);
                kinds.len()
            };
            if n_asked <= broken {
                return;
            }
            // The question is a well-formed answer to all but two kinds, and of a field that comes twice the last one counts.
            match kind {
                PUT_VALUE => *record.lock().unwrap() = Some(message.clone()),
                GET_VALUE => {
                    if let Some(kept) = record.lock().unwrap().clone() {
                        message = kept;
                        message.extend([8, GET_VALUE]);
                    }
                }
                _ => {}
            }
            let mut answer = Vec::new();
            swarm_wire::frame::encode_length(message.len(), &mut answer);
            answer.extend(message);
            stream.write_all(&answer).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    })
    .unwrap();
    let address = node.listen_addrs().await.remove(0);
    Server { node, address, asked }
}

async fn a_record_is_stored_right_after_dialling(transport: Transport) {
    let (a, b) = (start(config(transport)).await, start(config(transport)).await);
    let address = b.listen_addrs().await.remove(0);
    a.dial(&address).await.unwrap();
    a.put_record(b"key", b"value".to_vec()).await.unwrap();
    let c = start(config(transport)).await;
    c.dial(&address).await.unwrap();
    assert_eq!(c.get_record(b"key").await.unwrap(), Some(b"value".to_vec()));
    a.provide(b"thing").await.unwrap();
    let d = start(config(transport)).await;
    d.dial(&address).await.unwrap();
    assert_eq!(d.providers(b"thing").await.unwrap(), [a.peer_id()]);
}

over_quic_and_tcp!(a_record_is_stored_right_after_dialling);

#[tokio::test]
async fn questions_whose_answers_got_lost_are_asked_again() {
    let server = forgetful(2).await;
    let a = start(config(Transport::Quic)).await;
    a.dial(&server.address).await.unwrap();
    let stored = tokio::time::timeout(PATIENCE, a.put_record(b"key", b"value".to_vec())).await.unwrap();
    assert_eq!(stored, Ok(()), "after {:?}", server.asked.lock().unwrap());
    // For another node the next answers get lost as well.
    server.asked.lock().unwrap().clear();
    let b = start(config(Transport::Quic)).await;
    b.dial(&server.address).await.unwrap();
    assert_eq!(b.get_record(b"key").await, Ok(Some(b"value".to_vec())));
}

#[tokio::test]
async fn who_never_answers_is_not_asked_forever() {
    let server = forgetful(usize::MAX).await;
    let a = start(config(Transport::Quic)).await;
    a.dial(&server.address).await.unwrap();
    let stored = tokio::time::timeout(PATIENCE, a.put_record(b"key", b"value".to_vec())).await.unwrap();
    assert!(matches!(stored, Err(DhtError::NotStored { .. })), "{stored:?}");
    let asked = server.asked.lock().unwrap().len();
    assert!((2..10).contains(&asked), "asked {asked} times");
}

#[tokio::test]
async fn an_announcement_waits_until_somebody_can_be_told() {
    let (a, server) = (start(config(Transport::Tcp)).await, forgetful(0).await);
    a.provide(b"thing").await.unwrap();
    // It takes part in the DHT but listens nowhere, so nothing can be kept there.
    let guest = start(NodeConfig { listen: vec![], ..config(Transport::Tcp) }).await;
    guest.dial(&a.listen_addrs().await[0]).await.unwrap();
    eventually("it came", || a.is_connected(&guest.peer_id())).await;
    assert_eq!(a.get_record(b"nothing").await, Ok(None), "asked when it is known what the guest is");
    server.node.dial(&a.listen_addrs().await[0]).await.unwrap();
    eventually("it is told", || server.asked.lock().unwrap().contains(&ADD_PROVIDER)).await;
}

#[tokio::test]
async fn what_was_taken_back_is_not_announced_later() {
    let (a, b) = (start(config(Transport::Quic)).await, start(config(Transport::Quic)).await);
    for key in [b"taken", b"keeps"] {
        a.provide(key).await.unwrap();
    }
    a.stop_providing(b"taken").await;
    connect(&a, &b).await;
    let c = start(config(Transport::Quic)).await;
    connect(&c, &b).await;
    let announced = async { while c.providers(b"keeps").await.unwrap().is_empty() {} };
    tokio::time::timeout(PATIENCE, announced).await.unwrap();
    assert_eq!(c.providers(b"taken").await, Ok(vec![]));
}
