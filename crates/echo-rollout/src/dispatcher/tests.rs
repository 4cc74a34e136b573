//! What each command does, one by one, and any of them in any order.

use proptest::prelude::*;
use swarm_wire::{PeerId, PolicyVersion, RunId};

use super::*;
use crate::config::AuditPolicy;
use crate::lease::Lease;
use crate::rollout::tests::sample;
use crate::staleness::StalenessBound;

pub(super) fn config() -> DispatchConfig {
    DispatchConfig {
        group_size: 3,
        groups_per_step: 3,
        lease_ttl_ms: 120,
        max_leases_per_worker: 4,
        max_attempts: 1000,
        audit: AuditPolicy { fraction: 0.3, first: 2, seed: 5 },
        ..DispatchConfig::new(RunId(1))
    }
}

fn worker(i: u8) -> PeerId {
    PeerId::from_ed25519(&[i; 32])
}

fn leased(d: &mut Dispatcher, now_ms: u64, i: u8, max: u32) -> Vec<Lease> {
    let version = d.version();
    d.handle(now_ms, Command::Register { worker: worker(i), incarnation: 1 });
    d.handle(now_ms, Command::Acknowledge { worker: worker(i), version });
    match d.handle(now_ms, Command::Lease { worker: worker(i), max }) {
        Outcome::Leased(leases) => leases,
        other => panic!("{other:?}"),
    }
}

fn submit(d: &mut Dispatcher, now_ms: u64, i: u8, lease: Lease) -> Submission {
    let mut made = sample(lease, &worker(i));
    made.steps.iter_mut().for_each(|s| s.version = lease.version);
    match d.handle(now_ms, Command::Submit { trajectory: Trajectory::new(made).unwrap() }) {
        Outcome::Submitted(submission) => submission,
        other => panic!("{other:?}"),
    }
}

fn open(config: DispatchConfig) -> Dispatcher {
    let mut d = Dispatcher::new(config).unwrap();
    d.handle(0, Command::OpenGroups { up_to: 2 });
    d
}

#[test]
fn a_worker_behind_the_version_gets_nothing() {
    let mut d = open(config());
    d.handle(0, Command::SetVersion(PolicyVersion(1)));
    d.handle(0, Command::Register { worker: worker(1), incarnation: 1 });
    d.handle(0, Command::Acknowledge { worker: worker(1), version: PolicyVersion(0) });
    assert!(!d.can_lease(0, &worker(1)));
    assert_eq!(d.handle(0, Command::Lease { worker: worker(1), max: 9 }), Outcome::Leased(vec![]));
    let ahead = Command::Acknowledge { worker: worker(1), version: PolicyVersion(2) };
    assert_eq!(d.handle(0, ahead), Outcome::Refused(Refusal::UnknownVersion));
    assert_eq!(leased(&mut d, 0, 1, 3).len(), 3);
}

/// Nine groups of one sample, three a step.
fn ahead(budget: u64) -> Dispatcher {
    let config = DispatchConfig {
        group_size: 1,
        max_leases_per_worker: 64,
        staleness: StalenessBound(budget),
        audit: AuditPolicy::default(),
        ..config()
    };
    let mut d = Dispatcher::new(config).unwrap();
    d.handle(0, Command::OpenGroups { up_to: 9 });
    d
}

#[test]
fn a_worker_samples_only_for_steps_within_the_budget_of_its_policy() {
    for (budget, may) in [(0, 3), (1, 6), (2, 9), (7, 9)] {
        let mut d = ahead(budget);
        assert_eq!(leased(&mut d, 0, 1, 64).len(), may, "budget {budget}");
        assert!(!d.can_lease(0, &worker(1)));
    }
    // The learner is at step 1 and the worker still at version 0: three groups fewer.
    let mut d = ahead(1);
    let leases = leased(&mut d, 0, 1, 3);
    leases.iter().for_each(|l| assert_eq!(submit(&mut d, 1, 1, *l), Submission::Accepted));
    assert!(matches!(d.handle(2, Command::Take { step: 0, groups: 3 }), Outcome::Groups(g) if g.len() == 3));
    assert_eq!(leased(&mut d, 2, 1, 64).len(), 3, "what is in training counts until it is committed");
    d.handle(3, Command::Commit { step: 0 });
    assert!(!d.can_lease(3, &worker(1)), "version 0 may serve steps 0 and 1 only");
    d.handle(4, Command::SetVersion(PolicyVersion(1)));
    assert_eq!(leased(&mut d, 4, 1, 64).len(), 3);
    d.check_invariants().unwrap();
}

#[test]
fn what_became_too_old_is_sampled_again_and_nothing_too_old_is_taken() {
    let mut d = ahead(1);
    let leases = leased(&mut d, 0, 1, 6);
    leases[..5].iter().for_each(|l| assert_eq!(submit(&mut d, 1, 1, *l), Submission::Accepted));
    for step in 0..2 {
        let taken = d.handle(2, Command::Take { step, groups: 2 });
        assert!(matches!(&taken, Outcome::Groups(g) if g.len() == 2), "{taken:?}");
        assert_eq!(d.handle(2, Command::Take { step, groups: 2 }), taken, "taken again, the same");
        d.handle(3, Command::Commit { step });
    }
    // Step 2 is next; one sample of version 0 was ready, one is still with the worker.
    assert_eq!(d.counts().dropped_stale(), 2);
    assert_eq!((d.n_open_groups(), d.counts().groups_abandoned), (5, 0));
    assert_eq!(submit(&mut d, 3, 1, leases[5]), Submission::Stale);
    assert_eq!((d.counts().staleness_max, d.counts().consumed), (1, 4));
    // At batch time as well: a step that is ahead of what the books know.
    d.handle(4, Command::SetVersion(PolicyVersion(2)));
    leased(&mut d, 4, 1, 3)
        .into_iter()
        .for_each(|l| assert_eq!(submit(&mut d, 4, 1, l), Submission::Accepted));
    assert_eq!(d.handle(5, Command::Take { step: 4, groups: 3 }), Outcome::Groups(vec![]));
    assert_eq!(d.counts().dropped_stale(), 5);
    d.check_invariants().unwrap();
}

#[test]
fn a_step_that_was_begun_gets_the_same_groups_after_a_restart() {
    let mut d = ahead(2);
    let leases = leased(&mut d, 0, 1, 6);
    leases[1..].iter().for_each(|l| assert_eq!(submit(&mut d, 1, 1, *l), Submission::Accepted));
    let begun = d.handle(2, Command::Take { step: 0, groups: 3 });
    // An older group is complete only now.
    assert_eq!(submit(&mut d, 3, 1, leases[0]), Submission::Accepted);
    let others = d.ready_groups();
    assert!(others.contains(&GroupId(0)), "{others:?}");
    d.handle(4, Command::Recover { steps: 0 });
    assert_eq!(d.ready_groups().len(), 6);
    assert_eq!(d.handle(5, Command::Take { step: 0, groups: 3 }), begun);
    d.handle(6, Command::Commit { step: 0 });
    assert_eq!(d.ready_groups(), others);
    d.check_invariants().unwrap();
}

#[test]
fn workers_of_an_earlier_life_are_there_once_they_are_heard() {
    let mut d = open(config());
    let leases = leased(&mut d, 0, 1, 2);
    leased(&mut d, 0, 2, 1);
    leased(&mut d, 0, 3, 1);
    d.handle(1, Command::Disconnect { worker: worker(3) });
    d.handle(2, Command::Recover { steps: 0 });
    assert_eq!(d.active_versions(), [], "nobody has said anything yet");
    assert!(d.is_unheard(&worker(1)) && !d.is_unheard(&worker(3)));
    // What they had installed and hold is still theirs.
    assert_eq!(d.active_version(&worker(1)), Some(PolicyVersion(0)));
    assert_eq!(submit(&mut d, 3, 1, leases[0]), Submission::Accepted);
    assert_eq!(d.active_versions(), [(worker(1), Some(PolicyVersion(0)))]);
    d.handle(4, Command::Register { worker: worker(2), incarnation: 1 });
    assert_eq!(d.active_versions().len(), 2);
    assert_eq!(submit(&mut d, 5, 1, leases[1]), Submission::Accepted);
    d.check_invariants().unwrap();
}

#[test]
fn a_lease_broken_off_for_a_newer_policy_is_no_attempt() {
    let mut d = open(DispatchConfig { max_attempts: 2, ..config() });
    for n in 0..5 {
        let lease = leased(&mut d, n, 1, 1)[0];
        assert_eq!(lease.attempt, n as u32);
        d.handle(n, Command::Fail { worker: worker(1), lease: lease.id, aborted: true });
    }
    assert_eq!((d.n_open_groups(), d.counts().dropped_for(DropReason::Aborted)), (2, 5));
    d.check_invariants().unwrap();
}

#[test]
fn a_sample_goes_to_another_worker_than_the_one_that_dropped_it() {
    let mut d = Dispatcher::new(DispatchConfig { group_size: 1, ..config() }).unwrap();
    d.handle(0, Command::OpenGroups { up_to: 1 });
    let lease = leased(&mut d, 0, 1, 1)[0];
    d.handle(0, Command::Fail { worker: worker(1), lease: lease.id, aborted: false });
    assert!(d.can_lease(0, &worker(1)), "nobody else is there");
    d.handle(0, Command::Register { worker: worker(2), incarnation: 1 });
    d.handle(0, Command::Acknowledge { worker: worker(2), version: PolicyVersion(0) });
    assert!(!d.can_lease(0, &worker(1)) && d.can_lease(0, &worker(2)));
    assert!(d.can_lease(120, &worker(1)), "the other one did not want it");
    d.handle(0, Command::Disconnect { worker: worker(2) });
    assert!(d.can_lease(0, &worker(1)));
}

#[test]
fn nobody_waits_for_a_worker_that_has_left_until_it_is_back() {
    let mut d = open(config());
    for i in 1..=2 {
        d.handle(0, Command::Register { worker: worker(i), incarnation: 1 });
    }
    assert_eq!(d.active_versions().len(), 2);
    d.handle(1, Command::Disconnect { worker: worker(2) });
    assert_eq!(d.active_versions(), [(worker(1), None)]);
    for back in [
        Command::Acknowledge { worker: worker(2), version: PolicyVersion(0) },
        Command::Register { worker: worker(2), incarnation: 1 },
    ] {
        d.handle(1, Command::Disconnect { worker: worker(2) });
        d.handle(2, back);
        assert_eq!(d.active_versions().len(), 2);
    }
}

#[test]
fn openings_withheld_in_a_row_convict() {
    let every = AuditPolicy { fraction: 1.0, ..AuditPolicy::default() };
    let mut d = open(DispatchConfig { audit: every, max_withheld: 3, ..config() });
    let mut verdict = |verdict| {
        let lease = leased(&mut d, 0, 1, 1)[0];
        assert_eq!(submit(&mut d, 0, 1, lease), Submission::Accepted);
        d.handle(0, Command::Verdict { lease: lease.id, verdict });
        (d.is_admitted(&worker(1)), d.counts().dropped_for(DropReason::Unproven))
    };
    use AuditOutcome::{Pass, Unproven, Withheld};
    let seen: Vec<_> = [Withheld, Withheld, Pass, Withheld, Unproven, Withheld].map(&mut verdict).into();
    assert_eq!(seen.last(), Some(&(true, 5)), "{seen:?}");
    assert_eq!(verdict(Withheld), (false, 5));
}

#[test]
fn what_changes_nothing_is_known_before_it_is_written_down() {
    let mut d = open(config());
    let lease = leased(&mut d, 0, 1, 1)[0];
    assert_eq!(d.answer(&worker(1), lease.id), None);
    assert_eq!(d.answer(&worker(2), lease.id), Some(Submission::Late));
    assert_eq!(d.answer(&worker(1), LeaseId(77)), Some(Submission::Late));
    assert_eq!(
        d.handle(0, Command::Refuse { worker: worker(2), lease: lease.id }),
        Outcome::Submitted(Submission::Late)
    );
    assert_eq!(submit(&mut d, 0, 1, lease), Submission::Accepted);
    assert_eq!(d.answer(&worker(1), lease.id), Some(Submission::Duplicate));
    let other = leased(&mut d, 0, 1, 1)[0];
    let refused = d.handle(0, Command::Refuse { worker: worker(1), lease: other.id });
    assert_eq!(refused, Outcome::Submitted(Submission::Rejected));
    assert_eq!(d.answer(&worker(1), other.id), Some(Submission::Rejected));
    d.check_invariants().unwrap();
}

#[test]
fn an_answer_at_the_deadline_is_late_and_the_sample_goes_to_another() {
    let mut d = open(config());
    let first = leased(&mut d, 0, 1, 1)[0];
    assert_eq!(submit(&mut d, 120, 1, first), Submission::Late);
    let again = leased(&mut d, 121, 2, 1)[0];
    assert_eq!((again.group, again.sample_index, again.attempt), (first.group, first.sample_index, 1));
    assert_eq!(again.sampling.seed, first.sampling.seed);
    assert_ne!(again.id, first.id);
    assert_eq!(submit(&mut d, 122, 1, again), Submission::Late, "another worker's lease");
    assert_eq!(submit(&mut d, 122, 2, again), Submission::Accepted);
    assert_eq!(submit(&mut d, 122, 2, again), Submission::Duplicate);
    d.check_invariants().unwrap();
}

#[test]
fn a_version_that_was_never_published_is_refused() {
    let mut d = open(DispatchConfig { staleness: StalenessBound(1), ..config() });
    let lease = leased(&mut d, 0, 1, 1)[0];
    let mut made = sample(lease, &worker(1));
    made.steps[0].version = PolicyVersion(9);
    let outcome = d.handle(2, Command::Submit { trajectory: Trajectory::new(made).unwrap() });
    assert_eq!(outcome, Outcome::Submitted(Submission::Rejected));
    d.check_invariants().unwrap();
}

#[test]
fn samples_are_shared_among_the_workers_that_are_ready() {
    let mut d = open(DispatchConfig { max_leases_per_worker: 64, group_size: 8, ..config() });
    for i in 1..=3 {
        d.handle(0, Command::Register { worker: worker(i), incarnation: 1 });
        d.handle(0, Command::Acknowledge { worker: worker(i), version: PolicyVersion(0) });
    }
    let counts: Vec<usize> = (1..=3).map(|i| leased(&mut d, 0, i, 64).len()).collect();
    assert_eq!(counts, [6, 6, 4]);
    assert!(leased(&mut d, 0, 1, 64).is_empty());
    d.handle(1, Command::Disconnect { worker: worker(3) });
    assert_eq!(leased(&mut d, 1, 1, 64).len(), 2, "the share grows when a worker leaves");
    d.check_invariants().unwrap();
}

#[test]
fn a_conviction_takes_back_everything_not_yet_trained_on() {
    let mut d =
        open(DispatchConfig { audit: AuditPolicy { first: 1, ..AuditPolicy::default() }, ..config() });
    let leases = leased(&mut d, 0, 1, 3);
    leases.iter().for_each(|l| assert_eq!(submit(&mut d, 1, 1, *l), Submission::Accepted));
    assert!(d.ready_groups().is_empty(), "the first audit covers the later ones too");
    assert_eq!(d.audits_due().len(), 1);
    let held = leased(&mut d, 2, 1, 1);
    d.handle(3, Command::Verdict { lease: leases[0].id, verdict: AuditOutcome::Fail });
    assert_eq!(d.convicted(), [(worker(1), 1)]);
    assert_eq!(d.counts().dropped_for(DropReason::Convicted), 4);
    assert_eq!(submit(&mut d, 4, 1, held[0]), Submission::Rejected);
    let refused = d.handle(5, Command::Register { worker: worker(1), incarnation: 2 });
    assert_eq!(refused, Outcome::Refused(Refusal::Convicted));
    d.check_invariants().unwrap();
}

#[test]
fn a_sample_that_nobody_delivers_ends_its_group() {
    let mut d = open(DispatchConfig { max_attempts: 2, ..config() });
    for attempt in 0..2u64 {
        for lease in leased(&mut d, attempt, 1, 1) {
            d.handle(attempt, Command::Fail { worker: worker(1), lease: lease.id, aborted: false });
        }
    }
    assert_eq!((d.n_open_groups(), d.counts().groups_abandoned), (1, 1));
    d.check_invariants().unwrap();
}

#[test]
fn groups_of_equal_rewards_are_given_up_and_the_others_wait_for_the_same_step() {
    let mut d = open(DispatchConfig { audit: AuditPolicy::default(), ..config() });
    let made = |d: &mut Dispatcher, now| {
        while let [lease, ..] = leased(d, now, 1, 1)[..] {
            assert_eq!(submit(d, now, 1, lease), Submission::Accepted);
        }
    };
    let numbers = |outcome| match outcome {
        Outcome::Groups(groups) => groups.iter().map(|g| g.id.0).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    made(&mut d, 0);
    assert_eq!(numbers(d.handle(1, Command::Take { step: 0, groups: 2 })), [0, 1]);
    // What is not with the learner is not given back.
    d.handle(2, Command::GiveBack { step: 7, flat: vec![GroupId(1)] });
    d.handle(2, Command::GiveBack { step: 0, flat: vec![GroupId(0), GroupId(9)] });
    d.check_invariants().unwrap();
    let counts = d.counts();
    assert_eq!((counts.dropped_for(DropReason::Flat), counts.open, d.flat_groups()), (3, 3, 1));
    assert!(numbers(d.handle(3, Command::Take { step: 0, groups: 2 })).is_empty(), "one too few");
    d.handle(3, Command::OpenGroups { up_to: 2 });
    made(&mut d, 4);
    assert_eq!(numbers(d.handle(5, Command::Take { step: 0, groups: 2 })), [1, 2]);
    d.handle(6, Command::Commit { step: 0 });
    assert_eq!((d.counts().consumed, d.counts().open, d.flat_groups()), (6, 0, 0));
    d.check_invariants().unwrap();
}

#[derive(Debug, Clone)]
enum Op {
    Lease(u8, u32),
    Submit(u8, usize),
    Fail(u8, usize, bool),
    Refuse(u8, usize),
    Disconnect(u8),
    Register(u8, u64),
    Wait(u64),
    Verdict(usize, u8),
    Take,
    GiveBack(u64),
    Commit,
    Version,
    Open,
    Recover,
}

fn op() -> impl Strategy<Value = Op> {
    let worker = 1u8..4;
    prop_oneof![
        4 => (worker.clone(), 1u32..5).prop_map(|(w, n)| Op::Lease(w, n)),
        8 => (worker.clone(), 0usize..40).prop_map(|(w, l)| Op::Submit(w, l)),
        1 => (worker.clone(), 0usize..40, any::<bool>()).prop_map(|(w, l, a)| Op::Fail(w, l, a)),
        1 => (worker.clone(), 0usize..40).prop_map(|(w, l)| Op::Refuse(w, l)),
        1 => worker.clone().prop_map(Op::Disconnect),
        1 => (worker, 0u64..4).prop_map(|(w, i)| Op::Register(w, i)),
        2 => (0u64..200).prop_map(Op::Wait),
        4 => (0usize..40, 0u8..8).prop_map(|(l, v)| Op::Verdict(l, v)),
        2 => Just(Op::Take),
        1 => (0u64..8).prop_map(Op::GiveBack),
        2 => Just(Op::Commit),
        1 => Just(Op::Version),
        1 => Just(Op::Open),
        1 => Just(Op::Recover),
    ]
}

proptest! {
    #[test]
    fn leases_add_up_after_any_commands(ops in prop::collection::vec(op(), 1..120), bound in 0u64..3) {
        let mut d = open(DispatchConfig { max_attempts: 3, staleness: StalenessBound(bound), ..config() });
        let (mut now, mut step, mut leases) = (0, 0, Vec::new());
        for op in ops {
            match op {
                Op::Lease(w, n) => {
                    d.handle(now, Command::Register { worker: worker(w), incarnation: 1 });
                    let version = d.version();
                    d.handle(now, Command::Acknowledge { worker: worker(w), version });
                    if let Outcome::Leased(more) = d.handle(now, Command::Lease { worker: worker(w), max: n }) {
                        leases.extend(more);
                    }
                }
                Op::Submit(w, l) if !leases.is_empty() => {
                    let lease: Lease = leases[l % leases.len()];
                    submit(&mut d, now, w, lease);
                }
                Op::Fail(w, l, aborted) => {
                    d.handle(now, Command::Fail { worker: worker(w), lease: LeaseId(l as u64), aborted });
                }
                Op::Refuse(w, l) => {
                    d.handle(now, Command::Refuse { worker: worker(w), lease: LeaseId(l as u64) });
                }
                Op::Disconnect(w) => {
                    d.handle(now, Command::Disconnect { worker: worker(w) });
                }
                Op::Register(w, incarnation) => {
                    d.handle(now, Command::Register { worker: worker(w), incarnation });
                }
                Op::Wait(ms) => now += ms,
                Op::Verdict(l, v) => {
                    let verdict = match v {
                        0 => AuditOutcome::Fail,
                        1 => AuditOutcome::Unproven,
                        2 => AuditOutcome::Withheld,
                        _ => AuditOutcome::Pass,
                    };
                    d.handle(now, Command::Verdict { lease: LeaseId(l as u64), verdict });
                }
                Op::Take => {
                    d.handle(now, Command::Take { step, groups: 1 });
                }
                Op::GiveBack(flat) => {
                    d.handle(now, Command::GiveBack { step, flat: vec![GroupId(flat)] });
                }
                Op::Commit => {
                    d.handle(now, Command::Commit { step });
                    step += 1;
                }
                Op::Version => {
                    let next = PolicyVersion(d.version().0 + 1);
                    d.handle(now, Command::SetVersion(next));
                }
                Op::Open => {
                    let up_to = d.n_open_groups() as u32 + 1;
                    d.handle(now, Command::OpenGroups { up_to });
                }
                Op::Recover => {
                    d.handle(now, Command::Recover { steps: step });
                }
                Op::Submit(..) => {}
            }
            d.check_invariants().map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert!(d.counts().staleness_max <= bound);
        }
    }
}
