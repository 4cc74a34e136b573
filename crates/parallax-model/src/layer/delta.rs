//! The gated delta net as a mixer: two projections, the recurrence, the way back.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{Attend, Linear, Route};
use crate::ops::{
    delta::{DeltaWeights, GatedDelta},
    run2,
};

/// A gated delta net.
#[derive(Clone, Debug)]
pub(crate) struct DeltaMixerWeights {
    pub(crate) inner: Arc<DeltaWeights>,
    /// Queries, keys, values and output gates, one after the other.
    pub(crate) qkvz: Linear,
    /// [2·Hv, H]: strengths, then decays.
    pub(crate) ba: Linear,
    /// [H, Hv·Dv]
    pub(crate) out: Linear,
}

impl DeltaMixerWeights {
    pub(crate) fn forward(&self, x: &Tensor<2>, index: usize, attend: &Attend, route: Route) -> Tensor<2> {
        let Attend::Paged { states, rows, .. } = attend else {
            unreachable!("models with recurrent layers are refused where gradients are asked for")
        };
        let op = GatedDelta {
            weights: Arc::clone(&self.inner),
            states: Arc::clone(states),
            layer: index,
            rows: Arc::clone(&rows.sequences),
        };
        let y = run2(self.qkvz.forward(x, route), self.ba.forward(x, route), op);
        self.out.forward(&y, route)
    }
}
