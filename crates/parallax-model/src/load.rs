//! From tensors on disk to the weights of layers, packed for the kernels or as tensors for other devices.

use std::{ops::Range, sync::Arc};

use burn::tensor::{Device, Tensor, TensorData};
use half::bf16;
use parallax_kernels::{KernelError, PackedWeight, WeightKind, rope::RopeTable};

use crate::{
    adapter::{Adapter, module_shape, split},
    config::ModelConfig,
    error::{AdapterError, LoadError, OpenError},
    layer::{LayerWeights, Linear, LinearWeight, LoraPart, Route, Shared},
    ops::{attention::Geometry, linear::FrozenLinear},
    options::WeightDtype,
    weights::{StoredDtype, WeightIndex},
};

/// Reads weights of one model in one format.
pub(crate) struct Loader<'a> {
    pub(crate) index: &'a WeightIndex,
    pub(crate) config: &'a ModelConfig,
    pub(crate) dtype: WeightDtype,
    pub(crate) device: Device,
    pub(crate) route: Route,
    /// Keep the unpacked f32 weights too: the gradient of a frozen layer's input needs them.
    pub(crate) keep_dense: bool,
}

/// HF name of a layer's tensor.
pub(crate) fn layer_name(layer: usize, module: &str) -> String {
    format!("model.layers.{layer}.{module}.weight")
}

/// What the layers of a model share. `max_pos` bounds the rotary table.
pub(crate) fn shared(config: &ModelConfig, route: Route, max_pos: usize) -> Result<Shared, LoadError> {
    let factors = config.rope_scaling.as_ref().map(|s| s.factors(config.head_dim, config.rope_theta));
    let theta = f64::from(config.rope_theta);
    let rope = RopeTable::new(config.head_dim, theta, factors.as_deref(), max_pos.min(config.max_context))
        .map_err(|e| LoadError::Pack { name: "rotary table".to_owned(), reason: e.to_string() })?;
    let frequencies = (0..config.head_dim / 2)
        .map(|i| {
            let f = theta.powf(-((2 * i) as f64) / config.head_dim as f64) as f32;
            factors.as_ref().map_or(f, |factors| f / factors[i])
        })
        .collect();
    let (n_heads, n_kv_heads, head_dim) = (config.n_heads, config.n_kv_heads, config.head_dim);
    let geometry = Geometry { n_heads, n_kv_heads, head_dim, rope, frequencies };
    Ok(Shared { route, geometry: Arc::new(geometry), eps: config.rms_eps })
}

impl Loader<'_> {
    fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// A norm weight.
    pub(crate) fn vector(&self, name: &str, n: usize) -> Result<Tensor<1>, LoadError> {
        Ok(self.tensor(self.index.read_shaped(name, &[n])?, [n]))
    }

    fn pack_f32(&self, name: &str, values: &[f32], n: usize, k: usize) -> Result<PackedWeight, LoadError> {
        let kind = match self.dtype {
            WeightDtype::Native | WeightDtype::F32 => WeightKind::F32,
            WeightDtype::Bf16 => WeightKind::Bf16,
            WeightDtype::Q8_0 => WeightKind::Q8_0,
            WeightDtype::Q4_0 => WeightKind::Q4_0,
        };
        PackedWeight::pack_f32(kind, values, n, k).map_err(|e| pack_error(name, &e))
    }

    /// Stored blocks go to the kernels as they are, when that is what was asked for.
    fn keeps_blocks(&self, stored: StoredDtype) -> bool {
        match stored {
            StoredDtype::Q8_0 => matches!(self.dtype, WeightDtype::Native | WeightDtype::Q8_0),
            StoredDtype::Q4_0 => matches!(self.dtype, WeightDtype::Native | WeightDtype::Q4_0),
            StoredDtype::Q4_1 => matches!(self.dtype, WeightDtype::Native),
            StoredDtype::Bf16 => matches!(self.dtype, WeightDtype::Native | WeightDtype::Bf16),
            StoredDtype::F32 | StoredDtype::F16 => false,
        }
    }

    /// Tensors stacked by rows as one linear layer.
    pub(crate) fn linear(&self, names: &[(String, usize)], k: usize) -> Result<LinearWeight, LoadError> {
        for (name, n) in names {
            self.index.check_shape(name, &[*n, k])?;
        }
        if self.route == Route::Composed || self.keep_dense {
            let mut values = Vec::new();
            for (name, _) in names {
                values.extend(self.index.read_f32(name)?.1);
            }
            let n = values.len() / k;
            if self.route == Route::Composed {
                return Ok(LinearWeight::Dense(self.tensor(values, [n, k])));
            }
            let parts = vec![self.pack_f32(&names[0].0, &values, n, k)?];
            return Ok(LinearWeight::Packed(Arc::new(FrozenLinear { parts, dense: Some(values) })));
        }
        // Neighbours of one format become one part.
        let mut groups: Vec<(StoredDtype, Vec<&(String, usize)>)> = Vec::new();
        for entry in names {
            let stored = self.index.get(&entry.0)?.dtype;
            match groups.last_mut() {
                Some((dtype, group))
                    if *dtype == stored || !(self.keeps_blocks(stored) || self.keeps_blocks(*dtype)) =>
                {
                    group.push(entry);
                }
                _ => groups.push((stored, vec![entry])),
            }
        }
        let parts =
            groups.iter().map(|(stored, group)| self.part(*stored, group, k)).collect::<Result<_, _>>()?;
        Ok(LinearWeight::Packed(Arc::new(FrozenLinear { parts, dense: None })))
    }

    fn part(
        &self,
        stored: StoredDtype,
        group: &[&(String, usize)],
        k: usize,
    ) -> Result<PackedWeight, LoadError> {
        let n = group.iter().map(|(_, n)| n).sum();
        let name = &group[0].0;
        if !self.keeps_blocks(stored) {
            let mut values = Vec::with_capacity(n * k);
            for (name, _) in group {
                values.extend(self.index.read_f32(name)?.1);
            }
            return self.pack_f32(name, &values, n, k);
        }
        let mut raw = Vec::new();
        for (name, _) in group {
            raw.extend(self.index.read_bytes(name)?.1);
        }
        match stored {
            StoredDtype::Q8_0 => PackedWeight::from_q8_0_blocks(&raw, n, k),
            StoredDtype::Q4_0 => PackedWeight::from_q4_0_blocks(&raw, n, k),
            StoredDtype::Q4_1 => PackedWeight::from_q4_1_blocks(&raw, n, k),
            StoredDtype::Bf16 | StoredDtype::F32 | StoredDtype::F16 => {
                let values: Vec<bf16> =
                    raw.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect();
                PackedWeight::pack_bf16(&values, n, k)
            }
        }
        .map_err(|e| pack_error(name, &e))
    }

    /// All weights of a layer.
    pub(crate) fn layer(&self, layer: usize) -> Result<LayerWeights, LoadError> {
        let c = self.config;
        let name = |module: &str| layer_name(layer, module);
        let bare = |weight| Linear { weight, lora: Vec::new() };
        let head_norms = if c.family.has_head_norms() {
            let q = self.vector(&name("self_attn.q_norm"), c.head_dim)?;
            Some((q, self.vector(&name("self_attn.k_norm"), c.head_dim)?))
        } else {
            None
        };
        let qkv = [
            (name("self_attn.q_proj"), c.q_width()),
            (name("self_attn.k_proj"), c.kv_width()),
            (name("self_attn.v_proj"), c.kv_width()),
        ];
        let gate_up = [(name("mlp.gate_proj"), c.ffn), (name("mlp.up_proj"), c.ffn)];
        Ok(LayerWeights {
            input_norm: self.vector(&name("input_layernorm"), c.hidden)?,
            qkv: bare(self.linear(&qkv, c.hidden)?),
            head_norms,
            o: bare(self.linear(&[(name("self_attn.o_proj"), c.hidden)], c.q_width())?),
            post_norm: self.vector(&name("post_attention_layernorm"), c.hidden)?,
            gate_up: bare(self.linear(&gate_up, c.hidden)?),
            down: bare(self.linear(&[(name("mlp.down_proj"), c.hidden)], c.ffn)?),
        })
    }

    /// The embedding table, or the head. Four-bit weights keep the table at eight: it is read by row, and its
    /// errors reach every logit.
    pub(crate) fn table(&self, name: &str) -> Result<LinearWeight, LoadError> {
        let dtype = match self.dtype {
            WeightDtype::Q4_0 => WeightDtype::Q8_0,
            other => other,
        };
        let loader = Loader { dtype, device: self.device.clone(), ..*self };
        loader.linear(&[(name.to_owned(), self.config.vocab)], self.config.hidden)
    }
}

fn pack_error(name: &str, error: &KernelError) -> LoadError {
    LoadError::Pack { name: name.to_owned(), reason: error.to_string() }
}

/// Names of the tensors outside the layers.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(crate) const FINAL_NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// Name of the head's tensor: the embedding when they are tied.
pub(crate) fn head_name(config: &ModelConfig) -> &'static str {
    if config.tied_embeddings { EMBEDDING } else { HEAD }
}

/// The fused layer a module belongs to, and its first column there.
pub(crate) fn linear_of<'a>(
    layer: &'a mut LayerWeights,
    module: &str,
    config: &ModelConfig,
) -> Option<(&'a mut Linear, usize)> {
    Some(match module {
        "q_proj" => (&mut layer.qkv, 0),
        "k_proj" => (&mut layer.qkv, config.q_width()),
        "v_proj" => (&mut layer.qkv, config.q_width() + config.kv_width()),
        "o_proj" => (&mut layer.o, 0),
        "gate_proj" => (&mut layer.gate_up, 0),
        "up_proj" => (&mut layer.gate_up, config.ffn),
        "down_proj" => (&mut layer.down, 0),
        _ => return None,
    })
}

/// Replaces the adapters of the layers `range`, which `layers` holds; modules of other layers are left out.
pub(crate) fn attach(
    layers: &mut [LayerWeights],
    range: &Range<usize>,
    config: &ModelConfig,
    adapter: Option<&Adapter>,
    device: &Device,
) -> Result<(), AdapterError> {
    if let Some(adapter) = adapter {
        adapter.check(config)?;
    }
    for layer in layers.iter_mut() {
        for linear in [&mut layer.qkv, &mut layer.o, &mut layer.gate_up, &mut layer.down] {
            linear.lora.clear();
        }
    }
    let Some(adapter) = adapter else { return Ok(()) };
    for (module, t) in &adapter.tensors {
        let Some((layer, name)) = split(module).filter(|(layer, _)| range.contains(layer)) else { continue };
        let Some((linear, offset)) = linear_of(&mut layers[layer - range.start], name, config) else {
            return Err(AdapterError::UnknownModule { module: module.clone() });
        };
        let matrix = |values: &[f32], shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device)
        };
        linear.lora.push(LoraPart {
            a: matrix(&t.a, [adapter.rank, t.inputs]),
            b: matrix(&t.b, [t.outputs, adapter.rank]),
            scale: adapter.scale(),
            offset,
        });
    }
    // The order of addition is part of the value: by column, whatever the order in the map.
    for layer in layers.iter_mut() {
        for linear in [&mut layer.qkv, &mut layer.o, &mut layer.gate_up, &mut layer.down] {
            linear.lora.sort_by_key(|part| part.offset);
        }
    }
    Ok(())
}

/// Shape of a module's factors.
pub(crate) fn lora_shape(config: &ModelConfig, module: &str) -> Result<(usize, usize), OpenError> {
    module_shape(config, module).ok_or_else(|| {
        OpenError::Config(crate::error::ConfigError::Invalid {
            field: "LoRA target".to_owned(),
            value: module.to_owned(),
            reason: format!("known are {}", crate::adapter::MODULES.join(", ")),
        })
    })
}
