//! The calls that workers and auditors make.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::Bytes;
use lattica_net::{Node, Status};
use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::repeated::{self, Element};
use swarm_wire::{DecodeError, PeerId, PolicyVersion};

use super::Inner;
use crate::dispatcher::{AuditOutcome, Command, Outcome, Refusal, Submission};
use crate::lease::{Lease, LeaseId};
use crate::rollout::Trajectory;
use crate::service::journal::JournalError;
use crate::service::{
    AUDIT_NEXT, AUDIT_OPEN, AUDIT_VERDICT, LEASE, OPEN, REGISTER, SUBMIT, VERDICT_DOMAIN, encode,
};
use crate::wire::{self, MAX_OPENING_BYTES, MAX_SUBMISSION, audit_outcome, message};

/// Audits are handed out until an answer is this long: an auditor reads no message of more than 4 MiB.
const MAX_JOB_BYTES: usize = 1 << 20;

pub(super) fn install(node: &Node, inner: &Arc<Inner>) {
    method(node, inner, REGISTER, register);
    method(node, inner, LEASE, lease);
    method(node, inner, SUBMIT, submit);
    method(node, inner, AUDIT_NEXT, audit_next);
    method(node, inner, AUDIT_OPEN, audit_open);
    method(node, inner, AUDIT_VERDICT, audit_verdict);
}

/// Handlers hold the collector weakly, so that the last handle ends it.
fn method<H, F>(node: &Node, inner: &Arc<Inner>, name: &'static str, handler: H)
where
    H: Fn(Arc<Inner>, PeerId, Bytes) -> F + Copy + Send + Sync + 'static,
    F: Future<Output = Result<Bytes, Status>> + Send + 'static,
{
    let inner: Weak<Inner> = Arc::downgrade(inner);
    node.handle(name, move |peer, body| {
        let inner = inner.upgrade();
        async move {
            match inner.filter(|inner| !inner.state().closed) {
                Some(inner) => handler(inner, peer, body).await,
                None => Err(Status::unavailable("the run has ended")),
            }
        }
    });
}

async fn register(inner: Arc<Inner>, worker: PeerId, body: Bytes) -> Result<Bytes, Status> {
    let m: proto::RegisterRequest = message("register request", &body).map_err(Status::invalid_argument)?;
    let config = &inner.config;
    let mine = [
        ("base model", &m.base_model_id, &config.base_model_id),
        ("environment", &m.environment, &config.environment),
    ];
    if let Some((what, got, expected)) = mine.into_iter().find(|(_, got, expected)| got != expected) {
        let text = format!("this run's {what} is {expected}, not {got:.100}; start the worker with that one");
        return Err(Status::invalid_argument(text));
    }
    if m.environment_version != config.environment_version {
        let (got, expected) = (m.environment_version, config.environment_version);
        let text = format!("environment {} has version {expected} here, not {got}", config.environment);
        return Err(Status::invalid_argument(text));
    }
    let known = {
        let d = &inner.state().dispatcher;
        let here = !d.is_gone(&worker) && !d.is_unheard(&worker);
        here && d.is_admitted(&worker) && d.incarnation(&worker) == Some(m.incarnation)
    };
    if !known {
        let command = Command::Register { worker, incarnation: m.incarnation };
        carried_out(inner.execute(vec![command], false).await)?;
    }
    Ok(encode(&proto::RegisterReply { run: config.dispatch.run.0 }))
}

/// Answers as soon as there is a newer snapshot or something to make; with nothing after a while, or when the worker has
/// asked again with a newer version.
async fn lease(inner: Arc<Inner>, worker: PeerId, body: Bytes) -> Result<Bytes, Status> {
    let m: proto::LeaseRequest = message("lease request", &body).map_err(Status::invalid_argument)?;
    let until = tokio::time::Instant::now() + inner.config.long_poll;
    let mut changed = inner.changed.subscribe();
    let mut waited = false;
    loop {
        // It left while it asked, and only a later question means that it is back.
        if std::mem::replace(&mut waited, true) && inner.state().dispatcher.is_gone(&worker) {
            return Ok(encode(&proto::LeaseReply::default()));
        }
        let Found { snapshot, finished, outdated, commands } = look(&inner, &worker, &m)?;
        let news = snapshot.is_some() || finished || outdated || m.leaving;
        let mut leases: Vec<Lease> = Vec::new();
        if !commands.is_empty() {
            for outcome in inner.execute(commands, false).await.map_err(Status::internal)? {
                match outcome {
                    Outcome::Leased(granted) => leases = granted,
                    Outcome::Refused(refusal) => return Err(refused(refusal)),
                    _ => {}
                }
            }
        }
        if news || !leases.is_empty() || tokio::time::Instant::now() >= until {
            let leases = leases.iter().map(proto::Lease::from).collect();
            return Ok(encode(&proto::LeaseReply { leases, snapshot, finished }));
        }
        let _ = tokio::time::timeout_at(until, changed.changed()).await;
    }
}

/// What there is for a worker.
struct Found {
    /// A snapshot that it does not know.
    snapshot: Option<Signed>,
    /// The run is over.
    finished: bool,
    /// It has told of a newer version since it asked.
    outdated: bool,
    /// What its question changes: nothing when there is nothing to make for it.
    commands: Vec<Command>,
}

fn look(inner: &Inner, worker: &PeerId, m: &proto::LeaseRequest) -> Result<Found, Status> {
    let state = inner.state();
    let dispatcher = &state.dispatcher;
    if state.closed {
        return Err(Status::unavailable("the run has ended"));
    }
    admitted(&state, worker, m.incarnation)?;
    let mut found = Found { snapshot: None, finished: state.finished, outdated: false, commands: Vec::new() };
    if m.leaving {
        if !dispatcher.is_gone(worker) {
            found.commands.push(Command::Disconnect { worker: worker.clone() });
        }
        return Ok(found);
    }
    if dispatcher.is_unheard(worker) {
        // It need not know that the trainer was started again.
        found.commands.push(Command::Register { worker: worker.clone(), incarnation: m.incarnation });
    }
    let active = m.active_version.map(PolicyVersion);
    if dispatcher.active_version(worker) > active {
        return Ok(Found { outdated: true, ..found });
    }
    if let Some(version) = active.filter(|v| dispatcher.active_version(worker) != Some(*v)) {
        if version > dispatcher.version() {
            return Err(refused(Refusal::UnknownVersion));
        }
        found.commands.push(Command::Acknowledge { worker: worker.clone(), version });
    }
    if state.finished {
        return Ok(found);
    }
    let known = active.max(m.known_version.map(PolicyVersion));
    let newest = state.snapshots.last_key_value().filter(|(version, _)| known != Some(**version));
    found.snapshot = newest.map(|(_, snapshot)| snapshot.signed().clone());
    // An acknowledgement makes a difference to what it may have; both are carried out together.
    let may = !found.commands.is_empty() || dispatcher.can_lease(inner.now_ms(), worker);
    if m.max_leases > 0 && active.is_some() && may {
        found.commands.push(Command::Lease { worker: worker.clone(), max: m.max_leases });
    }
    Ok(found)
}

/// Only the last start of a worker that is registered and not convicted has a say.
fn admitted(state: &super::State, worker: &PeerId, incarnation: u64) -> Result<(), Status> {
    let dispatcher = &state.dispatcher;
    match dispatcher.incarnation(worker) {
        None => Err(refused(Refusal::NotRegistered)),
        Some(_) if !dispatcher.is_admitted(worker) => Err(refused(Refusal::Convicted)),
        Some(registered) if registered > incarnation => Err(refused(Refusal::OldIncarnation)),
        Some(registered) if registered < incarnation => Err(refused(Refusal::NotRegistered)),
        Some(_) => Ok(()),
    }
}

async fn submit(inner: Arc<Inner>, worker: PeerId, body: Bytes) -> Result<Bytes, Status> {
    // Trajectories, and leases that failed: counted before they are decoded, an empty one takes a hundred times its bytes.
    for list in [2, 3] {
        repeated::check("list in a submission", &body, (&[list], Element::Field), MAX_SUBMISSION)
            .map_err(Status::invalid_argument)?;
    }
    let m: proto::SubmitRequest = wire_sized("submission", &body)?;
    {
        let state = inner.state();
        let own = state.dispatcher.incarnation(&worker);
        // A convicted worker is told with its question for work; what it sends has no lease any more.
        if own != Some(m.incarnation) {
            let old = own.is_some_and(|registered| registered > m.incarnation);
            return Err(refused(if old { Refusal::OldIncarnation } else { Refusal::NotRegistered }));
        }
    }
    // Judging renders prompts and plays episodes; writing waits for the disk.
    let work = move || take_in(&inner, &worker, m);
    let reply = tokio::task::spawn_blocking(work).await.expect("taking a submission in does not panic");
    Ok(encode(&reply.map_err(Status::internal)?))
}

/// Judges and writes down what came for leases that the worker holds; answers the rest from the books.
fn take_in(
    inner: &Inner,
    worker: &PeerId,
    m: proto::SubmitRequest,
) -> Result<proto::SubmitReply, JournalError> {
    let mut commands = Vec::new();
    let mut outcomes: Vec<proto::SubmitOutcome> = Vec::new();
    let mut waiting = Vec::new();
    for t in m.trajectories {
        let lease = t.lease.as_ref().map_or(u64::MAX, |l| l.id);
        let mut outcome = proto::SubmitOutcome { lease, status: 0, reason: String::new() };
        let answer = inner.state().dispatcher.answer(worker, LeaseId(lease));
        if let Some(answer) = answer {
            inner.state().count_refused(answer);
            outcome.status = status(answer).into();
        } else {
            let (command, reason) = judged(inner, worker, t, LeaseId(lease));
            if !reason.is_empty() {
                tracing::warn!(worker = %worker.short(), lease, reason, "trajectory refused");
            }
            outcome.reason = reason;
            waiting.push(outcomes.len());
            commands.push(command);
        }
        outcomes.push(outcome);
    }
    for failed in m.failed {
        let lease = LeaseId(failed.lease);
        if inner.state().dispatcher.answer(worker, lease).is_some() {
            continue;
        }
        let reason = failed.reason.chars().take(200).collect::<String>();
        tracing::info!(worker = %worker.short(), %lease, reason, "lease given back");
        commands.push(Command::Fail { worker: worker.clone(), lease, aborted: failed.aborted });
    }
    if !commands.is_empty() {
        for (place, done) in waiting.into_iter().zip(inner.carry_out(commands, true)?) {
            let Outcome::Submitted(submission) = done else { continue };
            outcomes[place].status = status(submission).into();
        }
    }
    Ok(proto::SubmitReply { outcomes })
}

fn status(submission: Submission) -> proto::SubmitStatus {
    match submission {
        Submission::Accepted => proto::SubmitStatus::Accepted,
        Submission::Duplicate => proto::SubmitStatus::Duplicate,
        Submission::Late => proto::SubmitStatus::Late,
        Submission::Stale => proto::SubmitStatus::Stale,
        Submission::Rejected => proto::SubmitStatus::Rejected,
    }
}

/// Admission. What is refused is written down by its lease alone.
fn judged(inner: &Inner, worker: &PeerId, t: proto::Trajectory, lease: LeaseId) -> (Command, String) {
    let refusal = match wire::trajectory(t, worker) {
        Ok(trajectory) => match inner.admission.admit(&trajectory) {
            Ok(()) => return (Command::Submit { trajectory }, String::new()),
            Err(rejection) => rejection.to_string(),
        },
        Err(error) => error.to_string(),
    };
    (Command::Refuse { worker: worker.clone(), lease }, refusal)
}

/// Submissions are bounded by the network's own limit on bodies.
fn wire_sized<M: prost::Message + Default>(what: &'static str, body: &[u8]) -> Result<M, Status> {
    M::decode(body).map_err(|e| Status::invalid_argument(DecodeError::message(what, &e)))
}

fn check_auditor(inner: &Inner, peer: &PeerId) -> Result<(), Status> {
    if inner.config.auditors.contains(peer) {
        return Ok(());
    }
    Err(Status::permission_denied("this run does not know you as an auditor"))
}

async fn audit_next(inner: Arc<Inner>, auditor: PeerId, body: Bytes) -> Result<Bytes, Status> {
    check_auditor(&inner, &auditor)?;
    let m: proto::AuditRequest = message("audit request", &body).map_err(Status::invalid_argument)?;
    let until = tokio::time::Instant::now() + inner.config.long_poll;
    let mut changed = inner.changed.subscribe();
    inner.state().auditors.insert(auditor.clone());
    loop {
        let (jobs, given_up) = next_jobs(&inner, m.max_jobs as usize);
        if !given_up.is_empty() {
            inner.execute(given_up, true).await.map_err(Status::internal)?;
        }
        let finished = inner.state().finished;
        if finished {
            inner.state().auditors.remove(&auditor);
            inner.changed.send_modify(|n| *n += 1);
        }
        if finished || !jobs.is_empty() || tokio::time::Instant::now() >= until {
            return Ok(encode(&proto::AuditReply { jobs, finished }));
        }
        let _ = tokio::time::timeout_at(until, changed.changed()).await;
    }
}

/// Jobs to give out, and verdicts on trajectories that can never be proven: their snapshot is no longer kept, or no
/// auditor came to a result.
fn next_jobs(inner: &Inner, max: usize) -> (Vec<proto::AuditJob>, Vec<Command>) {
    let mut state = inner.state();
    let super::State { dispatcher, snapshots, audits, .. } = &mut *state;
    let (mut jobs, mut given_up, mut bytes) = (Vec::new(), Vec::new(), 0);
    let due = dispatcher.audits_due();
    let ids: BTreeSet<LeaseId> = due.iter().map(|t| t.id()).collect();
    audits.retain(|id, _| ids.contains(id));
    for t in due {
        if jobs.len() >= max.min(64) || bytes >= MAX_JOB_BYTES {
            break;
        }
        let tries = match audits.get(&t.id()) {
            Some((since, _)) if since.elapsed() < inner.config.audit_timeout => continue,
            taken => taken.map_or(0, |(_, tries)| *tries),
        };
        let snapshot = snapshots.get(&t.lease().version).filter(|_| tries < inner.config.max_audit_tries);
        let Some(snapshot) = snapshot else {
            tracing::warn!(lease = %t.id(), tries, "no auditor came to a result; the trajectory is not used");
            given_up.push(Command::Verdict { lease: t.id(), verdict: AuditOutcome::Unproven });
            continue;
        };
        audits.insert(t.id(), (Instant::now(), tries + 1));
        let job = proto::AuditJob {
            trajectory: Some(t.into()),
            worker: t.worker().as_bytes().to_vec().into(),
            snapshot: Some(snapshot.signed().clone()),
            base_model_id: inner.config.base_model_id.clone(),
        };
        bytes += prost::Message::encoded_len(&job);
        jobs.push(job);
    }
    (jobs, given_up)
}

async fn audit_open(inner: Arc<Inner>, auditor: PeerId, body: Bytes) -> Result<Bytes, Status> {
    check_auditor(&inner, &auditor)?;
    let m: proto::OpenRequest = message("open request", &body).map_err(Status::invalid_argument)?;
    let worker = inner.state().dispatcher.trajectory(LeaseId(m.lease)).map(Trajectory::worker).cloned();
    let worker = worker.ok_or_else(|| Status::not_found(format!("lease {} has no trajectory", m.lease)))?;
    let answer = inner.node.call(&worker, OPEN, body, inner.config.open_timeout).await;
    let answer = answer.map_err(|e| Status::unavailable(format!("worker {}: {e}", worker.short())))?;
    if answer.len() > MAX_OPENING_BYTES {
        return Err(Status::unavailable(format!("worker {} sent {} bytes", worker.short(), answer.len())));
    }
    Ok(answer)
}

async fn audit_verdict(inner: Arc<Inner>, auditor: PeerId, body: Bytes) -> Result<Bytes, Status> {
    check_auditor(&inner, &auditor)?;
    let signed: Signed = message("verdict", &body).map_err(Status::invalid_argument)?;
    if swarm_wire::signed::verify(&signed, VERDICT_DOMAIN).map_err(Status::invalid_argument)? != auditor {
        return Err(Status::permission_denied("the verdict is signed by another peer"));
    }
    let m: proto::AuditVerdict = message("verdict", &signed.payload).map_err(Status::invalid_argument)?;
    let lease = LeaseId(m.lease);
    let accused = inner.state().dispatcher.trajectory(lease).map(Trajectory::worker).cloned();
    let same = accused.is_some_and(|worker| worker.as_bytes() == &m.worker[..]);
    if !same || m.run != inner.config.dispatch.run.0 {
        return Err(Status::not_found(format!("{lease} of this run has no audit open for that worker")));
    }
    let verdict =
        audit_outcome(m.verdict()).ok_or_else(|| Status::invalid_argument("verdict without a value"))?;
    if m.verdict() == proto::Verdict::Pass {
        tracing::debug!(%lease, "audit passed");
    } else {
        let worker = PeerId::from_bytes(&m.worker).map(|p| p.to_string()).unwrap_or_default();
        tracing::warn!(%lease, worker, verdict = ?m.verdict(), reason = m.reason, "audit");
    }
    carried_out(inner.execute(vec![Command::Verdict { lease, verdict }], true).await)?;
    Ok(Bytes::new())
}

fn carried_out(outcomes: Result<Vec<Outcome>, JournalError>) -> Result<(), Status> {
    for outcome in outcomes.map_err(Status::internal)? {
        if let Outcome::Refused(refusal) = outcome {
            return Err(refused(refusal));
        }
    }
    Ok(())
}

fn refused(refusal: Refusal) -> Status {
    match refusal {
        Refusal::Convicted | Refusal::OldIncarnation => Status::permission_denied(refusal),
        Refusal::TooManyWorkers => Status::resource_exhausted(refusal),
        Refusal::NoSuchAudit => Status::not_found(refusal),
        _ => Status::failed_precondition(refusal),
    }
}
