//! DeepSeek-V2 and V3, and Kimi-K2, whose files say DeepSeek-V3: latent attention, shared experts, routers limited
//! to groups of experts, YaRN with a factor of the scores.

use serde_json::{Map, Value};

use super::{Architecture, standard};
use crate::{
    config::{
        Activation, DenseMlp, ExpertActivation, Experts, Family, GroupScore, Latent, LayerConfig, Mixer, Mlp,
        ModelConfig, Norm, NormKind, Norms, Projection, Rope, Router, RouterScore, experts::MLP_EXPERTS,
        fields::Fields, from_gguf::decimal,
    },
    error::ConfigError,
    weights::{LATENT_PARTS, gguf::GgufFile},
};

pub(super) const V2: Architecture = Architecture {
    family: Family::DeepseekV2,
    name: "deepseek_v2",
    classes: &["DeepseekV2ForCausalLM"],
    gguf: Some("deepseek2"),
    describe: describe_v2,
    gguf_fields,
    gguf_names: &[
        ("attn_q_a", "self_attn.q_a_proj"),
        ("attn_q_a_norm", "self_attn.q_a_layernorm"),
        ("attn_q_b", "self_attn.q_b_proj"),
        ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
        ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
        ("attn_kv_b", "self_attn.kv_b_proj"),
        ("attn_k_b", LATENT_PARTS[0]),
        ("attn_v_b", LATENT_PARTS[1]),
        ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    ],
    gguf_pairs: false,
};

pub(super) const V3: Architecture = Architecture {
    family: Family::DeepseekV3,
    name: "deepseek_v3",
    classes: &["DeepseekV3ForCausalLM"],
    // Files go under the older name; their routers' scores tell them apart: see `config/from_gguf.rs`.
    gguf: None,
    describe: describe_v3,
    ..V2
};

fn describe_v2(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let groups = match f.text("topk_method").unwrap_or("greedy") {
        "greedy" => None,
        "group_limited_greedy" => f.router_groups(GroupScore::Best)?,
        other => {
            let reason = "supported are greedy and group_limited_greedy";
            return Err(crate::config::fields::invalid("topk_method", other, reason));
        }
    };
    let router = Router {
        groups,
        scale: f.float_or("routed_scaling_factor", 1.0)?,
        ..f.softmax_router("mlp.gate", false)?
    };
    model(f, Family::DeepseekV2, true, router)
}

fn describe_v3(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    model(f, Family::DeepseekV3, f.bool_or("rope_interleave", true), sigmoid_router(f)?)
}

/// Sigmoid scores, chosen with a correction, within the groups of the best pairs.
pub(super) fn sigmoid_router(f: &Fields<'_>) -> Result<Router, ConfigError> {
    Ok(Router {
        correction: Some("mlp.gate.e_score_correction_bias"),
        score: RouterScore::Sigmoid,
        groups: f.router_groups(GroupScore::BestTwo)?,
        scale: f.float_or("routed_scaling_factor", 1.0)?,
        ..f.softmax_router("mlp.gate", f.bool_or("norm_topk_prob", true))?
    })
}

/// Experts with shared ones beside them, from layer `first_k_dense_replace` on.
pub(super) fn mlps(f: &Fields<'_>, router: Router) -> Result<Vec<Mlp>, ConfigError> {
    let dense = standard::mlp(f)?;
    let ffn = f.size("moe_intermediate_size")?;
    let shared = match f.size_or("n_shared_experts", 0)? {
        0 => None,
        n => Some(DenseMlp {
            ffn: ffn.saturating_mul(n),
            gate_up: Projection::plain(&["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"]),
            down: Projection::plain(&["mlp.shared_experts.down_proj"]),
            activation: Activation::Silu,
        }),
    };
    let experts = Experts {
        n_experts: f.n_experts()?,
        ffn,
        router,
        tensors: MLP_EXPERTS,
        activation: ExpertActivation::Gated(Activation::Silu),
        shared,
        shared_gate: None,
    };
    let (first, step) = (f.size_or("first_k_dense_replace", 0)?, f.size_or("moe_layer_freq", 1)?.max(1));
    let sparse = |i: usize| i >= first && i.is_multiple_of(step);
    let n_layers = f.n_layers()?;
    let mlp = |i| if sparse(i) { Mlp::Experts(experts.clone()) } else { Mlp::Dense(dense.clone()) };
    Ok((0..n_layers).map(mlp).collect())
}

fn model(
    f: &Fields<'_>,
    family: Family,
    interleaved: bool,
    router: Router,
) -> Result<ModelConfig, ConfigError> {
    let latent = latent(f, interleaved)?;
    let norms = [f.rms("input_layernorm")?, f.rms("post_attention_layernorm")?];
    let layer = |mlp| LayerConfig {
        mixer_norms: Norms::before(norms[0]),
        mixer: Mixer::Latent(latent.clone()),
        mlp_norms: Norms::before(norms[1]),
        mlp,
        residual_scale: 1.0,
    };
    f.model(family, mlps(f, router)?.into_iter().map(layer).collect())
}

fn latent(f: &Fields<'_>, interleaved: bool) -> Result<Latent, ConfigError> {
    let (nope_dim, rope_dim) = (f.size("qk_nope_head_dim")?, f.size("qk_rope_head_dim")?);
    let bias = f.bool_or("attention_bias", false);
    let q_rank = f.size_if("q_lora_rank")?;
    // These two norms have transformers' default epsilon, whatever the file says of the others.
    let inner = |name| Norm { name, kind: NormKind::Rms, eps: 1e-6 };
    let (q_in, q_out) = match q_rank {
        None => (Projection::plain(&["self_attn.q_proj"]), None),
        Some(_) => {
            let out = (inner("self_attn.q_a_layernorm"), Projection::plain(&["self_attn.q_b_proj"]));
            (Projection::biased(&["self_attn.q_a_proj"], bias), Some(out))
        }
    };
    // The rotated part is rotated whole, whatever `head_dim` says.
    let rope = Rope { interleaved, dims: rope_dim, ..f.rope(rope_dim)? };
    let mscale = f.rope_number("mscale_all_dim")?.filter(|m| *m != 0.0);
    let factor = f.rope_number("factor")?.unwrap_or(1.0);
    let stretch = match mscale {
        Some(m) if factor > 1.0 => 0.1 * m * factor.ln() + 1.0,
        _ => 1.0,
    };
    Ok(Latent {
        n_heads: f.size("num_attention_heads")?,
        nope_dim,
        rope_dim,
        value_dim: f.size("v_head_dim")?,
        kv_rank: f.size("kv_lora_rank")?,
        q_rank,
        q_in,
        q_out,
        kv_in: Projection::biased(&["self_attn.kv_a_proj_with_mqa"], bias),
        kv_norm: inner("self_attn.kv_a_layernorm"),
        kv_out: "self_attn.kv_b_proj",
        o: Projection::biased(&["self_attn.o_proj"], bias),
        rope,
        scale: ((nope_dim + rope_dim) as f32).sqrt().recip() * stretch * stretch,
    })
}

/// Groups of experts and how many of them are open, of released models whose GGUF files were made before there was a key
/// for them: by number of experts, DeepSeek-V2 and V3.
const GROUPS: [(u64, u64, u64); 2] = [(160, 8, 3), (256, 8, 4)];

/// Sizes of latent attention. llama.cpp runs it as one key head for all, and its own head sizes are those of the
/// compressed rows.
fn gguf_fields(file: &GgufFile, map: &mut Map<String, Value>) {
    gguf_router_fields(file, "deepseek2", map);
    let size = |key: &str| file.unsigned(&format!("deepseek2.{key}"));
    let rope = size("rope.dimension_count").unwrap_or(0);
    let head = size("attention.key_length_mla").or_else(|| size("attention.key_length"));
    for (name, value) in [
        ("q_lora_rank", size("attention.q_lora_rank")),
        ("kv_lora_rank", size("attention.kv_lora_rank")),
        ("qk_rope_head_dim", Some(rope)),
        ("qk_nope_head_dim", head.and_then(|head| head.checked_sub(rope))),
        ("v_head_dim", size("attention.value_length_mla").or_else(|| size("attention.value_length"))),
        ("num_key_value_heads", size("attention.head_count")),
    ] {
        map.extend(value.map(|value| (name.to_owned(), value.into())));
    }
    map.remove("head_dim");
    map.remove("partial_rotary_factor");
    if !map.contains_key("n_group") {
        let known = GROUPS.iter().find(|(experts, ..)| size("expert_count") == Some(*experts));
        map.extend(known.into_iter().flat_map(|(_, groups, open)| {
            [("n_group".to_owned(), (*groups).into()), ("topk_group".to_owned(), (*open).into())]
        }));
    }
    if map.get("n_group").and_then(Value::as_u64).is_some_and(|n| n > 1) {
        map.insert("topk_method".to_owned(), "group_limited_greedy".into());
    }
    // The file has a tenth of what both are in every released config.json.
    let tenth = file.float("deepseek2.rope.scaling.yarn_log_multiplier");
    if let (Some(Value::Object(scaling)), Some(tenth)) = (map.get_mut("rope_scaling"), tenth) {
        let whole = decimal(tenth).as_f64().map(|tenth| tenth * 10.0);
        scaling.extend(["mscale", "mscale_all_dim"].map(|name| (name.to_owned(), whole.into())));
    }
}

/// Routed and shared experts, and what chooses.
pub(super) fn gguf_router_fields(file: &GgufFile, name: &str, map: &mut Map<String, Value>) {
    standard::gguf_expert_fields(file, name, map);
    let key = |key: &str| format!("{name}.{key}");
    for (from, to) in [
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("expert_shared_count", "n_shared_experts"),
        ("expert_group_count", "n_group"),
        ("expert_group_used_count", "topk_group"),
    ] {
        map.extend(file.unsigned(&key(from)).map(|value| (to.to_owned(), value.into())));
    }
    // Left out where it is one; a zero of older files says the same.
    let scale = file.float(&key("expert_weights_scale")).filter(|scale| *scale != 0.0).unwrap_or(1.0);
    map.insert("routed_scaling_factor".to_owned(), decimal(scale));
    let normalized = file.bool(&key("expert_weights_norm")).unwrap_or(false);
    map.insert("norm_topk_prob".to_owned(), normalized.into());
}
