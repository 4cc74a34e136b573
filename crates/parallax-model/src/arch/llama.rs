//! Llama 2 and 3, SmolLM2, TinyLlama, Yi, DeepSeek-Coder: the shape that others are told by.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{Family, ModelConfig, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Llama,
    name: "llama",
    classes: &["LlamaForCausalLM"],
    gguf: Some("llama"),
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: true,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let layer = standard::layer(f, standard::attention(f)?, standard::mlp(f)?)?;
    f.model(Family::Llama, vec![layer; f.n_layers()?])
}
