//! The config.json that the metadata of a GGUF file stands for (keys `ARCH.block_count` and friends).
//!
//! The keys that llama.cpp's converter writes for every architecture are here; what only one architecture has is
//! in its file under `arch/`.

use serde_json::{Map, Value, json};

use super::{Family, fields::invalid};
use crate::{
    arch,
    error::ConfigError,
    weights::{ROPE_FACTORS, gguf::GgufFile},
};

/// Metadata keys after `ARCH.`, and the fields of config.json that say the same.
const SIZES: [(&str, &str); 11] = [
    ("block_count", "num_hidden_layers"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.sliding_window", "sliding_window"),
    ("context_length", "max_position_embeddings"),
    ("vocab_size", "vocab_size"),
    ("expert_count", "num_experts"),
    ("expert_used_count", "num_experts_per_tok"),
];

/// The same for numbers.
const FLOATS: [(&str, &str); 5] = [
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
    ("rope.freq_base_swa", "rope_local_base_freq"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
];

/// Key of the layers behind the others that guess tokens ahead.
const SPARE_LAYERS: &str = "nextn_predict_layers";
/// `expert_gating_func` of routers with sigmoid scores.
const SIGMOID: u64 = 2;

pub(super) fn fields(file: &GgufFile) -> Result<Map<String, Value>, ConfigError> {
    let missing = |field: &str| ConfigError::Missing { field: field.to_owned() };
    let name = file.string("general.architecture").ok_or_else(|| missing("general.architecture"))?;
    let key = |field: &str| format!("{name}.{field}");
    let architecture = match name {
        // Mixtral goes under Llama's name; what tells it apart are its experts.
        "llama" if file.unsigned(&key("expert_count")).is_some_and(|n| n > 0) => arch::of(Family::Mixtral),
        "deepseek2" if file.unsigned(&key("expert_gating_func")) == Some(SIGMOID) => {
            arch::of(Family::DeepseekV3)
        }
        _ => arch::by_gguf_name(name)?,
    };
    let mut map = Map::new();
    for (from, to) in SIZES {
        // A window of zero tokens says that there is none (Phi-4).
        let value = file.unsigned(&key(from)).filter(|value| *value > 0 || to != "sliding_window");
        map.extend(value.map(|value| (to.to_owned(), value.into())));
    }
    for (from, to) in FLOATS {
        if let Some(value) = file.float(&key(from)) {
            map.insert(to.to_owned(), decimal(value));
        }
    }
    // Layers that guess tokens ahead are counted among the blocks.
    if let (Some(blocks), Some(spare)) =
        (file.unsigned(&key("block_count")), file.unsigned(&key(SPARE_LAYERS)))
    {
        let layers = blocks.checked_sub(spare);
        let layers =
            layers.ok_or_else(|| invalid(&key(SPARE_LAYERS), spare, "there are not so many blocks"))?;
        map.insert("num_hidden_layers".to_owned(), layers.into());
        map.insert("num_nextn_predict_layers".to_owned(), spare.into());
    }
    for required in ["block_count", "embedding_length", "attention.head_count", "context_length"] {
        file.unsigned(&key(required)).ok_or_else(|| missing(&key(required)))?;
    }
    if !map.contains_key("vocab_size") {
        let tokens = file.string_count("tokenizer.ggml.tokens").ok_or_else(|| missing(&key("vocab_size")))?;
        map.insert("vocab_size".to_owned(), tokens.into());
    }
    partial_rotation(file, &key("rope.dimension_count"), &mut map);
    if let Some(scaling) = scaling(file, &key("rope.scaling"))? {
        map.insert("rope_scaling".to_owned(), scaling);
    }
    map.insert("architectures".to_owned(), json!([architecture.classes[0]]));
    map.insert("model_type".to_owned(), architecture.name.into());
    map.insert("tie_word_embeddings".to_owned(), (!file.has_tensor("output.weight")).into());
    if let Some(bos) = file.unsigned("tokenizer.ggml.bos_token_id") {
        map.insert("bos_token_id".to_owned(), bos.into());
    }
    let mut eos: Vec<u64> = Vec::new();
    for name in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(file.unsigned(name).filter(|i| !eos.contains(i)));
    }
    map.insert("eos_token_id".to_owned(), eos.into());
    for (tensor, field) in [("blk.0.attn_q.bias", "attention_bias"), ("blk.0.ffn_gate.bias", "mlp_bias")] {
        if file.has_tensor(tensor) {
            map.insert(field.to_owned(), true.into());
        }
    }
    (architecture.gguf_fields)(file, &mut map);
    Ok(map)
}

/// The file holds f32; the shortest decimal of it is what config.json had.
pub(crate) fn decimal(value: f64) -> Value {
    (value as f32).to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// Rotated elements as a share of the head.
fn partial_rotation(file: &GgufFile, key: &str, map: &mut Map<String, Value>) {
    let size = |name: &str| map.get(name).and_then(Value::as_u64);
    let derived = || size("hidden_size")?.checked_div(size("num_attention_heads")?);
    let Some((rotated, head_dim)) = file.unsigned(key).zip(size("head_dim").or_else(derived)) else { return };
    if rotated > 0 && rotated < head_dim {
        map.insert("partial_rotary_factor".to_owned(), (rotated as f64 / head_dim as f64).into());
    }
}

fn tensor(file: &GgufFile, name: &str) -> Result<Vec<f32>, ConfigError> {
    file.read_f32(name).map_err(|e| invalid(name, e, "it must be a readable tensor"))
}

fn scaling(file: &GgufFile, prefix: &str) -> Result<Option<Value>, ConfigError> {
    let float = |name: &str| file.float(&format!("{prefix}.{name}")).map(decimal);
    let original = file.unsigned(&format!("{prefix}.original_context_length"));
    let [long, short] = crate::weights::LONG_ROPE_FACTORS;
    if file.has_tensor(long) && file.has_tensor(short) {
        return Ok(Some(json!({
            "rope_type": "longrope", "long_factor": tensor(file, long)?, "short_factor": tensor(file, short)?,
            "original_max_position_embeddings": original, "attention_factor": float("attn_factor"),
        })));
    }
    if file.has_tensor(ROPE_FACTORS) {
        return Ok(Some(json!({"rope_type": "factors", "factors": tensor(file, ROPE_FACTORS)?})));
    }
    let factor = float("factor").unwrap_or_else(|| 1.0.into());
    match file.string(&format!("{prefix}.type")) {
        None | Some("none") => Ok(None),
        Some("linear") => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
        Some("yarn") => Ok(Some(json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "beta_fast": float("yarn_beta_fast"), "beta_slow": float("yarn_beta_slow"),
        }))),
        Some(other) => {
            Err(invalid(&format!("{prefix}.type"), other, "supported kinds are none, linear and yarn"))
        }
    }
}
