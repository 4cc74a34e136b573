//! Qwen2 and 2.5: a bias on queries, keys and values; later layers may have a sliding window.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{Attention, Family, ModelConfig, Projection, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Qwen2,
    name: "qwen2",
    classes: &["Qwen2ForCausalLM"],
    gguf: Some("qwen2"),
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let attention = Attention {
        qkv: Projection::biased(standard::QKV, true),
        o: Projection::plain(standard::O),
        ..standard::attention(f)?
    };
    let layers = standard::windowed(f, &attention, &standard::mlp(f)?)?;
    f.model(Family::Qwen2, layers)
}
