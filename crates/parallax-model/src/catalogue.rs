//! Known checkpoints: the shapes that their config.json files publish, and what they need in memory.
//!
//! A list, not a gate: any checkpoint of a supported architecture loads, whether it is named here or not.

use serde::Serialize;

use crate::{config::Family, options::WeightDtype};

/// The shape that checkpoints share. Letters as in [`crate::ModelConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Class name in config.json.
    pub architecture: &'static str,
    /// Decoder layers.
    pub n_layers: u32,
    /// H.
    pub hidden: u32,
    /// F.
    pub ffn: u32,
    /// Q.
    pub n_heads: u32,
    /// K.
    pub n_kv_heads: u32,
    /// D.
    pub head_dim: u32,
    /// V.
    pub vocab: u32,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// Longest sequence in tokens.
    pub max_context: u32,
}

/// A known checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct KnownModel {
    /// Repository on the hub.
    pub name: &'static str,
    /// Its shape.
    pub shape: Shape,
}

const LLAMA: &str = "LlamaForCausalLM";
const QWEN3: &str = "Qwen3ForCausalLM";
const QWEN2: &str = "Qwen2ForCausalLM";
const MISTRAL: &str = "MistralForCausalLM";

const TIED: bool = true;
const UNTIED: bool = false;

/// In the order of config.json: layers, H, F, Q, K, D, V, tied, context.
#[expect(clippy::too_many_arguments, reason = "one row of a table")]
const fn shape(
    architecture: &'static str,
    n_layers: u32,
    hidden: u32,
    ffn: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    vocab: u32,
    tied: bool,
    max_context: u32,
) -> Shape {
    Shape { architecture, n_layers, hidden, ffn, n_heads, n_kv_heads, head_dim, vocab, tied, max_context }
}

#[rustfmt::skip]
const TABLE: &[(Shape, &[&str])] = &[
    (shape(LLAMA, 30, 576, 1536, 9, 3, 64, 49152, TIED, 8192),
        &["HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"]),
    (shape(LLAMA, 32, 960, 2560, 15, 5, 64, 49152, TIED, 8192),
        &["HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct"]),
    (shape(LLAMA, 24, 2048, 8192, 32, 32, 64, 49152, TIED, 8192),
        &["HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct"]),
    (shape(LLAMA, 30, 576, 1536, 9, 3, 64, 49152, TIED, 2048),
        &["HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM-135M-Instruct"]),
    (shape(LLAMA, 32, 960, 2560, 15, 5, 64, 49152, TIED, 2048),
        &["HuggingFaceTB/SmolLM-360M", "HuggingFaceTB/SmolLM-360M-Instruct"]),
    (shape(LLAMA, 24, 2048, 8192, 32, 32, 64, 49152, TIED, 2048),
        &["HuggingFaceTB/SmolLM-1.7B", "HuggingFaceTB/SmolLM-1.7B-Instruct"]),
    (shape(LLAMA, 22, 2048, 5632, 32, 4, 64, 32000, UNTIED, 2048),
        &["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]),
    (shape(LLAMA, 16, 2048, 8192, 32, 8, 64, 128_256, TIED, 131_072),
        &["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"]),
    (shape(LLAMA, 28, 3072, 8192, 24, 8, 128, 128_256, TIED, 131_072),
        &["meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"]),
    (shape(LLAMA, 32, 4096, 14336, 32, 8, 128, 128_256, UNTIED, 131_072),
        &["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "NousResearch/Hermes-3-Llama-3.1-8B",
          "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]),
    (shape(LLAMA, 80, 8192, 28672, 64, 8, 128, 128_256, UNTIED, 131_072),
        &["meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct",
          "NousResearch/Hermes-3-Llama-3.1-70B", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B"]),
    (shape(LLAMA, 126, 16384, 53248, 128, 8, 128, 128_256, UNTIED, 131_072),
        &["meta-llama/Llama-3.1-405B", "meta-llama/Llama-3.1-405B-Instruct"]),
    (shape(LLAMA, 32, 4096, 14336, 32, 8, 128, 128_256, UNTIED, 8192),
        &["meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"]),
    (shape(LLAMA, 80, 8192, 28672, 64, 8, 128, 128_256, UNTIED, 8192),
        &["meta-llama/Meta-Llama-3-70B", "meta-llama/Meta-Llama-3-70B-Instruct"]),
    (shape(LLAMA, 32, 4096, 11008, 32, 32, 128, 32000, UNTIED, 4096),
        &["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", "lmsys/vicuna-7b-v1.5"]),
    (shape(LLAMA, 40, 5120, 13824, 40, 40, 128, 32000, UNTIED, 4096),
        &["meta-llama/Llama-2-13b-hf", "meta-llama/Llama-2-13b-chat-hf", "lmsys/vicuna-13b-v1.5"]),
    (shape(LLAMA, 80, 8192, 28672, 64, 8, 128, 32000, UNTIED, 4096),
        &["meta-llama/Llama-2-70b-hf", "meta-llama/Llama-2-70b-chat-hf"]),
    (shape(LLAMA, 32, 4096, 11008, 32, 4, 128, 64000, UNTIED, 4096),
        &["01-ai/Yi-1.5-6B", "01-ai/Yi-1.5-6B-Chat"]),
    (shape(LLAMA, 48, 4096, 11008, 32, 4, 128, 64000, UNTIED, 4096),
        &["01-ai/Yi-1.5-9B", "01-ai/Yi-1.5-9B-Chat"]),
    (shape(LLAMA, 24, 2048, 5504, 16, 16, 128, 32256, UNTIED, 16384),
        &["deepseek-ai/deepseek-coder-1.3b-base", "deepseek-ai/deepseek-coder-1.3b-instruct"]),
    (shape(LLAMA, 32, 4096, 11008, 32, 32, 128, 32256, UNTIED, 16384),
        &["deepseek-ai/deepseek-coder-6.7b-base", "deepseek-ai/deepseek-coder-6.7b-instruct"]),
    (shape(QWEN3, 28, 1024, 3072, 16, 8, 128, 151_936, TIED, 40960), &["Qwen/Qwen3-0.6B"]),
    (shape(QWEN3, 28, 1024, 3072, 16, 8, 128, 151_936, TIED, 32768), &["Qwen/Qwen3-0.6B-Base"]),
    (shape(QWEN3, 28, 2048, 6144, 16, 8, 128, 151_936, TIED, 40960), &["Qwen/Qwen3-1.7B"]),
    (shape(QWEN3, 28, 2048, 6144, 16, 8, 128, 151_936, TIED, 32768), &["Qwen/Qwen3-1.7B-Base"]),
    (shape(QWEN3, 36, 2560, 9728, 32, 8, 128, 151_936, TIED, 40960), &["Qwen/Qwen3-4B"]),
    (shape(QWEN3, 36, 2560, 9728, 32, 8, 128, 151_936, TIED, 32768), &["Qwen/Qwen3-4B-Base"]),
    (shape(QWEN3, 36, 2560, 9728, 32, 8, 128, 151_936, TIED, 262_144),
        &["Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"]),
    (shape(QWEN3, 36, 4096, 12288, 32, 8, 128, 151_936, UNTIED, 40960), &["Qwen/Qwen3-8B"]),
    (shape(QWEN3, 36, 4096, 12288, 32, 8, 128, 151_936, UNTIED, 32768), &["Qwen/Qwen3-8B-Base"]),
    (shape(QWEN3, 40, 5120, 17408, 40, 8, 128, 151_936, UNTIED, 40960),
        &["Qwen/Qwen3-14B", "NousResearch/Hermes-4-14B"]),
    (shape(QWEN3, 40, 5120, 17408, 40, 8, 128, 151_936, UNTIED, 32768), &["Qwen/Qwen3-14B-Base"]),
    (shape(QWEN3, 64, 5120, 25600, 64, 8, 128, 151_936, UNTIED, 40960), &["Qwen/Qwen3-32B"]),
    (shape(QWEN2, 24, 896, 4864, 14, 2, 64, 151_936, TIED, 32768),
        &["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"]),
    (shape(QWEN2, 28, 1536, 8960, 12, 2, 128, 151_936, TIED, 32768), &["Qwen/Qwen2.5-1.5B-Instruct"]),
    (shape(QWEN2, 28, 3584, 18944, 28, 4, 128, 152_064, UNTIED, 32768), &["Qwen/Qwen2.5-7B-Instruct"]),
    (shape(MISTRAL, 32, 4096, 14336, 32, 8, 128, 32768, UNTIED, 32768),
        &["mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"]),
];

/// All known checkpoints, family by family.
pub fn known() -> impl Iterator<Item = KnownModel> {
    TABLE.iter().flat_map(|(shape, names)| names.iter().map(|name| KnownModel { name, shape: *shape }))
}

/// A known checkpoint by its repository, upper and lower case alike.
pub fn find(name: &str) -> Option<KnownModel> {
    known().find(|m| m.name.eq_ignore_ascii_case(name))
}

impl KnownModel {
    /// The family whose forward pass runs it; `None` when this version has none.
    pub fn family(&self) -> Option<Family> {
        Family::from_architecture(self.shape.architecture).ok()
    }

    /// Whether this version runs it.
    pub fn supported(&self) -> bool {
        self.family().is_some()
    }
}

impl Shape {
    /// Weights of the linear layers of one decoder layer.
    fn layer_weights(&self) -> u64 {
        let [h, f, q, k, d] =
            [self.hidden, self.ffn, self.n_heads, self.n_kv_heads, self.head_dim].map(u64::from);
        2 * h * q * d + 2 * h * k * d + 3 * h * f
    }

    /// Norm weights and biases of one layer.
    fn layer_vectors(&self) -> u64 {
        let [h, q, k, d] = [self.hidden, self.n_heads, self.n_kv_heads, self.head_dim].map(u64::from);
        let special = match self.architecture {
            QWEN3 => 2 * d,
            QWEN2 => (q + 2 * k) * d,
            _ => 0,
        };
        2 * h + special
    }

    fn table(&self) -> u64 {
        u64::from(self.vocab) * u64::from(self.hidden)
    }

    fn n_tables(&self) -> u64 {
        if self.tied { 1 } else { 2 }
    }

    /// Parameters; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let layer = self.layer_weights() + self.layer_vectors();
        u64::from(self.n_layers) * layer + self.n_tables() * self.table() + u64::from(self.hidden)
    }

    /// Bytes of all weights in memory.
    pub fn weight_bytes(&self, dtype: WeightDtype) -> u64 {
        let tables = if dtype == WeightDtype::Q4_0 { WeightDtype::Q8_0 } else { dtype };
        let vectors = u64::from(self.n_layers) * self.layer_vectors() + u64::from(self.hidden);
        dtype.bytes(u64::from(self.n_layers) * self.layer_weights())
            + tables.bytes(self.n_tables() * self.table())
            + 4 * vectors
    }

    /// Bytes of keys and values (f32) of `tokens` tokens.
    pub fn kv_bytes(&self, tokens: u64) -> u64 {
        let row = 2 * u64::from(self.n_kv_heads) * u64::from(self.head_dim) * 4;
        u64::from(self.n_layers) * row * tokens
    }

    /// Memory to run the whole model with `tokens` tokens in the key-value store, in bytes.
    pub fn memory_bytes(&self, dtype: WeightDtype, tokens: u64) -> u64 {
        self.weight_bytes(dtype) + self.kv_bytes(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            ("mistralai/Mistral-7B-v0.3", 7248.0),
        ] {
            let got = find(name).unwrap().shape.parameters() as f64 / 1e6;
            assert!((got / millions - 1.0).abs() < 1e-3, "{name}: {got:.1} million, published {millions}");
        }
    }

    #[test]
    fn names_are_unique_and_enough() {
        let names: std::collections::BTreeSet<&str> = known().map(|m| m.name).collect();
        assert_eq!(names.len(), known().count());
        assert!(known().filter(KnownModel::supported).count() >= 40);
        assert!(known().any(|m| !m.supported()));
        assert!(find("qwen/qwen3-8b").is_some_and(|m| m.family() == Some(Family::Qwen3)));
    }

    #[test]
    fn memory_counts_weights_and_keys() {
        let shape = find("HuggingFaceTB/SmolLM2-135M").unwrap().shape;
        assert_eq!(shape.kv_bytes(1), 30 * 2 * 3 * 64 * 4);
        let q8 = shape.memory_bytes(WeightDtype::Q8_0, 0);
        assert!((142_000_000..144_000_000).contains(&q8), "{q8}");
        assert!(shape.memory_bytes(WeightDtype::Q4_0, 1024) < shape.memory_bytes(WeightDtype::Q8_0, 1024));
    }
}
