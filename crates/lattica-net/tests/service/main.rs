//! Real nodes on loopback addresses and free ports: calls, streams, deaths, relays, the DHT and hostile peers.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a broken expectation ends the test")]

mod calls;
mod death;
mod discovery;
mod hostile;
mod private;
mod streams;
mod switching;

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use lattica_net::{Identity, NetEvent, Node, NodeConfig};
use swarm_wire::PeerId;
use tokio::sync::broadcast;

/// Longer than anything here takes on a loaded machine; a test that needs it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Which transport two nodes use.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Transport {
    Quic,
    Tcp,
}

/// A configuration for a loopback address that no other node of this process uses.
pub(crate) fn config(transport: Transport) -> NodeConfig {
    static NEXT: AtomicU8 = AtomicU8::new(2);
    let ip = format!("127.0.0.{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let listen = match transport {
        Transport::Quic => format!("/ip4/{ip}/udp/0/quic-v1"),
        Transport::Tcp => format!("/ip4/{ip}/tcp/0"),
    };
    NodeConfig { listen: vec![listen], network: "test".to_owned(), ..NodeConfig::default() }
}

pub(crate) async fn start(config: NodeConfig) -> Node {
    Node::start(Identity::generate(), config).await.unwrap()
}

/// Two connected nodes; the first dialled the second.
pub(crate) async fn pair(transport: Transport) -> (Node, Node) {
    let (a, b) = (start(config(transport)).await, start(config(transport)).await);
    connect(&a, &b).await;
    (a, b)
}

/// Connects `a` to `b` and waits until both know it.
pub(crate) async fn connect(a: &Node, b: &Node) {
    let mut events = b.events();
    let address = b.listen_addrs().await.remove(0);
    assert_eq!(a.dial(&address).await.unwrap(), b.peer_id());
    if !b.is_connected(&a.peer_id()) {
        until(&mut events, &NetEvent::Connected(a.peer_id())).await;
    }
}

/// Waits for one event.
pub(crate) async fn until(events: &mut broadcast::Receiver<NetEvent>, wanted: &NetEvent) {
    let found = async {
        loop {
            if events.recv().await.unwrap() == *wanted {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("no {wanted:?}"));
}

/// Waits until `condition` holds, looking again whenever the other tasks had their turn.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let holds = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, holds).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A peer id that nobody has.
pub(crate) fn stranger() -> PeerId {
    Identity::from_seed([0x5a; 32]).peer_id()
}
