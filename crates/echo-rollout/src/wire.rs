//! Bytes from a peer become checked types here and nowhere else.
//!
//! A decoded [`Trajectory`] names the peer that sent it as its worker: the connection says who it is, not the message.

mod journal;

use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::limits::{MESSAGE_MAX_BYTES, NAME_MAX_BYTES};
use swarm_wire::prost::Message;
use swarm_wire::{Cid, DecodeError, PeerId, PolicyVersion, RunId};

use crate::environment::Reward;
use crate::lease::{GroupId, Lease, LeaseId, SamplingSpec};
use crate::rollout::{Finish, MAX_TOKENS, Sample, Step, Trajectory};
use crate::snapshot::{Artefact, Payload, SnapshotManifest};

#[cfg(feature = "collector")]
pub(crate) use journal::audit_outcome;
pub use journal::{Entry, decode_entry, encode_entry, encode_settings};

/// Most trajectories in one submission.
pub const MAX_SUBMISSION: usize = 256;
/// Largest group.
pub const MAX_GROUP_SIZE: u32 = 1024;
/// Rewards beyond are refused whatever the environment says.
pub const MAX_REWARD: f32 = 1e6;
/// Most bytes of a challenge or an opening that are passed on.
pub const MAX_OPENING_BYTES: usize = MESSAGE_MAX_BYTES;

/// Decodes a message of at most [`MESSAGE_MAX_BYTES`].
///
/// # Errors
/// When it is too large or not a message.
pub fn message<M: Message + Default>(what: &'static str, bytes: &[u8]) -> Result<M, DecodeError> {
    if bytes.len() > MESSAGE_MAX_BYTES {
        return Err(DecodeError::TooLarge { what, limit_bytes: MESSAGE_MAX_BYTES, got_bytes: bytes.len() });
    }
    M::decode(bytes).map_err(|e| DecodeError::message(what, &e))
}

/// A text field of at most [`NAME_MAX_BYTES`].
///
/// # Errors
/// When it is longer.
pub fn name(what: &'static str, text: String) -> Result<String, DecodeError> {
    if text.len() > NAME_MAX_BYTES {
        return Err(DecodeError::TooLarge { what, limit_bytes: NAME_MAX_BYTES, got_bytes: text.len() });
    }
    Ok(text)
}

pub(crate) fn snapshot_to_proto(manifest: &SnapshotManifest) -> proto::SnapshotManifest {
    let kind = match manifest.payload {
        Payload::Base => proto::SnapshotKind::Base,
        Payload::Lora(_) => proto::SnapshotKind::Lora,
        Payload::Full(_) => proto::SnapshotKind::Full,
    };
    let artefact = manifest.payload.artefact();
    proto::SnapshotManifest {
        run: manifest.run.0,
        version: manifest.version.0,
        parent: manifest.parent.map(|v| v.0),
        kind: kind.into(),
        base_model_id: manifest.base_model_id.clone(),
        root: artefact.map(|a| a.root.to_bytes()).unwrap_or_default().into(),
        payload_hash: artefact.map(|a| a.hash.to_vec()).unwrap_or_default().into(),
        payload_bytes: artefact.map_or(0, |a| a.bytes),
        spread: artefact.is_some_and(|a| a.spread),
        created_by: manifest.created_by.as_bytes().to_vec().into(),
    }
}

pub(crate) fn decode_snapshot(bytes: &[u8]) -> Result<SnapshotManifest, DecodeError> {
    let m: proto::SnapshotManifest = message("snapshot manifest", bytes)?;
    let artefact = |m: &proto::SnapshotManifest| -> Result<Artefact, DecodeError> {
        let root: Cid = swarm_wire::cid::decode(&m.root)?;
        let hash = m.payload_hash[..].try_into();
        let hash = hash.map_err(|_| DecodeError::invalid("payload hash length", m.payload_hash.len()))?;
        Ok(Artefact { root, hash, bytes: m.payload_bytes, spread: m.spread })
    };
    let payload = match m.kind() {
        proto::SnapshotKind::Base if m.root.is_empty() && m.payload_hash.is_empty() => Payload::Base,
        proto::SnapshotKind::Lora => Payload::Lora(artefact(&m)?),
        proto::SnapshotKind::Full => Payload::Full(artefact(&m)?),
        _ => return Err(DecodeError::invalid("snapshot kind", m.kind)),
    };
    if m.parent.is_some_and(|p| p >= m.version) {
        return Err(DecodeError::invalid("snapshot parent", m.parent.unwrap_or_default()));
    }
    Ok(SnapshotManifest {
        run: RunId(m.run),
        version: PolicyVersion(m.version),
        parent: m.parent.map(PolicyVersion),
        payload,
        base_model_id: name("base model id", m.base_model_id)?,
        created_by: PeerId::from_bytes(&m.created_by)?,
    })
}

impl From<&Lease> for proto::Lease {
    fn from(lease: &Lease) -> Self {
        let s = lease.sampling;
        Self {
            id: lease.id.0,
            run: lease.run.0,
            group: lease.group.0,
            sample_index: lease.sample_index,
            group_size: lease.group_size,
            attempt: lease.attempt,
            task_seed: lease.task_seed,
            version: lease.version.0,
            sampling: Some(proto::Sampling {
                temperature: s.temperature,
                top_k: s.top_k,
                top_p: s.top_p,
                max_tokens: s.max_tokens,
                seed: s.seed,
            }),
            ttl_ms: lease.ttl_ms,
        }
    }
}

impl TryFrom<proto::Lease> for Lease {
    type Error = DecodeError;

    fn try_from(m: proto::Lease) -> Result<Self, DecodeError> {
        let s = m.sampling.ok_or_else(|| DecodeError::invalid("lease sampling", "absent"))?;
        let sampling = SamplingSpec {
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            max_tokens: s.max_tokens,
            seed: s.seed,
        };
        if !(0.0..=100.0).contains(&s.temperature) {
            return Err(DecodeError::invalid("temperature", s.temperature));
        }
        if !(s.top_p > 0.0 && s.top_p <= 1.0) {
            return Err(DecodeError::invalid("top_p", s.top_p));
        }
        if s.max_tokens == 0 || s.max_tokens as usize > MAX_TOKENS {
            return Err(DecodeError::invalid("max_tokens", s.max_tokens));
        }
        if m.group_size == 0 || m.group_size > MAX_GROUP_SIZE || m.sample_index >= m.group_size {
            return Err(DecodeError::invalid("sample", format!("{} of {}", m.sample_index, m.group_size)));
        }
        Ok(Self {
            id: LeaseId(m.id),
            run: RunId(m.run),
            group: GroupId(m.group),
            sample_index: m.sample_index,
            group_size: m.group_size,
            attempt: m.attempt,
            task_seed: m.task_seed,
            version: PolicyVersion(m.version),
            sampling,
            ttl_ms: m.ttl_ms,
        })
    }
}

impl From<&Trajectory> for proto::Trajectory {
    fn from(t: &Trajectory) -> Self {
        let mut versions: Vec<proto::VersionRun> = Vec::new();
        for step in t.steps() {
            match versions.last_mut() {
                Some(run) if run.version == step.version.0 => run.n_tokens += 1,
                _ => versions.push(proto::VersionRun { version: step.version.0, n_tokens: 1 }),
            }
        }
        let finish = match t.finish() {
            Finish::Stop => proto::FinishReason::Stop,
            Finish::Length => proto::FinishReason::Length,
        };
        let component =
            |(name, value): &(String, f32)| proto::RewardComponent { name: name.clone(), value: *value };
        Self {
            lease: Some(t.lease().into()),
            environment: t.environment().to_owned(),
            prompt_ids: t.prompt().to_vec(),
            token_ids: t.completion(),
            logprobs: t.logprobs(),
            versions,
            finish: finish.into(),
            reward: t.reward().value(),
            components: t.reward().components().iter().map(component).collect(),
            commitment: t.commitment().clone(),
            spans: spans(t.steps()),
        }
    }
}

/// Runs of own and foreign tokens; none at all when every token is the policy's own.
fn spans(steps: &[Step]) -> Vec<proto::SpanRun> {
    if steps.iter().all(|s| s.trainable) {
        return Vec::new();
    }
    let mut runs: Vec<proto::SpanRun> = Vec::new();
    for step in steps {
        match runs.last_mut() {
            Some(run) if run.trainable == step.trainable => run.n_tokens += 1,
            _ => runs.push(proto::SpanRun { trainable: step.trainable, n_tokens: 1 }),
        }
    }
    runs
}

/// Checks a trajectory that `worker` sent.
///
/// # Errors
/// When lengths differ, a number is out of range, or an enumeration has no such value.
pub fn trajectory(m: proto::Trajectory, worker: &PeerId) -> Result<Trajectory, DecodeError> {
    let finish = match m.finish() {
        proto::FinishReason::Stop => Finish::Stop,
        proto::FinishReason::Length => Finish::Length,
        proto::FinishReason::Unspecified => return Err(DecodeError::invalid("finish reason", m.finish)),
    };
    let lease: Lease =
        m.lease.ok_or_else(|| DecodeError::invalid("trajectory lease", "absent"))?.try_into()?;
    let n = m.token_ids.len();
    if m.logprobs.len() != n {
        return Err(DecodeError::invalid(
            "log-probabilities",
            format!("{} for {n} tokens", m.logprobs.len()),
        ));
    }
    let runs: u64 = m.versions.iter().map(|r| u64::from(r.n_tokens)).sum();
    if runs != n as u64 || n > MAX_TOKENS || m.versions.len() > n {
        return Err(DecodeError::invalid("policy versions", format!("for {runs} of {n} tokens")));
    }
    let versions =
        m.versions.iter().flat_map(|r| std::iter::repeat_n(PolicyVersion(r.version), r.n_tokens as usize));
    let spanned: u64 = m.spans.iter().map(|r| u64::from(r.n_tokens)).sum();
    if !m.spans.is_empty() && (spanned != n as u64 || m.spans.len() > n) {
        return Err(DecodeError::invalid("spans", format!("for {spanned} of {n} tokens")));
    }
    let own = m.spans.iter().flat_map(|r| std::iter::repeat_n(r.trainable, r.n_tokens as usize));
    let steps = m.token_ids.iter().zip(&m.logprobs).zip(versions).zip(own.chain(std::iter::repeat(true)));
    let steps = steps
        .map(|(((&token, &logprob), version), trainable)| Step { token, logprob, version, trainable })
        .collect();
    let components = m.components.into_iter().map(|c| Ok((name("reward part", c.name)?, c.value)));
    let components = components.collect::<Result<_, DecodeError>>()?;
    let reward = Reward::new(m.reward, components, &(-MAX_REWARD..=MAX_REWARD));
    let reward = reward.map_err(|e| DecodeError::invalid("reward", e))?;
    Trajectory::new(Sample {
        lease,
        worker: worker.clone(),
        environment: name("environment", m.environment)?,
        prompt: m.prompt_ids,
        steps,
        finish,
        reward,
        commitment: m.commitment,
    })
    .map_err(|e| DecodeError::invalid("trajectory", e))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lease::tests::lease;
    use crate::rollout::tests::sample;

    fn worker() -> PeerId {
        PeerId::from_ed25519(&[9; 32])
    }

    fn good() -> proto::Trajectory {
        (&Trajectory::new(sample(lease(5), &worker())).unwrap()).into()
    }

    #[test]
    fn trajectories_round_trip_and_the_sender_is_the_worker() {
        let mut s = sample(lease(5), &worker());
        s.steps[1].version = PolicyVersion(4);
        let t = Trajectory::new(s).unwrap();
        let bytes = proto::Trajectory::from(&t).encode_to_vec();
        let m: proto::Trajectory = message("trajectory", &bytes).unwrap();
        assert_eq!(m.versions.len(), 2);
        assert_eq!(trajectory(m.clone(), &worker()).unwrap(), t);
        let other = PeerId::from_ed25519(&[8; 32]);
        assert_eq!(*trajectory(m, &other).unwrap().worker(), other);
    }

    #[test]
    fn what_a_tool_said_stays_marked() {
        let mut s = sample(lease(5), &worker());
        let mut tool = s.steps[0];
        (tool.trainable, tool.logprob) = (false, 0.0);
        s.steps.splice(1..1, [tool, tool]);
        let t = Trajectory::new(s).unwrap();
        let m = proto::Trajectory::from(&t);
        assert_eq!(
            m.spans.iter().map(|r| (r.trainable, r.n_tokens)).collect::<Vec<_>>(),
            [(true, 1), (false, 2), (true, 1)]
        );
        assert_eq!(trajectory(m, &worker()).unwrap(), t);
    }

    #[test]
    fn contradictions_are_refused() {
        let bad = |change: &dyn Fn(&mut proto::Trajectory)| {
            let mut m = good();
            change(&mut m);
            trajectory(m, &worker()).is_err()
        };
        assert!(!bad(&|_| ()));
        assert!(bad(&|m| m.lease = None));
        assert!(bad(&|m| m.logprobs.push(-1.0)));
        assert!(bad(&|m| m.logprobs[0] = f32::NAN));
        assert!(bad(&|m| m.versions[0].n_tokens = u32::MAX));
        assert!(bad(&|m| m.versions.clear()));
        let span = |trainable, n_tokens| proto::SpanRun { trainable, n_tokens };
        assert!(!bad(&|m| m.spans = vec![span(true, 2)]));
        assert!(bad(&|m| m.spans = vec![span(true, 1)]));
        assert!(bad(&|m| m.spans = vec![span(true, 1), span(false, u32::MAX)]));
        assert!(bad(&|m| m.spans = vec![span(true, 1), span(false, 1)]), "the last word is the policy's own");
        assert!(bad(&|m| m.reward = f32::NAN));
        assert!(bad(&|m| m.reward = 2e6));
        assert!(bad(&|m| m.finish = 0));
        assert!(bad(&|m| m.finish = 77));
        assert!(bad(&|m| m.environment = "x".repeat(NAME_MAX_BYTES + 1)));
        assert!(bad(&|m| m.token_ids.clear()));
        let in_lease = |change: &dyn Fn(&mut proto::Lease)| bad(&|m| change(m.lease.as_mut().unwrap()));
        assert!(in_lease(&|l| l.sampling = None));
        assert!(in_lease(&|l| l.sample_index = l.group_size));
        assert!(in_lease(&|l| l.sampling.as_mut().unwrap().temperature = f32::NAN));
        assert!(in_lease(&|l| l.sampling.as_mut().unwrap().top_p = 0.0));
        assert!(in_lease(&|l| l.sampling.as_mut().unwrap().max_tokens = u32::MAX));
    }

    #[test]
    fn the_encoding_is_pinned() {
        let hex: String = good().encode_to_vec().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "0a1b080510012802380540034a0c0d0000803f1d0000803f202050e807120a61726974686d657469631a030102032202\
             07082a08000000bf000000bf3204080310023801450000803f4a0e0a07636f7272656374150000803f5204726f6f74"
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_snapshot(&bytes);
            let _ = decode_entry(&bytes);
            if let Ok(m) = message::<proto::Trajectory>("trajectory", &bytes) {
                let _ = trajectory(m, &worker());
            }
        }

        #[test]
        fn a_broken_byte_never_panics(at in 0usize..200, bit in 0u8..8) {
            let mut bytes = good().encode_to_vec();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok(m) = message::<proto::Trajectory>("trajectory", &bytes) {
                let _ = trajectory(m, &worker());
            }
        }
    }
}
