//! The one decoder layer: inference and training, every family, every device run this function.
//!
//! x ── norm ── qkv ── rotate, attend ── o ──(+)── norm ── gate, up ── silu·mul ── down ──(+)──
//!
//! The hidden state is a Burn tensor [T, H]; `route` says whether an operation runs on our kernels or is
//! composed of Burn operations.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{
    config::ModelConfig,
    error::ForwardError,
    ops::{
        activation::SiluMul,
        attention::{Geometry, KvStore, PackedAttention, PagedAttention, PagedRows},
        composed,
        embedding::Embedding,
        linear::{Dense, Frozen, FrozenLinear, LoraAdd},
        norm::{HeadNorms, RmsNorm},
        run1, run2, run3, run4,
    },
};

/// How operations are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// Our CPU kernels as extension ops.
    Kernels,
    /// Burn operations: any device.
    Composed,
}

/// Weights of a linear layer, [N, K].
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a handful per layer; a box would cost a hop on every product")]
pub(crate) enum LinearWeight {
    /// Packed for the kernels, without gradient.
    Packed(Arc<FrozenLinear>),
    /// A tensor: trained, or on a device without kernels.
    Dense(Tensor<2>),
}

/// One module's adapter inside a (possibly fused) linear layer.
#[derive(Clone, Debug)]
pub(crate) struct LoraPart {
    /// [r, K]
    pub(crate) a: Tensor<2>,
    /// [n, r]
    pub(crate) b: Tensor<2>,
    pub(crate) scale: f32,
    /// First output column of the module.
    pub(crate) offset: usize,
}

/// A linear layer with its adapters.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub(crate) weight: LinearWeight,
    pub(crate) lora: Vec<LoraPart>,
}

impl Linear {
    pub(crate) fn forward(&self, x: &Tensor<2>, route: Route) -> Tensor<2> {
        let base = match (&self.weight, route) {
            (LinearWeight::Packed(weight), _) => run1(x.clone(), Frozen(Arc::clone(weight))),
            (LinearWeight::Dense(weight), Route::Kernels) => {
                let [n, k] = weight.dims();
                run2(x.clone(), weight.clone(), Dense { n, k })
            }
            (LinearWeight::Dense(weight), Route::Composed) => composed::linear(x.clone(), weight.clone()),
        };
        self.lora.iter().fold(base, |y, part| match route {
            Route::Kernels => {
                let ([rank, k], [outputs, _], [_, n]) = (part.a.dims(), part.b.dims(), y.dims());
                let op = LoraAdd { n, k, rank, outputs, offset: part.offset, scale: part.scale };
                run4(y, x.clone(), part.a.clone(), part.b.clone(), op)
            }
            Route::Composed => composed::lora_add(y, x.clone(), part),
        })
    }
}

/// Weights of one layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerWeights {
    /// [H]
    pub(crate) input_norm: Tensor<1>,
    /// [(Q + 2K)·D, H]
    pub(crate) qkv: Linear,
    /// Query and key norms, [D] each (Qwen3).
    pub(crate) head_norms: Option<(Tensor<1>, Tensor<1>)>,
    /// [H, Q·D]
    pub(crate) o: Linear,
    /// [H]
    pub(crate) post_norm: Tensor<1>,
    /// [2F, H]
    pub(crate) gate_up: Linear,
    /// [H, F]
    pub(crate) down: Linear,
}

/// What rows attend to.
#[derive(Clone, Debug)]
pub(crate) enum Attend {
    /// Keys of earlier rows in the paged store.
    Paged { store: Arc<KvStore>, rows: Arc<PagedRows> },
    /// Rows of the same packed sequence.
    Packed { positions: Arc<Vec<u32>>, cu_seqlens: Arc<Vec<u32>> },
}

/// Everything the layers of a model share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) route: Route,
    pub(crate) geometry: Arc<Geometry>,
    pub(crate) eps: f32,
}

/// Rows of the embedding table, [T, H], without gradient for packed tables.
///
/// # Errors
/// An id outside the vocabulary.
pub(crate) fn embed(
    table: &LinearWeight,
    tokens: &[u32],
    config: &ModelConfig,
    shared: &Shared,
    device: &Device,
) -> Result<Tensor<2>, ForwardError> {
    let (vocab, hidden) = (config.vocab, config.hidden);
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
        return Err(ForwardError::Token { id: *id, vocab });
    }
    Ok(match (table, shared.route) {
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
        (LinearWeight::Dense(table), Route::Composed) => {
            let ids: Vec<i32> = tokens.iter().map(|id| id.cast_signed()).collect();
            let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [tokens.len()]), device);
            table.clone().select(0, ids)
        }
    })
}

/// RMS norm of rows.
pub(crate) fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, shared: &Shared) -> Tensor<2> {
    match shared.route {
        Route::Kernels => run2(x, weight.clone(), RmsNorm { eps: shared.eps }),
        Route::Composed => composed::rms_norm(x, weight.clone(), shared.eps),
    }
}

fn attention(qkv: Tensor<2>, index: usize, attend: &Attend, shared: &Shared) -> Tensor<2> {
    let geometry = Arc::clone(&shared.geometry);
    match (attend, shared.route) {
        (Attend::Paged { store, rows }, Route::Kernels) => {
            let (store, rows) = (Arc::clone(store), Arc::clone(rows));
            run1(qkv, PagedAttention { geometry, store, layer: index, rows })
        }
        (Attend::Packed { positions, cu_seqlens }, Route::Kernels) => {
            let (positions, cu_seqlens) = (Arc::clone(positions), Arc::clone(cu_seqlens));
            run1(qkv, PackedAttention { geometry, positions, cu_seqlens })
        }
        (Attend::Packed { positions, cu_seqlens }, Route::Composed) => {
            composed::packed_attention(&qkv, &geometry, positions, cu_seqlens)
        }
        (Attend::Paged { store, rows }, Route::Composed) => {
            composed::paged_attention(&qkv, &geometry, store, index, rows)
        }
    }
}

/// One layer. `index` counts within the stage.
pub(crate) fn forward(
    weights: &LayerWeights,
    x: Tensor<2>,
    index: usize,
    attend: &Attend,
    shared: &Shared,
) -> Tensor<2> {
    let route = shared.route;
    let mut qkv = weights.qkv.forward(&rms_norm(x.clone(), &weights.input_norm, shared), route);
    if let Some((q_norm, k_norm)) = &weights.head_norms {
        let g = &shared.geometry;
        qkv = match route {
            Route::Kernels => {
                let (n_heads, n_kv_heads, head_dim) = (g.n_heads, g.n_kv_heads, g.head_dim);
                let op = HeadNorms { n_heads, n_kv_heads, head_dim, eps: shared.eps };
                run3(qkv, q_norm.clone(), k_norm.clone(), op)
            }
            Route::Composed => composed::head_norms(&qkv, q_norm, k_norm, g, shared.eps),
        };
    }
    let attended = attention(qkv, index, attend, shared);
    let x = x + weights.o.forward(&attended, route);
    let gate_up = weights.gate_up.forward(&rms_norm(x.clone(), &weights.post_norm, shared), route);
    let ffn = gate_up.dims()[1] / 2;
    let inner = match route {
        Route::Kernels => run1(gate_up, SiluMul { ffn }),
        Route::Composed => composed::silu_mul(gate_up),
    };
    x + weights.down.forward(&inner, route)
}
