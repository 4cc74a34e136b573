//! The shape of a model, from an HF config.json or from GGUF metadata; validated once, trusted afterwards.
//!
//! Both sources end in the same [`ModelConfig`]; everything behind it never asks which file it came from.

mod from_gguf;
mod from_hf;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{error::ConfigError, options::WeightDtype};

/// Families with a forward pass here. What is special about each is in `family/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2 and 3, SmolLM2, TinyLlama and everything else of that shape.
    Llama,
    /// Qwen3 dense: Llama with an RMS norm on each query and key head.
    Qwen3,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Llama, Self::Qwen3];

    /// `model_type` in config.json, `general.architecture` in GGUF.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Class name in config.json.
    pub fn hf_class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The family of an architecture name in either notation.
    ///
    /// # Errors
    /// The architecture is not supported; the message lists those that are.
    pub fn from_architecture(architecture: &str) -> Result<Self, ConfigError> {
        Self::ALL.into_iter().find(|f| f.name() == architecture || f.hf_class() == architecture).ok_or_else(
            || ConfigError::UnknownArchitecture {
                architecture: architecture.to_owned(),
                supported: Self::ALL.map(|f| format!("{} ({})", f.name(), f.hf_class())).join(", "),
            },
        )
    }

    /// Whether queries and keys are normalised per head before rotation.
    pub fn has_head_norms(self) -> bool {
        matches!(self, Self::Qwen3)
    }
}

/// How rotary frequencies are stretched past the length a model was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum RopeScaling {
    /// All positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1's: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context before stretching, in tokens.
        original_context: usize,
    },
    /// One divisor per frequency, as GGUF files carry them (`rope_freqs.weight`). [D / 2]
    Factors(Vec<f32>),
}

impl RopeScaling {
    /// The divisor of each of the `head_dim / 2` frequencies.
    pub fn factors(&self, head_dim: usize, theta: f32) -> Vec<f32> {
        let half = head_dim / 2;
        match self {
            Self::Linear { factor } => vec![*factor; half],
            Self::Factors(factors) => factors.clone(),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let context = *original_context as f64;
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let factor = f64::from(*factor);
                (0..half)
                    .map(|i| {
                        let inv = f64::from(theta).powf(-((2 * i) as f64) / head_dim as f64);
                        let wavelength = std::f64::consts::TAU / inv;
                        if wavelength < context / high {
                            1.0
                        } else if wavelength > context / low {
                            factor as f32
                        } else {
                            let smooth = (context / wavelength - low) / (high - low);
                            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                        }
                    })
                    .collect()
            }
        }
    }
}

/// The shape of a model. Field letters as everywhere: H hidden, Q query heads, K key-value heads, D head
/// dimension, V vocabulary, F feed-forward width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Which forward pass.
    pub family: Family,
    /// Decoder layers.
    pub n_layers: usize,
    /// H.
    pub hidden: usize,
    /// F.
    pub ffn: usize,
    /// Q.
    pub n_heads: usize,
    /// K.
    pub n_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// V.
    pub vocab: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Added to the mean square in RMS norms.
    pub rms_eps: f32,
    /// Whether the output head is the embedding table.
    pub tied_embeddings: bool,
    /// Longest sequence, in tokens.
    pub max_context: usize,
    /// Begin-of-text token.
    pub bos: Option<u32>,
    /// Tokens that end a text; may be several.
    pub eos: Vec<u32>,
}

/// Upper bounds that keep sizes computed from a hostile file small enough to multiply.
const MAX_DIM: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 12;
const MAX_CONTEXT: usize = 1 << 24;

impl ModelConfig {
    /// Reads the text of a config.json.
    ///
    /// # Errors
    /// Not JSON, an unsupported architecture, a missing or impossible field.
    pub fn from_hf_json(text: &str) -> Result<Self, ConfigError> {
        from_hf::parse(text)
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// An unsupported architecture, a missing or impossible field.
    pub fn from_gguf(file: &crate::weights::gguf::GgufFile) -> Result<Self, ConfigError> {
        from_gguf::parse(file)
    }

    /// The config.json that describes this model.
    pub fn to_hf_json(&self) -> serde_json::Value {
        from_hf::write(self)
    }

    /// Checks every number against the others.
    ///
    /// # Errors
    /// The first field that cannot be right.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let bad = |field: &str, value: String, reason: &str| {
            Err(ConfigError::Invalid { field: field.to_owned(), value, reason: reason.to_owned() })
        };
        let sizes = [
            ("n_layers", self.n_layers, MAX_LAYERS),
            ("hidden", self.hidden, MAX_DIM),
            ("ffn", self.ffn, MAX_DIM),
            ("n_heads", self.n_heads, MAX_DIM),
            ("n_kv_heads", self.n_kv_heads, MAX_DIM),
            ("head_dim", self.head_dim, MAX_DIM),
            ("vocab", self.vocab, MAX_DIM * 4),
            ("max_context", self.max_context, MAX_CONTEXT),
        ];
        for (name, value, max) in sizes {
            if value == 0 || value > max {
                return bad(name, value.to_string(), &format!("it must be within 1..={max}"));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            return bad(
                "n_kv_heads",
                self.n_kv_heads.to_string(),
                "it must divide the number of query heads",
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad("head_dim", self.head_dim.to_string(), "rotation works on pairs, it must be even");
        }
        if self.n_heads.saturating_mul(self.head_dim) > MAX_DIM {
            return bad("head_dim", self.head_dim.to_string(), "query width is out of range");
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return bad("rope_theta", self.rope_theta.to_string(), "it must be finite and above 1");
        }
        if !(self.rms_eps.is_finite() && self.rms_eps > 0.0 && self.rms_eps < 1.0) {
            return bad("rms_eps", self.rms_eps.to_string(), "it must be within 0..1");
        }
        match &self.rope_scaling {
            Some(RopeScaling::Linear { factor }) if !(factor.is_finite() && *factor > 0.0) => {
                return bad("rope_scaling.factor", factor.to_string(), "it must be positive");
            }
            Some(RopeScaling::Factors(f)) if f.len() != self.head_dim / 2 => {
                return bad("rope factors", f.len().to_string(), "one per pair of the head dimension");
            }
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context })
                if !(*factor > 0.0
                    && *low_freq_factor > 0.0
                    && high_freq_factor > low_freq_factor
                    && *original_context > 0) =>
            {
                return bad(
                    "rope_scaling",
                    format!("{:?}", self.rope_scaling),
                    "factors must be positive and ordered",
                );
            }
            _ => {}
        }
        for id in self.eos.iter().chain(self.bos.iter()) {
            if *id as usize >= self.vocab {
                return bad("bos/eos token", id.to_string(), "it is outside the vocabulary");
            }
        }
        Ok(())
    }

    /// Width of the queries: Q * D.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of the keys, and of the values: K * D.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Parameters of one decoder layer.
    pub fn layer_parameters(&self) -> u64 {
        let (h, f) = (self.hidden as u64, self.ffn as u64);
        let (q, kv) = (self.q_width() as u64, self.kv_width() as u64);
        let head_norms = if self.family.has_head_norms() { 2 * self.head_dim as u64 } else { 0 };
        h * q * 2 + h * kv * 2 + 3 * h * f + 2 * h + head_norms
    }

    /// Parameters of the whole model; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let table = self.vocab as u64 * self.hidden as u64;
        let tables = if self.tied_embeddings { table } else { 2 * table };
        self.layer_parameters() * self.n_layers as u64 + tables + self.hidden as u64
    }

    /// Bytes of one decoder layer in memory.
    pub fn layer_bytes(&self, dtype: WeightDtype) -> u64 {
        dtype.bytes(self.layer_parameters())
    }

    /// Bytes of the embedding table, or of the head; a tied head is the table itself. Four-bit weights keep
    /// the tables at eight.
    pub fn table_bytes(&self, dtype: WeightDtype) -> u64 {
        let dtype = if dtype == WeightDtype::Q4_0 { WeightDtype::Q8_0 } else { dtype };
        dtype.bytes(self.vocab as u64 * self.hidden as u64)
    }

    /// Bytes of a stage of these layers, tables included where it needs them.
    pub fn stage_bytes(&self, layers: &Range<usize>, dtype: WeightDtype) -> u64 {
        let (first, last) = (layers.start == 0, layers.end >= self.n_layers);
        let tables = match (first, last) {
            (true, true) if self.tied_embeddings => 1,
            _ => u64::from(first) + u64::from(last),
        };
        layers.len() as u64 * self.layer_bytes(dtype) + tables * self.table_bytes(dtype)
    }

    /// Key-value bytes of one token in one layer, stored as f32.
    pub fn kv_bytes_per_token_layer(&self) -> u64 {
        2 * self.kv_width() as u64 * 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_short_waves_and_divides_long_ones() {
        let s = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let f = s.factors(128, 500_000.0);
        assert_eq!((f[0], f[63]), (1.0, 8.0));
        assert!(f.windows(2).all(|w| w[0] <= w[1]));
        assert!(f.iter().any(|x| *x > 1.0 && *x < 8.0));
    }

    #[test]
    fn unknown_architecture_is_named_with_the_supported_ones() {
        let text =
            ModelConfig::from_hf_json(r#"{"architectures":["MambaForCausalLM"],"model_type":"mamba"}"#)
                .unwrap_err()
                .to_string();
        assert!(
            text.contains("MambaForCausalLM") && text.contains("llama") && text.contains("qwen3"),
            "{text}"
        );
    }
}
