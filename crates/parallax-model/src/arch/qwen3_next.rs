//! Qwen3-Next and Qwen3.5: three gated delta nets for every attention, which is gated too; norms store w − 1; Qwen3-Next
//! and the larger Qwen3.5 have experts with a gated shared one.

use super::{Architecture, no_more_fields, qwen3_moe, standard};
use crate::{
    config::{
        Activation, Attention, DeltaNet, DeltaProjections, DeltaShape, DenseMlp, Experts, Family, HeadNorms,
        HeadSpan, LayerConfig, Mixer, Mlp, ModelConfig, Norm, NormKind, Norms, Projection, Rope,
        fields::Fields,
    },
    error::ConfigError,
};

pub(super) const NEXT: Architecture = Architecture {
    family: Family::Qwen3Next,
    name: "qwen3_next",
    classes: &["Qwen3NextForCausalLM"],
    gguf: None,
    describe: describe_next,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: false,
};

pub(super) const DENSE: Architecture = Architecture {
    family: Family::Qwen35,
    name: "qwen3_5_text",
    classes: &["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"],
    describe: describe_dense,
    ..NEXT
};

pub(super) const MOE: Architecture = Architecture {
    family: Family::Qwen35Moe,
    name: "qwen3_5_moe_text",
    classes: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
    describe: describe_moe,
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
    let plus_one =
        |name| -> Result<Norm, ConfigError> { Ok(Norm { kind: NormKind::RmsPlusOne, ..f.rms(name)? }) };
    let plain = standard::attention(f)?;
    // A quarter of a head is rotated where the file does not say.
    let rope = match f.rope_number("partial_rotary_factor")?.or(f.float_if("partial_rotary_factor")?) {
        Some(_) => f.rope(plain.head_dim)?,
        None => Rope { dims: plain.head_dim / 4, ..f.rope(plain.head_dim)? },
    };
    let q = plus_one("self_attn.q_norm")?;
    let attention = Mixer::Attention(Attention {
        head_norms: Some(HeadNorms { q, k: plus_one("self_attn.k_norm")?, span: HeadSpan::Head }),
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
                mixer_norms: Norms::before(plus_one("input_layernorm")?),
                mixer: if attends { attention.clone() } else { delta.clone() },
                mlp_norms: Norms::before(plus_one("post_attention_layernorm")?),
                mlp: mlp(i)?,
                residual_scale: 1.0,
            })
        })
        .collect::<Result<_, ConfigError>>()?;
    let model = f.model(family, layers)?;
    Ok(ModelConfig { final_norm: Norm { kind: NormKind::RmsPlusOne, ..model.final_norm }, ..model })
}
