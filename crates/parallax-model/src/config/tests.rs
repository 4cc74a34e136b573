//! config.json of published models, and broken ones.

use super::*;

const LLAMA32: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":2048,"intermediate_size":8192,
    "num_hidden_layers":16,"num_attention_heads":32,"num_key_value_heads":8,"head_dim":64,"vocab_size":128256,
    "rope_theta":500000.0,"rope_scaling":{"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,
    "original_max_position_embeddings":8192,"rope_type":"llama3"},"rms_norm_eps":1e-05,
    "tie_word_embeddings":true,"max_position_embeddings":131072,"bos_token_id":128000,
    "eos_token_id":[128001,128008,128009]}"#;

fn attention(layer: &LayerConfig) -> &Attention {
    match &layer.mixer {
        Mixer::Attention(attention) => attention,
        other => panic!("{other:?}"),
    }
}

#[test]
fn llama_3_2_parses_and_round_trips() {
    let c = ModelConfig::from_hf_json(LLAMA32).unwrap();
    assert_eq!((c.n_layers, attention(&c.layers[15]).head_dim, c.eos.len()), (16, 64, 3));
    assert!((1.23e9..1.24e9).contains(&(c.parameters() as f64)), "{}", c.parameters());
    let again = ModelConfig::from_hf_json(&c.to_hf_json().to_string()).unwrap();
    assert_eq!((&again.layers, again.to_hf_json()), (&c.layers, c.to_hf_json()));
}

#[test]
fn missing_and_impossible_fields_are_named() {
    let refuse = |from: &str, to: &str| {
        assert!(LLAMA32.contains(from));
        ModelConfig::from_hf_json(&LLAMA32.replace(from, to)).unwrap_err().to_string()
    };
    assert!(refuse("\"num_hidden_layers\":16,", "").contains("num_hidden_layers"));
    assert!(refuse("\"num_hidden_layers\":16", "\"num_hidden_layers\":1e9").contains("num_hidden_layers"));
    assert!(refuse("\"num_key_value_heads\":8", "\"num_key_value_heads\":7").contains("num_key_value_heads"));
    assert!(refuse("\"llama3\"", "\"ntk\"").contains("ntk"));
    assert!(refuse("\"head_dim\":64", "\"head_dim\":63").contains("head_dim"));
    assert!(refuse("\"head_dim\":64", "\"head_dim\":\"64\"").contains("whole number"));
    assert!(refuse("\"vocab_size\":128256", "\"vocab_size\":128001").contains("vocabulary"));
}

#[test]
fn unknown_architecture_is_named_with_the_supported_ones() {
    let text = ModelConfig::from_hf_json(r#"{"architectures":["MambaForCausalLM"],"model_type":"mamba"}"#)
        .unwrap_err()
        .to_string();
    assert!(text.contains("MambaForCausalLM") && text.contains("qwen3"), "{text}");
}
