//! The shape of a model as data: read once from config.json or GGUF metadata, validated, trusted afterwards.
//!
//! Both sources end in the same [`ModelConfig`]; everything behind it never asks which file it came from. GGUF
//! metadata is first written as the config.json that it stands for, so that each architecture (`arch/`) reads one
//! notation only.

mod delta;
pub(crate) mod experts;
pub(crate) mod fields;
pub(crate) mod from_gguf;
mod latent;
mod layer;
mod rope;

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use delta::{DeltaNet, DeltaProjections, DeltaShape};
pub use experts::{ExpertActivation, ExpertTensors, Experts, GroupScore, Router, RouterGroups, RouterScore};
pub use latent::Latent;
pub use layer::{
    Activation, Attention, DenseMlp, HeadNorms, HeadSpan, LayerConfig, Mixer, Mlp, Norm, NormKind, Norms,
    Projection,
};
pub use rope::{Rope, RopeScaling};

use crate::{
    arch,
    error::ConfigError,
    options::{KvFormat, WeightDtype},
};
use fields::{Fields, invalid};

/// Families with a forward pass here. What is special about each is in `arch/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2 and 3, SmolLM2, TinyLlama and everything else of that shape.
    Llama,
    /// SmolLM3: Llama with layers that have no positions.
    SmolLm3,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: Llama with biases.
    Qwen2,
    /// Qwen3 dense: Llama with an RMS norm on each query and key head.
    Qwen3,
    /// Gemma 2.
    Gemma2,
    /// Gemma 3, text.
    Gemma3,
    /// Phi-3, 3.5, 4.
    Phi3,
    /// GLM-4.
    Glm4,
    /// Mixtral: experts with a softmax router.
    Mixtral,
    /// Qwen3 with experts.
    Qwen3Moe,
    /// GPT-OSS: attention sinks, windows, clamped experts.
    GptOss,
    /// DeepSeek-V2: latent attention, shared experts.
    DeepseekV2,
    /// DeepSeek-V3 and R1, Kimi-K2: the same with a sigmoid router.
    DeepseekV3,
    /// GLM-4.5 to 4.7.
    Glm4Moe,
    /// MiniMax-M2.
    MiniMaxM2,
    /// Qwen3-Next: gated delta nets and gated attention.
    Qwen3Next,
    /// Qwen3.5 dense.
    Qwen35,
    /// Qwen3.5 with experts.
    Qwen35Moe,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Llama,
        Self::SmolLm3,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gemma2,
        Self::Gemma3,
        Self::Phi3,
        Self::Glm4,
        Self::Mixtral,
        Self::Qwen3Moe,
        Self::GptOss,
        Self::DeepseekV2,
        Self::DeepseekV3,
        Self::Glm4Moe,
        Self::MiniMaxM2,
        Self::Qwen3Next,
        Self::Qwen35,
        Self::Qwen35Moe,
    ];

    /// `model_type` in config.json.
    pub fn name(self) -> &'static str {
        arch::of(self).name
    }

    /// Class name in config.json.
    pub fn hf_class(self) -> &'static str {
        arch::of(self).classes[0]
    }

    /// The family of a class name or `model_type`.
    ///
    /// # Errors
    /// The architecture is not supported; the message lists those that are.
    pub fn from_architecture(architecture: &str) -> Result<Self, ConfigError> {
        Ok(arch::by_name(architecture)?.family)
    }
}

/// The shape of a model. Field letters as everywhere: H hidden, Q query heads, K key-value heads, D head
/// dimension, V vocabulary, F feed-forward width.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which architecture described it.
    pub family: Family,
    /// Decoder layers: the length of `layers`.
    pub n_layers: usize,
    /// H.
    pub hidden: usize,
    /// V.
    pub vocab: usize,
    /// The decoder layers.
    pub layers: Vec<LayerConfig>,
    /// Factor of the embedding rows.
    pub embedding_scale: f32,
    /// The norm behind the last layer; its name is a whole one.
    pub final_norm: Norm,
    /// Factor of the logits.
    pub logit_scale: f32,
    /// Logits become cap · tanh(logit / cap).
    pub logit_softcap: Option<f32>,
    /// Whether the output head is the embedding table.
    pub tied_embeddings: bool,
    /// Longest sequence, in tokens.
    pub max_context: usize,
    /// Begin-of-text token.
    pub bos: Option<u32>,
    /// Tokens that end a text; may be several.
    pub eos: Vec<u32>,
    /// The config.json it was read from, or that stands for the GGUF metadata.
    pub(crate) source: Value,
}

/// Upper bounds that keep sizes computed from a hostile file small enough to multiply.
const MAX_DIM: usize = 1 << 20;
pub(crate) const MAX_LAYERS: usize = 1 << 12;
const MAX_CONTEXT: usize = 1 << 24;

impl ModelConfig {
    /// Reads the text of a config.json.
    ///
    /// # Errors
    /// Not JSON, an unsupported architecture, a missing or impossible field.
    pub fn from_hf_json(text: &str) -> Result<Self, ConfigError> {
        let map: Map<String, Value> = serde_json::from_str(text)?;
        Self::from_map(&text_model(map))
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// An unsupported architecture, a missing or impossible field.
    pub fn from_gguf(file: &crate::weights::gguf::GgufFile) -> Result<Self, ConfigError> {
        Self::from_map(&from_gguf::fields(file)?)
    }

    fn from_map(map: &Map<String, Value>) -> Result<Self, ConfigError> {
        let class = map.get("architectures").and_then(|a| a.get(0)).or_else(|| map.get("model_type"));
        let class = class.and_then(Value::as_str);
        let class = class.ok_or_else(|| ConfigError::Missing { field: "architectures".to_owned() })?;
        let config = (arch::by_name(class)?.describe)(&Fields(map))?;
        config.validate()?;
        Ok(config)
    }

    /// The config.json that describes this model, with weights stored in f32.
    pub fn to_hf_json(&self) -> Value {
        let mut json = self.source.clone();
        let eos = if self.eos.len() == 1 { self.eos[0].into() } else { self.eos.clone().into() };
        for (name, value) in [
            ("tie_word_embeddings", Value::from(self.tied_embeddings)),
            ("bos_token_id", self.bos.into()),
            ("eos_token_id", eos),
            ("torch_dtype", "float32".into()),
        ] {
            json[name] = value;
        }
        if let Some(map) = json.as_object_mut() {
            map.remove("dtype");
            map.remove("quantization_config");
        }
        json
    }

    /// The same model run with its longest context, where that changes rotary frequencies (LongRoPE).
    ///
    /// # Errors
    /// The longest context is out of range.
    pub fn with_long_context(&self) -> Result<Self, ConfigError> {
        let Value::Object(mut map) = self.source.clone() else { return Ok(self.clone()) };
        if let Some(longest) = map.get("max_position_embeddings").cloned() {
            map.insert(fields::CONTEXT.to_owned(), longest);
        }
        let config = Self::from_map(&map)?;
        Ok(Self { eos: self.eos.clone(), tied_embeddings: self.tied_embeddings, ..config })
    }

    /// Checks every number against the others.
    ///
    /// # Errors
    /// The first field that cannot be right.
    pub fn validate(&self) -> Result<(), ConfigError> {
        size("num_hidden_layers", self.n_layers, MAX_LAYERS)?;
        size("hidden_size", self.hidden, MAX_DIM)?;
        size("vocab_size", self.vocab, MAX_DIM * 4)?;
        size("max_position_embeddings", self.max_context, MAX_CONTEXT)?;
        if self.layers.len() != self.n_layers {
            return Err(invalid("layers", self.layers.len(), "there must be n_layers of them"));
        }
        for layer in &self.layers {
            validate_layer(layer)?;
        }
        validate_norm(&self.final_norm)?;
        for (name, value) in [
            ("embedding scale", self.embedding_scale),
            ("logit scale", self.logit_scale),
            ("logit softcap", self.logit_softcap.unwrap_or(1.0)),
        ] {
            positive(name, value)?;
        }
        for id in self.eos.iter().chain(self.bos.iter()) {
            if *id as usize >= self.vocab {
                return Err(invalid("bos/eos token", id, "it is outside the vocabulary"));
            }
        }
        Ok(())
    }

    /// Whether all layers run along the composed route and on GPUs.
    pub(crate) fn runs_composed(&self) -> bool {
        !self.layers.iter().any(LayerConfig::is_kernels_only)
    }

    /// Whether some layer keeps a state per sequence instead of something per token.
    pub fn is_recurrent(&self) -> bool {
        self.layers.iter().any(LayerConfig::is_recurrent)
    }

    /// Whether all layers have gradients.
    pub fn trains(&self) -> bool {
        self.runs_composed()
    }

    /// Parameters of the largest decoder layer.
    pub fn layer_parameters(&self) -> u64 {
        self.layers.iter().map(|l| self.parameters_of(l)).max().unwrap_or(0)
    }

    fn parameters_of(&self, layer: &LayerConfig) -> u64 {
        layer.matrix_parameters(self.hidden) + layer.vector_parameters(self.hidden)
    }

    /// Parameters of the whole model; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let table = self.vocab as u64 * self.hidden as u64;
        let tables = if self.tied_embeddings { table } else { 2 * table };
        self.layers.iter().map(|l| self.parameters_of(l)).sum::<u64>() + tables + self.hidden as u64
    }

    /// Bytes of the largest decoder layer in memory.
    pub fn layer_bytes(&self, dtype: WeightDtype) -> u64 {
        dtype.bytes(self.layer_parameters())
    }

    /// Bytes of the embedding table, or of the head; a tied head is the table itself. Weights of fewer
    /// bits than eight keep the tables at eight.
    pub fn table_bytes(&self, dtype: WeightDtype) -> u64 {
        dtype.table().bytes(self.vocab as u64 * self.hidden as u64)
    }

    /// Bytes of a stage of these layers, tables included where it needs them.
    pub fn stage_bytes(&self, layers: &Range<usize>, dtype: WeightDtype) -> u64 {
        let (first, last) = (layers.start == 0, layers.end >= self.n_layers);
        let tables = match (first, last) {
            (true, true) if self.tied_embeddings => 1,
            _ => u64::from(first) + u64::from(last),
        };
        let held = self.layers.get(layers.start..layers.end.min(self.n_layers)).unwrap_or_default();
        held.iter().map(|l| dtype.bytes(self.parameters_of(l))).sum::<u64>()
            + tables * self.table_bytes(dtype)
    }

    /// Key-value bytes of `tokens` tokens in all layers.
    pub fn kv_bytes(&self, tokens: u64, format: KvFormat) -> u64 {
        self.layers.iter().map(|l| l.stored_bytes_per_token(format)).sum::<usize>() as u64 * tokens
    }

    /// Recurrent states beside a key-value store for `tokens` tokens: they take as many bytes in a layer as keys and values do in
    /// the layer that stores most, but there are sixteen in any case and 4096 at most. None where no layer is recurrent.
    pub fn state_slots(&self, tokens: u64, format: KvFormat) -> usize {
        let state = self.state_bytes();
        if state == 0 {
            return 0;
        }
        let bytes = self.kv_bytes_per_token_layer(format).saturating_mul(tokens);
        usize::try_from(bytes / state).unwrap_or(usize::MAX).clamp(MIN_STATES, MAX_STATES)
    }

    /// Bytes of a recurrent state in the layer whose is largest; 0 where no layer is recurrent.
    fn state_bytes(&self) -> u64 {
        self.layers.iter().map(LayerConfig::state_bytes).max().unwrap_or(0)
    }

    /// Bytes of a cache for `tokens` tokens, by token, in the layer that takes most: keys and values, or the least number of
    /// recurrent states where those are more.
    pub fn cache_bytes_per_token_layer(&self, tokens: u64, format: KvFormat) -> u64 {
        let states = self.state_bytes().saturating_mul(self.state_slots(tokens, format) as u64);
        self.kv_bytes_per_token_layer(format).max(states.div_ceil(tokens.max(1)))
    }

    /// Key-value bytes of one token in the layer that stores most.
    pub fn kv_bytes_per_token_layer(&self, format: KvFormat) -> u64 {
        self.layers.iter().map(|l| l.stored_bytes_per_token(format)).max().unwrap_or(0) as u64
    }
}

/// Recurrent states of the smallest store.
const MIN_STATES: usize = 16;
/// Recurrent states of the largest.
const MAX_STATES: usize = 4096;

/// The language model of a config.json that nests it beside a vision or audio tower.
fn text_model(mut map: Map<String, Value>) -> Map<String, Value> {
    let Some(Value::Object(text)) = map.remove("text_config") else { return map };
    map.retain(|name, _| !name.ends_with("_config"));
    let class = map.get("architectures").cloned();
    map.extend(text);
    // The outer class is the one that the checkpoint names its tensors by.
    map.extend(class.map(|class| ("architectures".to_owned(), class)));
    map
}

fn size(name: &str, value: usize, max: usize) -> Result<(), ConfigError> {
    if value == 0 || value > max {
        return Err(invalid(name, value, &format!("it must be within 1..={max}")));
    }
    Ok(())
}

fn positive(name: &str, value: f32) -> Result<(), ConfigError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(invalid(name, value, "it must be positive"))
}

fn validate_norm(norm: &Norm) -> Result<(), ConfigError> {
    if norm.eps.is_finite() && norm.eps > 0.0 && norm.eps < 1.0 {
        return Ok(());
    }
    Err(invalid("rms_norm_eps", norm.eps, "it must be within 0..1"))
}

fn validate_layer(layer: &LayerConfig) -> Result<(), ConfigError> {
    let norms = [&layer.mixer_norms, &layer.mlp_norms].into_iter().flat_map(|n| [n.before, n.after]);
    norms.flatten().try_for_each(|norm| validate_norm(&norm))?;
    positive("residual scale", layer.residual_scale)?;
    match &layer.mixer {
        Mixer::Attention(attention) => validate_attention(attention)?,
        Mixer::Latent(latent) => {
            latent.validate()?;
            validate_rope(&latent.rope, latent.rope_dim)?;
        }
        Mixer::Delta(delta) => delta.validate()?,
    }
    match &layer.mlp {
        Mlp::Dense(mlp) => size("intermediate_size", mlp.ffn, MAX_DIM),
        Mlp::Experts(experts) => experts.validate(),
    }
}

fn validate_attention(a: &Attention) -> Result<(), ConfigError> {
    size("num_attention_heads", a.n_heads, MAX_DIM)?;
    size("num_key_value_heads", a.n_kv_heads, MAX_DIM)?;
    size("head_dim", a.head_dim, MAX_DIM)?;
    if !a.n_heads.is_multiple_of(a.n_kv_heads) {
        return Err(invalid("num_key_value_heads", a.n_kv_heads, "it must divide the number of query heads"));
    }
    if a.n_heads.saturating_mul(a.head_dim) > MAX_DIM {
        return Err(invalid("head_dim", a.head_dim, "query width is out of range"));
    }
    positive("attention scale", a.scale)?;
    positive("attention softcap", a.softcap.unwrap_or(1.0))?;
    size("sliding_window", a.window.unwrap_or(1), MAX_CONTEXT)?;
    let norms = a.head_norms.into_iter().flat_map(|n| [n.q, n.k]);
    norms.into_iter().try_for_each(|norm| validate_norm(&norm))?;
    if a.gated && a.qkv.bias {
        return Err(invalid("attention_bias", true, "gated attention is supported only without it"));
    }
    a.rope.as_ref().map_or(Ok(()), |rope| validate_rope(rope, a.head_dim))
}

fn validate_rope(rope: &Rope, head_dim: usize) -> Result<(), ConfigError> {
    if rope.dims == 0 || !rope.dims.is_multiple_of(2) || rope.dims > head_dim {
        let reason = "rotation works on pairs: the rotated part must be even and within the head";
        return Err(invalid("head_dim", format!("{} of {head_dim}", rope.dims), reason));
    }
    if !(rope.theta.is_finite() && rope.theta > 1.0) {
        return Err(invalid("rope_theta", rope.theta, "it must be finite and above 1"));
    }
    match rope.scaling.as_ref().and_then(|s| s.fault(rope.dims)) {
        Some(fault) => Err(invalid("rope_scaling", format!("{:?}", rope.scaling), fault)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
