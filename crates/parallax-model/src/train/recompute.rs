//! Activation checkpointing: a forward pass keeps the input of each layer and nothing else, and the backward pass computes
//! a layer again when it gets there (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
//!
//! Memory falls from all layers' activations to one layer's and `[T, H]` for each; the work grows by one forward pass. Values
//! and gradients stay the same bit for bit.

use burn::tensor::{Gradients, Tensor};

use super::{Assembled, TrainModel};
use crate::{
    error::ForwardError,
    layer::{self, Attend},
};

/// A forward pass on its way back.
pub struct Pass<'a> {
    model: &'a TrainModel,
    tokens: Vec<u32>,
    attend: Attend,
    /// The input of each layer, `[T, H]`, without a tape.
    inputs: Vec<Tensor<2>>,
    /// The output of the last, `[T, H]`: where the tape of the log-probabilities begins.
    top: Tensor<2>,
}

impl std::fmt::Debug for Pass<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pass").field("layers", &self.inputs.len()).finish_non_exhaustive()
    }
}

impl TrainModel {
    /// As [`Self::token_logprobs`], with a tape that reaches only to the final norm; [`Pass::gradients`] walks the rest.
    ///
    /// # Errors
    /// As [`Self::token_logprobs`].
    pub fn checkpointed_logprobs(
        &self,
        tokens: &[u32],
        cu_seqlens: &[u32],
    ) -> Result<(Tensor<1>, Pass<'_>), ForwardError> {
        let (positions, targets) = self.check(tokens, cu_seqlens)?;
        let attend = Attend::packed(positions, cu_seqlens);
        let weights = self.assemble(|parameter| untracked(parameter.clone()));
        let mut x = layer::embed(&weights.embedding, tokens, &self.config, self.route, &self.device)?;
        let mut inputs = Vec::with_capacity(weights.layers.len());
        for (index, layer) in weights.layers.iter().enumerate() {
            inputs.push(x.clone());
            x = layer::forward(layer, x, index, &attend, self.route);
        }
        let top = x.require_grad();
        let logprobs = self.logprobs(self.assemble(Tensor::clone), top.clone(), targets);
        Ok((logprobs, Pass { model: self, tokens: tokens.to_vec(), attend, inputs, top }))
    }
}

impl Pass<'_> {
    /// The gradient of `loss`, which was made of this pass's log-probabilities, by every parameter in the order of
    /// [`TrainModel::parameters`]; `None` for one that takes no part.
    pub fn gradients(self, loss: &Tensor<1>) -> Vec<Option<Tensor<2>>> {
        let Self { model, tokens, attend, inputs, top } = self;
        let Assembled { layers, embedding, .. } = model.assemble(Tensor::clone);
        let mut sums: Vec<Option<Tensor<2>>> = vec![None; model.parameters.len()];
        let mut add = |tape: &Gradients| {
            for (sum, (_, parameter)) in sums.iter_mut().zip(&model.parameters) {
                if let Some(part) = parameter.grad(tape) {
                    *sum = Some(match sum.take() {
                        Some(sum) => sum + part,
                        None => part,
                    });
                }
            }
        };
        let tape = loss.backward();
        add(&tape);
        let mut by_output = top.grad(&tape);
        drop((tape, top));
        for ((index, layer), input) in layers.iter().enumerate().zip(inputs).rev() {
            // A loss that no row takes part in.
            let Some(slope) = by_output.take() else { break };
            let input = input.require_grad();
            let output = layer::forward(layer, input.clone(), index, &attend, model.route);
            let tape = times(output, slope).backward();
            add(&tape);
            by_output = input.grad(&tape);
        }
        // Frozen tables have no gradient.
        if let (Some(slope), None) = (by_output, &model.frozen) {
            let rows = layer::embed(&embedding, &tokens, &model.config, model.route, &model.device);
            let rows = rows.expect("the tokens went through once");
            add(&times(rows, slope).backward());
        }
        sums
    }
}

/// `detach` would leave a parameter one that wants a gradient.
fn untracked(tensor: Tensor<2>) -> Tensor<2> {
    Tensor::from_inner(tensor.inner())
}

/// A scalar whose gradient by `output` `[T, H]` is `slope` `[T, H]`.
fn times(output: Tensor<2>, slope: Tensor<2>) -> Tensor<1> {
    (output * Tensor::from_inner(slope)).sum()
}
