//! GLM-4 (0414): half of each head rotated, by neighbouring pairs; norms before and after each part.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{
        Attention, DenseMlp, Family, LayerConfig, Mixer, Mlp, ModelConfig, Norms, Projection, Rope,
        fields::Fields,
    },
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Glm4,
    name: "glm4",
    classes: &["Glm4ForCausalLM"],
    gguf: Some("glm4"),
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[
        ("post_attention_norm", "post_self_attn_layernorm"),
        ("post_ffw_norm", "post_mlp_layernorm"),
        ("ffn_up", "mlp.gate_up_proj"),
    ],
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let attention = standard::attention(f)?;
    let dims = f.rotated_or(attention.head_dim, 0.5)?;
    let rope = attention.rope.clone().map(|rope| Rope { dims, interleaved: true, ..rope });
    let o = Projection::plain(standard::O);
    let gate_up = Projection::plain(standard::FUSED_GATE_UP);
    let mlp = DenseMlp { gate_up, down: Projection::plain(standard::DOWN), ..standard::mlp(f)? };
    let layer = LayerConfig {
        mixer_norms: Norms::sandwich(f.rms("input_layernorm")?, f.rms("post_self_attn_layernorm")?),
        mixer: Mixer::Attention(Attention { rope, o, ..attention }),
        mlp_norms: Norms::sandwich(f.rms("post_attention_layernorm")?, f.rms("post_mlp_layernorm")?),
        mlp: Mlp::Dense(mlp),
        residual_scale: 1.0,
    };
    f.model(Family::Glm4, vec![layer; f.n_layers()?])
}
