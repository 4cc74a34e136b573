//! A learner and its assistants on nodes of their own: honest ones, some that die, are late, or say what is not so.

use std::collections::BTreeSet;

use lattica_net::{Identity, NodeConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::sync::mpsc as channel;

use super::*;
use crate::averaging::Reply;
use crate::averaging::wire::{Frame, decode_share, encode_frame, encode_reply};
use crate::loss::LossConfig;
use crate::loss::config::Correction;
use crate::metrics::{LossMetrics, StepReport};
use crate::parameters::{Gradients, Parameters};
use crate::service::assistant::{Assistant, AssistantError, AssistantEvent};
use crate::shares::{Cut, Replicas, policy_gradients};
use crate::step::tests::{Bigram, sample};
use crate::trainer::Trainer;
use crate::trainer::tests::{config, round_with};

const MODEL: &str = "bigram";

async fn node() -> Node {
    Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.1", "assistants-test")).await.unwrap()
}

fn settings() -> TrainerConfig {
    // Corrections that depend on the present weights: shares are asked for log-probabilities, too.
    TrainerConfig { loss: LossConfig::ppo().decoupled(Correction::tis(1.5)), ..config() }
}

/// Reports of so many steps with this many replicas and nobody else, and the weights after them.
fn told_alone(replicas: usize, steps: usize) -> (Vec<StepReport>, Parameters) {
    let mut trainer = Trainer::new(Bigram::new(4), TrainerConfig { replicas, ..settings() }).unwrap();
    let reports = (0..steps).map(|_| round_with(&mut trainer, &mut averaging::Absent(0))).collect();
    (reports, trainer.masters)
}

fn alone(replicas: usize, steps: usize) -> Parameters {
    told_alone(replicas, steps).1
}

/// Checks this share of rounds, by this secret.
fn checking(check: f64, secret: u64) -> AssistantsConfig {
    AssistantsConfig {
        peers: Vec::new(),
        run: RunId(5),
        base_model_id: MODEL.to_owned(),
        trainer: settings(),
        patience: Duration::from_secs(20),
        check,
        secret,
    }
}

/// A learner with two seats.
struct Run {
    learner: Node,
    assistants: Assistants,
    trainer: Option<Trainer<Bigram>>,
    /// Of its steps.
    reports: Vec<StepReport>,
    nodes: [Node; 2],
}

impl Run {
    async fn start(patience_ms: u64) -> Self {
        Self::checking(patience_ms, 0.0).await
    }

    async fn checking(patience_ms: u64, check: f64) -> Self {
        Self::with(AssistantsConfig { patience: Duration::from_millis(patience_ms), ..checking(check, 1) })
            .await
    }

    async fn with(config: AssistantsConfig) -> Self {
        let (learner, nodes) = (node().await, [node().await, node().await]);
        let config = AssistantsConfig { peers: nodes.iter().map(Node::peer_id).collect(), ..config };
        let mut assistants = Assistants::start(learner.clone(), config).unwrap();
        let trainer = Trainer::new(Bigram::new(4), settings()).unwrap();
        trainer.introduce(&mut assistants);
        for node in &nodes {
            node.dial(&learner.listen_addrs().await[0]).await.unwrap();
        }
        Self { learner, assistants, trainer: Some(trainer), reports: Vec::new(), nodes }
    }

    /// An honest assistant, and the weights that it holds one after the other.
    async fn honest(&self, i: usize) -> channel::UnboundedReceiver<(PolicyVersion, Hash)> {
        let assistant = Assistant::join(&self.nodes[i], &self.learner.peer_id(), MODEL).await.unwrap();
        assert_eq!((assistant.run(), assistant.trainer()), (RunId(5), &settings()));
        let (tell, held) = channel::unbounded_channel();
        tokio::spawn(assistant.serve(Bigram::new(4), move |event| {
            if let AssistantEvent::Holds { version, hash } = event {
                let _ = tell.send((version, hash));
            }
        }));
        held
    }

    /// Until so many can be given shares.
    async fn present(&self, n: usize) {
        let here = async {
            while self.assistants.present() != n {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), here).await.expect("they come");
    }

    /// One step, and how many shares assistants computed.
    async fn step(&mut self) -> usize {
        let mut assistants = self.assistants.clone();
        let mut trainer = self.trainer.take().unwrap();
        let step = tokio::task::spawn_blocking(move || {
            let report = round_with(&mut trainer, &mut assistants);
            (trainer, report)
        });
        let (trainer, report) = step.await.unwrap();
        self.trainer = Some(trainer);
        self.reports.push(report);
        self.assistants.assisted()
    }

    /// One step in which `peer` owes its gradients until it is late: time passes as soon as nobody else is waited for.
    async fn step_without(&mut self, peer: &PeerId) -> usize {
        let shared = Arc::clone(&self.assistants.shared);
        let passes = async {
            loop {
                {
                    let mut state = shared.state();
                    if awaits_only(&state, peer) {
                        state.began -= shared.config.patience;
                        break;
                    }
                }
                tokio::task::yield_now().await;
            }
            shared.changed.notify_all();
        };
        let passes = tokio::time::timeout(Duration::from_secs(20), passes);
        let (computed, passed) = tokio::join!(self.step(), passes);
        passed.expect("it is waited for");
        computed
    }

    fn weights(&self) -> &[Parameter] {
        &self.trainer.as_ref().unwrap().masters
    }
}

/// Whether the step waits for the gradients of `peer` and for nothing else.
fn awaits_only(state: &State, peer: &PeerId) -> bool {
    let job = state.connections.get(peer).and_then(|connection| connection.job.as_ref());
    let (Some(job), Some(asked)) = (job, state.leader.asked(peer)) else { return false };
    let mut others = state.answers.iter().enumerate().filter(|(share, _)| *share != asked.share);
    job.share.task == Task::Gradients && others.all(|(_, answer)| answer.is_some())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_with_two_assistants_makes_the_steps_of_three_replicas() {
    let mut run = Run::start(20_000).await;
    let mut held = [run.honest(0).await, run.honest(1).await];
    run.present(2).await;
    for _ in 0..4 {
        assert_eq!(run.step().await, 2, "each computes one share");
    }
    assert!(run.weights() == alone(3, 4), "the same weights, bit for bit");
    assert!(run.assistants.take_news().is_empty());
    for held in &mut held {
        let mut all = Vec::new();
        while all.len() < 5 {
            all.push(held.recv().await.expect("it goes on"));
        }
        let versions: Vec<u64> = all.iter().map(|(version, _)| version.0).collect();
        assert_eq!(versions, [0, 1, 2, 3, 4]);
        assert_eq!(all[4].1, weights_hash(run.weights()), "and so has every assistant");
    }
    run.assistants.finish(Duration::from_secs(20)).await;
    for held in &mut held {
        assert_eq!(held.recv().await, None, "they end");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_take_part_is_told_why() {
    let run = Run::start(1000).await;
    let stranger = node().await;
    stranger.dial(&run.learner.listen_addrs().await[0]).await.unwrap();
    let why = |joined: Result<Assistant, AssistantError>| joined.unwrap_err().to_string();
    let unnamed = why(Assistant::join(&stranger, &run.learner.peer_id(), MODEL).await);
    assert!(
        unnamed.contains(&stranger.peer_id().to_string()) && unnamed.contains("run.assistants"),
        "{unnamed}"
    );
    let other = why(Assistant::join(&run.nodes[0], &run.learner.peer_id(), "trigram").await);
    assert!(other.contains("trains another model: bigram, not trigram"), "{other}");
    run.nodes[0].dial(&run.nodes[1].listen_addrs().await[0]).await.unwrap();
    let nobody = why(Assistant::join(&run.nodes[0], &run.nodes[1].peer_id(), MODEL).await);
    assert!(nobody.contains("takes no assistant"), "{nobody}");
    run.assistants.finish(Duration::ZERO).await;
    assert!(
        why(Assistant::join(&run.nodes[0], &run.learner.peer_id(), MODEL).await)
            .contains("takes no assistant")
    );
}

/// What an assistant does with the first share of gradients that it is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Flaw {
    /// Hangs up in the middle of its answer.
    Dies,
    /// Never answers, and never will.
    Silent,
    Nan,
    OtherStep,
    OtherRound,
    OtherWeights,
    TooShort,
    Damaged,
    /// Bytes that are no frame.
    Garbage,
    /// A frame that only learners say.
    Orders,
    /// Answers twice.
    Twice,
    /// Right in everything but one number.
    Wrong,
    /// The same, and before that all its log-probabilities are a lie.
    WrongTwice,
    /// Only those.
    WrongLogprobs,
}

impl Flaw {
    /// Whether its log-probabilities are a lie as well, which only computing them again tells.
    fn lies_first(self) -> bool {
        matches!(self, Self::Nan | Self::OtherStep | Self::Damaged | Self::WrongTwice | Self::WrongLogprobs)
    }
}

/// Takes part as a program with this flaw; ends when the learner ends it.
async fn flawed(node: Node, learner: PeerId, flaw: Flaw) {
    let (reader, mut writer) = tokio::io::split(node.open_stream(&learner, PROTOCOL).await.unwrap());
    let mut reader = BufReader::new(reader);
    frames::send(&mut writer, &Frame::Hello { base_model_id: MODEL.to_owned() }, &[]).await.unwrap();
    let mut weights = [0; 32];
    let loss = settings().loss;
    loop {
        let Ok(Some((frame, announced))) = frames::receive(&mut reader).await else { return };
        let bytes = frames::payload(&mut reader, announced, 1 << 20).await.unwrap();
        let attempt = match frame {
            Frame::Weights { hash, .. } => {
                weights = hash;
                // What a lie about weights is worth is seen with the answers.
                frames::send(&mut writer, &Frame::Held { hash }, &[]).await.unwrap();
                continue;
            }
            Frame::Work(attempt) => attempt,
            Frame::End { .. } => return,
            _ => continue,
        };
        // The values of version 0 are right for nothing but its length.
        let share = decode_share(&bytes).unwrap();
        let answer = share.compute(&Bigram::new(4), &loss).unwrap();
        let mut reply = Reply::new(attempt, weights, answer);
        if share.task == Task::Logprobs {
            if flaw.lies_first() {
                reply.values.iter_mut().for_each(|logprob| *logprob -= 0.25);
            }
            let (frame, bytes) = encode_reply(&reply);
            frames::send(&mut writer, &frame, &bytes).await.unwrap();
            continue;
        }
        match flaw {
            Flaw::Silent => continue,
            Flaw::Nan => reply.values[3] = f32::NAN,
            Flaw::OtherStep => reply.attempt.step += 1,
            Flaw::OtherRound => reply.attempt.round -= 1,
            Flaw::OtherWeights => reply.weights[0] ^= 1,
            Flaw::TooShort => _ = reply.values.pop(),
            Flaw::Wrong | Flaw::WrongTwice => reply.values[2] += 0.5,
            _ => {}
        }
        let (frame, mut bytes) = encode_reply(&reply);
        match flaw {
            Flaw::Damaged => bytes[7] ^= 1,
            Flaw::Dies => {
                let mut part = Vec::new();
                swarm_wire::frame::encode(&encode_frame(&frame, bytes.len()), &mut part);
                part.extend_from_slice(&bytes[..9]);
                writer.write_all(&part).await.unwrap();
                writer.flush().await.unwrap();
                return;
            }
            Flaw::Garbage => {
                writer.write_all(&[0xff; 64]).await.unwrap();
                writer.flush().await.unwrap();
                // Until it is hung up on.
                let _ = reader.read_to_end(&mut Vec::new()).await;
                return;
            }
            Flaw::Orders => {
                frames::send(&mut writer, &Frame::Work(attempt), &[]).await.unwrap();
                continue;
            }
            Flaw::Twice => frames::send(&mut writer, &frame, &bytes).await.unwrap(),
            _ => {}
        }
        // The stream may be over already.
        let _ = frames::send(&mut writer, &frame, &bytes).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_something_else_is_left_out_and_the_step_is_the_same() {
    let (reports, weights) = told_alone(3, 1);
    for flaw in [
        Flaw::Dies,
        Flaw::Silent,
        Flaw::Nan,
        Flaw::OtherStep,
        Flaw::OtherRound,
        Flaw::OtherWeights,
        Flaw::TooShort,
        Flaw::Damaged,
        Flaw::Garbage,
        Flaw::Orders,
    ] {
        let mut run = Run::start(20_000).await;
        let _held = run.honest(0).await;
        let (bad, learner) = (run.nodes[1].clone(), run.learner.peer_id());
        tokio::spawn(flawed(bad.clone(), learner.clone(), flaw));
        run.present(2).await;
        let late = flaw == Flaw::Silent;
        let computed = if late { run.step_without(&bad.peer_id()).await } else { run.step().await };
        assert!(
            run.reports == reports && run.weights() == weights,
            "{flaw:?}: the step is the same, bit for bit"
        );
        let news = run.assistants.take_news();
        let [(peer, why)] = &news[..] else { panic!("{flaw:?}: {news:?}") };
        let fits = match flaw {
            Flaw::Dies => matches!(why, Exclusion::Gone { .. }),
            Flaw::Silent => matches!(why, Exclusion::Late { patience_ms: 20_000 }),
            Flaw::Nan => *why == Exclusion::NotFinite,
            Flaw::OtherStep | Flaw::OtherRound => matches!(why, Exclusion::OtherShare { .. }),
            Flaw::OtherWeights => *why == Exclusion::OtherWeights,
            Flaw::TooShort => *why == Exclusion::Size { got: 60, needed: 64 },
            Flaw::Damaged => *why == Exclusion::Damaged,
            _ => matches!(why, Exclusion::Protocol { .. }),
        };
        assert!(fits && *peer == bad.peer_id(), "{flaw:?}: {why}");
        // The honest one's share, and this one's here. Of a step that begins again it may still be at work on the old one.
        assert!(computed == 1 || (why.is_false() && computed == 0), "{flaw:?}: {computed}");
        // Who was late once or has gone may come again.
        let again = Assistant::join(&bad, &learner, MODEL).await;
        assert_eq!(again.is_ok(), !why.is_final(), "{flaw:?}: {again:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_owes_an_answer_is_not_asked_again_and_one_that_died_comes_again() {
    let mut run = Run::start(20_000).await;
    let (learner, silent) = (run.learner.peer_id(), run.nodes[0].peer_id());
    tokio::spawn(flawed(run.nodes[0].clone(), learner.clone(), Flaw::Silent));
    run.present(1).await;
    // The second step does not wait for it.
    assert_eq!((run.step_without(&silent).await, run.step().await), (0, 0));
    assert_eq!(run.assistants.take_news().len(), 1);
    tokio::spawn(flawed(run.nodes[1].clone(), learner.clone(), Flaw::Dies));
    run.present(2).await;
    assert_eq!(run.step().await, 0);
    run.present(1).await;
    let _held = run.honest(1).await;
    run.present(2).await;
    assert_eq!(run.step().await, 1, "it died and came again");
    assert!(run.weights() == alone(3, 4));
    let out: BTreeSet<PeerId> = run.assistants.take_news().into_iter().map(|(peer, _)| peer).collect();
    assert_eq!(out, BTreeSet::from([run.nodes[1].peer_id()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_nobody_asked_for_ends_the_stream() {
    let mut run = Run::start(20_000).await;
    tokio::spawn(flawed(run.nodes[0].clone(), run.learner.peer_id(), Flaw::Twice));
    run.present(1).await;
    // Its first answer counts.
    assert_eq!(run.step().await, 1);
    run.present(0).await;
    let news = run.assistants.take_news();
    assert!(matches!(&news[..], [(_, Exclusion::Protocol { .. })]), "{news:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_of_other_bits_is_found_where_it_is_computed_again() {
    for check in [1.0, 0.0] {
        let mut run = Run::checking(20_000, check).await;
        tokio::spawn(flawed(run.nodes[0].clone(), run.learner.peer_id(), Flaw::Wrong));
        run.present(1).await;
        assert_eq!(run.step().await, if check > 0.0 { 0 } else { 1 }, "one that is wrong is not counted");
        let found: Vec<Exclusion> = run.assistants.take_news().into_iter().map(|(_, why)| why).collect();
        assert_eq!(found, if check > 0.0 { vec![Exclusion::Wrong] } else { Vec::new() });
        assert_eq!(run.weights() == alone(3, 1), check > 0.0, "what is not looked at is believed");
    }
    // An honest one passes.
    let mut run = Run::checking(20_000, 1.0).await;
    let _held = run.honest(0).await;
    run.present(1).await;
    assert_eq!((run.step().await, run.step().await), (1, 1));
    assert!(run.assistants.take_news().is_empty() && run.weights() == alone(3, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_found_wrong_had_said_nothing_in_this_step() {
    // Of two, the one with the greater name is asked for the share before the last. It lies about log-probabilities in the first round,
    // which is not looked at, and about gradients in the second, where it is the first of the two shares that may be.
    let drawn = |secret: &u64| {
        let config = checking(0.5, *secret);
        config.drawn(1, 2).is_none() && config.drawn(2, 2) == Some(0)
    };
    let secret = (0..).find(drawn).unwrap();
    for (flaw, check) in [(Flaw::WrongTwice, 0.5), (Flaw::WrongLogprobs, 0.0)] {
        let mut run = Run::with(checking(check, secret)).await;
        let bad = usize::from(run.nodes[1].peer_id() > run.nodes[0].peer_id());
        let liar = run.nodes[bad].peer_id();
        tokio::spawn(flawed(run.nodes[bad].clone(), run.learner.peer_id(), flaw));
        let _held = run.honest(1 - bad).await;
        run.present(2).await;
        let assisted = run.step().await;
        let news = run.assistants.take_news();
        if flaw == Flaw::WrongLogprobs {
            assert!(news.is_empty() && assisted == 2);
            assert!(run.reports != told_alone(3, 1).0, "what is not looked at is believed");
            continue;
        }
        assert_eq!((assisted, news), (1, vec![(liar, Exclusion::Wrong)]));
        for _ in 0..3 {
            assert_eq!(run.step().await, 1);
        }
        let (reports, weights) = told_alone(3, 4);
        assert!(
            run.reports == reports && run.weights() == weights,
            "as if it had never been there, bit for bit"
        );
        assert!(run.assistants.take_news().is_empty());
    }
}

/// The learner's own hands, which take up a share only when this assistant has answered for its last one.
struct Slow {
    shared: Arc<Shared>,
    assistant: PeerId,
    policy: Bigram,
}

impl Hands for Slow {
    fn width(&self) -> usize {
        1
    }

    fn compute(&mut self, shares: &[Arc<Share>]) -> Result<Vec<Answer>, StepError> {
        let began = Instant::now();
        while self.shared.state().leader.asked(&self.assistant).is_some() {
            assert!(began.elapsed() < Duration::from_secs(20), "it answers");
            std::thread::yield_now();
        }
        Replicas::new(vec![&mut self.policy], &settings().loss).compute(shares)
    }
}

/// Gradients of a batch in five shares, with whoever is there.
fn in_five_shares(
    compute: impl FnMut(&[Arc<Share>]) -> Result<Option<Vec<Answer>>, StepError>,
) -> (Gradients, LossMetrics) {
    let samples: Vec<_> =
        (0..5).map(|i| sample(&[i % 4, 1, (i + 2) % 4], 1, 0.3 * f64::from(i) - 0.5)).collect();
    let sizes = Cut { shares: 5, micro_batch_tokens: 1000 };
    policy_gradients(compute, &samples, &settings().loss, sizes).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_who_is_found_wrong_in_a_round_nothing_of_that_round_is_believed() {
    let run = Run::checking(20_000, 1.0).await;
    tokio::spawn(flawed(run.nodes[0].clone(), run.learner.peer_id(), Flaw::Wrong));
    run.present(1).await;
    let (mut assistants, assistant) = (run.assistants.clone(), run.nodes[0].peer_id());
    let shared = Arc::clone(&assistants.shared);
    let computed = tokio::task::spawn_blocking(move || {
        let mut own = Slow { shared, assistant, policy: Bigram::new(4) };
        in_five_shares(|shares| averaging::Assistants::compute(&mut assistants, shares, &mut own))
    });
    let computed = computed.await.unwrap();
    let (mut policy, loss) = (Bigram::new(4), settings().loss);
    let mut alone = Replicas::new(vec![&mut policy], &loss);
    let expected = in_five_shares(|shares| alone.compute(shares).map(Some));
    assert_eq!(computed, expected, "only one of its two was looked at");
    assert_eq!(run.assistants.assisted(), 0);
    let found: Vec<Exclusion> = run.assistants.take_news().into_iter().map(|(_, why)| why).collect();
    assert_eq!(found, [Exclusion::Wrong]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_being_greeted_when_the_run_ends_is_told_so_and_strangers_are_not_waited_for() {
    let run = Run::start(20_000).await;
    let stranger = node().await;
    stranger.dial(&run.learner.listen_addrs().await[0]).await.unwrap();
    let _silent = stranger.open_stream(&run.learner.peer_id(), PROTOCOL).await.unwrap();
    let stream = run.nodes[0].open_stream(&run.learner.peer_id(), PROTOCOL).await.unwrap();
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    let mut attended = run.assistants.shared.attended.subscribe();
    let here = tokio::time::timeout(Duration::from_secs(20), attended.wait_for(|streams| *streams == 1));
    assert_eq!(*here.await.expect("it comes").unwrap(), 1);

    let mut finishing = Box::pin(run.assistants.finish(Duration::from_secs(20)));
    assert!(tokio::time::timeout(Duration::ZERO, &mut finishing).await.is_err(), "it is waited for");
    let told = async {
        let hello = Frame::Hello { base_model_id: MODEL.to_owned() };
        frames::send(&mut writer, &hello, &[]).await.unwrap();
        let mut told = Vec::new();
        while let Ok(Some((frame, 0))) = frames::receive(&mut reader).await {
            told.push(frame);
        }
        told
    };
    let both = async { tokio::join!(finishing, told) };
    let ((), told) = tokio::time::timeout(Duration::from_secs(20), both).await.expect("it ends");
    assert!(matches!(&told[..], [Frame::Welcome { .. }, Frame::End { finished: true, .. }]), "{told:?}");
}

#[test]
fn checks_are_drawn_as_often_as_they_are_asked_for() {
    let drawn =
        |check, n| (0..4000).filter_map(|round| checking(check, 9).drawn(round, n)).collect::<Vec<_>>();
    assert!(drawn(0.0, 3).is_empty() && drawn(1.0, 0).is_empty());
    assert_eq!(drawn(1.0, 3).len(), 4000);
    let some = drawn(0.25, 3);
    assert!((900..1100).contains(&some.len()), "{}", some.len());
    for share in 0..3 {
        let n = some.iter().filter(|s| **s == share).count();
        assert!(n * 3 > some.len() * 4 / 5, "{share}: {n}");
    }
}
