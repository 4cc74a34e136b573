//! Peers that break the rules: each is refused on its own stream, and nobody else notices.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use lattica_net::wire::{Header, encode_echo};
use lattica_net::{CallError, Limits, Node, NodeConfig, Stream};
use libp2p::swarm::SwarmEvent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::stock::{StockEvent, beside, stock};
use super::{PATIENCE, RPC, Transport, config, connect, eventually, hang, pair, start};

const LINK: &str = "/lattica/link/1.0.0";

fn request(call_id: u64, method: &str, body_bytes: usize) -> Vec<u8> {
    let method = method.to_owned();
    Header::Request { call_id, method, deadline: PATIENCE, body_bytes, done_below: 0, attempt: 0 }.encode()
}

async fn is_closed(mut stream: Stream) -> bool {
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.is_ok()
}

/// A victim with an `echo` method, a hostile peer, and a friend that the victim must go on serving.
async fn scene(transport: Transport) -> (Node, Node, Node) {
    let (hostile, victim) = pair(transport).await;
    let friend = start(config(transport)).await;
    connect(&friend, &victim).await;
    victim.handle("echo", |_, body| async move { Ok(body) });
    hang(&victim, "hang");
    (hostile, victim, friend)
}

async fn serves(friend: &Node, victim: &Node) {
    let body = Bytes::from_static(b"still there?");
    assert_eq!(friend.call(&victim.peer_id(), "echo", body.clone(), PATIENCE).await.unwrap(), body);
}

async fn streams_that_break_the_protocol_are_closed(transport: Transport) {
    let (hostile, victim, friend) = scene(transport).await;
    let noise: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let cases: [(&str, Vec<u8>); 8] = [
        ("length above the header limit", vec![0xff, 0xff, 0xff, 0x7f]),
        ("length prefix without end", vec![0x80; 64]),
        ("body above its limit", request(1, "echo", 100 * 1024 * 1024)),
        ("noise", noise),
        ("empty header", vec![0]),
        ("method without name", request(1, "", 0)),
        ("answer to nobody", Header::Answer { call_id: 1, refusal: None, body_bytes: 0 }.encode()),
        ("one number twice", [request(7, "hang", 0), request(7, "hang", 0)].concat()),
    ];
    for (what, bytes) in cases {
        let mut stream = hostile.open_stream(&victim.peer_id(), RPC).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        assert!(is_closed(stream).await, "{what} over {transport:?}");
        serves(&friend, &victim).await;
    }
    for bytes in [vec![0xff, 0xff, 0x7f], vec![5, 0xff, 0xff, 0xff, 0xff, 0xff]] {
        let mut stream = hostile.open_stream(&victim.peer_id(), LINK).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.flush().await.unwrap();
        assert!(is_closed(stream).await);
    }
    // Even the hostile peer is served as soon as it behaves.
    serves(&hostile, &victim).await;
}

over_quic_and_tcp!(streams_that_break_the_protocol_are_closed);

#[tokio::test]
async fn a_flood_of_calls_is_held_back_and_others_are_served() {
    let limits = Limits { calls_per_peer: 8, call_bytes_per_peer: 8 * 1024 * 1024, ..Limits::default() };
    let victim = start(NodeConfig { limits, ..config(Transport::Quic) }).await;
    let (hostile, friend) = (start(config(Transport::Quic)).await, start(config(Transport::Quic)).await);
    connect(&hostile, &victim).await;
    connect(&friend, &victim).await;
    victim.handle("echo", |_, body| async move { Ok(body) });
    hang(&victim, "hang");
    // Calls without end, and no answer is ever read: the victim stops reading, so the writer gets stuck.
    let mut stream = hostile.open_stream(&victim.peer_id(), RPC).await.unwrap();
    let flood = async {
        let mut n_bytes = 0usize;
        for call_id in 0.. {
            let frame = [request(call_id, "hang", 1000), vec![0; 1000]].concat();
            n_bytes += frame.len();
            if stream.write_all(&frame).await.is_err() {
                break;
            }
        }
        n_bytes
    };
    let stuck = tokio::time::timeout(Duration::from_secs(2), flood).await.is_err();
    serves(&friend, &victim).await;
    // 2 s of loopback are gigabytes; what left is what two queues and two stream windows hold.
    assert!(stuck, "the flood ended by itself");
    drop(stream);
    // As soon as the victim sees the end of the stream, the places of its calls are free again.
    let served = async {
        while hostile.call(&victim.peer_id(), "echo", Bytes::new(), PATIENCE).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, served).await.expect("the flood's calls are forgotten");
}

#[tokio::test]
async fn a_peer_that_answers_with_nonsense_fails_the_call_at_once() {
    let (caller, hostile) = pair(Transport::Quic).await;
    let answers: [Vec<u8>; 3] = [
        vec![0xff; 64],
        Header::Answer { call_id: 1, refusal: None, body_bytes: 1 << 30 }.encode(),
        request(1, "echo", 0),
    ];
    for answer in answers {
        hostile
            .handle_stream(RPC, move |_, mut stream| {
                let answer = answer.clone();
                async move {
                    let _ = stream.read_u8().await;
                    let _ = stream.write_all(&answer).await;
                    let _ = stream.flush().await;
                    std::future::pending::<()>().await;
                }
            })
            .unwrap();
        // Two calls, one on each of the shared streams, so that the next case opens new ones.
        for _ in 0..2 {
            let error = caller.call(&hostile.peer_id(), "echo", Bytes::new(), PATIENCE).await.unwrap_err();
            assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
        }
    }
    assert!(caller.is_connected(&hostile.peer_id()));
}

#[tokio::test]
async fn echoes_of_probes_that_were_never_sent_change_nothing() {
    let (victim, hostile) = (start(config(Transport::Quic)).await, start(config(Transport::Quic)).await);
    let (seen, mut done) = tokio::sync::mpsc::channel(1);
    hostile
        .handle_stream(LINK, move |_, mut stream| {
            let seen = seen.clone();
            async move {
                for sequence in 1000..1100 {
                    stream.write_all(&encode_echo(sequence, Some(f64::MAX))).await.unwrap();
                }
                stream.write_all(&encode_echo(0, Some(f64::NAN))).await.unwrap();
                stream.flush().await.unwrap();
                seen.send(()).await.unwrap();
                std::future::pending::<()>().await;
            }
        })
        .unwrap();
    connect(&victim, &hostile).await;
    done.recv().await.unwrap();
    eventually("the one true echo counts", || victim.link(&hostile.peer_id()).is_some()).await;
    // Later probes may count beside the first one; the hundred forged echoes must not.
    assert!(victim.link(&hostile.peer_id()).unwrap().n_samples < 100);
}

#[tokio::test]
async fn a_stock_libp2p_peer_stays_connected_and_is_measured_by_ping() {
    let node = start(config(Transport::Tcp)).await;
    let mut stock = stock();
    let address: libp2p::Multiaddr = node.listen_addrs().await[0].parse().unwrap();
    stock.dial(address).unwrap();
    let peer = swarm_wire::PeerId::from_bytes(&stock.local_peer_id().to_bytes()).unwrap();
    let running = tokio::spawn(async move {
        let mut pings = 0;
        while pings < 1 {
            match stock.select_next_some().await {
                SwarmEvent::Behaviour(StockEvent::Ping(event)) => {
                    event.result.unwrap();
                    pings += 1;
                }
                SwarmEvent::ConnectionClosed { cause, .. } => panic!("closed: {cause:?}"),
                _ => {}
            }
        }
        stock
    });
    let mut stock = tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap();
    beside(&mut stock, eventually("the ping is measured", || node.link(&peer).is_some())).await;
    let call = node.call(&peer, "echo", Bytes::new(), PATIENCE);
    let error = beside(&mut stock, call).await.unwrap_err();
    assert!(matches!(&error, CallError::Unreachable { reason, .. } if reason.contains(RPC)), "{error}");
    assert!(node.is_connected(&peer));
}
