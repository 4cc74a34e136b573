//! What workers and auditors may ask, in which order and how often, on real nodes.

use lattica_net::{CallError, Status, StatusCode};
use swarm_wire::generated::echo::v1 as proto;

use super::*;
use crate::lease::Lease;
use crate::lease::tests::lease;
use crate::rollout::Trajectory;
use crate::rollout::tests::sample;
use crate::service::{AUDIT_NEXT, LEASE, REGISTER, SUBMIT};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_that_is_dropped_anywhere_goes_on() {
    let trainer = node(51).await;
    let rollouts = connected(52, &trainer).await;
    let collector = collecting(&trainer, config(vec![])).await;
    let run = tokio::spawn(worker(&rollouts, &trainer.peer_id(), 52, 0.0, false).run());
    let mut sync = SequentialSync::new(round_config(), PolicyVersion(0), 0);
    for version in 0..3 {
        let snapshot = snapshot(51, version);
        // Polled once each time: it ends wherever it first has to wait.
        let groups = loop {
            let round = collector.round(&mut sync, &snapshot);
            if let Ok(groups) = tokio::time::timeout(Duration::ZERO, round).await {
                break groups.unwrap();
            }
            tokio::task::yield_now().await;
        };
        // Nobody had them: they are given again.
        assert_eq!(collector.round(&mut sync, &snapshot).await.unwrap(), groups);
        assert_eq!(groups.len(), 5);
        let first = groups[0].id.0;
        assert_eq!(first, version * 5, "a dropped round opened groups twice");
        collector.commit(&mut sync).await.unwrap();
    }
    collector.check().unwrap();
    assert_eq!(collector.counts().consumed, 60);
    run.abort();
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_asked_to_stop_delivers_what_it_has_begun_and_holds_nothing() {
    let trainer = node(56).await;
    let rollouts = connected(57, &trainer).await;
    let collector = collecting(&trainer, config(vec![])).await;
    let worker = worker(&rollouts, &trainer.peer_id(), 57, 0.0, false);
    let (stopper, mut stats) = (worker.stopper(), worker.stats());
    let run = tokio::spawn(worker.run());
    assert_eq!(collector.wait_for_workers(1, Duration::from_secs(20)).await, 1);
    collector.publish(&snapshot(56, 0)).await.unwrap();
    collector.open_groups(400).await.unwrap();
    stats.wait_for(|s| s.accepted > 0).await.unwrap();
    stopper.stop();
    run.await.unwrap().unwrap();
    let stats = *stats.borrow();
    assert_eq!(stats.sampled, stats.accepted, "everything that was begun is delivered: {stats:?}");
    let counts = collector.counts();
    assert_eq!(counts.leased, stats.accepted + stats.failed, "no lease is left to expire: {counts:?}");
    assert_eq!(collector.inner.state().dispatcher.next_deadline_ms(), None);
    assert!(stats.accepted < 1600, "it did not work to the end");
    assert_eq!(collector.view().workers, 0, "it said goodbye");
    // One that knows no trainer yet ends as well.
    let lost = super::worker(&rollouts, &PeerId::from_ed25519(&[9; 32]), 57, 0.0, false);
    lost.stopper().stop();
    lost.run().await.unwrap();
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_that_is_still_open_does_not_bring_a_worker_back_that_has_left() {
    let trainer = node(83).await;
    let rollouts = connected(84, &trainer).await;
    let collector = collecting(&trainer, config(vec![])).await;
    let _: proto::RegisterReply = call(&rollouts, &trainer, REGISTER, &registration(5)).await.unwrap();
    collector.publish(&snapshot(83, 0)).await.unwrap();
    let question = proto::LeaseRequest {
        incarnation: 5,
        active_version: Some(0),
        max_leases: 0,
        known_version: Some(0),
        leaving: false,
    };
    let goodbye = proto::LeaseRequest { leaving: true, ..question };
    let asking = call::<_, proto::LeaseReply>(&rollouts, &trainer, LEASE, &question);
    let leaving = async {
        let mut changed = collector.changes();
        while collector.view().up_to_date == 0 {
            changed.changed().await.unwrap();
        }
        call::<_, proto::LeaseReply>(&rollouts, &trainer, LEASE, &goodbye).await
    };
    let (asked, left) = tokio::join!(asking, leaving);
    assert!(asked.is_ok() && left.is_ok());
    assert!(collector.inner.state().dispatcher.is_gone(&rollouts.peer_id()));
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_of_the_journal_is_there_once_it_has_asked_a_restarted_trainer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal.redb");
    let trainer = node(81).await;
    let rollouts = connected(82, &trainer).await;
    let start = || going_on(&trainer, &path, 0);
    let ask = |active: Option<u64>| proto::LeaseRequest {
        incarnation: 5,
        active_version: active,
        max_leases: 0,
        known_version: active,
        leaving: false,
    };
    let collector = start().await.unwrap();
    let _: proto::RegisterReply = call(&rollouts, &trainer, REGISTER, &registration(5)).await.unwrap();
    assert_eq!(collector.workers().len(), 1);
    collector.close();

    // It has installed nothing yet, goes on asking and hears nothing of the restart.
    let resumed = start().await.unwrap();
    assert_eq!(resumed.wait_for_workers(1, Duration::ZERO).await, 0, "it may be dead");
    let _: proto::LeaseReply = call(&rollouts, &trainer, LEASE, &ask(None)).await.unwrap();
    assert_eq!(resumed.wait_for_workers(1, Duration::ZERO).await, 1);
    resumed.publish(&snapshot(81, 0)).await.unwrap();
    let _: proto::LeaseReply = call(&rollouts, &trainer, LEASE, &ask(Some(0))).await.unwrap();
    assert_eq!(resumed.view().up_to_date, 1);
    resumed.close();

    // The same with a version that the journal knows it has.
    let again = start().await.unwrap();
    assert_eq!((again.wait_for_workers(1, Duration::ZERO).await, again.view().up_to_date), (0, 0));
    let _: proto::LeaseReply = call(&rollouts, &trainer, LEASE, &ask(Some(0))).await.unwrap();
    assert_eq!((again.wait_for_workers(1, Duration::ZERO).await, again.view().up_to_date), (1, 1));
    again.check().unwrap();
    again.close();

    // One that comes back and goes without a question is waited for no longer than its goodbye.
    let last = start().await.unwrap();
    let goodbye = proto::LeaseRequest { leaving: true, ..ask(Some(0)) };
    let _: proto::LeaseReply = call(&rollouts, &trainer, LEASE, &goodbye).await.unwrap();
    assert!(last.inner.state().dispatcher.is_gone(&rollouts.peer_id()));
    assert_eq!(last.workers().len(), 0);
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_run_is_finished_workers_and_auditors_hear_it_and_end() {
    let trainer = node(61).await;
    let rollouts = connected(62, &trainer).await;
    let auditor = connected(63, &trainer).await;
    let collector = collecting(&trainer, config(vec![auditor.peer_id()])).await;
    let run = tokio::spawn(worker(&rollouts, &trainer.peer_id(), 62, 0.0, false).run());
    let id = trainer.peer_id();
    let audits = tokio::spawn(async move {
        let config = AuditorConfig::new(id);
        let mut replay = Recompute::default();
        run_auditor(&auditor, &Adapters::default(), &mut replay, &config, || [1; 32], |_| ()).await
    });
    assert_eq!(collector.wait_for_workers(1, Duration::from_secs(20)).await, 1);
    let asked = async {
        let mut changed = collector.changes();
        while collector.inner.state().auditors.is_empty() {
            changed.changed().await.unwrap();
        }
    };
    collector.publish(&snapshot(61, 0)).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), asked).await.unwrap();
    let began = Instant::now();
    collector.finish(Duration::from_secs(30)).await;
    assert!(began.elapsed() < Duration::from_secs(10), "it waits for goodbyes, not for the time");
    collector.close();
    tokio::time::timeout(Duration::from_secs(10), run).await.unwrap().unwrap().unwrap();
    tokio::time::timeout(Duration::from_secs(10), audits).await.unwrap().unwrap().unwrap();
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_that_an_auditor_cannot_get_are_asked_for_once_for_all_jobs_of_theirs() {
    let trainer = node(85).await;
    let auditor = connected(86, &trainer).await;
    let (snapshot, worker) = (snapshot(85, 1), auditor.peer_id());
    let job = |id| {
        let lease = Lease { run: RunId(7), version: PolicyVersion(1), ..lease(id) };
        let trajectory = Trajectory::new(sample(lease, &worker)).unwrap();
        proto::AuditJob {
            trajectory: Some((&trajectory).into()),
            worker: worker.as_bytes().to_vec().into(),
            snapshot: Some(snapshot.signed().clone()),
            base_model_id: "three lines".to_owned(),
        }
    };
    let given = proto::AuditReply { jobs: vec![job(1), job(2), job(3)], finished: false };
    let replies = Mutex::new(vec![proto::AuditReply { jobs: Vec::new(), finished: true }, given]);
    trainer.handle(AUDIT_NEXT, move |_, _| {
        let reply = replies.lock().unwrap().pop().expect("it ends when it is told so");
        async move { Ok(Bytes::from(prost::Message::encode_to_vec(&reply))) }
    });
    let source = Adapters { corrupt: true, ..Adapters::default() };
    let (config, mut replay) = (AuditorConfig::new(trainer.peer_id()), Recompute::default());
    let auditing = run_auditor(
        &auditor,
        &source,
        &mut replay,
        &config,
        || [1; 32],
        |_| panic!("there is nothing to recompute with"),
    );
    auditing.await.unwrap();
    assert_eq!(source.fetched.load(Ordering::Relaxed), 1);
    trainer.shutdown().await;
    auditor.shutdown().await;
}

/// Asks as a worker would and gives the message back.
async fn call<Q: prost::Message, A: prost::Message + Default>(
    from: &Node,
    trainer: &Node,
    method: &'static str,
    question: &Q,
) -> Result<A, Status> {
    let body = question.encode_to_vec().into();
    match from.call(&trainer.peer_id(), method, body, Duration::from_secs(5)).await {
        Ok(answer) => Ok(A::decode(answer).unwrap()),
        Err(CallError::Remote { status, .. }) => Err(status),
        Err(error) => panic!("{error}"),
    }
}

fn registration(incarnation: u64) -> proto::RegisterRequest {
    let (base_model_id, environment) = ("three lines".to_owned(), "arithmetic".to_owned());
    proto::RegisterRequest { incarnation, base_model_id, environment, environment_version: 1 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_last_start_of_a_worker_has_a_say() {
    let trainer = node(71).await;
    let rollouts = connected(72, &trainer).await;
    let collector = collecting(&trainer, config(vec![])).await;
    collector.publish(&snapshot(71, 0)).await.unwrap();
    for incarnation in [5, 6] {
        let _: proto::RegisterReply =
            call(&rollouts, &trainer, REGISTER, &registration(incarnation)).await.unwrap();
    }
    let ask = |incarnation| proto::LeaseRequest {
        incarnation,
        active_version: Some(0),
        max_leases: 1,
        ..Default::default()
    };
    let old: Result<proto::LeaseReply, _> = call(&rollouts, &trainer, LEASE, &ask(5)).await;
    assert_eq!(old.unwrap_err().code, StatusCode::PermissionDenied);
    assert_eq!(collector.workers()[0].version, None, "the older start says nothing about the newer one");
    let submission = proto::SubmitRequest { incarnation: 5, ..Default::default() };
    let old: Result<proto::SubmitReply, _> = call(&rollouts, &trainer, SUBMIT, &submission).await;
    assert_eq!(old.unwrap_err().code, StatusCode::PermissionDenied);
    let new: Result<proto::LeaseReply, _> = call(&rollouts, &trainer, LEASE, &ask(7)).await;
    assert_eq!(new.unwrap_err().code, StatusCode::FailedPrecondition, "register first");
    let _: proto::LeaseReply = call(&rollouts, &trainer, LEASE, &ask(6)).await.unwrap();
    assert_eq!(collector.workers()[0].version, Some(PolicyVersion(0)));
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn junk_of_a_registered_worker_is_answered_and_not_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal.redb");
    let trainer = node(81).await;
    let rollouts = connected(82, &trainer).await;
    let collector = going_on(&trainer, &path, 0).await.unwrap();
    collector.publish(&snapshot(81, 0)).await.unwrap();
    let one = lease(3);
    let junk: proto::Trajectory = (&Trajectory::new(sample(one, &rollouts.peer_id())).unwrap()).into();
    for _ in 0..5 {
        let _: proto::RegisterReply = call(&rollouts, &trainer, REGISTER, &registration(1)).await.unwrap();
        let failed = vec![proto::FailedLease { lease: 9, ..Default::default() }; 20];
        let trajectories = vec![junk.clone(); 20];
        let submission = proto::SubmitRequest { incarnation: 1, trajectories, failed };
        let reply: proto::SubmitReply = call(&rollouts, &trainer, SUBMIT, &submission).await.unwrap();
        assert!(reply.outcomes.iter().all(|o| o.status() == proto::SubmitStatus::Late), "{reply:?}");
        let ask = proto::LeaseRequest {
            incarnation: 1,
            active_version: Some(9),
            max_leases: 1,
            ..Default::default()
        };
        assert!(call::<_, proto::LeaseReply>(&rollouts, &trainer, LEASE, &ask).await.is_err());
    }
    assert_eq!(collector.counts().late_refused, 100);
    collector.close();
    let mut written = Vec::new();
    Journal::open(&path, &config(vec![]).settings_hash(), |_, command| written.push(command)).unwrap();
    assert_eq!(written.len(), 2, "a version and a registration: {written:?}");
    trainer.shutdown().await;
    rollouts.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_that_nobody_can_make_does_not_hold_the_run_up() {
    let trainer = node(91).await;
    let (rollouts, auditor) = (connected(92, &trainer).await, connected(93, &trainer).await);
    let mut settings = config(vec![auditor.peer_id()]);
    settings.audit_timeout = Duration::ZERO;
    settings.dispatch.audit = AuditPolicy { fraction: 0.0, first: 1, seed: 1 };
    let collector = collecting(&trainer, settings).await;
    let run = tokio::spawn(worker(&rollouts, &trainer.peer_id(), 92, 0.0, false).run());
    let mut sync = SequentialSync::new(round_config(), PolicyVersion(0), 0);
    // An auditor that takes jobs and never says anything.
    let to = trainer.clone();
    let idle = tokio::spawn(async move {
        loop {
            let question = proto::AuditRequest { max_jobs: 16 };
            let reply: Result<proto::AuditReply, _> = call(&auditor, &to, AUDIT_NEXT, &question).await;
            if reply.is_err() {
                return;
            }
        }
    });
    let given = snapshot(91, 0);
    let round = tokio::time::timeout(Duration::from_secs(60), collector.round(&mut sync, &given));
    assert_eq!(round.await.unwrap().unwrap().len(), 5);
    assert_eq!(collector.counts().dropped_for(DropReason::Unproven), 1);
    assert!(collector.convicted().is_empty());
    idle.abort();
    run.abort();
    trainer.shutdown().await;
    rollouts.shutdown().await;
}
