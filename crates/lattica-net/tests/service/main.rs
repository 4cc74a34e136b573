//! Real nodes on loopback addresses and free ports: calls, streams, deaths, relays, paths that change, the DHT, private
//! swarms, hostile peers and bad input.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a broken expectation ends the test")]

/// Has a check made twice, as tests of the names `over_quic` and `over_tcp`.
macro_rules! over_quic_and_tcp {
    ($check:ident $(, $($setting:tt)+)?) => {
        mod $check {
            #[tokio::test$(($($setting)+))?]
            async fn over_quic() {
                super::$check(crate::Transport::Quic).await;
            }

            #[tokio::test$(($($setting)+))?]
            async fn over_tcp() {
                super::$check(crate::Transport::Tcp).await;
            }
        }
    };
}

mod bad_input;
mod calls;
mod death;
mod dht;
mod discovery;
mod first_calls;
mod gossip;
mod hostile;
mod log;
mod news;
mod private;
mod published;
mod punch;
mod rendezvous;
mod stock;
mod streams;
mod switching;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use lattica_net::{Identity, NetEvent, Node, NodeConfig, Status};
use swarm_wire::PeerId;
use tokio::sync::{Notify, Semaphore, broadcast};

/// The protocol of calls, for peers that speak it by hand.
pub(crate) const RPC: &str = "/lattica/rpc/2.0.0";

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
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let ip = format!("127.0.{}.{}", n / 200, 2 + n % 200);
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

/// Waits until `node` is reachable through a relay; its address there.
pub(crate) async fn reserved(node: &Node) -> String {
    let mut events = node.events();
    let reserved = async {
        loop {
            let circuit = node.listen_addrs().await.into_iter().find(|a| a.contains("p2p-circuit"));
            match circuit {
                Some(address) => return address,
                None => events.recv().await.unwrap(),
            };
        }
    };
    tokio::time::timeout(PATIENCE, reserved).await.expect("a relay keeps a slot")
}

/// A handler that never answers.
#[derive(Debug, Default)]
pub(crate) struct Hanging {
    /// Notified by each call that starts.
    pub(crate) started: Notify,
    /// Calls that were dropped without having been finished.
    pub(crate) dropped: AtomicUsize,
}

/// Makes `method` of `node` hang.
pub(crate) fn hang(node: &Node, method: &str) -> Arc<Hanging> {
    struct Guard(Arc<Hanging>);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
    let hanging = Arc::new(Hanging::default());
    let shared = Arc::clone(&hanging);
    node.handle(method, move |_, _| {
        let guard = Guard(Arc::clone(&shared));
        guard.0.started.notify_one();
        async move {
            let _guard = guard;
            std::future::pending::<Result<Bytes, Status>>().await
        }
    });
    hanging
}

/// A handler that waits for a permit and then answers with what it was given.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) permits: Semaphore,
    /// Calls that have started.
    pub(crate) entered: AtomicUsize,
}

impl Gate {
    /// Waits until `n` calls have started.
    pub(crate) async fn entered(&self, n: usize) {
        eventually("the calls run", || self.entered.load(Ordering::SeqCst) >= n).await;
    }
}

/// Makes `method` of `node` wait.
pub(crate) fn gate(node: &Node, method: &str) -> Arc<Gate> {
    let gate = Arc::new(Gate { permits: Semaphore::new(0), entered: AtomicUsize::new(0) });
    let shared = Arc::clone(&gate);
    node.handle(method, move |_, body| {
        let gate = Arc::clone(&shared);
        gate.entered.fetch_add(1, Ordering::SeqCst);
        async move {
            gate.permits.acquire().await.map_err(Status::internal)?.forget();
            Ok(body)
        }
    });
    gate
}
