//! Gemma 3 (arXiv:2503.19786), the language model: Gemma 2 with normalised heads instead of caps; five layers with a
//! window and slow rotation between layers that see everything and rotate by another base.

use super::{Architecture, gemma2};
use crate::{
    config::{Attention, Family, HeadNorms, HeadSpan, ModelConfig, Rope, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Gemma3,
    name: "gemma3_text",
    classes: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
    gguf: Some("gemma3"),
    describe,
    gguf_fields: |file, map| gemma2::gguf_fields(file, map, 62),
    gguf_names: gemma2::GGUF_NAMES,
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    // Files of the larger models leave out what the class takes without.
    let f = &f.with_defaults(&[
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("vocab_size", 262_208),
        ("max_position_embeddings", 131_072),
    ]);
    let f = &Fields(f);
    let q = f.rms_plus_one("self_attn.q_norm")?;
    let head_norms = Some(HeadNorms { q, k: f.rms_plus_one("self_attn.k_norm")?, span: HeadSpan::Head });
    let attention = Attention { head_norms, ..gemma2::attention(f, None)? };
    let everywhere = f.rope_of(Some("full_attention"), attention.head_dim, 1_000_000.0)?;
    let near = if f.has_rope_of("sliding_attention") {
        f.rope_of(Some("sliding_attention"), attention.head_dim, 10_000.0)?
    } else {
        let theta = f.float_or("rope_local_base_freq", 10_000.0)?;
        Rope { theta, scaling: None, ..everywhere.clone() }
    };
    let window = f.size_or("sliding_window", 4096)?;
    let every = f.size_or("sliding_window_pattern", 6)?.max(1);
    let one = |i: usize| {
        let (window, rope) = if f.slides(i, !(i + 1).is_multiple_of(every)) {
            (Some(window), Some(near.clone()))
        } else {
            (None, Some(everywhere.clone()))
        };
        gemma2::layer(f, Attention { window, rope, ..attention.clone() })
    };
    let layers = (0..f.n_layers()?).map(one).collect::<Result<_, _>>()?;
    gemma2::model(f, Family::Gemma3, layers, None)
}
