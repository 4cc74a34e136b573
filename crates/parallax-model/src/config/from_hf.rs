//! config.json of a Hugging Face checkpoint, in both directions.
//!
//! Two generations are read: `rope_theta` at the top level, and the newer `rope_parameters` object.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Family, ModelConfig, RopeScaling};
use crate::error::ConfigError;

#[derive(Deserialize)]
struct HfConfig {
    #[serde(default)]
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    rms_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    max_position_embeddings: Option<usize>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
}

fn need<T>(value: Option<T>, field: &str) -> Result<T, ConfigError> {
    value.ok_or_else(|| ConfigError::Missing { field: field.to_owned() })
}

fn token_ids(value: Option<&Value>) -> Vec<u32> {
    match value {
        Some(Value::Number(n)) => n.as_u64().and_then(|n| u32::try_from(n).ok()).into_iter().collect(),
        Some(Value::Array(ids)) => ids.iter().flat_map(|v| token_ids(Some(v))).collect(),
        _ => Vec::new(),
    }
}

fn scaling(value: Option<&Value>) -> Result<Option<RopeScaling>, ConfigError> {
    let Some(Value::Object(map)) = value else { return Ok(None) };
    let number = |name: &str| {
        map.get(name)
            .and_then(Value::as_f64)
            .map(|v| v as f32)
            .ok_or_else(|| ConfigError::Missing { field: format!("rope_scaling.{name}") })
    };
    let kind = map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or("default");
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        "llama3" => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: number("original_max_position_embeddings")? as usize,
        })),
        other => Err(ConfigError::Invalid {
            field: "rope_scaling".to_owned(),
            value: other.to_owned(),
            reason: "supported kinds are default, linear and llama3".to_owned(),
        }),
    }
}

pub(super) fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
    let c: HfConfig = serde_json::from_str(text)?;
    let architecture = c
        .architectures
        .as_ref()
        .and_then(|a| a.first().cloned())
        .or_else(|| c.model_type.clone())
        .ok_or_else(|| ConfigError::Missing { field: "architectures".to_owned() })?;
    let family = Family::from_architecture(&architecture)?;
    for (name, value) in [
        ("attention_bias", c.attention_bias),
        ("mlp_bias", c.mlp_bias),
        ("use_sliding_window", c.use_sliding_window),
    ] {
        if value == Some(true) {
            return Err(ConfigError::Invalid {
                field: name.to_owned(),
                value: "true".to_owned(),
                reason: format!("{} is supported only without it", family.name()),
            });
        }
    }
    if let Some(act) = c.hidden_act.as_deref().filter(|a| *a != "silu") {
        return Err(ConfigError::Invalid {
            field: "hidden_act".to_owned(),
            value: act.to_owned(),
            reason: "only silu is supported".to_owned(),
        });
    }
    let hidden = need(c.hidden_size, "hidden_size")?;
    let n_heads = need(c.num_attention_heads, "num_attention_heads")?;
    let rope = c.rope_parameters.as_ref().or(c.rope_scaling.as_ref());
    let theta = c
        .rope_theta
        .or_else(|| c.rope_parameters.as_ref().and_then(|r| r.get("rope_theta")).and_then(Value::as_f64));
    let config = ModelConfig {
        family,
        n_layers: need(c.num_hidden_layers, "num_hidden_layers")?,
        hidden,
        ffn: need(c.intermediate_size, "intermediate_size")?,
        n_heads,
        n_kv_heads: c.num_key_value_heads.unwrap_or(n_heads),
        head_dim: c.head_dim.unwrap_or_else(|| hidden.checked_div(n_heads).unwrap_or(0)),
        vocab: need(c.vocab_size, "vocab_size")?,
        rope_theta: theta.unwrap_or(10_000.0) as f32,
        rope_scaling: scaling(rope)?,
        rms_eps: c.rms_norm_eps.unwrap_or(1e-6) as f32,
        tied_embeddings: c.tie_word_embeddings.unwrap_or(false),
        max_context: c.max_position_embeddings.unwrap_or(2048),
        bos: token_ids(c.bos_token_id.as_ref()).first().copied(),
        eos: token_ids(c.eos_token_id.as_ref()),
    };
    config.validate()?;
    Ok(config)
}

/// Shortest decimal of an f32, as JSON: 1e-5 and not 9.999999747378752e-6.
fn decimal(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

pub(super) fn write(c: &ModelConfig) -> Value {
    let scaling = match &c.rope_scaling {
        None => Value::Null,
        Some(RopeScaling::Linear { factor }) => json!({"rope_type": "linear", "factor": decimal(*factor)}),
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }) => json!({
            "rope_type": "llama3", "factor": decimal(*factor), "low_freq_factor": decimal(*low_freq_factor),
            "high_freq_factor": decimal(*high_freq_factor), "original_max_position_embeddings": original_context,
        }),
        // No HF field holds bare factors; they only come from GGUF files, which keep them.
        Some(RopeScaling::Factors(_)) => Value::Null,
    };
    let eos = if c.eos.len() == 1 { json!(c.eos[0]) } else { json!(c.eos) };
    json!({
        "architectures": [c.family.hf_class()], "model_type": c.family.name(), "hidden_act": "silu",
        "attention_bias": false, "hidden_size": c.hidden, "intermediate_size": c.ffn,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim, "vocab_size": c.vocab,
        "max_position_embeddings": c.max_context, "rms_norm_eps": decimal(c.rms_eps),
        "rope_theta": decimal(c.rope_theta), "rope_scaling": scaling, "tie_word_embeddings": c.tied_embeddings,
        "bos_token_id": c.bos, "eos_token_id": eos, "torch_dtype": "float32",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA32: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":2048,"intermediate_size":8192,
        "num_hidden_layers":16,"num_attention_heads":32,"num_key_value_heads":8,"head_dim":64,"vocab_size":128256,
        "rope_theta":500000.0,"rope_scaling":{"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,
        "original_max_position_embeddings":8192,"rope_type":"llama3"},"rms_norm_eps":1e-05,
        "tie_word_embeddings":true,"max_position_embeddings":131072,"bos_token_id":128000,
        "eos_token_id":[128001,128008,128009]}"#;

    #[test]
    fn llama_3_2_parses_and_round_trips() {
        let c = parse(LLAMA32).unwrap();
        assert_eq!((c.n_layers, c.head_dim, c.eos.len()), (16, 64, 3));
        assert!((1.23e9..1.24e9).contains(&(c.parameters() as f64)), "{}", c.parameters());
        assert_eq!(parse(&write(&c).to_string()).unwrap(), c);
    }

    #[test]
    fn missing_and_impossible_fields_are_named() {
        let lacking = LLAMA32.replace("\"num_hidden_layers\":16,", "");
        assert!(parse(&lacking).unwrap_err().to_string().contains("num_hidden_layers"));
        let odd = LLAMA32.replace("\"num_key_value_heads\":8", "\"num_key_value_heads\":7");
        assert!(parse(&odd).unwrap_err().to_string().contains("n_kv_heads"));
        let yarn = LLAMA32.replace("\"llama3\"", "\"yarn\"");
        assert!(parse(&yarn).unwrap_err().to_string().contains("yarn"));
    }
}
