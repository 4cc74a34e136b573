//! The report of `parallax status`; fields as in the user guide.

use parallax_sched::{Coordinator, Member, NodeId};
use serde_json::{Value, json};

use super::Shared;
use crate::service::EngineHandle;

pub(super) fn status(shared: &Shared, engine: &EngineHandle) -> Value {
    let me = NodeId::from(&shared.node.peer_id());
    let cache = engine.metrics();
    let kv_free_tokens = (cache.pages - cache.pages_used) * shared.shape.page_tokens;
    let ready = shared.ready();
    shared.membership.read(|coordinator| {
        let nodes: Vec<Value> = coordinator
            .members()
            .map(|(id, member)| node(shared, coordinator, id, member, &me, kv_free_tokens))
            .collect();
        let pipelines: Vec<Value> = coordinator
            .view()
            .plan
            .iter()
            .flat_map(|plan| &plan.pipelines)
            .map(|pipeline| {
                let stages: Vec<Value> = pipeline
                    .stages
                    .iter()
                    .map(|s| json!({"peer": s.node.as_str(), "layers": [s.layers.start(), s.layers.end()]}))
                    .collect();
                json!({
                    "stages": stages,
                    "ready": ready.is_ok() && coordinator.is_ready(pipeline),
                    "bottleneck_ms": pipeline.bottleneck_ms,
                    "latency_ms": pipeline.latency_ms,
                })
            })
            .collect();
        json!({
            "swarm": shared.membership.description().swarm,
            "model": shared.membership.description().name,
            "epoch": coordinator.view().epoch,
            "ready": ready.is_ok(),
            "nodes": nodes,
            "pipelines": pipelines,
            "why": ready.err().unwrap_or_else(|| coordinator.why()),
        })
    })
}

fn node(
    shared: &Shared,
    coordinator: &Coordinator,
    id: &NodeId,
    member: &Member,
    me: &NodeId,
    kv_free_tokens: usize,
) -> Value {
    let local = id == me;
    let layers = coordinator.stage_of(id).map(|(_, _, layers)| [layers.start(), layers.end()]);
    let measured = if local { shared.stats.decode_ms_per_layer() } else { member.report.decode_ms_per_layer };
    let rtt_ms = if local { 0.0 } else { coordinator.rtt_ms(me, id) };
    let (sent, payload, tokens) = if local {
        (shared.stats.sent_bytes(), shared.stats.sent_payload_bytes(), shared.stats.sent_tokens())
    } else {
        (member.report.sent_bytes, member.report.sent_payload_bytes, member.report.sent_tokens)
    };
    json!({
        "peer": id.as_str(),
        "head": local,
        "layers": layers,
        "state": member.report.state.as_str(),
        "detail": member.report.detail,
        "rtt_ms": rtt_ms,
        "decode_ms_per_layer": measured.unwrap_or(member.profile.decode_ms_per_layer),
        "measured": measured.is_some(),
        "memory_bytes": member.profile.memory_bytes,
        "kv_free_tokens": if layers.is_some() { kv_free_tokens } else { 0 },
        "device": member.device,
        "sent_bytes": sent,
        "sent_payload_bytes": payload,
        "sent_tokens": tokens,
    })
}
