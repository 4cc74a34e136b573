//! A process that is killed: its peers learn of it within the idle time (QUIC) or at once (TCP).

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lattica_net::{CallError, NetEvent, NodeConfig, Status};
use tokio::io::AsyncReadExt;

use super::{Transport, config, eventually, start, until};

/// Set for the process that is to be killed: the address to listen on.
const ROLE: &str = "LATTICA_NET_TEST_VICTIM";

/// Kills the process when a test ends early.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The other process. As a test of its own it does nothing.
#[tokio::test]
async fn victim() {
    let Ok(address) = std::env::var(ROLE) else { return };
    let node = start(NodeConfig { listen: vec![address], ..config(Transport::Quic) }).await;
    node.handle("hang", |_, _| {
        println!("\ncalled");
        std::future::pending::<Result<Bytes, Status>>()
    });
    node.handle_stream("/test/hang/1.0.0", |_, _stream| std::future::pending::<()>()).unwrap();
    println!("\nlistening {}", node.listen_addrs().await[0]);
    std::future::pending::<()>().await;
}

async fn is_noticed(listen: &str, within: Duration) {
    let mut victim = Victim(
        Command::new(std::env::current_exe().unwrap())
            .args(["death::victim", "--exact", "--nocapture"])
            .env(ROLE, listen)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut lines = BufReader::new(victim.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    let address = lines.find_map(|l| l.strip_prefix("listening ").map(str::to_owned)).unwrap();
    let node = start(config(Transport::Quic)).await;
    let mut events = node.events();
    let peer = node.dial(&address).await.unwrap();
    let mut stream = node.open_stream(&peer, "/test/hang/1.0.0").await.unwrap();
    let call = {
        let (node, peer) = (node.clone(), peer.clone());
        tokio::spawn(async move { node.call(&peer, "hang", Bytes::new(), Duration::from_secs(600)).await })
    };
    // A call that had not arrived would be told that the peer cannot be reached.
    assert!(tokio::task::spawn_blocking(move || lines.any(|l| l == "called")).await.unwrap());
    eventually("the link is measured", || node.link(&peer).is_some()).await;

    victim.0.kill().unwrap();
    let start = Instant::now();
    let error = call.await.unwrap().unwrap_err();
    let noticed = start.elapsed();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
    until(&mut events, &NetEvent::Disconnected(peer.clone())).await;
    let reliability = node.link(&peer).unwrap().reliability;
    assert!(reliability < 0.5, "{reliability} after a break");
    assert!(!matches!(stream.read(&mut [0; 8]).await, Ok(n) if n > 0));
    println!("{listen}: noticed after {noticed:?}");
    assert!(noticed < within, "noticed after {noticed:?}");
}

#[tokio::test]
async fn a_killed_process_is_noticed_over_quic() {
    is_noticed("/ip4/127.0.0.201/udp/0/quic-v1", Duration::from_millis(2500)).await;
}

#[tokio::test]
async fn a_killed_process_is_noticed_over_tcp() {
    is_noticed("/ip4/127.0.0.202/tcp/0", Duration::from_millis(1500)).await;
}
