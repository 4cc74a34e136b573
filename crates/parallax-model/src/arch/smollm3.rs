//! SmolLM3: Llama in which every fourth layer has no positions (NoPE, Yang et al. 2025, arXiv:2501.18795).

use serde_json::Value;

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{Attention, Family, ModelConfig, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::SmolLm3,
    name: "smollm3",
    classes: &["SmolLM3ForCausalLM"],
    gguf: Some("smollm3"),
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: true,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let (attention, mlp) = (standard::attention(f)?, standard::mlp(f)?);
    let every = f.size_or("no_rope_layer_interval", 4)?.max(1);
    // Entry 1 means that the layer rotates, in spite of the field's name.
    let listed = f.get("no_rope_layers").and_then(Value::as_array);
    let rotates = |i: usize| match listed.and_then(|list| list.get(i)) {
        Some(entry) => entry.as_u64() == Some(1),
        None => !(i + 1).is_multiple_of(every),
    };
    let window = f.size_if("sliding_window")?;
    let layer = |i: usize| {
        let rope = attention.rope.clone().filter(|_| rotates(i));
        let window = window.filter(|_| f.slides(i, false));
        standard::layer(f, Attention { rope, window, ..attention.clone() }, mlp.clone())
    };
    f.model(Family::SmolLm3, (0..f.n_layers()?).map(layer).collect::<Result<_, _>>()?)
}
