//! Streams and tensors between two nodes, and what becomes of them when something goes wrong.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use lattica_net::{Limits, NodeConfig, StreamError, TensorReceiver, TensorSender};
use swarm_wire::{DType, TensorHeader};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::{PATIENCE, Transport, config, connect, pair, start, stranger};

async fn twenty_megabytes_go_there_and_back(transport: Transport) {
    let (a, b) = pair(transport).await;
    b.handle_stream("/test/echo/1.0.0", |_, stream| async move {
        let (mut reader, mut writer) = tokio::io::split(stream);
        tokio::io::copy(&mut reader, &mut writer).await.unwrap();
        writer.shutdown().await.unwrap();
    })
    .unwrap();
    let stream = a.open_stream(&b.peer_id(), "/test/echo/1.0.0").await.unwrap();
    assert_eq!((stream.peer(), stream.is_relayed()), (&b.peer_id(), false));
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sent: Vec<u8> = (0..20_000_000u32).map(|i| (i % 253) as u8).collect();
    let expected = sent.clone();
    let sending = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    tokio::time::timeout(PATIENCE, reader.read_to_end(&mut got)).await.unwrap().unwrap();
    assert!(got == expected, "{} bytes came back", got.len());
    sending.await.unwrap();
    let link = a.link(&b.peer_id()).unwrap();
    assert!(link.goodput_in_bytes_per_s.unwrap() > 1e6, "{link:?}");
}

over_quic_and_tcp!(twenty_megabytes_go_there_and_back);

#[tokio::test]
async fn tensors_travel_and_the_end_is_told() {
    let (a, b) = pair(Transport::Quic).await;
    let (arrived, mut tensors) = mpsc::channel(4);
    b.handle_stream("/test/tensors/1.0.0", move |_, stream| {
        let arrived = arrived.clone();
        async move {
            let mut receiver = TensorReceiver::new(stream, 1 << 24);
            while let Some(tensor) = receiver.recv().await.unwrap() {
                arrived.send(tensor).await.unwrap();
            }
        }
    })
    .unwrap();
    let stream = a.open_stream(&b.peer_id(), "/test/tensors/1.0.0").await.unwrap();
    let mut sender = TensorSender::new(stream);
    for rows in [1usize, 7, 512] {
        let payload: Vec<u8> = (0..rows * 576 * 4).map(|i| (i % 250) as u8).collect();
        let header = TensorHeader::new(DType::F32, &[rows, 576]).unwrap();
        sender.send(&header, &payload).await.unwrap();
        let tensor = tensors.recv().await.unwrap();
        assert_eq!((tensor.header, &tensor.payload[..]), (header, &payload[..]));
    }
    sender.finish().await.unwrap();
    b.unhandle_stream("/test/tensors/1.0.0");
    assert!(tensors.recv().await.is_none(), "the receiver saw the end");
}

#[tokio::test]
async fn a_peer_that_lacks_the_protocol_says_so() {
    let (a, b) = pair(Transport::Tcp).await;
    let error = a.open_stream(&b.peer_id(), "/test/unknown/1.0.0").await.unwrap_err();
    assert!(matches!(error, StreamError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("/test/unknown/1.0.0"));
    let error = a.open_stream(&b.peer_id(), "no-slash").await.unwrap_err();
    assert!(matches!(error, StreamError::BadProtocol { .. }), "{error}");
    let error = a.open_stream(&stranger(), "/test/unknown/1.0.0").await.unwrap_err();
    assert!(matches!(error, StreamError::Unreachable { .. }), "{error}");
}

async fn a_peer_that_leaves_ends_its_streams(transport: Transport) {
    let (a, b) = pair(transport).await;
    b.handle_stream("/test/hang/1.0.0", |_, mut stream| async move {
        stream.write_all(b"x").await.unwrap();
        std::future::pending::<()>().await;
    })
    .unwrap();
    let mut stream = a.open_stream(&b.peer_id(), "/test/hang/1.0.0").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    b.shutdown().await;
    let mut receiver = TensorReceiver::new(stream, 1 << 20);
    let ended = tokio::time::timeout(Duration::from_secs(3), receiver.recv()).await.unwrap();
    assert!(ended.is_err(), "a lost peer looks like a proper end: {ended:?}");
}

over_quic_and_tcp!(a_peer_that_leaves_ends_its_streams);

#[tokio::test]
async fn streams_beyond_the_limit_wait_and_beyond_that_are_reset() {
    let limits = Limits { streams_per_connection: 2, waiting_streams_per_connection: 8, ..Limits::default() };
    let server = start(NodeConfig { limits, ..config(Transport::Quic) }).await;
    let client = start(config(Transport::Quic)).await;
    connect(&client, &server).await;
    server
        .handle_stream("/test/greet/1.0.0", |_, mut stream| async move {
            stream.write_all(b"!").await.unwrap();
            // Runs until the client ends the stream.
            let _ = stream.read_u8().await;
        })
        .unwrap();
    let peer = server.peer_id();
    // The client's own streams, such as link probes, take places too, and streams may arrive in another order.
    let mut reads = FuturesUnordered::new();
    for _ in 0..14 {
        let mut stream = client.open_stream(&peer, "/test/greet/1.0.0").await.unwrap();
        reads.push(async move { stream.read_u8().await.map(|greeting| (stream, greeting)) });
    }
    let (mut running, mut greeted, mut reset) = (Vec::new(), 0, 0);
    let seen = async {
        while let Some(read) = reads.next().await {
            match read {
                Ok((stream, greeting)) => {
                    assert_eq!(greeting, b'!');
                    greeted += 1;
                    running.push(stream);
                    assert!(running.len() <= 2 || reset >= 4, "a third ran beside the two");
                }
                Err(_) => reset += 1,
            }
            // Nobody ends a stream before all that are too many were reset; those that waited run then.
            if reset >= 4 {
                running.clear();
            }
        }
    };
    tokio::time::timeout(PATIENCE, seen).await.expect("every stream is greeted or reset, none forgotten");
    assert!((4..=10).contains(&greeted), "{greeted} were greeted, {reset} reset");
}
