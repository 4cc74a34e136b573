//! Strangers at the ports of a running swarm: bytes that are no protocol, frames that break theirs. Head and stage close
//! the stream and go on with the tokens of one process.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};

use lattica_net::{Identity, Node, NodeConfig};
use swarm_tests::swarm::{PATIENCE, Process, Swarm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PROTOCOLS: [&str; 4] =
    ["/parallax/stage/2", lattica_bitswap::wire::PROTOCOL, "/lattica/rpc/2.0.0", "/lattica/link/1.0.0"];

/// Bytes without a meaning, the same in every run.
fn noise(n: u32) -> Vec<u8> {
    (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// What a hostile peer sends: noise, a length beyond every limit, one without end, an empty frame, half a frame.
fn frames() -> Vec<Vec<u8>> {
    let announced = |bytes: u32| {
        // A varint of five bytes.
        (0..5).map(|i| ((bytes >> (7 * i)) & 0x7f) as u8 | if i < 4 { 0x80 } else { 0 }).collect::<Vec<u8>>()
    };
    vec![noise(5000), announced(u32::MAX), vec![0xff; 64], vec![0], [announced(1000), noise(10)].concat()]
}

/// The TCP address that a process says in its log, behind `mark`.
fn said(process: &Process, mark: &str) -> String {
    process.wait_until(&format!("TCP address behind {mark}"), |log| {
        let mut addresses =
            log.lines().filter_map(|line| line.split_once(mark)).map(|(_, address)| address.trim());
        addresses.find(|address| address.contains("/tcp/")).map(str::to_owned)
    })
}

/// The TCP port behind `/ip4/A/tcp/P/p2p/...`.
fn tcp_address(multiaddress: &str) -> String {
    let parts: Vec<&str> = multiaddress.split('/').collect();
    assert_eq!((parts[1], parts[3]), ("ip4", "tcp"), "{multiaddress}");
    format!("{}:{}", parts[2], parts[4])
}

/// Bytes that are not even libp2p: the connection is closed, or ignored.
fn shout_at(address: &str) {
    for bytes in [noise(4000), b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 100_000]] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The other side may be gone before all is written, which is its right.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let closed = stream.read_to_end(&mut answer);
        assert!(
            closed.is_ok() || closed.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset),
            "{address} keeps a connection that says nothing of use"
        );
    }
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for bytes in [noise(1200), vec![0xc0; 1200], vec![0]] {
        // The same port number over UDP is most likely nobody's; noise must not matter there either.
        let _ = socket.send_to(&bytes, address);
    }
}

/// A peer with a proper handshake whose frames break every protocol that the other side speaks.
async fn lie_to(address: &str) {
    let hostile =
        Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.9", "default")).await.unwrap();
    let peer = hostile.dial(address).await.unwrap();
    let mut spoken = 0;
    for protocol in PROTOCOLS {
        for frame in frames() {
            let Ok(mut stream) = hostile.open_stream(&peer, protocol).await else { continue };
            spoken += 1;
            // It may be closed while we still write.
            let _ = stream.write_all(&frame).await;
            let _ = stream.flush().await;
            let _ = stream.shutdown().await;
            let mut rest = Vec::new();
            let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
            assert!(end.is_ok(), "{protocol} stays open after {:?}...", &frame[..frame.len().min(8)]);
        }
    }
    assert!(
        spoken >= frames().len() * 3,
        "only {spoken} streams were opened: are the protocols still called that?"
    );
    hostile.shutdown().await;
}

#[test]
fn strangers_with_garbage_change_nothing_for_a_swarm() {
    let swarm = Swarm::start();
    let stage = swarm.join("stage", 2, "2..6");
    swarm.wait_until_ready(&[&stage]);
    swarm.check_tokens();

    let runtime = tokio::runtime::Runtime::new().unwrap();
    for address in [said(&swarm.head, "--bootstrap "), said(&stage, "listening on ")] {
        shout_at(&tcp_address(&address));
        runtime.block_on(lie_to(&address));
    }
    swarm.check_tokens();
    for log in [swarm.head.log(), stage.log()] {
        assert!(!log.contains("panicked"), "{log}");
    }
}
