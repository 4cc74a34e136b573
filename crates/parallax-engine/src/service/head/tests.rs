//! Pipelines over real nodes on this machine, with a toy model whose every result depends on the whole cache: a lost,
//! doubled or misplaced row changes the tokens.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lattica_net::{Identity, Liveness, Node, NodeConfig};
use parallax_sched::service::{JoinOptions, MemberClient, MembershipServer, find_head};
use parallax_sched::{
    Coordinator, CoordinatorConfig, MemberState, ModelProfile, NodeId, NodeProfile, PlanOptions, Report,
    Staged,
};
use swarm_wire::generated::parallax::v1 as pb;
use swarm_wire::limits::TENSOR_MAX_BYTES;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::config::EngineConfig;
use crate::request::{Completion, FinishReason, Request};
use crate::service::EngineHandle;
use crate::service::stage_server::StageServer;
use crate::service::stage_server::frame::STAGE_PROTOCOL;

const N_LAYERS: u32 = 6;
const VOCAB: usize = 31;
const PAGE_TOKENS: usize = 4;
const PAGES: usize = 64;
const PATIENCE: Duration = Duration::from_secs(30);

/// A hidden row is one number modulo a prime; a layer mixes it with everything the sequence cached in that layer.
struct Toy {
    layers: LayerRange,
    cache: HashMap<(u32, u32, usize), u64>,
    adapter: u64,
    residents: HashMap<u32, u64>,
    fail_at_token: Option<f32>,
    refuses_adapters: bool,
    delay: Duration,
}

impl Toy {
    fn new(layers: LayerRange) -> Self {
        Self {
            layers,
            cache: HashMap::new(),
            adapter: 0,
            residents: HashMap::new(),
            fail_at_token: None,
            refuses_adapters: false,
            delay: Duration::ZERO,
        }
    }

    fn whole() -> Self {
        Self::new(LayerRange::new(0, N_LAYERS).unwrap())
    }

    fn row(&mut self, pages: &[u32], position: usize, mut value: u64, adapter: u64) -> u64 {
        for layer in self.layers.start()..self.layers.end() {
            let place = |p: usize| (layer, pages[p / PAGE_TOKENS], p % PAGE_TOKENS);
            self.cache.insert(place(position), value);
            let mut sum = u64::from(layer) + adapter;
            for p in 0..=position {
                sum = (sum * 31 + self.cache.get(&place(p)).copied().unwrap_or(7777)) % 65_521;
            }
            value = (value + sum) % 65_521;
        }
        value
    }
}

impl StageRunner for Toy {
    fn shape(&self) -> StageShape {
        StageShape {
            layers: self.layers,
            n_layers: N_LAYERS,
            hidden: 1,
            vocab: VOCAB,
            max_context: 200,
            page_tokens: PAGE_TOKENS,
            n_pages: PAGES,
            state_slots: 0,
        }
    }

    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        std::thread::sleep(self.delay);
        let n = batch.n_rows();
        let values: Vec<f32> = if self.shape().is_first() {
            input.to_ids(n)?.into_iter().map(|id| id as f32).collect()
        } else {
            input.to_f32_rows(n, 1)?.into_owned()
        };
        if self.fail_at_token.is_some_and(|bad| values.contains(&bad)) {
            return Err(StageError::Forward {
                layers: self.layers.to_string(),
                reason: "not a number".into(),
            });
        }
        let mut rows = Vec::new();
        for sequence in &batch.sequences {
            let adapter = sequence.adapter.map_or(self.adapter, |id| self.residents[&id]);
            for i in 0..sequence.rows {
                let value = values[rows.len()] as u64;
                rows.push(self.row(&sequence.pages, (sequence.start + i) as usize, value, adapter) as f32);
            }
        }
        if !self.shape().is_last() {
            return Ok(StageOutput { hidden: Some(Tensor::from_f32(&[n, 1], rows)), logits: None });
        }
        let wanted: Vec<f32> = batch.wanted_rows().into_iter().map(|row| rows[row]).collect();
        let logits: Vec<f32> = wanted
            .iter()
            .flat_map(|v| (0..VOCAB).map(move |t| -((*v as i64 % 31 - t as i64).abs() as f32)))
            .collect();
        Ok(StageOutput {
            hidden: batch.want_hidden.then(|| Tensor::from_f32(&[wanted.len(), 1], wanted.as_slice())),
            logits: (!wanted.is_empty()).then(|| Tensor::from_f32(&[wanted.len(), VOCAB], logits)),
        })
    }

    fn set_adapter(
        &mut self,
        version: PolicyVersion,
        adapter: Option<&AdapterFile>,
    ) -> Result<(), StageError> {
        if self.refuses_adapters && adapter.is_some() {
            return Err(StageError::Adapter { version, reason: "another rank".into() });
        }
        self.adapter = adapter.map_or(0, |bytes| u64::from(bytes[0]));
        Ok(())
    }

    fn add_adapter(&mut self, id: u32, adapter: &AdapterFile) -> Result<(), StageError> {
        if self.refuses_adapters {
            return Err(StageError::NotReady { reason: "another rank".into() });
        }
        self.residents.insert(id, u64::from(adapter[0]));
        Ok(())
    }

    fn remove_adapter(&mut self, id: u32) {
        self.residents.remove(&id);
    }

    fn remove_adapters(&mut self) {
        self.residents.clear();
    }

    fn log_softmax(&self) -> LogSoftmax {
        log_softmax
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let sum: f32 = logits.iter().map(|l| l.exp()).sum();
    logits.iter().map(|l| l - sum.ln()).collect()
}

async fn node() -> Node {
    let liveness = Liveness {
        quic_idle: Duration::from_millis(1000),
        quic_keep_alive: Duration::from_millis(200),
        ..Liveness::default()
    };
    let config = NodeConfig { liveness, ..NodeConfig::loopback("127.0.0.1", "pipeline-test") };
    Node::start(Identity::generate(), config).await.unwrap()
}

/// A head on its own node, with the engine over its pipeline.
struct TestHead {
    node: Node,
    head: Head,
    engine: EngineHandle,
    membership: MembershipServer,
}

async fn head(local_layers: u64, slack: f64) -> TestHead {
    let node = node().await;
    let me = NodeId::from(&node.peer_id());
    let plan = PlanOptions {
        max_pipelines: 1,
        more_nodes_slack: slack,
        context_tokens: 0,
        first_stage: Some(me.clone()),
        ..PlanOptions::default()
    };
    let config = CoordinatorConfig {
        settle: Duration::from_millis(200),
        plan,
        first_epoch: 100,
        ..CoordinatorConfig::default()
    };
    let coordinator = Coordinator::new(ModelProfile::uniform("toy", N_LAYERS, 10), config).unwrap();
    let description = pb::ModelDescription { swarm: "toys".into(), name: "toy".into(), ..Default::default() };
    let membership = MembershipServer::start(&node, coordinator, description, |assignment| {
        (assignment.kv_pages, assignment.kv_page_tokens) = (PAGES as u32, PAGE_TOKENS as u32);
    });
    if local_layers > 0 {
        membership.join_local(NodeProfile::new(me.as_str(), local_layers * 10, 1.0), 1, "toy").unwrap();
    }
    let loader: StageLoader = Arc::new(|layers| Ok(Box::new(Toy::new(layers)) as Box<dyn StageRunner>));
    let options = HeadOptions {
        shape: Toy::whole().shape(),
        log_softmax,
        local: (local_layers > 0).then_some(loader),
        step_timeout: PATIENCE,
    };
    let (head, runner) = Head::start(&node, membership.clone(), options).unwrap();
    let engine = EngineHandle::start(Box::new(runner), EngineConfig::default()).unwrap();
    TestHead { node, head, engine, membership }
}

impl TestHead {
    fn status(&self) -> serde_json::Value {
        self.head.status(&self.engine)
    }
}

struct TestMember {
    node: Node,
    task: JoinHandle<()>,
}

impl TestMember {
    /// Joins with room for so many layers and runs toys as it is told.
    async fn join(head: &TestHead, room: u64, make: impl Fn(LayerRange) -> Toy + Send + 'static) -> Self {
        let node = node().await;
        let addrs = head.node.listen_addrs().await;
        let (peer, _) = find_head(&node, "toys", &addrs, PATIENCE).await.unwrap();
        let stage = StageServer::start(&node).unwrap();
        let options = JoinOptions {
            swarm: "toys".into(),
            head: peer,
            head_addrs: addrs,
            profile: NodeProfile::new(&node.peer_id().to_string(), room * 10, 1.0),
            incarnation: 1,
            device: "toy".into(),
        };
        let client = MemberClient::join(&node, options).await.unwrap();
        let task = tokio::spawn(async move {
            let (mut assignments, mut next) = (client.assignments(), client.next_weights());
            let mut report = Report::default();
            loop {
                tokio::select! {
                    changed = assignments.changed() => if changed.is_err() { return },
                    Ok(()) = next.changed() => {
                        let next = next.borrow_and_update().clone();
                        report.staged = next.and_then(|next| next.model).map(|model| Staged {
                            checkpoint_id: model.checkpoint_id,
                            failure: Some("no room".into()),
                        });
                        client.report(report.clone());
                        continue;
                    }
                }
                let Some(assignment) = assignments.borrow_and_update().clone() else { continue };
                stage.deactivate().await;
                report = Report { epoch: assignment.epoch, ..Report::default() };
                if let Ok(layers) = LayerRange::new(assignment.layers_start, assignment.layers_end) {
                    stage.activate(&assignment, Box::new(make(layers))).unwrap();
                    report.state = MemberState::Ready;
                }
                client.report(report.clone());
            }
        });
        Self { node, task }
    }

    /// As a process that is killed: no goodbye. Dropping connections is what the system does for it.
    async fn kill(self) {
        self.task.abort();
        self.node.shutdown().await;
    }
}

async fn ready(head: &TestHead) {
    let waited = tokio::time::timeout(PATIENCE, head.head.until_ready()).await;
    assert!(waited.is_ok(), "{}", head.status());
}

fn request(i: u32) -> Request {
    Request::greedy(vec![i % 31, 5, 9 + i % 7, 2, 3, 11], 25)
}

fn expected(requests: &[Request]) -> Vec<Vec<u32>> {
    let engine = EngineHandle::start(Box::new(Toy::whole()), EngineConfig::default()).unwrap();
    requests.iter().map(|r| ids(&engine.generate_blocking(r.clone()).unwrap())).collect()
}

fn ids(completion: &Completion) -> Vec<u32> {
    completion.tokens.iter().map(|t| t.id).collect()
}

async fn check_tokens(head: &TestHead) {
    let requests: Vec<Request> = (0..6).map(request).collect();
    let wanted = tokio::task::spawn_blocking({
        let requests = requests.clone();
        move || expected(&requests)
    });
    let running: Vec<_> = requests
        .into_iter()
        .map(|r| {
            let engine = head.engine.clone();
            tokio::spawn(async move { engine.generate(r).await.unwrap() })
        })
        .collect();
    let wanted = wanted.await.unwrap();
    for (task, wanted) in running.into_iter().zip(wanted) {
        let got = task.await.unwrap();
        assert_eq!(got.error, None);
        assert_eq!(ids(&got), wanted);
        assert_eq!(wanted.len(), 25);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_with_layers_and_two_peers_give_the_tokens_of_one_process() {
    let head = head(2, 4.0).await;
    let _a = TestMember::join(&head, 2, Toy::new).await;
    let _b = TestMember::join(&head, 2, Toy::new).await;
    ready(&head).await;
    check_tokens(&head).await;
    let status = head.status();
    assert_eq!(status["why"], "serving", "{status}");
    let nodes = status["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 3);
    assert!(nodes.iter().all(|node| node["kv_free_tokens"] == PAGES * PAGE_TOKENS), "nothing runs: {status}");
    assert_eq!(status["pipelines"][0]["stages"].as_array().unwrap().len(), 3);
    assert_eq!(status["pipelines"][0]["stages"][0]["peer"], head.node.peer_id().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_layers_serves_through_peers_and_adapters_reach_all_of_them() {
    let head = head(0, 1.0).await;
    let _a = TestMember::join(&head, 3, Toy::new).await;
    let _b = TestMember::join(&head, 3, Toy::new).await;
    ready(&head).await;
    check_tokens(&head).await;

    let plain = ids(&head.engine.generate(request(1)).await.unwrap());
    head.engine.swap_adapter(PolicyVersion(1), Some(vec![5])).await.unwrap();
    let adapted = ids(&head.engine.generate(request(1)).await.unwrap());
    let mut toy = Toy::whole();
    toy.adapter = 5;
    let alone = EngineHandle::start(Box::new(toy), EngineConfig::default()).unwrap();
    let wanted = alone.generate(request(1)).await.unwrap();
    assert_eq!(adapted, ids(&wanted));
    assert_ne!(adapted, plain);

    let captured = Request { capture_hidden: true, ..request(2) };
    let (far, near) =
        (head.engine.generate(captured.clone()).await.unwrap(), alone.generate(captured).await.unwrap());
    let hidden = |c: &Completion| c.tokens.iter().map(|t| t.hidden.clone().unwrap()).collect::<Vec<_>>();
    assert_eq!(hidden(&far), hidden(&near));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resident_adapters_reach_all_stages_and_those_that_come_later() {
    let head = head(2, 4.0).await;
    let a = TestMember::join(&head, 4, Toy::new).await;
    ready(&head).await;
    let alone = EngineHandle::start(Box::new(Toy::whole()), EngineConfig::default()).unwrap();
    for engine in [&head.engine, &alone] {
        engine.add_adapter("five", vec![5]).await.unwrap();
        engine.add_adapter("nine", vec![9]).await.unwrap();
    }
    let named = |name: &str| Request { adapter: Some(name.into()), ..request(1) };
    let mut wanted = vec![ids(&alone.generate(request(1)).await.unwrap())];
    for name in ["five", "nine"] {
        wanted.push(ids(&alone.generate(named(name)).await.unwrap()));
    }
    assert!(wanted[0] != wanted[1] && wanted[1] != wanted[2], "{wanted:?}");
    let all = [request(1), named("five"), named("nine")];
    let together = futures::future::join_all(all.iter().cloned().map(|r| head.engine.generate(r))).await;
    assert_eq!(together.iter().map(|c| ids(c.as_ref().unwrap())).collect::<Vec<_>>(), wanted, "in one batch");

    head.engine.remove_adapter("nine").unwrap();
    a.kill().await;
    let _b = TestMember::join(&head, 4, Toy::new).await;
    // The old pipeline may stand for a moment longer: what fails for it is asked again.
    let again = loop {
        ready(&head).await;
        let answer = head.engine.generate(named("five")).await.unwrap();
        if answer.error.is_none() {
            break answer;
        }
    };
    assert_eq!(ids(&again), wanted[1], "a stage that came later has it");
    let gone = head.engine.generate(named("nine")).await.unwrap_err();
    assert!(gone.to_string().contains("loaded are: five"), "{gone}");
    check_tokens(&head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adapter_that_one_stage_refuses_changes_no_stage() {
    let head = head(3, 4.0).await;
    let picky = |layers| Toy { refuses_adapters: true, ..Toy::new(layers) };
    let _a = TestMember::join(&head, 3, picky).await;
    ready(&head).await;
    let refused = head.engine.swap_adapter(PolicyVersion(1), Some(vec![5])).await.unwrap_err();
    assert!(refused.to_string().contains("another rank"), "{refused}");
    check_tokens(&head).await;
    let refused = head.engine.add_adapter("five", vec![5]).await.unwrap_err();
    assert!(refused.to_string().contains("another rank"), "{refused}");
    assert!(head.engine.adapters().is_empty());
    check_tokens(&head).await;
    let large = vec![5; TENSOR_MAX_BYTES + 1];
    let refused = head.engine.swap_adapter(PolicyVersion(1), Some(large)).await.unwrap_err();
    assert!(refused.to_string().contains("at most"), "{refused}");
    check_tokens(&head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_stage_fails_requests_with_its_name_and_a_new_one_heals_the_pipeline() {
    let head = head(2, 4.0).await;
    let _a = TestMember::join(&head, 2, Toy::new).await;
    // Slow enough that the request is certainly in flight when its stage dies.
    let slow = |layers| Toy { delay: Duration::from_millis(20), ..Toy::new(layers) };
    let b = TestMember::join(&head, 2, slow).await;
    ready(&head).await;

    let mut stream = head.engine.submit(Request::greedy(vec![1, 2, 3], 150)).unwrap();
    assert!(stream.next().await.is_some(), "the first token comes through all stages");
    let free = head.status()["nodes"][0]["kv_free_tokens"].as_u64().unwrap();
    assert!((1..(PAGES * PAGE_TOKENS) as u64).contains(&free), "{free}");
    let name = b.node.peer_id().to_string();
    let killed = Instant::now();
    b.kill().await;
    let mut last = None;
    while let Some(event) = stream.next().await {
        last = Some(event);
    }
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    let Some(crate::request::Event::Finished { reason: FinishReason::Error, error: Some(error), .. }) = last
    else {
        panic!("{last:?}");
    };
    let error = error.to_string();
    assert!(error.contains(&name) && error.contains(".."), "{error}");

    // The error may be out a moment before the plan.
    tokio::time::timeout(PATIENCE, async {
        while head.head.ready().is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    let refused = head.engine.generate(request(0)).await.unwrap();
    let error = refused.error.unwrap().to_string();
    assert!(error.contains("2 more of 6 layers"), "{error}");
    assert_eq!(head.head.ready().unwrap_err(), head.status()["why"].as_str().unwrap());

    let _c = TestMember::join(&head, 2, Toy::new).await;
    ready(&head).await;
    check_tokens(&head).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_goes_on_with_the_same_tokens_when_another_takes_a_killed_stages_place() {
    let head = head(2, 4.0).await;
    let slow = |layers| Toy { delay: Duration::from_millis(5), ..Toy::new(layers) };
    let mut members = Vec::new();
    for _ in 0..3 {
        members.push(TestMember::join(&head, 2, slow).await);
    }
    ready(&head).await;

    let asked = Request::greedy(vec![1, 2, 3], 120);
    let wanted = tokio::task::spawn_blocking({
        let asked = asked.clone();
        move || expected(&[asked]).remove(0)
    });
    let mut stream = head.engine.submit(asked).unwrap();
    let mut completion = Completion::default();
    completion.take(stream.next().await.unwrap());
    let last = head.membership.read(|c| {
        let plan = c.view().plan.as_ref().unwrap();
        plan.pipelines[0].stages.last().unwrap().node.clone()
    });
    let last = members.iter().position(|m| NodeId::from(&m.node.peer_id()) == last).unwrap();
    members.remove(last).kill().await;
    let (readiness, mut refused) = (head.head.readiness(), Vec::new());
    let mut looks = tokio::time::interval(Duration::from_millis(5));
    loop {
        tokio::select! {
            event = stream.next() => match event {
                Some(event) => completion.take(event),
                None => break,
            },
            _ = looks.tick() => refused.extend(readiness().err()),
        }
    }
    assert_eq!(refused, Vec::<String>::new(), "new requests wait, too");
    assert_eq!((completion.error.clone(), completion.reason), (None, FinishReason::Length));
    assert_eq!(ids(&completion), wanted.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_a_stage_refuses_fails_with_its_layers_and_the_pipeline_goes_on() {
    let head = head(0, 1.0).await;
    let picky = |layers| Toy { fail_at_token: Some(30.0), ..Toy::new(layers) };
    let _a = TestMember::join(&head, 6, picky).await;
    ready(&head).await;
    let refused = head.engine.generate(Request::greedy(vec![30], 2)).await.unwrap();
    assert!(
        refused
            .error
            .as_ref()
            .map(ToString::to_string)
            .is_some_and(|e| e.contains("not a number") && e.contains("0..6")),
        "{refused:?}"
    );
    assert_eq!(head.engine.generate(Request::greedy(vec![4], 1)).await.unwrap().error, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_garbage_on_stage_streams_change_nothing() {
    let head = head(3, 4.0).await;
    let a = TestMember::join(&head, 3, Toy::new).await;
    ready(&head).await;
    let stranger = node().await;
    for target in [&head.node, &a.node] {
        let peer = stranger.dial(&target.listen_addrs().await[0]).await.unwrap();
        let epoch = head.membership.read(|c| c.view().epoch);
        for stage_index in 0..3 {
            let mut stream = stranger.open_stream(&peer, STAGE_PROTOCOL).await.unwrap();
            let hello = pb::StageHello { epoch, stage_index };
            EncodedFrame::new(stage_frame::Kind::Hello(hello)).write(&mut stream).await.unwrap();
            let mut answer = Vec::new();
            let end = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer);
            // The stream is closed without a word.
            let _ = tokio::time::timeout(PATIENCE, end).await.expect("the stream ends");
            assert!(answer.is_empty());
        }
        let mut stream = stranger.open_stream(&peer, STAGE_PROTOCOL).await.unwrap();
        let _ = stream.write_all(&[0xff; 64]).await;
        let _ = stream.flush().await;
        let mut answer = Vec::new();
        let end = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer);
        let _ = tokio::time::timeout(PATIENCE, end).await.expect("the stream ends");
    }
    check_tokens(&head).await;
}

/// Weights of which every layer adds three.
async fn stage_other_weights(head: &TestHead) -> Result<PipelineRunner, StageWeightsError> {
    let description = pb::ModelDescription { checkpoint_id: "other".into(), ..head.membership.description() };
    let loader: StageLoader =
        Arc::new(|layers| Ok(Box::new(Toy { adapter: 3, ..Toy::new(layers) }) as Box<dyn StageRunner>));
    head.head.stage(description, |_| (), Some(loader)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_weights_serve_from_the_swap_on_and_adapters_stay() {
    let head = head(u64::from(N_LAYERS), 1.0).await;
    ready(&head).await;
    head.engine.add_adapter("nine", vec![9]).await.unwrap();
    let adapted = Request { adapter: Some("nine".into()), ..request(1) };
    let before = ids(&head.engine.generate(adapted.clone()).await.unwrap());
    let epoch = head.membership.read(|c| c.view().epoch);

    drop(stage_other_weights(&head).await.unwrap());
    check_tokens(&head).await;
    let runner = stage_other_weights(&head).await.unwrap();
    assert!(matches!(stage_other_weights(&head).await, Err(StageWeightsError::Busy)));
    check_tokens(&head).await;
    assert_eq!(head.membership.read(|c| c.view().epoch), epoch, "nothing has changed yet");

    head.engine.swap_weights(PolicyVersion(1), Box::new(runner)).await.unwrap();
    let alone =
        EngineHandle::start(Box::new(Toy { adapter: 3, ..Toy::whole() }), EngineConfig::default()).unwrap();
    let wanted = alone.generate(request(1)).await.unwrap();
    assert_eq!(ids(&head.engine.generate(request(1)).await.unwrap()), ids(&wanted));
    assert_eq!(ids(&head.engine.generate(adapted).await.unwrap()), before);
    assert_eq!(head.membership.read(|c| c.view().epoch), epoch + 1);
    assert_eq!(head.membership.description().checkpoint_id, "other");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_that_a_member_cannot_have_change_nothing() {
    let head = head(2, 4.0).await;
    let a = TestMember::join(&head, 4, Toy::new).await;
    ready(&head).await;
    for _ in 0..2 {
        let refused = stage_other_weights(&head).await.unwrap_err().to_string();
        assert_eq!(refused, format!("{} cannot stage them: no room", a.node.peer_id()));
    }
    check_tokens(&head).await;
    assert_eq!(head.membership.description().checkpoint_id, "");
}
