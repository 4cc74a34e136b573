//! An auditor: takes trajectories that the trainer drew, challenges their workers, recomputes and signs a verdict.
//!
//! The recomputation needs the model, so whoever wires an auditor hands it in as a [`Replay`] (a few lines over
//! `veri_verify::service::Auditor`). It is made with the very version that the lease names: the trainer's signed snapshot comes with
//! the job, and the trainer serves that version's blocks for as long as a trajectory of it may be trained on.

use std::time::{Duration, Instant};

use bytes::Bytes;
use lattica_net::{CallError, Node, Status, StatusCode};
use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::prost::Message;
use swarm_wire::signed::Signer as _;
use swarm_wire::{DecodeError, PeerId};
use veri_verify::verdict::{Evidence, to_hex};
use veri_verify::{Answer, Audit, Job, Profile, Verdict, wire as veri_wire};

use super::payload_source::PayloadSource;
use super::{AUDIT_NEXT, AUDIT_OPEN, AUDIT_VERDICT, AskError, LONG_POLL, VERDICT_DOMAIN, ask, veri};
use crate::rollout::Trajectory;
use crate::snapshot::{Payload, SignedSnapshot, Weights};
use crate::wire;

/// How an auditor behaves.
#[derive(Debug, Clone)]
pub struct AuditorConfig {
    /// The trainer.
    pub trainer: PeerId,
    /// What counts as the same computation.
    pub profile: Profile,
    /// Rows opened per trajectory. Default: 8.
    pub positions: u32,
    /// How long one call may take. Default: 10 s.
    pub call_timeout: Duration,
    /// After this long without an answer of the trainer the auditor ends. Default: 60 s.
    pub give_up: Duration,
}

impl AuditorConfig {
    /// The defaults: f32 weights, 8 positions.
    pub fn new(trainer: PeerId) -> Self {
        Self {
            trainer,
            profile: Profile::f32(),
            positions: veri_verify::config::DEFAULT_POSITIONS,
            call_timeout: Duration::from_secs(10),
            give_up: Duration::from_secs(60),
        }
    }
}

/// Recomputes answers with the auditor's own copy of the model.
pub trait Replay: Send {
    /// Whether the weights with this hash are installed; `None`: the base model's.
    fn holds(&self, hash: Option<[u8; 32]>) -> bool;

    /// Installs the weights with this hash in place of those before. Jobs of one version come together.
    ///
    /// # Errors
    /// When they cannot be read or do not fit; then nothing need be installed any more.
    fn install(&mut self, hash: Option<[u8; 32]>, weights: Weights) -> Result<(), String>;

    /// Final-norm rows, log-probabilities and draws behind every sampled token of `answer`, under what is installed: the
    /// weights whose hash is the job's.
    ///
    /// # Errors
    /// When it cannot be recomputed here; no verdict is given then.
    fn replay(&mut self, job: &Job, answer: &Answer) -> Result<veri_verify::Replay, String>;
}

/// Why an auditor ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuditorError {
    /// The trainer does not answer any more, or does not want this auditor.
    #[error("trainer {trainer}: {reason}")]
    Trainer {
        /// The trainer.
        trainer: PeerId,
        /// What it said last.
        reason: String,
    },
}

/// One finished audit.
#[derive(Debug)]
pub struct Audited<'a> {
    /// What was audited.
    pub trajectory: &'a Trajectory,
    /// What came out.
    pub verdict: &'a Verdict,
    finding: &'a Finding,
    adapter: Option<&'a [u8]>,
    full: bool,
    all_weights: Option<&'a Bytes>,
}

impl Audited<'_> {
    /// The file of all weights that the recomputation was made with, where evidence names it and somebody is convicted by it. The
    /// evidence is of no use without it.
    pub fn all_weights(&self) -> Option<&Bytes> {
        self.all_weights
    }

    /// What anybody needs to repeat the audit, the adapter included; of all weights the hash only.
    pub fn evidence(&self) -> Evidence {
        let Finding { job, answer, randomness, n_positions, opening, verdict } = self.finding;
        Evidence {
            job: job.clone(),
            answer: answer.clone(),
            commitment: to_hex(self.trajectory.commitment()),
            randomness: to_hex(randomness),
            n_positions: *n_positions,
            opening: opening.as_deref().map(to_hex),
            adapter: self.adapter.map(to_hex),
            full: self.full,
            verdict: verdict.clone(),
        }
    }
}

/// Audits until the run is finished. `on_verdict` sees each one; `randomness` gives fresh unpredictable bytes. Dropping
/// the future stops the auditor; what it had taken is given out again.
///
/// # Errors
/// When the trainer refuses this auditor or gives no usable answer for a long time.
pub async fn run_auditor(
    node: &Node,
    source: &dyn PayloadSource,
    replay: &mut dyn Replay,
    config: &AuditorConfig,
    mut randomness: impl FnMut() -> [u8; 32],
    mut on_verdict: impl FnMut(&Audited<'_>),
) -> Result<(), AuditorError> {
    let mut last_answer = Instant::now();
    let mut adapter: Option<([u8; 32], Bytes)> = None;
    loop {
        let question = proto::AuditRequest { max_jobs: 16 };
        let timeout = config.call_timeout.max(LONG_POLL * 2);
        let reply: Result<proto::AuditReply, _> =
            ask(node, &config.trainer, AUDIT_NEXT, &question, timeout).await;
        let reply = match reply {
            Ok(reply) => reply,
            Err(error) => {
                let denied = |s: &Status| s.code == StatusCode::PermissionDenied;
                let refused =
                    matches!(&error, AskError::Call(CallError::Remote { status, .. }) if denied(status));
                if refused || last_answer.elapsed() > config.give_up {
                    let (trainer, reason) = (config.trainer.clone(), error.to_string());
                    return Err(AuditorError::Trainer { trainer, reason });
                }
                tokio::time::sleep(Duration::from_millis(250)).await;
                continue;
            }
        };
        if reply.finished {
            return Ok(());
        }
        let mut claims = Vec::with_capacity(reply.jobs.len());
        for job in reply.jobs {
            match claim(job, &config.trainer) {
                Ok(claim) => claims.push(claim),
                Err(error) => tracing::warn!(%error, "audit job refused"),
            }
        }
        // What is too old soonest comes first, and weights change once for each version.
        claims.sort_by_key(|claim| claim.snapshot.manifest().version);
        let mut unavailable = None;
        for claim in claims {
            let manifest = claim.snapshot.manifest();
            // It may have taken long to find that out, and the others wait.
            if unavailable == Some(claim.hash()) {
                continue;
            }
            if let Err(reason) = take_up(source, replay, config, &claim, &mut adapter).await {
                tracing::warn!(version = %manifest.version, reason, "snapshot not available to the auditor");
                unavailable = Some(claim.hash());
                continue;
            }
            let Some(finding) = audit(node, replay, config, &claim, randomness()).await else { continue };
            let (trajectory, verdict) = (&claim.trajectory, &finding.verdict);
            let full = matches!(manifest.payload, Payload::Full(_));
            // Its blocks are still here.
            let all_weights = if full && verdict.convicts() {
                payload(source, &claim.snapshot, &config.trainer).await.ok()
            } else {
                None
            };
            on_verdict(&Audited {
                trajectory,
                verdict,
                finding: &finding,
                adapter: adapter.as_ref().map(|(_, bytes)| &bytes[..]),
                full,
                all_weights: all_weights.as_ref(),
            });
            report(node, config, trajectory, verdict).await;
        }
        // Whole models take their time, in which it was not asked for more.
        last_answer = Instant::now();
    }
}

/// A claimed computation.
struct Claim {
    trajectory: Trajectory,
    snapshot: SignedSnapshot,
    base_model_id: String,
}

impl Claim {
    /// Hash of what the claimed version installs.
    fn hash(&self) -> Option<[u8; 32]> {
        self.snapshot.manifest().payload.artefact().map(|artefact| artefact.hash)
    }
}

/// Has the weights of the claim installed, fetched where they are not there. The bytes of an adapter stay here, for evidence; those of
/// all weights do not. Weights are known by their hash: another run's version of the same number is another one.
async fn take_up(
    source: &dyn PayloadSource,
    replay: &mut dyn Replay,
    config: &AuditorConfig,
    claim: &Claim,
    adapter: &mut Option<([u8; 32], Bytes)>,
) -> Result<(), String> {
    let (hash, to_install) = (claim.hash(), &claim.snapshot.manifest().payload);
    let carried = if matches!(to_install, Payload::Lora(_)) { hash } else { None };
    if replay.holds(hash) && adapter.as_ref().map(|(hash, _)| *hash) == carried {
        return Ok(());
    }
    *adapter = None;
    let bytes = match hash {
        Some(_) => payload(source, &claim.snapshot, &config.trainer).await?,
        None => Bytes::new(),
    };
    *adapter = carried.map(|hash| (hash, bytes.clone()));
    let weights = to_install.weights(bytes);
    off_runtime(|| replay.install(hash, weights))
}

fn claim(job: proto::AuditJob, trainer: &PeerId) -> Result<Claim, DecodeError> {
    let absent = |what| DecodeError::invalid(what, "absent");
    let worker = PeerId::from_bytes(&job.worker)?;
    let trajectory = wire::trajectory(job.trajectory.ok_or_else(|| absent("trajectory"))?, &worker)?;
    let snapshot = SignedSnapshot::verify(job.snapshot.ok_or_else(|| absent("snapshot"))?, trainer)?;
    let (manifest, lease) = (snapshot.manifest(), trajectory.lease());
    if (manifest.run, manifest.version) != (lease.run, lease.version) {
        return Err(DecodeError::invalid("snapshot", format!("{} of {}", manifest.version, manifest.run)));
    }
    let base_model_id = wire::name("base model id", job.base_model_id)?;
    Ok(Claim { trajectory, snapshot, base_model_id })
}

async fn payload(
    source: &dyn PayloadSource,
    snapshot: &SignedSnapshot,
    trainer: &PeerId,
) -> Result<Bytes, String> {
    let manifest = snapshot.manifest();
    let bytes = source.fetch(manifest, trainer).await?;
    manifest.check_payload(&bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// What an audit came to, and from what.
#[derive(Debug)]
struct Finding {
    job: Job,
    answer: Answer,
    randomness: [u8; 32],
    n_positions: u32,
    /// As the worker sent it.
    opening: Option<Bytes>,
    verdict: Verdict,
}

/// A finding, or nothing when it was our own fault that there is none.
async fn audit(
    node: &Node,
    replay: &mut dyn Replay,
    config: &AuditorConfig,
    claim: &Claim,
    randomness: [u8; 32],
) -> Option<Finding> {
    let t = &claim.trajectory;
    let job = veri::job(&claim.base_model_id, t.lease(), claim.hash(), t.prompt());
    let answer = Answer::of_turns(t.steps().iter().map(|s| (s.token, s.logprob, s.trainable)));
    let n_positions = config.positions;
    let mut finding =
        Finding { job, answer, randomness, n_positions, opening: None, verdict: Verdict::Withheld };
    let found = |mut finding: Finding, verdict| {
        finding.verdict = verdict;
        Some(finding)
    };
    let signed = match veri_wire::decode_signed_commitment(t.commitment()) {
        Ok(signed) => signed,
        Err(error) => return found(finding, Verdict::Malformed { reason: error.to_string() }),
    };
    let (job, answer) = (&finding.job, &finding.answer);
    let audit = match Audit::begin(job, answer, &signed, Some(t.worker()), randomness, n_positions) {
        Ok(audit) => audit,
        Err(verdict) => return found(finding, verdict),
    };
    let challenge = veri_wire::encode_challenge(audit.challenge()).into();
    let question = proto::OpenRequest { lease: t.id().0, challenge };
    let reply: Result<proto::OpenReply, _> =
        ask(node, &config.trainer, AUDIT_OPEN, &question, config.call_timeout).await;
    let opening = match reply {
        Ok(reply) => {
            let opening = veri_wire::decode_opening(&reply.opening);
            finding.opening = Some(reply.opening);
            match opening {
                Ok(opening) => opening,
                Err(error) => return found(finding, Verdict::Malformed { reason: error.to_string() }),
            }
        }
        Err(AskError::Call(CallError::Remote { .. })) => return found(finding, Verdict::Withheld),
        Err(error) => {
            tracing::warn!(%error, "challenge not passed on");
            return None;
        }
    };
    match off_runtime(|| replay.replay(&finding.job, &finding.answer)) {
        Ok(replayed) => {
            let verdict = audit.judge(&opening, &replayed, &config.profile);
            found(finding, verdict)
        }
        Err(reason) => {
            tracing::warn!(reason, lease = %t.id(), "cannot recompute");
            None
        }
    }
}

/// A prefill takes a while; where the runtime has other threads, they take over meanwhile.
fn off_runtime<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::current().runtime_flavor() {
        tokio::runtime::RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

async fn report(node: &Node, config: &AuditorConfig, t: &Trajectory, verdict: &Verdict) {
    let word = match verdict {
        Verdict::Pass { .. } => proto::Verdict::Pass,
        Verdict::Withheld => proto::Verdict::Withheld,
        _ if verdict.convicts() => proto::Verdict::Fail,
        _ => proto::Verdict::Inconclusive,
    };
    let statement = proto::AuditVerdict {
        run: t.lease().run.0,
        lease: t.id().0,
        worker: t.worker().as_bytes().to_vec().into(),
        verdict: word.into(),
        reason: verdict.reason(),
    };
    let signed = node.identity().signed(VERDICT_DOMAIN, &statement.encode_to_vec());
    let body = signed.encode_to_vec().into();
    if let Err(error) = node.call(&config.trainer, AUDIT_VERDICT, body, config.call_timeout).await {
        tracing::warn!(%error, lease = %t.id(), "verdict not delivered");
    }
}
