//! The leaves of a training run: read from a checkpoint, or drawn from a seed.

use burn::tensor::{Device, Tensor, TensorData};

use super::invalid;
use crate::{
    adapter::modules::{self, module_shape},
    config::{Attention, HeadSpan, LayerConfig, Mixer, Mlp, ModelConfig, Norm, NormKind, Projection},
    error::LoadError,
    load,
    options::BaseDtype,
    weights::WeightIndex,
};

/// A new adapter to train.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Inner width.
    pub rank: usize,
    /// Numerator of the scale alpha / rank.
    pub alpha: f32,
    /// Modules of every layer that get one, e.g. `q_proj`; empty means all that a layer has.
    pub targets: Vec<String>,
    /// Seed of A's initial values; B starts at zero.
    pub seed: u64,
    /// Format of the frozen weights. The adapter, its gradients and all activations are f32 with each.
    pub base_dtype: BaseDtype,
}

type Leaves = Vec<(String, Tensor<2>)>;

/// A full parameter: its name, its rows by HF tensor, its columns. Norms and biases have one row.
pub(super) struct Parameter {
    pub(super) name: String,
    /// HF tensors stacked in it, with their rows (a vector: its elements).
    pub(super) parts: Vec<(String, usize)>,
    pub(super) columns: usize,
    pub(super) kind: Kind,
}

/// How a parameter is drawn, and the shape of its tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Matrix,
    /// Starts at this value everywhere.
    Vector(f32),
}

impl Parameter {
    /// Shape of one of its tensors.
    pub(super) fn shape(&self, rows: usize) -> Vec<usize> {
        match self.kind {
            Kind::Matrix => vec![rows, self.columns],
            Kind::Vector(_) => vec![rows],
        }
    }
}

/// Collects the parameters of one layer.
struct LayerParameters<'a> {
    layer: usize,
    hidden: usize,
    out: &'a mut Vec<Parameter>,
}

impl LayerParameters<'_> {
    fn push(&mut self, name: &str, parts: Vec<(String, usize)>, columns: usize, kind: Kind) {
        self.out.push(Parameter { name: format!("layers.{}.{name}", self.layer), parts, columns, kind });
    }

    fn norm(&mut self, name: &str, norm: Option<Norm>, n: usize) {
        let Some(norm) = norm else { return };
        let tensor = load::layer_name(self.layer, &format!("{}.weight", norm.name));
        self.push(name, vec![(tensor, n)], n, Kind::Vector(first_norm(&norm)));
    }

    fn linear(&mut self, name: &str, p: &Projection, rows: &[usize], columns: usize) {
        let stacked = [rows.iter().sum()];
        let rows = if p.names.len() == rows.len() { rows } else { stacked.as_slice() };
        let layer = self.layer;
        let tensors = |kind: &str| -> Vec<(String, usize)> {
            let full = |(name, n): (&&str, &usize)| (load::layer_name(layer, &format!("{name}.{kind}")), *n);
            p.names.iter().zip(rows).map(full).collect()
        };
        self.push(&format!("{name}_proj"), tensors("weight"), columns, Kind::Matrix);
        if p.bias {
            self.push(&format!("{name}_bias"), tensors("bias"), rows.iter().sum(), Kind::Vector(0.0));
        }
    }

    fn all(&mut self, c: &LayerConfig) {
        self.norm("input_norm", c.mixer_norms.before, self.hidden);
        match &c.mixer {
            Mixer::Attention(a) => self.attention(a),
            Mixer::Latent(_) | Mixer::Delta(_) => unreachable!("models with other mixers were refused"),
        }
        self.norm("mixer_post_norm", c.mixer_norms.after, self.hidden);
        self.norm("post_norm", c.mlp_norms.before, self.hidden);
        match &c.mlp {
            Mlp::Dense(m) => {
                self.linear("gate_up", &m.gate_up, &[m.ffn, m.ffn], self.hidden);
                self.linear("down", &m.down, &[self.hidden], m.ffn);
            }
            Mlp::Experts(_) => unreachable!("models with experts were refused"),
        }
        self.norm("mlp_post_norm", c.mlp_norms.after, self.hidden);
    }

    fn attention(&mut self, a: &Attention) {
        self.linear("qkv", &a.qkv, &[a.q_width(), a.kv_width(), a.kv_width()], self.hidden);
        if let Some(norms) = a.head_norms {
            let [q, k] = match norms.span {
                HeadSpan::Head => [a.head_dim; 2],
                HeadSpan::All => [a.q_width(), a.kv_width()],
            };
            self.norm("q_norm", Some(norms.q), q);
            self.norm("k_norm", Some(norms.k), k);
        }
        self.linear("o", &a.o, &[self.hidden], a.q_width());
    }
}

/// The stored weight by which a norm multiplies with 1.
fn first_norm(norm: &Norm) -> f32 {
    match norm.kind {
        NormKind::Rms => 1.0,
        NormKind::RmsPlusOne => 0.0,
    }
}

/// All weights of a model, in the order in which the forward pass takes them.
pub(super) fn full_parameters(c: &ModelConfig) -> Vec<Parameter> {
    let whole = |name: &str, tensor: String, rows, columns, kind| Parameter {
        name: name.to_owned(),
        parts: vec![(tensor, rows)],
        columns,
        kind,
    };
    let mut out = vec![whole("embed_tokens", load::EMBEDDING.to_owned(), c.vocab, c.hidden, Kind::Matrix)];
    for (layer, config) in c.layers.iter().enumerate() {
        LayerParameters { layer, hidden: c.hidden, out: &mut out }.all(config);
    }
    let kind = Kind::Vector(first_norm(&c.final_norm));
    out.push(whole("norm", format!("{}.weight", c.final_norm.name), c.hidden, c.hidden, kind));
    if !c.tied_embeddings {
        out.push(whole("lm_head", load::HEAD.to_owned(), c.vocab, c.hidden, Kind::Matrix));
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
            values.extend(index.read_shaped(name, &p.shape(*rows))?);
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
            let rows = p.parts.iter().map(|(_, rows)| rows).sum::<usize>();
            let std = if p.name.ends_with("o_proj") || p.name.ends_with("down_proj") {
                INIT_STD * residual
            } else {
                INIT_STD
            };
            let values = match p.kind {
                Kind::Vector(value) => vec![value; rows],
                Kind::Matrix => (0..rows * p.columns).map(|_| (rng.normal() * std) as f32).collect(),
            };
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
        modules::names().filter(|m| module_shape(config, 0, m).is_some()).collect()
    } else {
        lora.targets.iter().map(String::as_str).collect()
    };
    let mut shapes = std::collections::BTreeMap::new();
    for target in &targets {
        for layer in 0..config.n_layers {
            let shape = module_shape(config, layer, target).ok_or_else(|| {
                let known = modules::names().collect::<Vec<_>>().join(", ");
                invalid("LoRA target", (*target).to_owned(), &format!("known are {known}"))
            })?;
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
