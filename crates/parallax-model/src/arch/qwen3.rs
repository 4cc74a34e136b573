//! Qwen3 dense: an RMS norm on each query and key head; later layers may have a sliding window.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{Attention, Family, HeadNorms, HeadSpan, ModelConfig, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Qwen3,
    name: "qwen3",
    classes: &["Qwen3ForCausalLM"],
    gguf: Some("qwen3"),
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let layers = standard::windowed(f, &attention(f)?, &standard::mlp(f)?)?;
    f.model(Family::Qwen3, layers)
}

/// Attention with a norm on each query and key head.
pub(super) fn attention(f: &Fields<'_>) -> Result<Attention, ConfigError> {
    let q = f.rms("self_attn.q_norm")?;
    let head_norms = Some(HeadNorms { q, k: f.rms("self_attn.k_norm")?, span: HeadSpan::Head });
    Ok(Attention { head_norms, ..standard::attention(f)? })
}
