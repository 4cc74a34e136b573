//! What the trainer needs of a model, as a trait: the real one is parallax-model's `TrainModel`, tests train a table.

use burn::tensor::{Device, Tensor, TensorData};
use parallax_model::train::TrainModel;

use crate::error::StepError;
use crate::parameters::{Gradients, Parameter, Parameters};

/// The CPU with gradients: where policies train unless they say otherwise.
pub fn training_device() -> Device {
    Device::flex().autodiff()
}

/// Makes the gradients of a loss of one forward pass's log-probabilities, in the order of [`Policy::leaves`].
pub type Backward<'a> = Box<dyn FnOnce(&Tensor<1>) -> Result<Gradients, StepError> + 'a>;

/// A model with trainable matrices and differentiable token log-probabilities.
pub trait Policy {
    /// The trainable matrices as leaves of the gradient tape, always in the same order.
    fn leaves(&self) -> Vec<(String, Tensor<2>)>;

    /// Replaces the values of every trainable matrix, in the order of [`Policy::leaves`].
    ///
    /// # Errors
    /// When names or shapes are not those of the leaves.
    fn assign(&mut self, parameters: &[Parameter]) -> Result<(), StepError>;

    /// `log p(tokens[t + 1] | tokens[..= t])` for each packed sequence, ragged: [T - N] rows for N sequences.
    ///
    /// # Errors
    /// When a token is not in the vocabulary or a sequence is longer than the context.
    fn token_logprobs(&self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<Tensor<1>, StepError>;

    /// The same model once more, to compute with at the same time.
    fn replica(&self) -> Self
    where
        Self: Sized;

    /// The same for learning: with what goes back through the model.
    ///
    /// # Errors
    /// As [`Policy::token_logprobs`].
    fn pass(&self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<(Tensor<1>, Backward<'_>), StepError>
    where
        Self: Sized,
    {
        whole_pass(self, tokens, cu_seqlens)
    }
}

impl Policy for TrainModel {
    fn leaves(&self) -> Vec<(String, Tensor<2>)> {
        self.parameters().to_vec()
    }

    fn assign(&mut self, parameters: &[Parameter]) -> Result<(), StepError> {
        let fits =
            |(p, (name, t)): (&Parameter, &(String, Tensor<2>))| p.name == *name && p.shape == t.dims();
        if parameters.len() != self.parameters().len() || !parameters.iter().zip(self.parameters()).all(fits)
        {
            return Err(StepError::model(
                "parameters of other names or shapes; is it another model or rank?",
            ));
        }
        let tensor =
            |p: &Parameter| Tensor::from_data(TensorData::new(p.values.clone(), p.shape), self.device());
        self.set_parameters(parameters.iter().map(tensor).collect());
        Ok(())
    }

    fn token_logprobs(&self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<Tensor<1>, StepError> {
        Self::token_logprobs(self, tokens, cu_seqlens).map_err(StepError::model)
    }

    fn replica(&self) -> Self {
        Self::replica(self)
    }

    fn pass(&self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<(Tensor<1>, Backward<'_>), StepError> {
        if !self.activation_checkpointing() {
            return whole_pass(self, tokens, cu_seqlens);
        }
        let (logprobs, pass) = self.checkpointed_logprobs(tokens, cu_seqlens).map_err(StepError::model)?;
        Ok((logprobs, Box::new(|loss| read(self, pass.gradients(loss)))))
    }
}

/// A forward pass whose every value is kept on the tape.
fn whole_pass<'a>(
    policy: &'a impl Policy,
    tokens: &[u32],
    cu_seqlens: &[u32],
) -> Result<(Tensor<1>, Backward<'a>), StepError> {
    let logprobs = policy.token_logprobs(tokens, cu_seqlens)?;
    Ok((logprobs, Box::new(|loss| read_gradients(policy, loss))))
}

/// The values of all leaves, copied to the host.
pub fn read_parameters(policy: &impl Policy) -> Parameters {
    let read = |(name, tensor): (String, Tensor<2>)| {
        let shape = tensor.dims();
        Parameter { name, shape, values: values(tensor.into_data()) }
    };
    policy.leaves().into_iter().map(read).collect()
}

/// Runs the backward pass of the scalar `loss` and reads every leaf's gradient.
fn read_gradients(policy: &impl Policy, loss: &Tensor<1>) -> Result<Gradients, StepError> {
    let tape = loss.backward();
    read(policy, policy.leaves().iter().map(|(_, leaf)| leaf.grad(&tape)).collect())
}

/// The gradient of each leaf, each of which takes part.
fn read(policy: &impl Policy, by_leaf: Vec<Option<Tensor<2>>>) -> Result<Gradients, StepError> {
    let value = |((name, _), gradient): ((String, Tensor<2>), Option<Tensor<2>>)| match gradient {
        Some(gradient) => Ok(values(gradient.into_data())),
        None => Err(StepError::NoGradient { name }),
    };
    Ok(Gradients { values: policy.leaves().into_iter().zip(by_leaf).map(value).collect::<Result<_, _>>()? })
}

/// A tensor's values as f32, without a copy where it already holds f32.
pub(crate) fn values(data: TensorData) -> Vec<f32> {
    data.convert::<f32>().try_into_vec().expect("converted to f32")
}
