//! The leaves of a training run: read from a checkpoint, or drawn from a seed.

use burn::tensor::{Device, Tensor, TensorData};

use super::invalid;
use crate::{
    adapter::MODULES,
    config::ModelConfig,
    error::LoadError,
    load::{self, layer_name},
    weights::WeightIndex,
};

/// A new adapter to train.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Inner width.
    pub rank: usize,
    /// Numerator of the scale alpha / rank.
    pub alpha: f32,
    /// Modules of every layer that get one, e.g. `q_proj`; empty means all seven.
    pub targets: Vec<String>,
    /// Seed of A's initial values; B starts at zero.
    pub seed: u64,
}

type Leaves = Vec<(String, Tensor<2>)>;

/// A full parameter: its name, its rows by HF tensor, its columns. Norms have one row.
pub(super) struct Parameter {
    pub(super) name: String,
    pub(super) parts: Vec<(String, usize)>,
    pub(super) columns: usize,
    pub(super) is_norm: bool,
}

/// All weights of a model, in the order in which the forward pass takes them.
pub(super) fn full_parameters(c: &ModelConfig) -> Vec<Parameter> {
    let matrix = |name: &str, parts: Vec<(String, usize)>, columns| Parameter {
        name: name.to_owned(),
        parts,
        columns,
        is_norm: false,
    };
    let norm =
        |name: String, hf: String, n| Parameter { name, parts: vec![(hf, 1)], columns: n, is_norm: true };
    let mut out = vec![matrix("embed_tokens", vec![(load::EMBEDDING.to_owned(), c.vocab)], c.hidden)];
    for i in 0..c.n_layers {
        let hf = |module: &str| layer_name(i, module);
        let name = |module: &str| format!("layers.{i}.{module}");
        out.push(norm(name("input_norm"), hf("input_layernorm"), c.hidden));
        let qkv = vec![
            (hf("self_attn.q_proj"), c.q_width()),
            (hf("self_attn.k_proj"), c.kv_width()),
            (hf("self_attn.v_proj"), c.kv_width()),
        ];
        out.push(matrix(&name("qkv_proj"), qkv, c.hidden));
        if c.family.has_head_norms() {
            out.push(norm(name("q_norm"), hf("self_attn.q_norm"), c.head_dim));
            out.push(norm(name("k_norm"), hf("self_attn.k_norm"), c.head_dim));
        }
        out.push(matrix(&name("o_proj"), vec![(hf("self_attn.o_proj"), c.hidden)], c.q_width()));
        out.push(norm(name("post_norm"), hf("post_attention_layernorm"), c.hidden));
        let gate_up = vec![(hf("mlp.gate_proj"), c.ffn), (hf("mlp.up_proj"), c.ffn)];
        out.push(matrix(&name("gate_up_proj"), gate_up, c.hidden));
        out.push(matrix(&name("down_proj"), vec![(hf("mlp.down_proj"), c.hidden)], c.ffn));
    }
    out.push(norm("norm".to_owned(), load::FINAL_NORM.to_owned(), c.hidden));
    if !c.tied_embeddings {
        out.push(matrix("lm_head", vec![(load::HEAD.to_owned(), c.vocab)], c.hidden));
    }
    out
}

fn leaf(values: Vec<f32>, columns: usize, device: &Device) -> Tensor<2> {
    let shape = [values.len() / columns, columns];
    Tensor::from_data(TensorData::new(values, shape), device).require_grad()
}

pub(super) fn read_parameters(
    index: &WeightIndex,
    config: &ModelConfig,
    device: &Device,
) -> Result<Leaves, LoadError> {
    let mut leaves = Vec::new();
    for p in full_parameters(config) {
        let mut values = Vec::new();
        for (name, rows) in &p.parts {
            let shape = if p.is_norm { vec![p.columns] } else { vec![*rows, p.columns] };
            values.extend(index.read_shaped(name, &shape)?);
        }
        leaves.push((p.name, leaf(values, p.columns, device)));
    }
    Ok(leaves)
}

/// SplitMix64 (Steele, Lea, Flood 2014): one well mixed number per counter.
#[derive(Clone, Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0..1.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// Standard deviation of new weights.
const INIT_STD: f64 = 0.02;

pub(super) fn random_parameters(config: &ModelConfig, seed: u64, device: &Device) -> Leaves {
    let mut rng = SplitMix(seed);
    let residual = (2.0 * config.n_layers as f64).sqrt().recip();
    full_parameters(config)
        .into_iter()
        .map(|p| {
            let n = p.columns * p.parts.iter().map(|(_, rows)| rows).sum::<usize>();
            let std = if p.name.ends_with("o_proj") || p.name.ends_with("down_proj") {
                INIT_STD * residual
            } else {
                INIT_STD
            };
            let values =
                if p.is_norm { vec![1.0; n] } else { (0..n).map(|_| (rng.normal() * std) as f32).collect() };
            (p.name, leaf(values, p.columns, device))
        })
        .collect()
}

/// Modules in the order of [`crate::Adapter::tensors`], and their A and B: A uniform within
/// ±1 / sqrt(inputs) as PEFT draws it, B zero.
pub(super) fn lora_parameters(
    lora: &LoraConfig,
    config: &ModelConfig,
    device: &Device,
) -> Result<(Vec<String>, Leaves), LoadError> {
    if lora.rank == 0 || lora.rank > config.hidden || !lora.alpha.is_finite() {
        let value = format!("rank {}, alpha {}", lora.rank, lora.alpha);
        return Err(invalid("lora", value, "rank must be within 1..=hidden, alpha finite"));
    }
    let targets: Vec<&str> = if lora.targets.is_empty() {
        MODULES.to_vec()
    } else {
        lora.targets.iter().map(String::as_str).collect()
    };
    let mut shapes = std::collections::BTreeMap::new();
    for target in &targets {
        let shape = load::lora_shape(config, target)?;
        for layer in 0..config.n_layers {
            shapes.insert(format!("layers.{layer}.{target}"), shape);
        }
    }
    let mut rng = SplitMix(lora.seed);
    let (mut modules, mut leaves) = (Vec::new(), Vec::new());
    for (module, (inputs, outputs)) in shapes {
        let bound = (inputs as f64).sqrt().recip();
        let a = (0..lora.rank * inputs).map(|_| ((2.0 * rng.uniform() - 1.0) * bound) as f32).collect();
        leaves.push((format!("{module}.lora_a"), leaf(a, inputs, device)));
        leaves.push((format!("{module}.lora_b"), leaf(vec![0.0; outputs * lora.rank], lora.rank, device)));
        modules.push(module);
    }
    Ok((modules, leaves))
}
