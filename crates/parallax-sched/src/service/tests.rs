//! Membership over real nodes on this machine.

use std::time::Duration;

use lattica_net::{Identity, Node, NodeConfig};
use swarm_wire::generated::parallax::v1 as pb;

use super::*;
use crate::{Coordinator, CoordinatorConfig, MemberState, ModelProfile, NodeId, NodeProfile, Report};

async fn node() -> Node {
    Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.1", "sched-test")).await.unwrap()
}

fn description() -> pb::ModelDescription {
    pb::ModelDescription {
        swarm: "s".into(),
        name: "toy".into(),
        n_layers: 4,
        layer_bytes: 10,
        ..Default::default()
    }
}

fn serve(node: &Node) -> MembershipServer {
    let config = CoordinatorConfig { settle: Duration::from_millis(100), ..CoordinatorConfig::default() };
    let coordinator = Coordinator::new(ModelProfile::uniform("toy", 4, 10), config).unwrap();
    MembershipServer::start(node, coordinator, description(), |assignment| assignment.kv_pages = 7)
}

async fn member(node: &Node, head: &Node, room: u64) -> MemberClient {
    let addrs = head.listen_addrs().await;
    let (peer, model) = find_head(node, "s", &addrs, Duration::from_secs(20)).await.unwrap();
    assert_eq!(model.name, "toy");
    let options = JoinOptions {
        swarm: "s".into(),
        head: peer,
        head_addrs: addrs,
        profile: NodeProfile::new(&node.peer_id().to_string(), room * 10, 1.0),
        incarnation: 1,
        device: "test".into(),
    };
    MemberClient::join(node, options).await.unwrap()
}

async fn assigned(client: &MemberClient) -> pb::Assignment {
    let mut assignments = client.assignments();
    let wanted = assignments.wait_for(|a| a.as_ref().is_some_and(|a| a.layers_end > 0));
    tokio::time::timeout(Duration::from_secs(20), wanted).await.unwrap().unwrap().clone().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_get_layers_and_a_lost_one_is_noticed() {
    let (head, a, b) = (node().await, node().await, node().await);
    let server = serve(&head);
    // Nodes of unequal memory: the plan can only be 1 layer here and 3 there.
    let (small, large) = (member(&a, &head, 1).await, member(&b, &head, 3).await);
    let (small_layers, large_layers) = (assigned(&small).await, assigned(&large).await);
    assert_eq!(small_layers.layers_end - small_layers.layers_start, 1);
    assert_eq!(large_layers.layers_end - large_layers.layers_start, 3);
    assert_eq!((small_layers.kv_pages, small_layers.epoch), (7, large_layers.epoch));
    let (first, last) = if small_layers.stage_index == 0 { (&small_layers, &b) } else { (&large_layers, &a) };
    assert_eq!(first.next_peer, last.peer_id().as_bytes());
    assert!(!first.next_is_head && !first.next_addrs.is_empty());

    for client in [&small, &large] {
        client.report(Report { epoch: small_layers.epoch, state: MemberState::Ready, ..Report::default() });
    }
    let mut view = server.watch();
    tokio::time::timeout(Duration::from_secs(20), async {
        while !server.read(Coordinator::is_serving) {
            tokio::task::yield_now().await;
        }
        b.shutdown().await;
        view.wait_for(|v| v.plan.is_err()).await.unwrap();
    })
    .await
    .unwrap();
    let gone = NodeId::from(&b.peer_id());
    assert!(server.read(|c| c.member(&gone).is_none()));
    assert!(server.read(Coordinator::why).contains(gone.as_str()), "{}", server.read(Coordinator::why));
    drop((small, large));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_model_is_staged_then_withdrawn_or_served_in_a_new_epoch() {
    let (head, a) = (node().await, node().await);
    let server = serve(&head);
    let client = member(&a, &head, 4).await;
    let first = assigned(&client).await;
    assert_eq!(first.kv_pages, 7);
    client.report(Report { epoch: first.epoch, state: MemberState::Ready, ..Report::default() });
    let (mut next, mut assignments) = (client.next_weights(), client.assignments());
    let stage = |id: &str| {
        server.stage(pb::ModelDescription { checkpoint_id: id.into(), ..description() }, |assignment| {
            assignment.kv_pages = 9;
            assignment.files = vec![pb::FileSpans { name: "w".into(), ..Default::default() }];
        });
    };
    let id = |next: &Option<pb::NextWeights>| next.clone().and_then(|n| n.model).map(|m| m.checkpoint_id);
    let within = Duration::from_secs(20);
    stage("bad");
    let wanted = tokio::time::timeout(within, next.wait_for(|n| id(n).as_deref() == Some("bad"))).await;
    assert_eq!(wanted.unwrap().unwrap().as_ref().unwrap().files[0].name, "w");
    server.withdraw();
    tokio::time::timeout(within, next.wait_for(Option::is_none)).await.unwrap().unwrap();

    stage("good");
    tokio::time::timeout(within, next.wait_for(|n| id(n).as_deref() == Some("good"))).await.unwrap().unwrap();
    assert_eq!(server.description().checkpoint_id, "");
    server.adopt();
    tokio::time::timeout(within, next.wait_for(Option::is_none)).await.unwrap().unwrap();
    let second = assignments.borrow_and_update().clone().unwrap();
    assert_eq!((second.epoch, second.layers_end, second.kv_pages), (first.epoch + 1, 4, 9));
    let (_, model) = find_head(&a, "s", &[], within).await.unwrap();
    assert_eq!(model.checkpoint_id, "good");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_takes_effect_and_other_swarms_are_not_joined() {
    let (head, a) = (node().await, node().await);
    let server = serve(&head);
    let addrs = head.listen_addrs().await;
    let error = find_head(&a, "other", &addrs, Duration::from_millis(1)).await.unwrap_err();
    assert!(error.to_string().contains("parallax serve --swarm other"), "{error}");

    let client = member(&a, &head, 4).await;
    assert_eq!(assigned(&client).await.layers_end, 4);
    client.leave().await;
    assert!(server.read(|c| c.members().next().is_none()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_answered_with_an_error() {
    let (head, a) = (node().await, node().await);
    let _server = serve(&head);
    let peer = a.dial(&head.listen_addrs().await[0]).await.unwrap();
    for method in [DESCRIBE, JOIN, HEARTBEAT, LEAVE] {
        let reply = a.call(&peer, method, vec![0xff; 40].into(), Duration::from_secs(20)).await;
        assert!(reply.is_err(), "{method}");
    }
}
