//! Calls while their paths come and go: each is answered, and each is run once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use lattica_net::wire::{Header, Hello};
use lattica_net::{CallError, CallOptions, Limits, Node, NodeConfig, Stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use super::{PATIENCE, RPC, Transport, config, eventually, gate, hang, pair, reserved, start};

/// How often the path changes: as often from the relay to a direct connection as back.
const SWITCHES: usize = 1000;
const CALLERS: usize = 8;

/// A client and a server that are connected over a relay; the server also has a direct address.
async fn over_a_relay(limits: Limits) -> (Node, Node, Node, String) {
    let relay = start(NodeConfig { relay_server: true, ..config(Transport::Tcp) }).await;
    let relays = relay.listen_addrs().await;
    let quiet = || NodeConfig { hole_punching: false, autonat: false, ..config(Transport::Tcp) };
    let server = start(NodeConfig { relays: relays.clone(), limits, ..quiet() }).await;
    let direct = server.listen_addrs().await.into_iter().find(|a| !a.contains("p2p-circuit")).unwrap();
    reserved(&server).await;
    let client = start(quiet()).await;
    let circuit = format!("{}/p2p-circuit/p2p/{}", relays[0], server.peer_id());
    client.dial(&circuit).await.unwrap();
    (relay, server, client, direct)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_changes_of_path_under_load_lose_and_double_no_call() {
    let (_relay, server, client, direct) = over_a_relay(Limits::default()).await;
    let runs: Arc<Mutex<HashMap<Bytes, usize>>> = Arc::default();
    let counted = Arc::clone(&runs);
    server.handle("count", move |_, body| {
        *counted.lock().unwrap().entry(body.clone()).or_default() += 1;
        async move { Ok(body) }
    });
    let peer = server.peer_id();
    let done = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let (client, peer, done) = (client.clone(), peer.clone(), Arc::clone(&done));
            tokio::spawn(async move {
                let mut n_calls = 0usize;
                while !done.load(Ordering::Relaxed) {
                    let body = Bytes::from(format!("{caller}/{n_calls}"));
                    let answer = client.call(&peer, "count", body.clone(), PATIENCE).await;
                    assert_eq!(answer.as_ref().ok(), Some(&body), "call {n_calls} of {caller}: {answer:?}");
                    n_calls += 1;
                }
                n_calls
            })
        })
        .collect();
    let relayed = |node: &Node| node.paths(&peer).first().map(|p| p.relayed);
    for _ in 0..SWITCHES / 2 {
        client.dial(&direct).await.unwrap();
        assert_eq!(relayed(&client), Some(false), "the direct path is used as soon as it stands");
        let key = client.paths(&peer)[0].key;
        client.close_path(&peer, key).await;
        eventually("the direct path is gone", || relayed(&client) == Some(true)).await;
    }
    done.store(true, Ordering::Relaxed);
    let mut n_calls = 0;
    for caller in callers {
        n_calls += caller.await.unwrap();
    }
    let runs = runs.lock().unwrap();
    println!("{n_calls} calls over {SWITCHES} changes of path");
    assert_eq!(runs.len(), n_calls);
    assert!(runs.values().all(|n| *n == 1), "{} calls ran twice", runs.values().filter(|n| **n > 1).count());
}

#[tokio::test]
async fn a_call_under_way_is_answered_on_the_path_that_is_left() {
    let (_relay, server, client, direct) = over_a_relay(Limits::default()).await;
    let gate = gate(&server, "wait");
    let peer = server.peer_id();
    client.dial(&direct).await.unwrap();
    for large in [false, true] {
        gate.entered.store(0, Ordering::SeqCst);
        let body = Bytes::from(vec![7; if large { 300_000 } else { 10 }]);
        let call = {
            let (client, peer, body) = (client.clone(), peer.clone(), body.clone());
            tokio::spawn(async move { client.call(&peer, "wait", body, PATIENCE).await })
        };
        gate.entered(1).await;
        leave_direct(&client, &server).await;
        gate.permits.add_permits(1);
        assert_eq!(call.await.unwrap().unwrap(), body);
        assert_eq!(gate.entered.load(Ordering::SeqCst), 1, "the call ran once");
        client.dial(&direct).await.unwrap();
    }
}

/// Closes the direct path, so that only the one over the relay is left.
async fn leave_direct(client: &Node, server: &Node) {
    let peer = server.peer_id();
    let key = client.paths(&peer)[0].key;
    client.close_path(&peer, key).await;
    eventually("only the relay is left", || client.paths(&peer).iter().all(|p| p.relayed)).await;
}

fn waiting_calls(client: &Node, server: &Node, n: usize) -> Vec<JoinHandle<Result<Bytes, CallError>>> {
    let call = |i: usize| {
        let (client, peer) = (client.clone(), server.peer_id());
        let body = Bytes::from(vec![i as u8; 1 + i * 1000]);
        tokio::spawn(async move { client.call(&peer, "wait", body, PATIENCE).await })
    };
    (0..n).map(call).collect()
}

#[tokio::test]
async fn a_change_of_path_with_every_place_taken_fails_no_call() {
    let limits = Limits { calls_per_peer: 4, ..Limits::default() };
    let (_relay, server, client, direct) = over_a_relay(limits).await;
    let gate = gate(&server, "wait");
    client.dial(&direct).await.unwrap();
    let calls = waiting_calls(&client, &server, 4);
    gate.entered(4).await;
    leave_direct(&client, &server).await;
    // A node that is about to stop finishes what it runs, whichever way the caller comes back.
    let draining = {
        let server = server.clone();
        tokio::spawn(async move { server.drain(PATIENCE).await })
    };
    // The calls are sent again as soon as the loss is noticed; the permits come when they had the time for it.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    client.dial(&direct).await.unwrap();
    leave_direct(&client, &server).await;
    gate.permits.add_permits(4);
    for (i, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.unwrap().unwrap().len(), 1 + i * 1000);
    }
    assert_eq!(gate.entered.load(Ordering::SeqCst), 4, "none ran twice");
    assert_eq!(draining.await.unwrap(), 0);
}

/// A peer that is another one than before must not be given a call that may have been done.
#[tokio::test]
async fn a_call_is_not_given_to_a_peer_that_restarted() {
    let (client, server) = pair(Transport::Tcp).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    // Speaks the protocol by hand: each stream is another incarnation, and ends when a call has arrived.
    server
        .handle_stream(RPC, move |_, mut stream| {
            let n = count.fetch_add(1, Ordering::SeqCst) as u64 + 1;
            async move {
                let hello = Header::Hello(Hello { incarnation: n, calls: 8, body_bytes: 1 << 20 });
                stream.write_all(&hello.encode()).await.unwrap();
                stream.flush().await.unwrap();
                let mut call = [0; 16];
                let _ = stream.read_exact(&mut call).await;
                // Long enough for the hello to have been read.
                let _ =
                    tokio::time::timeout(Duration::from_millis(100), stream.read_exact(&mut [0; 64])).await;
            }
        })
        .unwrap();
    let peer = server.peer_id();
    let error = client.call(&peer, "once", Bytes::new(), PATIENCE).await.unwrap_err();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
    assert_eq!(asked.load(Ordering::SeqCst), 2, "asked who it is, and left it at that");
    // What may be done twice is sent to whoever is there, until its tries are used up.
    let options = CallOptions { idempotent: true, ..CallOptions::new(PATIENCE) };
    client.call_with(&peer, "twice", Bytes::new(), &options).await.unwrap_err();
    assert!(asked.load(Ordering::SeqCst) > 4);
}

#[tokio::test]
async fn a_peer_that_ends_every_stream_before_it_says_who_it_is_does_not_hold_the_caller() {
    let (client, server) = pair(Transport::Tcp).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    server
        .handle_stream(RPC, move |_, mut stream| {
            let first = count.fetch_add(1, Ordering::SeqCst) == 0;
            async move {
                let hello = Header::Hello(Hello { incarnation: 1, calls: 8, body_bytes: 1 << 20 });
                if first {
                    stream.write_all(&hello.encode()).await.unwrap();
                    stream.flush().await.unwrap();
                    let mut hello_and_call = [0; 32];
                    let _ = stream.read_exact(&mut hello_and_call).await;
                }
            }
        })
        .unwrap();
    let long = Duration::from_secs(3600);
    let peer = server.peer_id();
    let call = client.call(&peer, "a method with a long name", Bytes::new(), long);
    let error = tokio::time::timeout(PATIENCE, call).await.expect("ends by itself").unwrap_err();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
}

#[tokio::test]
async fn the_second_of_two_peers_answers_for_a_slow_or_dead_first_one() {
    let (client, slow) = pair(Transport::Tcp).await;
    let quick = start(config(Transport::Tcp)).await;
    super::connect(&client, &quick).await;
    let hanging = hang(&slow, "who");
    quick.handle("who", |_, _| async { Ok(Bytes::from_static(b"quick")) });
    let options = CallOptions::new(PATIENCE);
    let peers = [slow.peer_id(), quick.peer_id()];
    let hedge = Some(Duration::from_millis(30));
    let answer = client.call_any(&peers, "who", Bytes::new(), hedge, &options).await.unwrap();
    assert_eq!(answer, "quick");
    eventually("the slow one is told to stop", || hanging.dropped.load(Ordering::SeqCst) == 1).await;
    slow.unhandle("who");
    let answer = client.call_any(&peers, "who", Bytes::new(), Some(PATIENCE), &options).await.unwrap();
    assert_eq!(answer, "quick", "a refusal moves on at once");
    let error = client.call_any(&[], "who", Bytes::new(), None, &options).await.unwrap_err();
    assert!(matches!(error, CallError::NoPeers { .. }), "{error}");
}

#[tokio::test]
async fn a_drained_node_finishes_its_calls_and_takes_no_more() {
    let (client, server) = pair(Transport::Quic).await;
    let gate = gate(&server, "wait");
    let peer = server.peer_id();
    // So large that most of the answer is still on its way when the handler has ended.
    let body = Bytes::from(vec![7; 8 * 1024 * 1024]);
    let call = {
        let (client, peer, body) = (client.clone(), peer.clone(), body.clone());
        tokio::spawn(async move { client.call(&peer, "wait", body, PATIENCE).await })
    };
    gate.entered(1).await;
    let draining = tokio::spawn({
        let server = server.clone();
        async move { server.drain(PATIENCE).await }
    });
    let refused = async {
        loop {
            let late = client.call(&peer, "none", Bytes::new(), PATIENCE).await.unwrap_err();
            if late.to_string().contains("about to stop") {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.expect("further calls are refused");
    gate.permits.add_permits(1);
    assert_eq!(call.await.unwrap().unwrap(), body);
    assert_eq!(draining.await.unwrap(), 0);
}

/// The next header that a peer sends on a stream of calls.
async fn next_header(stream: &mut Stream, read: &mut Vec<u8>) -> Option<Header> {
    loop {
        if let Some((header, n_bytes)) = Header::decode(read, 1 << 20).unwrap() {
            read.drain(..n_bytes);
            return Some(header);
        }
        match stream.read_buf(read).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

/// A server that answers by hand: over the direct path it takes a call and never says who it is.
#[tokio::test]
async fn a_call_that_left_before_its_peer_said_hello_goes_on_where_a_connection_stood_already() {
    let (_relay, server, client, direct) = over_a_relay(Limits::default()).await;
    let (taken, mut taking) = tokio::sync::mpsc::channel(8);
    let by_hand = move |_, mut stream: Stream| {
        let taken = taken.clone();
        async move {
            let mut read = Vec::new();
            if stream.is_relayed() {
                let hello = Header::Hello(Hello { incarnation: 7, calls: 64, body_bytes: 1 << 20 });
                stream.write_all(&hello.encode()).await.unwrap();
                stream.flush().await.unwrap();
            }
            while let Some(header) = next_header(&mut stream, &mut read).await {
                let Header::Request { call_id, .. } = header else { continue };
                taken.send(call_id).await.unwrap();
                if stream.is_relayed() {
                    let answer = Header::Answer { call_id, refusal: None, body_bytes: 0 };
                    stream.write_all(&answer.encode()).await.unwrap();
                    stream.flush().await.unwrap();
                }
            }
        }
    };
    server.handle_stream(RPC, by_hand).unwrap();
    client.dial(&direct).await.unwrap();
    let peer = server.peer_id();
    eventually("the direct path is the one in use", || !client.paths(&peer)[0].relayed).await;
    let call = {
        let (client, peer) = (client.clone(), peer.clone());
        tokio::spawn(async move { client.call(&peer, "wait", Bytes::new(), PATIENCE).await })
    };
    let first = taking.recv().await.unwrap();
    leave_direct(&client, &server).await;
    assert_eq!(taking.recv().await, Some(first), "the same call");
    assert_eq!(call.await.unwrap().unwrap(), Bytes::new());
}
