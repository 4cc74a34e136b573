//! Announcements: judged before they are passed on, bounded, one listener a topic.

use lattica_net::gossip::{MESSAGE_MAX_BYTES, Verdict};
use lattica_net::{GossipError, Node, NodeConfig};

use super::{PATIENCE, Transport, config, connect, pair, start};

async fn gossiper() -> Node {
    // Nobody serves the DHT, so nobody meets anybody by accident.
    start(NodeConfig { gossip: true, dht_server: false, ..config(Transport::Tcp) }).await
}

/// Publishes until somebody listens.
async fn publish(node: &Node, topic: &str, data: &[u8]) {
    let published = async {
        loop {
            match node.publish(topic, data.to_vec()).await {
                Ok(()) => return,
                Err(GossipError::NoListeners) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, published).await.expect("somebody listens");
}

#[tokio::test]
async fn announcements_reach_all_and_bad_ones_stop_at_the_first_who_sees_them() {
    let (a, b, c) = (gossiper().await, gossiper().await, gossiper().await);
    connect(&a, &b).await;
    connect(&c, &b).await;
    let honest =
        |_: &_, data: &[u8]| if data.starts_with(b"bad") { Verdict::Reject } else { Verdict::Accept };
    let mut at_b = b.subscribe("news", honest).await.unwrap();
    // Takes everything: what b lets through shows here.
    let mut at_c = c.subscribe("news", |_, _| Verdict::Accept).await.unwrap();
    let mut heard = Vec::new();
    let hearing = async {
        for n in 0.. {
            publish(&a, "news", format!("bad {n}").as_bytes()).await;
            publish(&a, "news", format!("good {n}").as_bytes()).await;
            let pause = std::time::Duration::from_millis(50);
            while let Ok(Some(announcement)) = tokio::time::timeout(pause, at_c.recv()).await {
                assert_eq!((&announcement.author, &announcement.relayed_by), (&a.peer_id(), &b.peer_id()));
                heard.push(announcement.data);
            }
            if heard.len() >= 2 {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, hearing).await.expect("c hears of it through b");
    assert!(heard.iter().all(|data| data.starts_with(b"good")), "{heard:?}");
    let at_b = at_b.recv().await.unwrap();
    assert_eq!((at_b.author, at_b.relayed_by), (a.peer_id(), a.peer_id()));
}

#[tokio::test]
async fn what_cannot_be_announced_is_refused_with_the_reason() {
    let (a, b) = (gossiper().await, gossiper().await);
    connect(&a, &b).await;
    let error = a.publish("news", vec![0; MESSAGE_MAX_BYTES + 1]).await.unwrap_err();
    assert!(error.to_string().contains("announce its CID"), "{error}");
    let error = a.publish("", vec![0]).await.unwrap_err();
    assert!(matches!(error, GossipError::BadTopic { got_bytes: 0 }), "{error}");
    assert_eq!(a.publish("news", vec![1]).await, Err(GossipError::NoListeners));
    let (quiet, _) = pair(Transport::Tcp).await;
    assert_eq!(quiet.publish("news", vec![1]).await, Err(GossipError::Off));
}

#[tokio::test]
async fn a_topic_has_one_listener_at_a_time() {
    let a = gossiper().await;
    let first = a.subscribe("news", |_, _| Verdict::Accept).await.unwrap();
    let error = a.subscribe("news", |_, _| Verdict::Accept).await.unwrap_err();
    assert!(matches!(error, GossipError::Subscribed { .. }), "{error}");
    drop(first);
    let mut second = a.subscribe("news", |_, _| Verdict::Accept).await.unwrap();
    a.shutdown().await;
    assert!(second.recv().await.is_none());
}
