//! What learner and assistants say to each other, as bytes. Bytes from a peer become checked types here and nowhere else.

use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::limits::NAME_MAX_BYTES;
use swarm_wire::prost::Message as _;
use swarm_wire::{DecodeError, PolicyVersion, RunId};

use super::{Attempt, Exclusion, Hash, Reply};
use crate::loss::PolicyTargets;
use crate::loss::plan::{CorrectionFigures, RowPlan};
use crate::metrics::LossMetrics;
use crate::packing::PackedBatch;
use crate::shares::{Part, Share, Task};

/// The streams' protocol. Another number for frames that the last one's programs would misunderstand.
pub const PROTOCOL: &str = "/echo/assist/1";
/// Largest frame without its payload; settings are the longest.
pub const FRAME_MAX_BYTES: usize = 64 * 1024;
/// Largest share: some five million tokens.
pub const WORK_MAX_BYTES: usize = 256 * 1024 * 1024;

/// A frame without its payload.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// Assistant: what it has.
    Hello {
        /// Identity of its base checkpoint.
        base_model_id: String,
    },
    /// Learner: it may take part.
    Welcome {
        /// The run.
        run: RunId,
        /// Its trainer settings, as JSON.
        settings: Vec<u8>,
    },
    /// Learner: hold these weights. Their values are the payload.
    Weights {
        /// Their version.
        version: PolicyVersion,
        /// Their hash.
        hash: Hash,
    },
    /// Assistant: it holds them.
    Held {
        /// Their hash, taken from the model.
        hash: Hash,
    },
    /// Learner: compute this. The share is the payload.
    Work(Attempt),
    /// Assistant: done. The values are the payload.
    Answer(Answered),
    /// Either: nothing follows.
    End {
        /// The run is over.
        finished: bool,
        /// Why, else.
        reason: String,
    },
}

/// An answer without its values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answered {
    /// To what.
    pub attempt: Attempt,
    /// Hash of the weights.
    pub weights: Hash,
    /// BLAKE3 of the payload.
    pub payload_hash: Hash,
    /// Of gradients.
    pub figures: LossMetrics,
}

impl Answered {
    /// The answer with the `payload` that followed.
    ///
    /// # Errors
    /// Bytes that are no list of values, or other ones than were sent.
    pub fn with(&self, payload: &[u8]) -> Result<Reply, Exclusion> {
        if *blake3::hash(payload).as_bytes() != self.payload_hash {
            return Err(Exclusion::Damaged);
        }
        let needed = payload.len() as u64 / 4 * 4;
        let size = |_: DecodeError| Exclusion::Size { got: payload.len() as u64, needed };
        let values = decode_values(payload).map_err(size)?;
        Ok(Reply { attempt: self.attempt, weights: self.weights, figures: self.figures, values })
    }
}

/// An answer and its payload as frame and bytes.
pub fn encode_reply(reply: &Reply) -> (Frame, Vec<u8>) {
    let payload = encode_values([&reply.values[..]]);
    let payload_hash = *blake3::hash(&payload).as_bytes();
    let Reply { attempt, weights, figures, .. } = *reply;
    (Frame::Answer(Answered { attempt, weights, payload_hash, figures }), payload)
}

/// Lists of values as they travel, one after the other.
pub fn encode_values<'a>(lists: impl IntoIterator<Item = &'a [f32]>) -> Vec<u8> {
    let lists: Vec<&[f32]> = lists.into_iter().collect();
    // Of a whole model: a list that grows would be copied over and over, and keep room for up to twice of it.
    let mut bytes = Vec::with_capacity(4 * lists.iter().map(|list| list.len()).sum::<usize>());
    for value in lists.into_iter().flatten() {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// The values in a payload.
///
/// # Errors
/// A length that is no multiple of four.
pub fn decode_values(payload: &[u8]) -> Result<Vec<f32>, DecodeError> {
    if !payload.len().is_multiple_of(4) {
        return Err(DecodeError::invalid("bytes of a list of f32", payload.len()));
    }
    Ok(payload.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

/// A frame that `payload_bytes` bytes follow.
pub fn encode_frame(frame: &Frame, payload_bytes: usize) -> Vec<u8> {
    use proto::assist_frame::Kind;
    let kind = match frame.clone() {
        Frame::Hello { base_model_id } => Kind::Hello(proto::AssistHello { base_model_id }),
        Frame::Welcome { run, settings } => {
            Kind::Welcome(proto::AssistWelcome { run: run.0, settings: settings.into() })
        }
        Frame::Weights { version, hash } => {
            Kind::Weights(proto::AssistWeights { version: version.0, hash: hash.to_vec().into() })
        }
        Frame::Held { hash } => Kind::Held(proto::AssistHeld { hash: hash.to_vec().into() }),
        Frame::Work(attempt) => Kind::Work(attempt_to_proto(attempt)),
        Frame::Answer(a) => Kind::Answer(proto::AssistAnswer {
            attempt: Some(attempt_to_proto(a.attempt)),
            weights: a.weights.to_vec().into(),
            payload_hash: a.payload_hash.to_vec().into(),
            figures: Some(figures_to_proto(&a.figures)),
        }),
        Frame::End { finished, reason } => Kind::End(proto::AssistEnd { finished, reason }),
    };
    proto::AssistFrame { payload_bytes: payload_bytes as u64, kind: Some(kind) }.encode_to_vec()
}

/// A frame, and how many bytes follow it, which nobody has compared with anything yet.
///
/// # Errors
/// Bytes that are no frame.
pub fn decode_frame(frame: &[u8]) -> Result<(Frame, u64), DecodeError> {
    use proto::assist_frame::Kind;
    let what = "assist frame";
    if frame.len() > FRAME_MAX_BYTES {
        return Err(DecodeError::TooLarge { what, limit_bytes: FRAME_MAX_BYTES, got_bytes: frame.len() });
    }
    let m = proto::AssistFrame::decode(frame).map_err(|e| DecodeError::message(what, &e))?;
    let kind = match m.kind.ok_or_else(|| DecodeError::invalid(what, "nothing"))? {
        Kind::Hello(m) => Frame::Hello { base_model_id: name("base model", m.base_model_id)? },
        Kind::Welcome(m) => Frame::Welcome { run: RunId(m.run), settings: m.settings.to_vec() },
        Kind::Weights(m) => Frame::Weights { version: PolicyVersion(m.version), hash: hash(&m.hash)? },
        Kind::Held(m) => Frame::Held { hash: hash(&m.hash)? },
        Kind::Work(m) => Frame::Work(attempt(&m)?),
        Kind::Answer(m) => Frame::Answer(Answered {
            attempt: attempt(&m.attempt.ok_or_else(|| DecodeError::invalid("attempt", "nothing"))?)?,
            weights: hash(&m.weights)?,
            payload_hash: hash(&m.payload_hash)?,
            figures: figures(m.figures.unwrap_or_default()),
        }),
        Kind::End(m) => Frame::End { finished: m.finished, reason: m.reason },
    };
    Ok((kind, m.payload_bytes))
}

fn hash(bytes: &[u8]) -> Result<Hash, DecodeError> {
    bytes.try_into().map_err(|_| DecodeError::invalid("hash length", bytes.len()))
}

fn name(what: &'static str, text: String) -> Result<String, DecodeError> {
    if text.len() > NAME_MAX_BYTES {
        return Err(DecodeError::TooLarge { what, limit_bytes: NAME_MAX_BYTES, got_bytes: text.len() });
    }
    Ok(text)
}

fn attempt_to_proto(Attempt { step, round, share }: Attempt) -> proto::AssistAttempt {
    proto::AssistAttempt { step, round, share: u32::try_from(share).unwrap_or(u32::MAX) }
}

fn attempt(m: &proto::AssistAttempt) -> Result<Attempt, DecodeError> {
    let share = usize::try_from(m.share).map_err(|_| DecodeError::invalid("share", m.share))?;
    Ok(Attempt { step: m.step, round: m.round, share })
}

fn correction_to_proto(c: &CorrectionFigures) -> proto::CorrectionFigures {
    proto::CorrectionFigures {
        filtered_fraction: c.filtered_fraction,
        weight_mean: c.weight_mean,
        weight_max: c.weight_max,
        effective_sample_share: c.effective_sample_share,
    }
}

fn correction(m: proto::CorrectionFigures) -> CorrectionFigures {
    CorrectionFigures {
        filtered_fraction: m.filtered_fraction,
        weight_mean: m.weight_mean,
        weight_max: m.weight_max,
        effective_sample_share: m.effective_sample_share,
    }
}

fn figures_to_proto(f: &LossMetrics) -> proto::ShareFigures {
    proto::ShareFigures {
        loss: f.loss,
        tokens: f.tokens as u64,
        batch_tokens: f.batch_tokens as u64,
        clip_fraction: f.clip_fraction,
        sampled_kl: f.sampled_kl,
        ratio_deviation_max: f.ratio_deviation_max,
        correction: Some(correction_to_proto(&f.correction)),
    }
}

fn figures(m: proto::ShareFigures) -> LossMetrics {
    let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    LossMetrics {
        loss: m.loss,
        tokens: count(m.tokens),
        batch_tokens: count(m.batch_tokens),
        clip_fraction: m.clip_fraction,
        sampled_kl: m.sampled_kl,
        ratio_deviation_max: m.ratio_deviation_max,
        correction: correction(m.correction.unwrap_or_default()),
    }
}

/// A share as it travels.
///
/// # Errors
/// One of more than [`WORK_MAX_BYTES`], or one of gradients without the weights of its rows: that is a whole batch, which nobody shares.
pub fn encode_share(share: &Share) -> Result<Vec<u8>, DecodeError> {
    let mut m = proto::ShareWork {
        task: match share.task {
            Task::Logprobs => proto::ShareTask::Logprobs,
            Task::Gradients => proto::ShareTask::Gradients,
        } as i32,
        total_tokens: share.total_tokens as u64,
        ..proto::ShareWork::default()
    };
    let mut trainable = Vec::new();
    for Part { batch, plan } in &share.parts {
        m.tokens.extend_from_slice(&batch.tokens);
        m.sequence_tokens.extend(batch.cu_seqlens.windows(2).map(|w| w[1] - w[0]));
        m.part_sequences.push(u32::try_from(batch.cu_seqlens.len().saturating_sub(1)).unwrap_or(u32::MAX));
        if share.task == Task::Logprobs {
            continue;
        }
        let t = &batch.targets;
        trainable.extend(t.mask.iter().map(|mark| u8::from(*mark)));
        for (all, list) in [
            (&mut m.sampled_logprobs, &t.sampled),
            (&mut m.proximal_logprobs, &t.proximal),
            (&mut m.reference_logprobs, &t.reference),
        ] {
            all.extend(list.iter().flatten());
        }
        m.advantages.extend(&t.advantages);
        let Some(plan) = plan else {
            return Err(DecodeError::invalid("share of gradients", "no weights of rows"));
        };
        m.policy_weights.extend(&plan.policy);
        m.divergence_weights.extend(&plan.divergence);
        m.correction = Some(correction_to_proto(&plan.figures));
    }
    m.trainable = trainable.into();
    let got_bytes = m.encoded_len();
    if got_bytes > WORK_MAX_BYTES {
        return Err(DecodeError::TooLarge { what: "share", limit_bytes: WORK_MAX_BYTES, got_bytes });
    }
    Ok(m.encode_to_vec())
}

/// The share in a payload.
///
/// # Errors
/// Bytes that are no share, lists that do not fit each other.
pub fn decode_share(payload: &[u8]) -> Result<Share, DecodeError> {
    let m = proto::ShareWork::decode(payload).map_err(|e| DecodeError::message("share", &e))?;
    let task = match m.task() {
        proto::ShareTask::Logprobs => Task::Logprobs,
        proto::ShareTask::Gradients => Task::Gradients,
        proto::ShareTask::Unspecified => return Err(DecodeError::invalid("task", m.task)),
    };
    let sum = |list: &[u32]| list.iter().map(|n| u64::from(*n)).sum::<u64>();
    let (n_tokens, n_sequences) = (m.tokens.len(), m.sequence_tokens.len());
    let short = m.sequence_tokens.iter().any(|n| *n < 2) || m.part_sequences.contains(&0);
    let tokens_fit = sum(&m.sequence_tokens) == n_tokens as u64;
    if short || !tokens_fit || sum(&m.part_sequences) != n_sequences as u64 || n_sequences == 0 {
        return Err(DecodeError::invalid("sequences of a share", n_sequences));
    }
    let rows = n_tokens - n_sequences;
    let counted = |what, got: usize, optional: bool| match got {
        0 if optional || task == Task::Logprobs => Ok(()),
        got if got == rows && task == Task::Gradients => Ok(()),
        got => Err(DecodeError::invalid(what, got)),
    };
    counted("trainable marks", m.trainable.len(), false)?;
    counted("sampled log-probabilities", m.sampled_logprobs.len(), true)?;
    counted("proximal log-probabilities", m.proximal_logprobs.len(), true)?;
    counted("reference log-probabilities", m.reference_logprobs.len(), true)?;
    counted("advantages", m.advantages.len(), false)?;
    counted("weights of rows", m.policy_weights.len(), false)?;
    counted("divergence weights of rows", m.divergence_weights.len(), false)?;
    if let Some(mark) = m.trainable.iter().find(|mark| **mark > 1) {
        return Err(DecodeError::invalid("trainable mark", mark));
    }
    let total_tokens = usize::try_from(m.total_tokens).unwrap_or(usize::MAX).max(1);
    let figures = m.correction.map(correction).unwrap_or_default();
    let (mut parts, mut token, mut row) = (Vec::with_capacity(m.part_sequences.len()), 0, 0);
    let mut lengths = m.sequence_tokens.iter().map(|n| *n as usize);
    for n in &m.part_sequences {
        let (first_token, first_row) = (token, row);
        let (mut cu_seqlens, mut offsets) = (vec![0_u32], vec![0]);
        for length in lengths.by_ref().take(*n as usize) {
            token += length;
            row += length - 1;
            cu_seqlens.push(u32::try_from(token - first_token).unwrap_or(u32::MAX));
            offsets.push(row - first_row);
        }
        let rows = first_row..row;
        let some = |list: &[f64]| (!list.is_empty()).then(|| list[rows.clone()].to_vec());
        let targets = match task {
            Task::Logprobs => PolicyTargets::default(),
            Task::Gradients => PolicyTargets {
                offsets,
                mask: m.trainable[rows.clone()].iter().map(|mark| *mark == 1).collect(),
                sampled: some(&m.sampled_logprobs),
                proximal: some(&m.proximal_logprobs),
                reference: some(&m.reference_logprobs),
                advantages: m.advantages[rows.clone()].to_vec(),
            },
        };
        let plan = (task == Task::Gradients).then(|| RowPlan {
            policy: m.policy_weights[rows.clone()].to_vec(),
            divergence: m.divergence_weights[rows.clone()].to_vec(),
            figures,
        });
        parts.push(Part {
            batch: PackedBatch { tokens: m.tokens[first_token..token].to_vec(), cu_seqlens, targets },
            plan,
        });
    }
    Ok(Share { task, parts, total_tokens })
}
