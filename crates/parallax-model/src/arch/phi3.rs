//! Phi-3, 3.5 and 4: Llama whose projections are stored in one; LongRoPE, and in Phi-4-mini three quarters of a head
//! rotated.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{Attention, DenseMlp, Family, ModelConfig, Projection, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Phi3,
    name: "phi3",
    classes: &["Phi3ForCausalLM"],
    gguf: Some("phi3"),
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")],
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let attention = Attention {
        qkv: Projection::plain(standard::FUSED_QKV),
        o: Projection::plain(standard::O),
        window: f.size_if("sliding_window")?,
        ..standard::attention(f)?
    };
    let gate_up = Projection::plain(standard::FUSED_GATE_UP);
    let layer = standard::layer(f, attention, DenseMlp { gate_up, ..standard::mlp(f)? })?;
    f.model(Family::Phi3, vec![layer; f.n_layers()?])
}
