//! Calls: answers, refusals, deadlines, cancels, limits.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lattica_net::{CallError, Limits, NetEvent, Status, StatusCode};

use super::{PATIENCE, Transport, config, connect, eventually, gate, hang, pair, start, stranger, until};

async fn bodies_of_every_size_come_back(transport: Transport) {
    let (a, b) = pair(transport).await;
    b.handle("echo", |_, body| async move { Ok(body) });
    for n_bytes in [0, 1, 1000, 65_535, 65_536, 300_000, 8 * 1024 * 1024] {
        let body = Bytes::from((0..n_bytes).map(|i| (i % 251) as u8).collect::<Vec<u8>>());
        assert_eq!(a.call(&b.peer_id(), "echo", body.clone(), PATIENCE).await.unwrap(), body, "{n_bytes}");
    }
    let calls = (0..200u32).map(|i| {
        let (a, peer) = (a.clone(), b.peer_id());
        tokio::spawn(async move {
            let body = Bytes::from(i.to_le_bytes().repeat(1 + (i as usize % 7) * 1000));
            assert_eq!(a.call(&peer, "echo", body.clone(), PATIENCE).await.unwrap(), body);
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
}

over_quic_and_tcp!(bodies_of_every_size_come_back);

#[tokio::test]
async fn both_sides_call_each_other_at_the_same_time() {
    let (a, b) = pair(Transport::Quic).await;
    a.handle("who", |peer, _| async move { Ok(Bytes::from(peer.to_string())) });
    b.handle("who", |peer, _| async move { Ok(Bytes::from(peer.to_string())) });
    let (of_a, of_b) = (a.peer_id(), b.peer_id());
    let (from_b, from_a) = tokio::join!(
        a.call(&of_b, "who", Bytes::new(), PATIENCE),
        b.call(&of_a, "who", Bytes::new(), PATIENCE)
    );
    assert_eq!(from_b.unwrap(), a.peer_id().to_string());
    assert_eq!(from_a.unwrap(), b.peer_id().to_string());
}

#[tokio::test]
async fn refusals_carry_their_code_and_text() {
    let (a, b) = pair(Transport::Quic).await;
    b.handle("refuse", |_, _| async { Err(Status::not_found("no such thing")) });
    b.handle("panic", |_, body| async move { Ok(body.slice(9..)) });
    let peer = b.peer_id();
    let error = a.call(&peer, "refuse", Bytes::new(), PATIENCE).await.unwrap_err();
    assert_eq!(error.remote_code(), Some(StatusCode::NotFound));
    assert!(error.to_string().contains("no such thing"), "{error}");
    let error = a.call(&peer, "nothing", Bytes::new(), PATIENCE).await.unwrap_err();
    assert_eq!(error.remote_code(), Some(StatusCode::Unimplemented));
    let error = a.call(&peer, "panic", Bytes::new(), PATIENCE).await.unwrap_err();
    assert_eq!(error.remote_code(), Some(StatusCode::Internal));
    // The node that had a handler panic still answers.
    b.unhandle("refuse");
    let error = a.call(&peer, "refuse", Bytes::new(), PATIENCE).await.unwrap_err();
    assert_eq!(error.remote_code(), Some(StatusCode::Unimplemented));
}

#[tokio::test]
async fn a_node_can_call_itself() {
    let a = start(config(Transport::Quic)).await;
    a.handle("echo", |_, body| async move { Ok(body) });
    assert_eq!(a.call(&a.peer_id(), "echo", Bytes::from_static(b"me"), PATIENCE).await.unwrap(), "me");
}

#[tokio::test]
async fn what_cannot_be_sent_is_refused_before_it_is() {
    let (a, b) = pair(Transport::Quic).await;
    let large = Bytes::from(vec![0; 8 * 1024 * 1024 + 1]);
    let error = a.call(&b.peer_id(), "echo", large, PATIENCE).await.unwrap_err();
    assert!(matches!(error, CallError::TooLarge { limit_bytes: 8_388_608, .. }), "{error}");
    let error = a.call(&b.peer_id(), "", Bytes::new(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, CallError::BadMethod { .. }), "{error}");
    let error = a.call(&stranger(), "echo", Bytes::new(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, CallError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("dial one of its addresses"), "{error}");
}

#[tokio::test]
async fn a_call_that_takes_too_long_ends_at_its_deadline_on_both_sides() {
    let (a, b) = pair(Transport::Quic).await;
    let hanging = hang(&b, "hang");
    let start = Instant::now();
    let error = a.call(&b.peer_id(), "hang", Bytes::new(), Duration::from_millis(200)).await.unwrap_err();
    assert!(
        matches!(error, CallError::Timeout { .. })
            || error.remote_code() == Some(StatusCode::DeadlineExceeded),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
    eventually("the handler is dropped", || hanging.dropped.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn dropping_a_call_cancels_the_handler() {
    let (a, b) = pair(Transport::Tcp).await;
    let hanging = hang(&b, "hang");
    let peer = b.peer_id();
    let call = tokio::spawn({
        let a = a.clone();
        async move { a.call(&peer, "hang", Bytes::new(), Duration::from_secs(600)).await }
    });
    hanging.started.notified().await;
    assert_eq!(hanging.dropped.load(Ordering::SeqCst), 0);
    call.abort();
    eventually("the handler is dropped", || hanging.dropped.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_peer_has_no_more_calls_under_way_than_it_was_granted_and_others_are_served() {
    let limits = Limits { calls_per_peer: 3, ..Limits::default() };
    let server = start(lattica_net::NodeConfig { limits, ..config(Transport::Quic) }).await;
    let (a, b) = (start(config(Transport::Quic)).await, start(config(Transport::Quic)).await);
    connect(&a, &server).await;
    connect(&b, &server).await;
    let gate = gate(&server, "wait");
    let peer = server.peer_id();
    // The first answer tells the caller what it may have under way.
    gate.permits.add_permits(1);
    a.call(&peer, "wait", Bytes::new(), PATIENCE).await.unwrap();
    gate.entered.store(0, Ordering::SeqCst);
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let (a, peer) = (a.clone(), peer.clone());
            tokio::spawn(async move { a.call(&peer, "wait", Bytes::new(), PATIENCE).await })
        })
        .collect();
    gate.entered(3).await;
    // Another peer has its own limit, and calls of `a` beyond its own wait at home.
    b.call(&peer, "none", Bytes::new(), PATIENCE).await.unwrap_err();
    assert_eq!(gate.entered.load(Ordering::SeqCst), 3);
    gate.permits.add_permits(4);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(gate.entered.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn one_slow_handler_does_not_hold_up_other_calls() {
    let (a, b) = pair(Transport::Quic).await;
    // Computes on the runtime's thread, as an application should not but will.
    b.handle("block", |_, _| async {
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(600) {
            std::hint::spin_loop();
        }
        Ok(Bytes::new())
    });
    b.handle("echo", |_, body| async move { Ok(body) });
    let peer = b.peer_id();
    let blocked = tokio::spawn({
        let (a, peer) = (a.clone(), peer.clone());
        async move { a.call(&peer, "block", Bytes::new(), PATIENCE).await }
    });
    a.call(&peer, "echo", Bytes::from_static(b"x"), PATIENCE).await.unwrap();
    blocked.await.unwrap().unwrap();
    assert!(b.is_connected(&a.peer_id()) && a.is_connected(&peer));
}

#[tokio::test]
async fn a_known_address_is_dialled_when_it_is_needed() {
    let (a, b) = (start(config(Transport::Quic)).await, start(config(Transport::Quic)).await);
    b.handle("echo", |_, body| async move { Ok(body) });
    a.add_address(&b.peer_id(), &b.listen_addrs().await[0]).unwrap();
    assert!(!a.is_connected(&b.peer_id()));
    assert_eq!(a.call(&b.peer_id(), "echo", Bytes::from_static(b"hi"), PATIENCE).await.unwrap(), "hi");
}

async fn a_peer_that_leaves_ends_its_calls(transport: Transport) {
    let (a, b) = pair(transport).await;
    let hanging = hang(&b, "hang");
    let (peer, mut events) = (b.peer_id(), a.events());
    let call = tokio::spawn({
        let (a, peer) = (a.clone(), peer.clone());
        async move { a.call(&peer, "hang", Bytes::new(), Duration::from_secs(600)).await }
    });
    hanging.started.notified().await;
    let start = Instant::now();
    b.shutdown().await;
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
    until(&mut events, &NetEvent::Disconnected(peer.clone())).await;
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(!a.is_connected(&peer));
}

over_quic_and_tcp!(a_peer_that_leaves_ends_its_calls);

#[tokio::test]
async fn a_node_that_was_shut_down_says_so() {
    let (a, b) = pair(Transport::Quic).await;
    a.shutdown().await;
    let error = a.call(&b.peer_id(), "echo", Bytes::new(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, CallError::ShutDown), "{error}");
    assert!(a.listen_addrs().await.is_empty());
    assert!(a.dial("/ip4/127.0.0.1/tcp/9").await.unwrap_err().to_string().contains("shut down"));
}
