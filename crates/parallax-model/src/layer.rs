//! A decoder layer as the configuration describes it: inference and training, every family, every device run this.
//!
//! x ── norm ── mixer ── norm ──(+)── norm ── feed-forward ── norm ──(+)──      (of the norms, those that it has)
//!
//! The hidden state is a Burn tensor [T, H]; `route` says whether an operation runs on our kernels, on the CPU or a GPU, or
//! is composed of Burn operations. In a stage on the CPU attention and dense feed-forward parts are one operation (`fused`).

mod delta;
mod experts;
mod fused;
mod latent;

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Device, Tensor, TensorData};

pub(crate) use self::{
    delta::DeltaMixerWeights,
    experts::ExpertsMlpWeights,
    fused::forward_fused,
    latent::{LatentAdapter, LatentMixerWeights},
};

#[cfg(feature = "gpu")]
use crate::ops::gpu::{self, DeviceLinear};
use crate::{
    config::{Activation, ModelConfig},
    error::ForwardError,
    ops::{
        activation::GatedMul,
        attention::{Geometry, KvStore, PackedAttention, PagedRows},
        composed,
        delta::StateStore,
        embedding::Embedding,
        linear::{Adapted, AddLora, Dense, Frozen, FrozenLinear, Lora, LoraModule},
        norm::{HeadNorms, RmsNorm},
        run1, run2, run3, run4,
    },
};

/// How operations are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Our CPU kernels as extension ops.
    Kernels,
    /// Our kernels on a GPU, and Burn operations between them.
    #[cfg(feature = "gpu")]
    Gpu,
    /// Burn operations on any device: the specification.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests compare the other routes with it"))]
    Composed,
}

/// Weights of a linear layer, [N, K].
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a handful per layer; a box would cost a hop on every product")]
pub(crate) enum LinearWeight {
    /// Packed for the kernels, without gradient.
    Packed(Arc<FrozenLinear>),
    /// Packed on a GPU.
    #[cfg(feature = "gpu")]
    Device(Arc<DeviceLinear>),
    /// A tensor: trained, or on the composed route.
    Dense(Tensor<2>),
}

impl LinearWeight {
    /// Bytes of memory held, on whichever device.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Packed(packed) => packed.bytes(),
            #[cfg(feature = "gpu")]
            Self::Device(packed) => packed.bytes(),
            Self::Dense(tensor) => 4 * tensor.dims().iter().product::<usize>(),
        }
    }
}

/// The rows of the batch at hand that an adapter applies to: everyone's, unless the batch chose. Shared by all parts of an
/// adapter in a stage, which sets it before a pass and runs one pass at a time.
#[derive(Debug, Default)]
pub(crate) struct AdapterRows(Mutex<Option<Arc<Vec<u32>>>>);

impl AdapterRows {
    /// `None` is every row.
    pub(crate) fn set(&self, rows: Option<Vec<u32>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = rows.map(Arc::new);
    }

    pub(crate) fn get(&self) -> Option<Arc<Vec<u32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the adapter's modules in a linear layer add in this batch; `None` when it has no rows.
    pub(crate) fn lora(&self, modules: &Arc<Vec<LoraModule>>) -> Option<Lora> {
        let rows = self.get();
        let used = rows.as_ref().is_none_or(|rows| !rows.is_empty());
        used.then(|| Lora { modules: Arc::clone(modules), rows })
    }
}

/// An adapter's modules inside a (possibly fused) linear layer.
#[derive(Clone, Debug)]
pub(crate) struct LoraPart {
    /// The modules' A one below the other. [R, K]
    pub(crate) a: Tensor<2>,
    /// The modules' B, [outputs, r] each, one after the other.
    pub(crate) b: Tensor<1>,
    /// By output column.
    pub(crate) modules: Arc<Vec<LoraModule>>,
    /// Number of a resident adapter; `None` is the one that applies where a sequence names none.
    pub(crate) id: Option<u32>,
    pub(crate) rows: Arc<AdapterRows>,
}

/// An adapter's place in a stage: its number, `None` for the one that sequences get which name none, and its rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct AdapterSlot {
    pub(crate) id: Option<u32>,
    pub(crate) rows: Arc<AdapterRows>,
}

/// A linear layer with its bias and its adapters.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub(crate) weight: LinearWeight,
    /// [N]
    pub(crate) bias: Option<Tensor<1>>,
    pub(crate) lora: Vec<LoraPart>,
}

impl Linear {
    /// Without bias and adapters.
    pub(crate) fn bare(weight: LinearWeight) -> Self {
        Self { weight, bias: None, lora: Vec::new() }
    }

    /// Adds a module, A [r, K] and B [outputs, r], of the adapter of `slot`.
    pub(crate) fn add_module(
        &mut self,
        slot: &AdapterSlot,
        a: Tensor<2>,
        b: Tensor<2>,
        offset: usize,
        scale: f32,
    ) {
        let [outputs, rank] = b.dims();
        let b: Tensor<1> = b.reshape([outputs * rank]);
        let module = LoraModule { offset, outputs, rank, scale, first: 0, from: 0 };
        let Some(part) = self.lora.iter_mut().find(|part| part.id == slot.id) else {
            let rows = Arc::clone(&slot.rows);
            self.lora.push(LoraPart { a, b, modules: Arc::new(vec![module]), id: slot.id, rows });
            return self.lora.sort_by_key(|part| part.id);
        };
        let modules = Arc::make_mut(&mut part.modules);
        modules.push(LoraModule { first: part.a.dims()[0], from: part.b.dims()[0], ..module });
        modules.sort_by_key(|m| m.offset);
        part.a = Tensor::cat(vec![part.a.clone(), a], 0);
        part.b = Tensor::cat(vec![part.b.clone(), b], 0);
    }

    pub(crate) fn forward(&self, x: &Tensor<2>, route: Route) -> Tensor<2> {
        let mut adapters = self.lora.iter().filter_map(|part| Some((part, part.rows.lora(&part.modules)?)));
        let x = x.clone();
        let y = match (&self.weight, route) {
            (LinearWeight::Packed(weight), _) => match (adapters.next(), &self.bias) {
                (None, None) => run1(x.clone(), Frozen(Arc::clone(weight))),
                (None, Some(bias)) => run2(x.clone(), bias.clone(), Frozen(Arc::clone(weight))),
                (Some((part, lora)), bias) => {
                    let (a, b) = (part.a.clone(), part.b.clone());
                    let op = Adapted { base: Arc::clone(weight), lora };
                    match bias {
                        None => run3(x.clone(), a, b, op),
                        Some(bias) => run4(x.clone(), a, b, bias.clone(), op),
                    }
                }
            },
            (LinearWeight::Dense(weight), Route::Kernels) => {
                let [n, k] = weight.dims();
                match &self.bias {
                    None => run2(x.clone(), weight.clone(), Dense { n, k }),
                    Some(bias) => run3(x.clone(), weight.clone(), bias.clone(), Dense { n, k }),
                }
            }
            (LinearWeight::Dense(weight), _) => self.add_bias(composed::linear(x.clone(), weight.clone())),
            #[cfg(feature = "gpu")]
            (LinearWeight::Device(weight), _) => self.add_bias(weight.apply(x.clone())),
        };
        adapters.fold(y, |y, (part, lora)| match route {
            Route::Kernels => {
                let n = y.dims()[1];
                run4(y, x.clone(), part.a.clone(), part.b.clone(), AddLora { n, lora })
            }
            _ => composed::lora_add(y, &x, part, lora.rows.as_deref()),
        })
    }

    fn add_bias(&self, y: Tensor<2>) -> Tensor<2> {
        match &self.bias {
            None => y,
            Some(bias) => y + bias.clone().unsqueeze(),
        }
    }
}

/// An RMS norm of rows; a stored `1 + w` is added up in the weight.
#[derive(Clone, Debug)]
pub(crate) struct NormWeights {
    /// [H]
    pub(crate) weight: Tensor<1>,
    pub(crate) eps: f32,
}

impl NormWeights {
    pub(crate) fn forward(&self, x: Tensor<2>, route: Route) -> Tensor<2> {
        match route {
            Route::Kernels => run2(x, self.weight.clone(), RmsNorm { eps: self.eps }),
            #[cfg(feature = "gpu")]
            Route::Gpu => gpu::rms_norm(x, self.weight.clone(), self.eps),
            Route::Composed => composed::rms_norm(x, self.weight.clone(), self.eps),
        }
    }
}

/// The norms around one part of a layer.
#[derive(Clone, Debug)]
pub(crate) struct AroundWeights {
    pub(crate) before: Option<NormWeights>,
    pub(crate) after: Option<NormWeights>,
}

/// Weights of one layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerWeights {
    pub(crate) mixer_norms: AroundWeights,
    pub(crate) mixer: MixerWeights,
    pub(crate) mlp_norms: AroundWeights,
    pub(crate) mlp: MlpWeights,
    pub(crate) residual_scale: f32,
}

/// How rows see each other.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per layer")]
pub(crate) enum MixerWeights {
    Attention(AttentionWeights),
    Latent(LatentMixerWeights),
    Delta(DeltaMixerWeights),
}

/// The feed-forward part.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per layer")]
pub(crate) enum MlpWeights {
    Dense(DenseMlpWeights),
    Experts(ExpertsMlpWeights),
}

/// Causal attention with grouped keys.
#[derive(Clone, Debug)]
pub(crate) struct AttentionWeights {
    pub(crate) geometry: Arc<Geometry>,
    /// [(Q + 2K)·D, H]
    pub(crate) qkv: Linear,
    /// Of queries and keys: [D] each, or [Q·D] and [K·D].
    pub(crate) head_norms: Option<[NormWeights; 2]>,
    /// [H, Q·D]
    pub(crate) o: Linear,
    /// [Q·D, H]: its sigmoid multiplies what was attended to.
    pub(crate) gate: Option<Linear>,
}

/// activation(gate) · up, down.
#[derive(Clone, Debug)]
pub(crate) struct DenseMlpWeights {
    /// [2F, H]
    pub(crate) gate_up: Linear,
    /// [H, F]
    pub(crate) down: Linear,
    pub(crate) activation: Activation,
}

impl LayerWeights {
    /// Its linear layers, in a fixed order.
    pub(crate) fn linears(&self) -> Vec<&Linear> {
        let mut all = match &self.mixer {
            MixerWeights::Attention(a) => vec![&a.qkv, &a.o],
            MixerWeights::Latent(a) => vec![&a.q_in, &a.kv_in, &a.o],
            MixerWeights::Delta(d) => vec![&d.qkvz, &d.ba, &d.out],
        };
        match &self.mixer {
            MixerWeights::Attention(a) => all.extend(&a.gate),
            MixerWeights::Latent(a) => all.extend(a.q_out.as_ref().map(|(_, out)| out)),
            MixerWeights::Delta(_) => {}
        }
        match &self.mlp {
            MlpWeights::Dense(m) => all.extend([&m.gate_up, &m.down]),
            MlpWeights::Experts(e) => {
                all.extend(e.shared.iter().flat_map(|m| [&m.gate_up, &m.down]));
                all.extend(&e.shared_gate);
            }
        }
        all
    }

    /// Bytes of the weights that are in no linear layer of [`Self::linears`]: experts, matrices of latent heads.
    pub(crate) fn inner_bytes(&self) -> usize {
        let mixer = match &self.mixer {
            MixerWeights::Latent(a) => a.inner.bytes(),
            MixerWeights::Attention(_) | MixerWeights::Delta(_) => 0,
        };
        match &self.mlp {
            MlpWeights::Experts(e) => mixer + e.experts.bytes(),
            MlpWeights::Dense(_) => mixer,
        }
    }

    /// The same, to be changed.
    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = match &mut self.mixer {
            MixerWeights::Attention(a) => {
                let mut all = vec![&mut a.qkv, &mut a.o];
                all.extend(&mut a.gate);
                all
            }
            MixerWeights::Latent(a) => {
                let mut all = vec![&mut a.q_in, &mut a.kv_in, &mut a.o];
                all.extend(a.q_out.as_mut().map(|(_, out)| out));
                all
            }
            MixerWeights::Delta(d) => vec![&mut d.qkvz, &mut d.ba, &mut d.out],
        };
        match &mut self.mlp {
            MlpWeights::Dense(m) => all.extend([&mut m.gate_up, &mut m.down]),
            MlpWeights::Experts(e) => {
                all.extend(e.shared.iter_mut().flat_map(|m| [&mut m.gate_up, &mut m.down]));
                all.extend(&mut e.shared_gate);
            }
        }
        all
    }
}

/// What rows attend to.
#[derive(Clone, Debug)]
pub(crate) enum Attend {
    /// Keys of earlier rows in the paged store, states of sequences beside it.
    Paged { store: Arc<KvStore>, states: Arc<StateStore>, rows: Arc<PagedRows> },
    /// Rows of the same packed sequence.
    Packed { positions: Arc<Vec<u32>>, cu_seqlens: Arc<Vec<u32>> },
}

impl Attend {
    /// Packed sequences `cu_seqlens[i]..cu_seqlens[i + 1]`.
    pub(crate) fn packed(positions: Vec<u32>, cu_seqlens: &[u32]) -> Self {
        Self::Packed { positions: Arc::new(positions), cu_seqlens: Arc::new(cu_seqlens.to_vec()) }
    }
}

/// Rows of the embedding table, [T, H], scaled as the configuration says; without gradient for packed tables.
///
/// # Errors
/// An id outside the vocabulary.
pub(crate) fn embed(
    table: &LinearWeight,
    tokens: &[u32],
    config: &ModelConfig,
    route: Route,
    device: &Device,
) -> Result<Tensor<2>, ForwardError> {
    let (vocab, hidden) = (config.vocab, config.hidden);
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
        return Err(ForwardError::Token { id: *id, vocab });
    }
    let rows = match (table, route) {
        (LinearWeight::Packed(packed), _) => {
            let mut rows = vec![0.0; tokens.len() * hidden];
            for (row, id) in rows.chunks_exact_mut(hidden).zip(tokens) {
                packed.parts[0]
                    .dequantize_row(*id as usize, row)
                    .expect("ids were compared with the vocabulary");
            }
            Tensor::from_data(TensorData::new(rows, [tokens.len(), hidden]), device)
        }
        (LinearWeight::Dense(table), Route::Kernels) => {
            run1(table.clone(), Embedding { tokens: Arc::new(tokens.to_vec()), hidden })
        }
        (LinearWeight::Dense(table), _) => composed::select(table, tokens),
        #[cfg(feature = "gpu")]
        (LinearWeight::Device(table), _) => table.rows(tokens),
    };
    Ok(scaled(rows, config.embedding_scale))
}

/// x · factor; x itself when the factor is 1.
fn scaled(x: Tensor<2>, factor: f32) -> Tensor<2> {
    if factor.to_bits() == 1.0f32.to_bits() { x } else { x.mul_scalar(factor) }
}

fn attend_rows(qkv: Tensor<2>, g: &Arc<Geometry>, index: usize, attend: &Attend, route: Route) -> Tensor<2> {
    let geometry = Arc::clone(g);
    match (attend, route) {
        (Attend::Paged { .. }, Route::Kernels) => {
            unreachable!("with packed weights, which a stage on the CPU has, attention is fused")
        }
        (Attend::Packed { positions, cu_seqlens }, Route::Kernels) => {
            let (positions, cu_seqlens) = (Arc::clone(positions), Arc::clone(cu_seqlens));
            run1(qkv, PackedAttention { geometry, positions, cu_seqlens })
        }
        (Attend::Packed { positions, cu_seqlens }, _) => {
            composed::packed_attention(&qkv, &geometry, positions, cu_seqlens)
        }
        #[cfg(feature = "gpu")]
        (Attend::Paged { store, rows, .. }, Route::Gpu) => {
            gpu::paged_attention(qkv, &geometry, store, index, rows)
        }
        (Attend::Paged { store, rows, .. }, Route::Composed) => {
            composed::paged_attention(&qkv, &geometry, store, index, rows)
        }
    }
}

impl AttentionWeights {
    fn forward(&self, x: &Tensor<2>, index: usize, attend: &Attend, route: Route) -> Tensor<2> {
        let g = &self.geometry;
        let mut qkv = self.qkv.forward(x, route);
        if let Some([q, k]) = &self.head_norms {
            let eps = [q.eps, k.eps];
            qkv = match route {
                Route::Kernels => {
                    let (n_heads, n_kv_heads, head_dim) = (g.n_heads, g.n_kv_heads, g.head_dim);
                    let op = HeadNorms { n_heads, n_kv_heads, head_dim, eps };
                    run3(qkv, q.weight.clone(), k.weight.clone(), op)
                }
                #[cfg(feature = "gpu")]
                Route::Gpu => gpu::head_norms(qkv, q.weight.clone(), k.weight.clone(), g, eps),
                Route::Composed => composed::head_norms(&qkv, &q.weight, &k.weight, g, eps),
            };
        }
        assert!(self.gate.is_none(), "models with output gates run fused alone");
        self.o.forward(&attend_rows(qkv, g, index, attend, route), route)
    }
}

impl DenseMlpWeights {
    fn forward(&self, x: &Tensor<2>, route: Route) -> Tensor<2> {
        let gate_up = self.gate_up.forward(x, route);
        let (activation, ffn) = (self.activation, gate_up.dims()[1] / 2);
        let inner = match route {
            Route::Kernels => run1(gate_up, GatedMul { activation, ffn }),
            #[cfg(feature = "gpu")]
            Route::Gpu => gpu::gated_mul(activation, gate_up),
            Route::Composed => composed::gated_mul(activation, gate_up),
        };
        self.down.forward(&inner, route)
    }
}

/// x with a part of the layer added, between its norms.
fn residual(
    x: Tensor<2>,
    norms: &AroundWeights,
    scale: f32,
    route: Route,
    part: impl FnOnce(&Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let normed = |x: Tensor<2>, norm: &Option<NormWeights>| match norm {
        None => x,
        Some(norm) => norm.forward(x, route),
    };
    let result = normed(part(&normed(x.clone(), &norms.before)), &norms.after);
    x + scaled(result, scale)
}

/// One layer, operation by operation. `index` counts within the stage.
pub(crate) fn forward(
    weights: &LayerWeights,
    x: Tensor<2>,
    index: usize,
    attend: &Attend,
    route: Route,
) -> Tensor<2> {
    feed(weights, mix(weights, x, index, attend, route), route)
}

/// The layer's first half.
fn mix(weights: &LayerWeights, x: Tensor<2>, index: usize, attend: &Attend, route: Route) -> Tensor<2> {
    residual(x, &weights.mixer_norms, weights.residual_scale, route, |x| match &weights.mixer {
        MixerWeights::Attention(attention) => attention.forward(x, index, attend, route),
        MixerWeights::Latent(latent) => latent.forward(x, index, attend, route),
        MixerWeights::Delta(delta) => delta.forward(x, index, attend, route),
    })
}

/// The layer's second half.
fn feed(weights: &LayerWeights, x: Tensor<2>, route: Route) -> Tensor<2> {
    residual(x, &weights.mlp_norms, weights.residual_scale, route, |x| match &weights.mlp {
        MlpWeights::Dense(mlp) => mlp.forward(x, route),
        MlpWeights::Experts(experts) => experts.forward(x, route),
    })
}
