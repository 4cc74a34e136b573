//! What nodes tell each other: links of others, predictions, addresses that outlive the bootstrap peer and the process.

use std::time::Duration;

use lattica_net::{Confidence, Identity, NetEvent, Node, NodeConfig, PathKind};
use swarm_wire::PeerId;

use super::{Transport, config, connect, eventually, start, until};

/// News every few milliseconds, so that no test has to wait for it.
fn quick(config: NodeConfig) -> NodeConfig {
    NodeConfig { news_interval: Duration::from_millis(20), ..config }
}

/// `n` nodes that know each other through the first one.
async fn swarm(transport: Transport, n: usize) -> Vec<Node> {
    let hub = start(quick(config(transport))).await;
    let bootstrap = hub.listen_addrs().await;
    let mut nodes = vec![hub];
    for _ in 1..n {
        nodes.push(start(quick(NodeConfig { bootstrap: bootstrap.clone(), ..config(transport) })).await);
    }
    nodes
}

fn ids(nodes: &[Node]) -> Vec<PeerId> {
    nodes.iter().map(Node::peer_id).collect()
}

/// Whether `node` could dial every one of `others`.
fn can_reach(node: &Node, others: &[PeerId]) -> bool {
    others.iter().all(|peer| node.is_connected(peer) || !node.addresses(peer).is_empty())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_of_others_are_told_and_own_ones_are_measured() {
    let quiet = || quick(NodeConfig { keep_peers: 0, dht_server: false, ..config(Transport::Quic) });
    let (a, b, c) = (start(quiet()).await, start(quiet()).await, start(quiet()).await);
    connect(&a, &b).await;
    connect(&b, &c).await;
    // a has no connection to c, and knows b's link to it from what b and c say.
    let confidence = |x: &Node, y: &Node| a.link_between(&x.peer_id(), &y.peer_id()).map(|l| l.confidence);
    eventually("a hears of the link from b to c", || confidence(&b, &c) == Some(Confidence::Heard)).await;
    eventually("and of the way back", || confidence(&c, &b) == Some(Confidence::Heard)).await;
    let heard = a.link_between(&b.peer_id(), &c.peer_id()).unwrap();
    assert!(heard.rtt_ms > 0.0 && heard.loss == Some(0.0), "{heard:?}");
    assert_eq!((heard.path, heard.reliability), (Some(PathKind::Quic), Some(1.0)), "{heard:?}");
    assert!(heard.age < Duration::from_secs(20), "{heard:?}");
    assert_eq!(confidence(&a, &b), Some(Confidence::Measured));
    assert_eq!(confidence(&a, &a), None);
    eventually("a predicts its link to c", || confidence(&a, &c) == Some(Confidence::Predicted)).await;
    assert!(!a.is_connected(&c.peer_id()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn networks_do_not_hear_of_each_other() {
    let quiet = |network: &str| {
        let network = network.to_owned();
        quick(NodeConfig { keep_peers: 0, dht_server: false, network, ..config(Transport::Quic) })
    };
    let (a, b, c) = (start(quiet("one")).await, start(quiet("other")).await, start(quiet("other")).await);
    connect(&a, &b).await;
    connect(&b, &c).await;
    eventually("c hears of the link between b and a", || {
        c.link_between(&b.peer_id(), &a.peer_id()).is_some()
    })
    .await;
    assert_eq!(a.link_between(&b.peer_id(), &c.peer_id()), None);
    assert!(a.addresses(&c.peer_id()).is_empty());
}

async fn a_swarm_outlives_its_bootstrap_peer(transport: Transport) {
    let mut nodes = swarm(transport, 5).await;
    let peers = ids(&nodes[1..]);
    for node in &nodes {
        eventually("everybody is known to everybody", || {
            let others: Vec<PeerId> = peers.iter().filter(|p| **p != node.peer_id()).cloned().collect();
            can_reach(node, &others)
        })
        .await;
    }
    nodes.remove(0).shutdown().await;
    // A newcomer that knows one ordinary peer.
    let known = nodes[3].listen_addrs().await;
    let newcomer =
        start(quick(NodeConfig { bootstrap: known, dht_server: false, ..config(transport) })).await;
    eventually("the newcomer has heard of all", || can_reach(&newcomer, &peers)).await;
    for peer in &peers {
        newcomer.connect(peer).await.unwrap();
    }
}

over_quic_and_tcp!(a_swarm_outlives_its_bootstrap_peer, flavor = "multi_thread", worker_threads = 2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarts_finds_back_without_its_bootstrap_peer() {
    let folder = tempfile::tempdir().unwrap();
    let mut nodes = swarm(Transport::Quic, 3).await;
    let hub = nodes.remove(0);
    let remembering = || NodeConfig {
        peers_file: Some(folder.path().join("peers")),
        ..quick(NodeConfig { dht_server: false, ..config(Transport::Quic) })
    };
    let identity = Identity::generate();
    let bootstrap = hub.listen_addrs().await;
    let node = Node::start(identity.clone(), NodeConfig { bootstrap, ..remembering() }).await.unwrap();
    eventually("it hears of the others", || can_reach(&node, &ids(&nodes))).await;
    node.shutdown().await;
    hub.shutdown().await;
    let again = Node::start(identity, remembering()).await.unwrap();
    eventually("it is connected to both", || nodes.iter().all(|n| again.is_connected(&n.peer_id()))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_few_peers_connects_to_those_that_it_heard_of() {
    let lonely = |keep_peers| quick(NodeConfig { keep_peers, dht_server: false, ..config(Transport::Tcp) });
    let (a, b, c) = (start(lonely(2)).await, start(lonely(0)).await, start(lonely(0)).await);
    connect(&c, &b).await;
    let mut events = a.events();
    connect(&a, &b).await;
    until(&mut events, &NetEvent::Connected(c.peer_id())).await;
}
