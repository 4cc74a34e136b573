//! Messages of members become domain types here and nowhere else.

use swarm_wire::generated::parallax::v1 as pb;
use swarm_wire::limits::NAME_MAX_BYTES;
use swarm_wire::{DecodeError, LayerRange};

use crate::coordinator::{Report, Staged};
use crate::{MemberState, ModelProfile, NodeId, NodeProfile};

/// A member may listen on this many addresses.
pub const MAX_ADDRS: usize = 16;
/// Longest text of a heartbeat.
const DETAIL_MAX_BYTES: usize = 1024;

/// The profile in a join request of `node`; numbers are checked by [`NodeProfile::validate`].
///
/// # Errors
/// When the pinned range is reversed.
pub fn node_profile(node: NodeId, profile: &pb::NodeProfile) -> Result<NodeProfile, DecodeError> {
    let pinned = if profile.pinned_start == profile.pinned_end {
        None
    } else {
        Some(LayerRange::new(profile.pinned_start, profile.pinned_end)?)
    };
    Ok(NodeProfile {
        id: node,
        memory_bytes: profile.memory_bytes,
        decode_ms_per_layer: profile.decode_ms_per_layer,
        head_ms: profile.head_ms,
        prefill_ms_per_layer_token: profile.prefill_ms_per_layer_token,
        overhead_ms: profile.overhead_ms,
        pinned,
    })
}

/// The message for a profile.
pub fn node_profile_message(profile: &NodeProfile) -> pb::NodeProfile {
    pb::NodeProfile {
        memory_bytes: profile.memory_bytes,
        decode_ms_per_layer: profile.decode_ms_per_layer,
        head_ms: profile.head_ms,
        prefill_ms_per_layer_token: profile.prefill_ms_per_layer_token,
        overhead_ms: profile.overhead_ms,
        pinned_start: profile.pinned.map_or(0, LayerRange::start),
        pinned_end: profile.pinned.map_or(0, LayerRange::end),
    }
}

/// The addresses of a join request.
///
/// # Errors
/// When there are more than [`MAX_ADDRS`] or one is too long.
pub fn addrs(addrs: Vec<String>) -> Result<Vec<String>, DecodeError> {
    if addrs.len() > MAX_ADDRS {
        return Err(DecodeError::TooLarge {
            what: "list of addresses",
            limit_bytes: MAX_ADDRS,
            got_bytes: addrs.len(),
        });
    }
    match addrs.iter().find(|a| a.len() > NAME_MAX_BYTES) {
        Some(long) => {
            Err(DecodeError::TooLarge { what: "address", limit_bytes: NAME_MAX_BYTES, got_bytes: long.len() })
        }
        None => Ok(addrs),
    }
}

/// What a heartbeat reports.
///
/// # Errors
/// When the state is unknown or the text is too long.
pub fn report(heartbeat: pb::Heartbeat) -> Result<Report, DecodeError> {
    let state = match heartbeat.state() {
        pb::MemberState::Standby => MemberState::Standby,
        pb::MemberState::Loading => MemberState::Loading,
        pb::MemberState::Ready => MemberState::Ready,
        pb::MemberState::Failed => MemberState::Failed,
    };
    if pb::MemberState::try_from(heartbeat.state).is_err() {
        return Err(DecodeError::invalid("member state", heartbeat.state));
    }
    for text in [&heartbeat.detail, &heartbeat.staged_checkpoint_id, &heartbeat.staged_failure] {
        if text.len() > DETAIL_MAX_BYTES {
            return Err(DecodeError::TooLarge {
                what: "heartbeat text",
                limit_bytes: DETAIL_MAX_BYTES,
                got_bytes: text.len(),
            });
        }
    }
    let staged = (!heartbeat.staged_checkpoint_id.is_empty()).then(|| Staged {
        checkpoint_id: heartbeat.staged_checkpoint_id,
        failure: (!heartbeat.staged_failure.is_empty()).then_some(heartbeat.staged_failure),
    });
    Ok(Report {
        epoch: heartbeat.epoch,
        state,
        detail: heartbeat.detail,
        decode_ms_per_layer: (heartbeat.decode_ms_per_layer > 0.0).then_some(heartbeat.decode_ms_per_layer),
        sent_bytes: heartbeat.sent_bytes,
        sent_payload_bytes: heartbeat.sent_payload_bytes,
        sent_tokens: heartbeat.sent_tokens,
        staged,
    })
}

/// The heartbeat for a report.
pub fn heartbeat(incarnation: u64, report: &Report) -> pb::Heartbeat {
    let state = match report.state {
        MemberState::Standby => pb::MemberState::Standby,
        MemberState::Loading => pb::MemberState::Loading,
        MemberState::Ready => pb::MemberState::Ready,
        MemberState::Failed => pb::MemberState::Failed,
    };
    let (staged, failure) = match &report.staged {
        Some(staged) => (staged.checkpoint_id.as_str(), staged.failure.as_deref().unwrap_or_default()),
        None => ("", ""),
    };
    pb::Heartbeat {
        incarnation,
        epoch: report.epoch,
        state: state.into(),
        detail: cut(&report.detail),
        decode_ms_per_layer: report.decode_ms_per_layer.unwrap_or(0.0),
        sent_bytes: report.sent_bytes,
        sent_payload_bytes: report.sent_payload_bytes,
        sent_tokens: report.sent_tokens,
        staged_checkpoint_id: staged.to_owned(),
        staged_failure: cut(failure),
    }
}

/// The beginning of a text, as much as a heartbeat may bring.
fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(DETAIL_MAX_BYTES)].to_owned()
}

/// The planner's view of a described model.
pub fn model_profile(model: &pb::ModelDescription) -> ModelProfile {
    ModelProfile {
        name: model.name.clone(),
        n_layers: model.n_layers,
        layer_bytes: model.layer_bytes,
        embedding_bytes: model.embedding_bytes,
        head_bytes: if model.head_bytes == 0 { model.embedding_bytes } else { model.head_bytes },
        tied: model.head_bytes == 0,
        kv_bytes_per_token_layer: model.kv_bytes_per_token_layer,
        layer_flops: 0.0,
        hidden: model.hidden,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_and_reports_round_trip() {
        let mut profile = NodeProfile::new("n", 7, 1.5);
        profile.pinned = Some(LayerRange::new(2, 5).unwrap());
        assert_eq!(node_profile(NodeId::new("n"), &node_profile_message(&profile)).unwrap(), profile);
        let sent = Report {
            epoch: 3,
            state: MemberState::Failed,
            detail: "why".into(),
            decode_ms_per_layer: Some(0.25),
            staged: Some(Staged { checkpoint_id: "c".into(), failure: Some("no room".into()) }),
            ..Report::default()
        };
        assert_eq!(report(heartbeat(1, &sent)).unwrap(), sent);
    }

    #[test]
    fn nonsense_from_peers_is_refused() {
        let reversed = pb::NodeProfile { pinned_start: 5, pinned_end: 2, ..pb::NodeProfile::default() };
        assert!(node_profile(NodeId::new("n"), &reversed).is_err());
        assert!(report(pb::Heartbeat { state: 77, ..pb::Heartbeat::default() }).is_err());
        assert!(report(pb::Heartbeat { detail: "x".repeat(5000), ..pb::Heartbeat::default() }).is_err());
        assert!(addrs(vec!["a".repeat(1000)]).is_err());
        assert!(addrs(vec![String::new(); 100]).is_err());
    }

    #[test]
    fn long_details_are_cut_at_a_character() {
        let sent = Report { detail: "ä".repeat(1000), ..Report::default() };
        assert!(report(heartbeat(1, &sent)).unwrap().detail.len() <= DETAIL_MAX_BYTES);
    }
}
