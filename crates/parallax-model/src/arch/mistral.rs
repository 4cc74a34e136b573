//! Mistral: Llama with a sliding window in every layer, where the checkpoint has one.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{Attention, Family, ModelConfig, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Mistral,
    name: "mistral",
    classes: &["MistralForCausalLM"],
    // GGUF files of Mistral call themselves llama.
    gguf: None,
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: true,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let attention = Attention { window: f.size_if("sliding_window")?, ..standard::attention(f)? };
    let layer = standard::layer(f, attention, standard::mlp(f)?)?;
    f.model(Family::Mistral, vec![layer; f.n_layers()?])
}
