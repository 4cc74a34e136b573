//! Model shape from the metadata of a GGUF file (keys `ARCH.block_count` and friends).

use super::{Family, ModelConfig, RopeScaling};
use crate::{
    error::ConfigError,
    weights::{ROPE_FACTORS, gguf::GgufFile},
};

pub(super) fn parse(file: &GgufFile) -> Result<ModelConfig, ConfigError> {
    let missing = |field: &str| ConfigError::Missing { field: field.to_owned() };
    let architecture = file.string("general.architecture").ok_or_else(|| missing("general.architecture"))?;
    let family = Family::from_architecture(architecture)?;
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| file.unsigned(&key(name)).and_then(|v| usize::try_from(v).ok());
    let need = |name: &str| size(name).ok_or_else(|| missing(&key(name)));

    let hidden = need("embedding_length")?;
    let n_heads = need("attention.head_count")?;
    let tokens = file.string_count("tokenizer.ggml.tokens");
    let vocab = size("vocab_size").or(tokens).ok_or_else(|| missing(&key("vocab_size")))?;
    let id = |name: &str| file.unsigned(name).and_then(|v| u32::try_from(v).ok());
    let mut eos: Vec<u32> = Vec::new();
    for name in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(id(name).filter(|i| !eos.contains(i)));
    }
    let config = ModelConfig {
        family,
        n_layers: need("block_count")?,
        hidden,
        ffn: need("feed_forward_length")?,
        n_heads,
        n_kv_heads: size("attention.head_count_kv").unwrap_or(n_heads),
        head_dim: size("attention.key_length").unwrap_or_else(|| hidden.checked_div(n_heads).unwrap_or(0)),
        vocab,
        rope_theta: file.float(&key("rope.freq_base")).unwrap_or(10_000.0) as f32,
        rope_scaling: scaling(file, &key("rope.scaling"))?,
        rms_eps: file
            .float(&key("attention.layer_norm_rms_epsilon"))
            .ok_or_else(|| missing(&key("attention.layer_norm_rms_epsilon")))? as f32,
        tied_embeddings: !file.has_tensor("output.weight"),
        max_context: need("context_length")?,
        bos: id("tokenizer.ggml.bos_token_id"),
        eos,
    };
    config.validate()?;
    Ok(config)
}

fn scaling(file: &GgufFile, prefix: &str) -> Result<Option<RopeScaling>, ConfigError> {
    if file.has_tensor(ROPE_FACTORS) {
        let factors = file.read_f32(ROPE_FACTORS).map_err(|e| ConfigError::Invalid {
            field: ROPE_FACTORS.to_owned(),
            value: e.to_string(),
            reason: "it must be a readable tensor".to_owned(),
        })?;
        return Ok(Some(RopeScaling::Factors(factors)));
    }
    match file.string(&format!("{prefix}.type")) {
        None | Some("none") => Ok(None),
        Some("linear") => {
            let factor = file.float(&format!("{prefix}.factor")).unwrap_or(1.0) as f32;
            Ok(Some(RopeScaling::Linear { factor }))
        }
        Some(other) => Err(ConfigError::Invalid {
            field: format!("{prefix}.type"),
            value: other.to_owned(),
            reason: "supported kinds are none and linear".to_owned(),
        }),
    }
}
