//! Known checkpoints: the shapes that their config.json files publish, and what they need in memory.
//!
//! A list, not a gate: any checkpoint of a supported architecture loads, whether it is named here or not. Each row
//! is read by its architecture like a config.json, so that sizes are counted in one place.

mod table;

use serde_json::json;

use crate::config::{Family, ModelConfig};

/// One published shape. Letters as in [`ModelConfig`].
#[derive(Debug)]
struct Row {
    family: Family,
    /// Layers, H, F, Q, K, D, V.
    shape: [u32; 7],
    tied: bool,
    max_context: u32,
    /// Further fields of config.json on which sizes depend: a JSON object.
    more: &'static str,
}

/// A known checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct KnownModel {
    /// Repository on the hub.
    pub name: &'static str,
    row: &'static Row,
}

/// All known checkpoints, family by family.
pub fn known() -> impl Iterator<Item = KnownModel> {
    table::TABLE.iter().flat_map(|(row, names)| names.iter().map(move |name| KnownModel { name, row }))
}

/// A known checkpoint by its repository, upper and lower case alike.
pub fn find(name: &str) -> Option<KnownModel> {
    known().find(|m| m.name.eq_ignore_ascii_case(name))
}

impl KnownModel {
    /// The family whose forward pass runs it.
    pub fn family(&self) -> Family {
        self.row.family
    }

    /// Its shape, from which parameters and bytes are counted. What sizes do not depend on (rotary scaling,
    /// windows, special tokens) is not in it: run the checkpoint with its own config.json.
    ///
    /// # Panics
    /// Never: the tests read every row.
    pub fn config(&self) -> ModelConfig {
        let row = self.row;
        let [n_layers, hidden, ffn, n_heads, n_kv_heads, head_dim, vocab] = row.shape;
        let mut json = json!({
            "architectures": [row.family.hf_class()], "num_hidden_layers": n_layers, "hidden_size": hidden,
            "intermediate_size": ffn, "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv_heads, "head_dim": head_dim, "vocab_size": vocab,
            "tie_word_embeddings": row.tied, "max_position_embeddings": row.max_context,
        });
        let more: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(row.more).expect("the tests read every row");
        more.into_iter().for_each(|(name, value)| json[name] = value);
        ModelConfig::from_hf_json(&json.to_string()).expect("the tests read every row")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{KvFormat, WeightDtype};

    #[test]
    fn parameter_counts_are_the_published_ones() {
        for (name, millions) in [
            ("HuggingFaceTB/SmolLM2-135M", 134.5),
            ("HuggingFaceTB/SmolLM2-360M", 361.8),
            ("HuggingFaceTB/SmolLM2-1.7B", 1711.4),
            ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1100.0),
            ("meta-llama/Llama-3.2-1B", 1235.8),
            ("meta-llama/Llama-3.2-3B", 3212.7),
            ("meta-llama/Llama-3.1-8B", 8030.3),
            ("meta-llama/Llama-3.3-70B-Instruct", 70553.7),
            ("meta-llama/Llama-3.1-405B", 405_853.4),
            ("meta-llama/Llama-2-7b-hf", 6738.4),
            ("meta-llama/Llama-2-13b-hf", 13015.9),
            ("01-ai/Yi-1.5-9B", 8829.4),
            ("Qwen/Qwen3-0.6B", 596.0),
            ("Qwen/Qwen3-1.7B", 1720.6),
            ("Qwen/Qwen3-4B", 4022.5),
            ("Qwen/Qwen3-8B", 8190.7),
            ("Qwen/Qwen3-14B", 14768.3),
            ("Qwen/Qwen3-32B", 32762.1),
            ("Qwen/Qwen2.5-0.5B", 494.0),
            ("Qwen/Qwen2.5-1.5B-Instruct", 1543.7),
            ("Qwen/Qwen2.5-7B-Instruct", 7615.6),
            ("Qwen/Qwen2.5-14B-Instruct", 14770.0),
            ("Qwen/Qwen2.5-72B-Instruct", 72706.2),
            ("mistralai/Mistral-7B-v0.3", 7248.0),
            ("mistralai/Mistral-Nemo-Base-2407", 12247.8),
            ("HuggingFaceTB/SmolLM3-3B", 3075.1),
            ("google/gemma-2-2b", 2614.3),
            ("google/gemma-2-9b", 9241.7),
            ("google/gemma-2-27b", 27227.1),
            ("google/gemma-3-270m", 268.1),
            ("google/gemma-3-1b-pt", 999.9),
            ("microsoft/Phi-3-mini-4k-instruct", 3821.1),
            ("microsoft/phi-4", 14659.5),
            ("microsoft/Phi-4-mini-instruct", 3836.0),
            ("zai-org/GLM-4-9B-0414", 9400.3),
            ("mistralai/Mixtral-8x7B-v0.1", 46_702.8),
            ("mistralai/Mixtral-8x22B-v0.1", 140_620.6),
            ("Qwen/Qwen3-30B-A3B", 30_532.1),
            ("Qwen/Qwen3-235B-A22B", 235_093.6),
            ("Qwen/Qwen3-Coder-480B-A35B-Instruct", 480_154.9),
            ("openai/gpt-oss-20b", 20_914.8),
            ("openai/gpt-oss-120b", 116_829.2),
            ("deepseek-ai/DeepSeek-V2-Lite", 15_706.5),
            ("deepseek-ai/DeepSeek-V2", 235_741.4),
            ("deepseek-ai/DeepSeek-V3", 671_026.4),
            ("moonshotai/Kimi-K2-Instruct", 1_026_408.2),
            ("MiniMaxAI/MiniMax-M2", 228_689.8),
            ("Qwen/Qwen3.5-0.8B", 752.4),
            ("Qwen/Qwen3.5-9B", 8_950.0),
            ("Qwen/Qwen3.5-27B", 26_900.0),
            ("Qwen/Qwen3.5-35B-A3B", 34_660.0),
            ("Qwen/Qwen3.5-122B-A10B", 122_110.0),
            ("Qwen/Qwen3.5-397B-A17B", 396_350.0),
        ] {
            let got = find(name).unwrap().config().parameters() as f64 / 1e6;
            assert!((got / millions - 1.0).abs() < 1e-3, "{name}: {got:.1} million, published {millions}");
        }
    }

    #[test]
    fn names_are_unique_and_every_row_is_read() {
        let names: std::collections::BTreeSet<&str> = known().map(|m| m.name).collect();
        assert_eq!(names.len(), known().count());
        assert!(names.len() >= 40);
        for model in known() {
            assert_eq!(model.config().family, model.family());
        }
        assert!(find("qwen/qwen3-8b").is_some_and(|m| m.family() == Family::Qwen3));
    }

    #[test]
    fn memory_counts_weights_and_keys() {
        let config = find("HuggingFaceTB/SmolLM2-135M").unwrap().config();
        assert_eq!(config.kv_bytes(1, KvFormat::F32), 30 * 2 * 3 * 64 * 4);
        let bytes = |dtype| config.stage_bytes(&(0..30), dtype);
        let q8 = bytes(WeightDtype::Q8_0);
        assert!((142_000_000..144_000_000).contains(&q8), "{q8}");
        assert!(bytes(WeightDtype::Q4_0) < q8 && q8 < bytes(WeightDtype::Bf16));
    }

    #[test]
    fn memory_counts_the_least_number_of_recurrent_states() {
        let cache =
            |config: &ModelConfig, tokens| config.cache_bytes_per_token_layer(tokens, KvFormat::F32) * tokens;
        let config = find("Qwen/Qwen3-Next-80B-A3B-Instruct").unwrap().config();
        let states = 16 * config.layers[0].state_bytes();
        assert!((35_000_000..36_000_000).contains(&states), "{states}");
        assert!((states..states + 4096).contains(&cache(&config, 4096)), "more than keys and values");
        assert_eq!(cache(&config, 16_384), 16_384 * 2 * 2 * 256 * 4, "keys and values have more");
        let config = find("HuggingFaceTB/SmolLM2-135M").unwrap().config();
        assert_eq!(cache(&config, 16), 16 * 2 * 3 * 64 * 4);
    }
}
