//! The feed-forward part of a layer with experts: those that a row's router chooses, and what all rows go through.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{DenseMlpWeights, Linear, Route};
use crate::ops::{
    delta::SigmoidGate,
    experts::{ExpertWeights, MixExperts},
    run1, run2,
};

/// Experts, and at most one dense part beside them.
#[derive(Clone, Debug)]
pub(crate) struct ExpertsMlpWeights {
    pub(crate) experts: Arc<ExpertWeights>,
    pub(crate) shared: Option<DenseMlpWeights>,
    /// [1, H]
    pub(crate) shared_gate: Option<Linear>,
}

impl ExpertsMlpWeights {
    pub(crate) fn forward(&self, x: &Tensor<2>, route: Route) -> Tensor<2> {
        let mixed = run1(x.clone(), MixExperts(Arc::clone(&self.experts)));
        let Some(shared) = &self.shared else { return mixed };
        let y = shared.forward(x, route);
        let y = match &self.shared_gate {
            Some(gate) => {
                let [_, columns] = y.dims();
                run2(y, gate.forward(x, route), SigmoidGate { columns })
            }
            None => y,
        };
        mixed + y
    }
}
