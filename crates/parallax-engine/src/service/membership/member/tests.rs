//! A member against a head that answers when the test says so.

use bytes::Bytes;
use lattica_bitswap::Blocks;
use lattica_net::{Identity, NodeConfig};
use parallax_sched::service::{DESCRIBE, JOIN, LEAVE};
use prost::Message as _;
use tokio::sync::{Notify, mpsc};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

async fn node() -> Node {
    Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.1", "member-test")).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_stopped_while_it_joins_still_says_goodbye() {
    let (head, member) = (node().await, node().await);
    let model = pb::ModelDescription {
        swarm: "home".into(),
        name: "tiny".into(),
        checkpoint_id: Checkpoint::resolve("tiny").unwrap().id().unwrap(),
        ..Default::default()
    };
    let reply = Bytes::from(model.encode_to_vec());
    head.handle(DESCRIBE, move |_, _| {
        let reply = reply.clone();
        async move { Ok(reply) }
    });
    let (let_in, said_goodbye) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (asks, mut asked) = mpsc::channel(1);
    let gate = Arc::clone(&let_in);
    head.handle(JOIN, move |_, _| {
        let (asks, gate) = (asks.clone(), Arc::clone(&gate));
        async move {
            asks.send(()).await.unwrap();
            gate.notified().await;
            Ok(pb::JoinReply { heartbeat_ms: 60_000, ..Default::default() }.encode_to_vec().into())
        }
    });
    let heard = Arc::clone(&said_goodbye);
    head.handle(LEAVE, move |_, _| {
        heard.notify_one();
        async { Ok(Bytes::new()) }
    });
    let cache = tempfile::tempdir().unwrap();
    let options = JoinOptions {
        swarm: "home".into(),
        bootstrap: head.listen_addrs().await,
        memory_bytes: 1 << 30,
        device: DeviceKind::Cpu,
        pinned: None,
        model: None,
        cache_dir: cache.path().to_owned(),
        patience: PATIENCE,
    };
    let stop = Arc::new(Notify::new());
    let joined = join(&member, None::<&Blocks>, &options, stop.notified(), |_| {});
    let operator = async {
        // The head has the question and has not answered when the operator gives up.
        asked.recv().await.unwrap();
        stop.notify_one();
        // The member has heard it before the answer goes out.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let_in.notify_one();
        said_goodbye.notified().await;
    };
    let both = async { tokio::join!(joined, operator) };
    let (joined, ()) = tokio::time::timeout(PATIENCE, both).await.expect("a goodbye");
    joined.unwrap();
}
