//! From tensors on disk to the weights of layers: packed for the kernels, in memory or on a GPU, or as tensors.

mod adapters;
mod delta;
mod experts;
mod latent;

use std::sync::Arc;

pub(crate) use self::adapters::attach;
#[cfg(feature = "train")]
pub(crate) use self::adapters::linear_at;

use burn::tensor::{Device, Tensor, TensorData};
use parallax_kernels::{
    KernelError, PackedWeight, WeightKind,
    rope::{RopeLayout, RopeTable},
};

#[cfg(feature = "gpu")]
use crate::ops::gpu::DeviceLinear;
use crate::{
    config::{
        Attention, DenseMlp, HeadSpan, LayerConfig, Mixer, Mlp, ModelConfig, Norm, NormKind, Norms,
        Projection, Rope,
    },
    error::LoadError,
    layer::{
        AroundWeights, AttentionWeights, DenseMlpWeights, LayerWeights, Linear, LinearWeight, MixerWeights,
        MlpWeights, NormWeights, Route,
    },
    ops::{
        attention::{Geometry, Rotation},
        linear::FrozenLinear,
    },
    options::WeightDtype,
    weights::{Rows, WeightIndex},
};

/// Reads weights of one model in one format.
pub(crate) struct Loader<'a> {
    pub(crate) index: &'a WeightIndex,
    pub(crate) config: &'a ModelConfig,
    pub(crate) dtype: WeightDtype,
    pub(crate) device: Device,
    pub(crate) route: Route,
    /// Keep the transposed f32 weights too, by which the gradient of a frozen layer's input is faster. For f32 weights alone.
    pub(crate) keep_transposed: bool,
}

/// HF name of a layer's tensor; `tensor` is a module with `.weight` or `.bias`.
pub(crate) fn layer_name(layer: usize, tensor: &str) -> String {
    format!("model.layers.{layer}.{tensor}")
}

/// The rotations of a model's layers, each made once.
#[derive(Debug)]
pub(crate) struct Rotations {
    /// First position without an entry.
    max_pos: usize,
    made: Vec<(Rope, usize, Arc<Rotation>)>,
}

impl Rotations {
    /// For positions of at most this many tokens.
    pub(crate) fn new(config: &ModelConfig, max_pos: usize) -> Self {
        Self { max_pos: max_pos.min(config.max_context), made: Vec::new() }
    }

    pub(crate) fn get(&mut self, rope: &Rope, head_dim: usize) -> Result<Arc<Rotation>, LoadError> {
        if let Some((.., made)) = self.made.iter().find(|(r, d, _)| r == rope && *d == head_dim) {
            return Ok(Arc::clone(made));
        }
        let (frequencies, magnitude) = (rope.frequencies(), rope.magnitude());
        let interleaved = rope.interleaved;
        let layout = RopeLayout { head_dim, interleaved, magnitude };
        let table = RopeTable::new(layout, &frequencies, self.max_pos)
            .map_err(|e| LoadError::Pack { name: "rotary table".to_owned(), reason: e.to_string() })?;
        let rotation = Arc::new(Rotation { table, interleaved, magnitude, frequencies });
        self.made.push((rope.clone(), head_dim, Arc::clone(&rotation)));
        Ok(rotation)
    }

    /// What a layer's attention does besides its linear layers.
    pub(crate) fn geometry(
        &mut self,
        a: &Attention,
        sinks: Option<Vec<f32>>,
    ) -> Result<Arc<Geometry>, LoadError> {
        let rope = a.rope.as_ref().map(|rope| self.get(rope, a.head_dim)).transpose()?;
        Ok(Arc::new(Geometry {
            n_heads: a.n_heads,
            n_kv_heads: a.n_kv_heads,
            head_dim: a.head_dim,
            rope,
            scale: a.scale,
            window: a.window,
            softcap: a.softcap,
            sinks,
        }))
    }
}

impl Loader<'_> {
    fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// A norm of `n` elements, by the module that it is.
    pub(crate) fn norm(&self, module: &str, norm: &Norm, n: usize) -> Result<NormWeights, LoadError> {
        let mut values = self.index.read_shaped(&format!("{module}.weight"), &[n])?;
        if norm.kind == NormKind::RmsPlusOne {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        Ok(NormWeights { weight: self.tensor(values, [n]), eps: norm.eps })
    }

    /// The norm behind the last layer.
    pub(crate) fn final_norm(&self) -> Result<NormWeights, LoadError> {
        self.norm(self.config.final_norm.name, &self.config.final_norm, self.config.hidden)
    }

    /// Tensors stacked by rows as one linear layer.
    pub(crate) fn linear(&self, names: &[(String, usize)], k: usize) -> Result<LinearWeight, LoadError> {
        for (name, n) in names {
            self.index.check_shape(name, &[*n, k])?;
        }
        let pieces: Vec<Rows> =
            names.iter().map(|(name, n)| Rows { name: name.clone(), first: 0, n: *n }).collect();
        let failed = |e: KernelError| LoadError::Pack { name: names[0].0.clone(), reason: e.to_string() };
        #[cfg(feature = "gpu")]
        if self.route == Route::Gpu {
            let stacks = self.index.stack(&pieces, k, self.dtype)?;
            let weight = DeviceLinear::upload(&self.device, &stacks, k).map_err(failed)?;
            return Ok(LinearWeight::Device(Arc::new(weight)));
        }
        if self.route == Route::Kernels && !self.keep_transposed {
            let parts = self.index.pack(&pieces, k, self.dtype)?;
            return Ok(LinearWeight::Packed(Arc::new(FrozenLinear { parts, transposed: None })));
        }
        let mut values = Vec::new();
        for piece in &pieces {
            values.extend(self.index.read_rows_f32(&piece.name, piece.range())?);
        }
        let n = values.len() / k;
        if self.route != Route::Kernels {
            return Ok(LinearWeight::Dense(self.tensor(values, [n, k])));
        }
        let parts = vec![PackedWeight::pack_f32(WeightKind::F32, &values, n, k).map_err(failed)?];
        let transposed = Some(PackedWeight::pack_transposed(&values, k, n).map_err(failed)?);
        Ok(LinearWeight::Packed(Arc::new(FrozenLinear { parts, transposed })))
    }

    /// A layer's linear layer: `rows` of each stored tensor, or of all of them where one tensor stacks them.
    fn projection(
        &self,
        layer: usize,
        p: &Projection,
        rows: &[usize],
        k: usize,
    ) -> Result<Linear, LoadError> {
        let stacked = [rows.iter().sum()];
        let rows = if p.names.len() == rows.len() { rows } else { stacked.as_slice() };
        let named = |kind: &str| -> Vec<(String, usize)> {
            let full = |(name, n): (&&str, &usize)| (layer_name(layer, &format!("{name}.{kind}")), *n);
            p.names.iter().zip(rows).map(full).collect()
        };
        let weight = self.linear(&named("weight"), k)?;
        if !p.bias {
            return Ok(Linear::bare(weight));
        }
        let mut bias = Vec::new();
        for (name, n) in named("bias") {
            bias.extend(self.index.read_shaped(&name, &[n])?);
        }
        let n = bias.len();
        Ok(Linear { bias: Some(self.tensor(bias, [n])), ..Linear::bare(weight) })
    }

    fn norms(&self, layer: usize, norms: &Norms) -> Result<AroundWeights, LoadError> {
        let read = |norm: Option<Norm>| {
            norm.map(|norm| self.norm(&layer_name(layer, norm.name), &norm, self.config.hidden)).transpose()
        };
        Ok(AroundWeights { before: read(norms.before)?, after: read(norms.after)? })
    }

    /// All weights of a layer.
    pub(crate) fn layer(&self, layer: usize, rotations: &mut Rotations) -> Result<LayerWeights, LoadError> {
        let c: &LayerConfig = &self.config.layers[layer];
        Ok(LayerWeights {
            mixer_norms: self.norms(layer, &c.mixer_norms)?,
            mixer: match &c.mixer {
                Mixer::Attention(a) => MixerWeights::Attention(self.attention(layer, a, rotations)?),
                Mixer::Latent(a) => MixerWeights::Latent(self.latent(layer, a, rotations)?),
                Mixer::Delta(d) => MixerWeights::Delta(self.delta(layer, d)?),
            },
            mlp_norms: self.norms(layer, &c.mlp_norms)?,
            mlp: match &c.mlp {
                Mlp::Dense(m) => MlpWeights::Dense(self.dense_mlp(layer, m)?),
                Mlp::Experts(e) => MlpWeights::Experts(self.experts(layer, e)?),
            },
            residual_scale: c.residual_scale,
        })
    }

    fn attention(
        &self,
        layer: usize,
        a: &Attention,
        rotations: &mut Rotations,
    ) -> Result<AttentionWeights, LoadError> {
        let hidden = self.config.hidden;
        let sinks =
            a.sinks.map(|name| self.index.read_shaped(&layer_name(layer, name), &[a.n_heads])).transpose()?;
        let head_norms = match &a.head_norms {
            None => None,
            Some(norms) => {
                let widths = match norms.span {
                    HeadSpan::Head => [a.head_dim; 2],
                    HeadSpan::All => [a.q_width(), a.kv_width()],
                };
                let read = |norm: &Norm, n| self.norm(&layer_name(layer, norm.name), norm, n);
                Some([read(&norms.q, widths[0])?, read(&norms.k, widths[1])?])
            }
        };
        let (qkv, gate) = if a.gated {
            let (qkv, gate) = self.gated_queries(layer, a)?;
            (qkv, Some(gate))
        } else {
            let rows = [a.q_width(), a.kv_width(), a.kv_width()];
            (self.projection(layer, &a.qkv, &rows, hidden)?, None)
        };
        Ok(AttentionWeights {
            geometry: rotations.geometry(a, sinks)?,
            qkv,
            gate,
            head_norms,
            o: self.projection(layer, &a.o, &[hidden], a.q_width())?,
        })
    }

    fn dense_mlp(&self, layer: usize, m: &DenseMlp) -> Result<DenseMlpWeights, LoadError> {
        let hidden = self.config.hidden;
        Ok(DenseMlpWeights {
            gate_up: self.projection(layer, &m.gate_up, &[m.ffn, m.ffn], hidden)?,
            down: self.projection(layer, &m.down, &[hidden], m.ffn)?,
            activation: m.activation,
        })
    }

    /// The embedding table, or the head, at eight bits or more.
    pub(crate) fn table(&self, name: &str) -> Result<LinearWeight, LoadError> {
        let loader = Loader { dtype: self.dtype.table(), device: self.device.clone(), ..*self };
        loader.linear(&[(name.to_owned(), self.config.vocab)], self.config.hidden)
    }
}

/// Names of the tensors outside the layers.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Name of the head's tensor: the embedding when they are tied.
pub(crate) fn head_name(config: &ModelConfig) -> &'static str {
    if config.tied_embeddings { EMBEDDING } else { HEAD }
}
