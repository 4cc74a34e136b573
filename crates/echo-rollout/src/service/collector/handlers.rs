//! The calls that workers and auditors make.

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::Bytes;
use lattica_net::{Node, Status};
use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::{DecodeError, PeerId, PolicyVersion};

use super::{Inner, State, audit_outcome};
use crate::dispatcher::{Command, Outcome, Refusal, Submission};
use crate::lease::{Lease, LeaseId};
use crate::rollout::Trajectory;
use crate::service::journal::JournalError;
use crate::service::{
    AUDIT_NEXT, AUDIT_OPEN, AUDIT_VERDICT, LEASE, LONG_POLL, OPEN, REGISTER, SUBMIT, VERDICT_DOMAIN, encode,
};
use crate::snapshot::signer;
use crate::wire::{self, MAX_OPENING_BYTES, MAX_SUBMISSION, message};

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
    let command = Command::Register { worker, incarnation: m.incarnation };
    carried_out(inner.execute(vec![command], false).await)?;
    let run = config.dispatch.run.0;
    let snapshot = current_snapshot(&inner.state());
    Ok(encode(&proto::RegisterReply { run, snapshot, lease_ttl_ms: config.dispatch.lease_ttl_ms }))
}

/// Answers as soon as there is a newer snapshot or something to make, or after a while with nothing.
async fn lease(inner: Arc<Inner>, worker: PeerId, body: Bytes) -> Result<Bytes, Status> {
    let m: proto::LeaseRequest = message("lease request", &body).map_err(Status::invalid_argument)?;
    let active = m.active_version.map(PolicyVersion);
    let until = tokio::time::Instant::now() + LONG_POLL;
    let mut changed = inner.changed.subscribe();
    loop {
        let (snapshot, commands) = lease_commands(&inner.state(), &worker, active, m.max_leases)?;
        let newer = snapshot.is_some();
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
        let over = tokio::time::Instant::now() >= until;
        if newer || over || !leases.is_empty() {
            let leases = leases.iter().map(proto::Lease::from).collect();
            return Ok(encode(&proto::LeaseReply { leases, snapshot, wait_ms: 0 }));
        }
        let _ = tokio::time::timeout_at(until, changed.changed()).await;
    }
}

/// The snapshot that the worker lacks, and what its question changes: nothing when there is nothing to make for it.
fn lease_commands(
    state: &State,
    worker: &PeerId,
    active: Option<PolicyVersion>,
    max: u32,
) -> Result<(Option<Signed>, Vec<Command>), Status> {
    let dispatcher = &state.dispatcher;
    if state.closed {
        return Err(Status::unavailable("the run has ended"));
    }
    if !dispatcher.is_registered(worker) {
        return Err(refused(Refusal::NotRegistered));
    }
    if !dispatcher.is_admitted(worker) {
        return Err(refused(Refusal::Convicted));
    }
    let mut commands = Vec::new();
    if let Some(version) = active
        && dispatcher.active_version(worker) != active
    {
        commands.push(Command::Acknowledge { worker: worker.clone(), version });
    }
    let newest = state.snapshots.last_key_value().map(|(version, _)| *version);
    if newest.is_some() && newest != active {
        return Ok((current_snapshot(state), commands));
    }
    if active.is_some_and(|version| dispatcher.has_pending(version)) {
        commands.push(Command::Lease { worker: worker.clone(), max });
    }
    Ok((None, commands))
}

fn current_snapshot(state: &State) -> Option<Signed> {
    state.snapshots.last_key_value().map(|(_, snapshot)| snapshot.signed().clone())
}

async fn submit(inner: Arc<Inner>, worker: PeerId, body: Bytes) -> Result<Bytes, Status> {
    let m: proto::SubmitRequest = wire_sized("submission", &body)?;
    if m.trajectories.len() > MAX_SUBMISSION || m.failed.len() > MAX_SUBMISSION {
        return Err(Status::invalid_argument(format!("at most {MAX_SUBMISSION} trajectories at once")));
    }
    if !inner.state().dispatcher.is_registered(&worker) {
        return Err(refused(Refusal::NotRegistered));
    }
    let mut commands = Vec::new();
    let mut answers: Vec<(u64, String)> = Vec::new();
    for t in m.trajectories {
        let lease = t.lease.as_ref().map_or(u64::MAX, |l| l.id);
        let (command, reason) = judged(&inner, &worker, t, lease);
        if !reason.is_empty() {
            tracing::warn!(worker = %worker.short(), lease, reason, "trajectory refused");
        }
        commands.push(command);
        answers.push((lease, reason));
    }
    for failed in &m.failed {
        let (worker, reason) = (worker.short(), failed.reason.chars().take(200).collect::<String>());
        tracing::warn!(worker, lease = failed.lease, reason, "lease given back");
    }
    let failed = m.failed.iter().map(|f| LeaseId(f.lease));
    commands.extend(failed.map(|lease| Command::Fail { worker: worker.clone(), lease }));
    let outcomes = inner.execute(commands, true).await.map_err(Status::internal)?;
    let outcome = |((lease, reason), outcome): ((u64, String), Outcome)| {
        let status = match outcome {
            Outcome::Submitted(Submission::Accepted) => proto::SubmitStatus::Accepted,
            Outcome::Submitted(Submission::Duplicate) => proto::SubmitStatus::Duplicate,
            Outcome::Submitted(Submission::Late) => proto::SubmitStatus::Late,
            Outcome::Submitted(Submission::Stale) => proto::SubmitStatus::Stale,
            _ => proto::SubmitStatus::Rejected,
        };
        proto::SubmitOutcome { lease, status: status.into(), reason }
    };
    let outcomes = answers.into_iter().zip(outcomes).map(outcome).collect();
    Ok(encode(&proto::SubmitReply { outcomes }))
}

/// Admission; a trajectory that cannot even be read gives its lease back.
fn judged(inner: &Inner, worker: &PeerId, t: proto::Trajectory, lease: u64) -> (Command, String) {
    match wire::trajectory(t, worker) {
        Ok(trajectory) => {
            let reason = inner.admission.admit(&trajectory).err().map(|e| e.to_string()).unwrap_or_default();
            (Command::Submit { trajectory, refused: !reason.is_empty() }, reason)
        }
        Err(error) => (Command::Fail { worker: worker.clone(), lease: LeaseId(lease) }, error.to_string()),
    }
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
    let until = tokio::time::Instant::now() + LONG_POLL;
    let mut changed = inner.changed.subscribe();
    loop {
        let (jobs, orphans) = next_jobs(&inner, m.max_jobs as usize);
        if !orphans.is_empty() {
            inner.execute(orphans, true).await.map_err(Status::internal)?;
        }
        if !jobs.is_empty() || tokio::time::Instant::now() >= until {
            return Ok(encode(&proto::AuditReply { jobs, wait_ms: 0 }));
        }
        let _ = tokio::time::timeout_at(until, changed.changed()).await;
    }
}

/// Jobs to give out, and verdicts on trajectories whose snapshot is no longer kept: those can never be proven.
fn next_jobs(inner: &Inner, max: usize) -> (Vec<proto::AuditJob>, Vec<Command>) {
    let mut state = inner.state();
    let State { dispatcher, snapshots, audits, .. } = &mut *state;
    let (mut jobs, mut orphans) = (Vec::new(), Vec::new());
    for t in dispatcher.audits_due() {
        if jobs.len() >= max.min(64) {
            break;
        }
        if audits.get(&t.id()).is_some_and(|since| since.elapsed() < inner.config.audit_timeout) {
            continue;
        }
        let Some(snapshot) = snapshots.get(&t.lease().version) else {
            let verdict = crate::dispatcher::AuditOutcome::Unproven;
            orphans.push(Command::Verdict { lease: t.id(), verdict });
            continue;
        };
        audits.insert(t.id(), Instant::now());
        jobs.push(proto::AuditJob {
            trajectory: Some(t.into()),
            worker: t.worker().as_bytes().to_vec().into(),
            snapshot: Some(snapshot.signed().clone()),
            base_model_id: inner.config.base_model_id.clone(),
        });
    }
    (jobs, orphans)
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
    if signer(&signed, VERDICT_DOMAIN).map_err(Status::invalid_argument)? != auditor {
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
        Refusal::Convicted => Status::permission_denied(refusal),
        Refusal::TooManyWorkers => Status::resource_exhausted(refusal),
        Refusal::NoSuchAudit => Status::not_found(refusal),
        _ => Status::failed_precondition(refusal),
    }
}
