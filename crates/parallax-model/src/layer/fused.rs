//! A stage's layers with their parts fused where that is possible: attention and dense feed-forward parts whose weights are
//! packed for the CPU. Other parts, and training, run operation by operation.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{
    AroundWeights, Attend, AttentionWeights, DenseMlpWeights, LayerWeights, Linear, LinearWeight,
    MixerWeights, MlpWeights, NormWeights, Route, feed, mix,
};
use crate::ops::{
    Values,
    fused::{
        FusedAdapter, FusedAround, FusedAttention, FusedLinear, FusedMlp, FusedNorm, FusedParts, RunParts,
    },
    run1,
};

impl Linear {
    /// `None` where the weights are not packed for the CPU.
    fn fused(&self) -> Option<FusedLinear> {
        let LinearWeight::Packed(weight) = &self.weight else { return None };
        let adapters = self.lora.iter().map(|part| FusedAdapter {
            a: Values::of(&part.a),
            b: Values::of(&part.b),
            modules: Arc::clone(&part.modules),
            rows: Arc::clone(&part.rows),
        });
        Some(FusedLinear {
            weight: Arc::clone(weight),
            bias: self.bias.as_ref().map(Values::of),
            adapters: adapters.collect(),
        })
    }
}

impl NormWeights {
    fn fused(&self) -> FusedNorm {
        FusedNorm { weight: Values::of(&self.weight), eps: self.eps }
    }
}

impl AroundWeights {
    fn fused(&self, scale: f32) -> FusedAround {
        let norm = |norm: &Option<NormWeights>| norm.as_ref().map(NormWeights::fused);
        FusedAround { before: norm(&self.before), after: norm(&self.after), scale }
    }
}

impl AttentionWeights {
    fn fused(&self, around: &AroundWeights, scale: f32) -> Option<FusedAttention> {
        Some(FusedAttention {
            geometry: Arc::clone(&self.geometry),
            qkv: self.qkv.fused()?,
            o: self.o.fused()?,
            gate: match &self.gate {
                None => None,
                Some(gate) => Some(gate.fused()?),
            },
            head_norms: self.head_norms.as_ref().map(|norms| norms.each_ref().map(NormWeights::fused)),
            around: around.fused(scale),
        })
    }
}

impl DenseMlpWeights {
    fn fused(&self, around: &AroundWeights, scale: f32) -> Option<FusedMlp> {
        Some(FusedMlp {
            gate_up: self.gate_up.fused()?,
            down: self.down.fused()?,
            activation: self.activation,
            around: around.fused(scale),
        })
    }
}

impl LayerWeights {
    /// The parts that can be fused, with the adapters that the layer has now.
    pub(crate) fn fused(&self) -> FusedParts {
        let scale = self.residual_scale;
        FusedParts {
            attention: match &self.mixer {
                MixerWeights::Attention(attention) => attention.fused(&self.mixer_norms, scale),
                MixerWeights::Latent(_) | MixerWeights::Delta(_) => None,
            },
            mlp: match &self.mlp {
                MlpWeights::Dense(mlp) => mlp.fused(&self.mlp_norms, scale),
                MlpWeights::Experts(_) => None,
            },
        }
    }
}

/// One layer of a stage, `parts` being those of `weights`; `index` counts within the stage.
pub(crate) fn forward_fused(
    weights: &LayerWeights,
    parts: &Arc<FusedParts>,
    x: Tensor<2>,
    index: usize,
    attend: &Attend,
    route: Route,
) -> Tensor<2> {
    let Attend::Paged { store, rows, .. } = attend else { unreachable!("a stage attends over its store") };
    let (mixed, fed) = (parts.attention.is_some(), parts.mlp.is_some());
    let mut x = if mixed { x } else { mix(weights, x, index, attend, route) };
    if mixed || fed {
        let (parts, store, rows) = (Arc::clone(parts), Arc::clone(store), Arc::clone(rows));
        x = run1(x, RunParts { parts, store, layer: index, rows });
    }
    if fed { x } else { feed(weights, x, route) }
}

#[cfg(test)]
mod tests;
