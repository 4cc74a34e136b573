//! The DHT where peers are new or their answers get lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lattica_net::{DhtError, Node, NodeConfig, read_frame};
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

use super::{PATIENCE, Transport, config, start};

/// The DHT's protocol in the network of these tests.
const KAD: &str = "/lattica/kad/2.0.0/test";

/// A DHT server by hand, that keeps one record and breaks the first `broken` streams instead of answering.
async fn forgetful(broken: usize) -> (Node, Arc<AtomicUsize>) {
    let node = start(NodeConfig { dht_server: false, ..config(Transport::Quic) }).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let (record, counter) = (Arc::new(Mutex::new(None)), Arc::clone(&asked));
    node.handle_stream(KAD, move |_, mut stream| {
        let (record, counter) = (Arc::clone(&record), Arc::clone(&counter));
        async move {
            let mut message = read_frame(&mut stream, "message", 1 << 16).await.unwrap().unwrap().to_vec();
            if counter.fetch_add(1, Ordering::SeqCst) < broken {
                return;
            }
            // Field 1 is the kind, missing where a value is put and 1 where one is asked for; the question is a well-formed
            // answer to all but that, and of a field that comes twice the last one counts.
            match message[..2] {
                [8, 1] => {
                    if let Some(kept) = record.lock().await.clone() {
                        message = kept;
                        message.extend([8, 1]);
                    }
                }
                [8, _] => {}
                _ => *record.lock().await = Some(message.clone()),
            }
            let mut answer = Vec::new();
            swarm_wire::frame::encode_length(message.len(), &mut answer);
            answer.extend(message);
            stream.write_all(&answer).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    })
    .unwrap();
    (node, asked)
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

#[tokio::test]
async fn a_record_is_stored_right_after_dialling_over_quic() {
    a_record_is_stored_right_after_dialling(Transport::Quic).await;
}

#[tokio::test]
async fn a_record_is_stored_right_after_dialling_over_tcp() {
    a_record_is_stored_right_after_dialling(Transport::Tcp).await;
}

#[tokio::test]
async fn questions_whose_answers_got_lost_are_asked_again() {
    let (server, asked) = forgetful(2).await;
    let address = server.listen_addrs().await.remove(0);
    let a = start(config(Transport::Quic)).await;
    a.dial(&address).await.unwrap();
    let stored = tokio::time::timeout(PATIENCE, a.put_record(b"key", b"value".to_vec())).await.unwrap();
    assert_eq!(stored, Ok(()), "after {} questions", asked.load(Ordering::SeqCst));
    // For another node the next answers get lost as well.
    asked.store(0, Ordering::SeqCst);
    let b = start(config(Transport::Quic)).await;
    b.dial(&address).await.unwrap();
    assert_eq!(b.get_record(b"key").await, Ok(Some(b"value".to_vec())));
}

#[tokio::test]
async fn who_never_answers_is_not_asked_forever() {
    let (server, asked) = forgetful(usize::MAX).await;
    let a = start(config(Transport::Quic)).await;
    a.dial(&server.listen_addrs().await.remove(0)).await.unwrap();
    let stored = tokio::time::timeout(PATIENCE, a.put_record(b"key", b"value".to_vec())).await.unwrap();
    assert!(matches!(stored, Err(DhtError::NotStored { .. })), "{stored:?}");
    let asked = asked.load(Ordering::SeqCst);
    assert!((2..10).contains(&asked), "asked {asked} times");
}
