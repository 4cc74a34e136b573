//! Qwen3-Next and Qwen3.5: three gated delta nets for every attention, which is gated too; norms store w − 1; Qwen3-Next
//! and the larger Qwen3.5 have experts with a gated shared one.

use serde_json::{Map, Value};

use super::{Architecture, qwen3_moe, standard};
use crate::{
    config::{
        Activation, Attention, DeltaNet, DeltaProjections, DeltaShape, DenseMlp, Experts, Family, HeadNorms,
        HeadSpan, LayerConfig, MAX_LAYERS, Mixer, Mlp, ModelConfig, Norms, Projection, Rope, fields::Fields,
    },
    error::ConfigError,
    weights::{NEGATED_RATES, gguf::GgufFile},
};

pub(super) const NEXT: Architecture = Architecture {
    family: Family::Qwen3Next,
    name: "qwen3_next",
    classes: &["Qwen3NextForCausalLM"],
    gguf: Some("qwen3next"),
    describe: describe_next,
    gguf_fields: |file, map| gguf_fields(file, "qwen3next", map),
    gguf_names: &[
        ("post_attention_norm", "post_attention_layernorm"),
        // The first is from before the second and third.
        ("ssm_in", "linear_attn.in_proj_qkvz"),
        ("attn_qkv", "linear_attn.in_proj_qkv"),
        ("attn_gate", "linear_attn.in_proj_z"),
        ("ssm_ba", "linear_attn.in_proj_ba"),
        ("ssm_beta", "linear_attn.in_proj_b"),
        ("ssm_alpha", "linear_attn.in_proj_a"),
        ("ssm_conv1d", "linear_attn.conv1d"),
        ("ssm_dt.bias", "linear_attn.dt_bias"),
        ("ssm_a", NEGATED_RATES),
        ("ssm_norm", "linear_attn.norm"),
        ("ssm_out", "linear_attn.out_proj"),
        ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
        ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
        ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
        ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
    ],
    gguf_pairs: false,
};

pub(super) const DENSE: Architecture = Architecture {
    family: Family::Qwen35,
    name: "qwen3_5_text",
    classes: &["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"],
    gguf: Some("qwen35"),
    describe: describe_dense,
    gguf_fields: |file, map| gguf_fields(file, "qwen35", map),
    ..NEXT
};

pub(super) const MOE: Architecture = Architecture {
    family: Family::Qwen35Moe,
    name: "qwen3_5_moe_text",
    classes: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
    gguf: Some("qwen35moe"),
    describe: describe_moe,
    gguf_fields: |file, map| gguf_fields(file, "qwen35moe", map),
    ..NEXT
};

fn describe_next(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let experts = with_shared(f, f.bool_or("norm_topk_prob", true))?;
    model(f, Family::Qwen3Next, DeltaProjections::ByHead, |i| {
        Ok(if qwen3_moe::is_sparse(f, i)? { experts.clone() } else { Mlp::Dense(standard::mlp(f)?) })
    })
}

fn describe_dense(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    model(f, Family::Qwen35, DeltaProjections::ByKind, |_| Ok(Mlp::Dense(standard::mlp(f)?)))
}

fn describe_moe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let experts = with_shared(f, true)?;
    model(f, Family::Qwen35Moe, DeltaProjections::ByKind, |_| Ok(experts.clone()))
}

fn with_shared(f: &Fields<'_>, normalize: bool) -> Result<Mlp, ConfigError> {
    let shared = DenseMlp {
        ffn: f.size("shared_expert_intermediate_size")?,
        gate_up: Projection::plain(&["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"]),
        down: Projection::plain(&["mlp.shared_expert.down_proj"]),
        activation: Activation::Silu,
    };
    let experts = qwen3_moe::experts(f, normalize)?;
    Ok(Mlp::Experts(Experts { shared: Some(shared), shared_gate: Some("mlp.shared_expert_gate"), ..experts }))
}

fn model(
    f: &Fields<'_>,
    family: Family,
    projections: DeltaProjections,
    mlp: impl Fn(usize) -> Result<Mlp, ConfigError>,
) -> Result<ModelConfig, ConfigError> {
    let plain = standard::attention(f)?;
    // A quarter of a head is rotated where the file does not say.
    let rope = match f.rope_number("partial_rotary_factor")?.or(f.float_if("partial_rotary_factor")?) {
        Some(_) => f.rope(plain.head_dim)?,
        None => Rope { dims: plain.head_dim / 4, ..f.rope(plain.head_dim)? },
    };
    let q = f.rms_plus_one("self_attn.q_norm")?;
    let attention = Mixer::Attention(Attention {
        head_norms: Some(HeadNorms { q, k: f.rms_plus_one("self_attn.k_norm")?, span: HeadSpan::Head }),
        rope: Some(rope),
        gated: true,
        ..plain
    });
    let delta = Mixer::Delta(DeltaNet {
        shape: DeltaShape {
            n_key_heads: f.size("linear_num_key_heads")?,
            n_heads: f.size("linear_num_value_heads")?,
            key_dim: f.size("linear_key_head_dim")?,
            value_dim: f.size("linear_value_head_dim")?,
            tiled: f.bool_or(TILED, false),
        },
        taps: f.size("linear_conv_kernel_dim")?,
        norm: f.rms("linear_attn.norm")?,
        projections,
    });
    let (kinds, every) = (f.texts("layer_types"), f.size_or("full_attention_interval", 4)?.max(1));
    let layers = (0..f.n_layers()?)
        .map(|i| {
            let attends = match &kinds {
                Some(kinds) => kinds.get(i) == Some(&"full_attention"),
                None => (i + 1).is_multiple_of(every),
            };
            Ok(LayerConfig {
                mixer_norms: Norms::before(f.rms_plus_one("input_layernorm")?),
                mixer: if attends { attention.clone() } else { delta.clone() },
                mlp_norms: Norms::before(f.rms_plus_one("post_attention_layernorm")?),
                mlp: mlp(i)?,
                residual_scale: 1.0,
            })
        })
        .collect::<Result<_, ConfigError>>()?;
    Ok(ModelConfig { final_norm: f.rms_plus_one("model.norm")?, ..f.model(family, layers)? })
}

/// Our own field: the value heads of a delta net lie in llama.cpp's order.
const TILED: &str = "parallax_value_heads_tiled";

/// The converter adds 1 to the norms, negates and exponentiates the decays, and, of Qwen3.5, deals the value heads out to
/// the key heads in turn.
fn gguf_fields(file: &GgufFile, name: &str, map: &mut Map<String, Value>) {
    standard::gguf_expert_fields(file, name, map);
    let size = |key: &str| file.unsigned(&format!("{name}.{key}"));
    let n_heads = size("ssm.time_step_rank");
    let value_dim = size("ssm.inner_size").zip(n_heads).and_then(|(width, n)| width.checked_div(n));
    for (name, value) in [
        ("linear_num_key_heads", size("ssm.group_count")),
        ("linear_num_value_heads", n_heads),
        ("linear_key_head_dim", size("ssm.state_size")),
        ("linear_value_head_dim", value_dim),
        ("linear_conv_kernel_dim", size("ssm.conv_kernel")),
        ("shared_expert_intermediate_size", size("expert_shared_feed_forward_length")),
    ] {
        map.extend(value.map(|value| (name.to_owned(), value.into())));
    }
    let n_layers = map.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or(0).min(MAX_LAYERS as u64);
    let kind = |i| match file.has_tensor(&format!("blk.{i}.ssm_out.weight")) {
        true => "linear_attention",
        false => "full_attention",
    };
    map.insert("layer_types".to_owned(), (0..n_layers).map(kind).collect());
    map.insert("parallax_norms_hold_one".to_owned(), true.into());
    map.insert(TILED.to_owned(), (name != "qwen3next").into());
    map.entry("partial_rotary_factor").or_insert(1.0.into());
    // The converter writes no flag: the released checkpoint has it.
    map.insert("norm_topk_prob".to_owned(), true.into());
}
