//! Multi-head latent attention: queries straight or by way of a compressed row, keys and values from the compressed rows
//! in the store.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{AdapterSlot, Attend, Linear, NormWeights, Route};
use crate::ops::{
    latent::{LatentAttention, LatentLora, LatentWeights},
    run2,
};

/// An adapter of the matrix out of compressed rows.
#[derive(Clone, Debug)]
pub(crate) struct LatentAdapter {
    pub(crate) slot: AdapterSlot,
    pub(crate) lora: LatentLora,
}

impl LatentAdapter {
    /// With the rows of the batch at hand, if there are any.
    fn chosen(&self) -> Option<LatentLora> {
        let rows = self.slot.rows.get();
        let used = rows.as_ref().is_none_or(|rows| !rows.is_empty());
        used.then(|| self.lora.for_rows(rows))
    }
}

/// Latent attention.
#[derive(Clone, Debug)]
pub(crate) struct LatentMixerWeights {
    pub(crate) inner: Arc<LatentWeights>,
    /// Of the matrix out of compressed rows, which is in `inner`; by number.
    pub(crate) adapters: Vec<LatentAdapter>,
    /// Into the compressed queries, or straight to them.
    pub(crate) q_in: Linear,
    /// Norm of compressed queries and the way out of them.
    pub(crate) q_out: Option<(NormWeights, Linear)>,
    /// [R + P, H]
    pub(crate) kv_in: Linear,
    /// [H, Q·V]
    pub(crate) o: Linear,
}

impl LatentMixerWeights {
    pub(crate) fn forward(&self, x: &Tensor<2>, index: usize, attend: &Attend, route: Route) -> Tensor<2> {
        let Attend::Paged { store, rows, .. } = attend else {
            unreachable!("models with latent attention are refused where gradients are asked for")
        };
        let mut q = self.q_in.forward(x, route);
        if let Some((norm, out)) = &self.q_out {
            q = out.forward(&norm.forward(q, route), route);
        }
        let op = LatentAttention {
            weights: Arc::clone(&self.inner),
            adapters: self.adapters.iter().filter_map(LatentAdapter::chosen).collect(),
            store: Arc::clone(store),
            layer: index,
            rows: Arc::clone(rows),
        };
        self.o.forward(&run2(q, self.kv_in.forward(x, route), op), route)
    }
}
