//! The same layers on an autodiff device: gradients for an adapter, or for all weights.

use std::path::Path;

use burn::tensor::Tensor;

use crate::{
    adapter::Adapter,
    checkpoint::Checkpoint,
    error::{ForwardError, LoadError, SaveError},
};

/// A new adapter to train.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Inner width.
    pub rank: usize,
    /// Numerator of the scale alpha / rank.
    pub alpha: f32,
    /// Modules of every layer that get one, e.g. `q_proj`.
    pub targets: Vec<String>,
    /// Seed of A's initial values; B starts at zero.
    pub seed: u64,
}

/// What to train.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainOptions {
    /// An adapter on frozen weights.
    pub lora: Option<LoraConfig>,
    /// All weights.
    pub full: bool,
}

/// A model whose parameters have gradients.
#[derive(Debug)]
pub struct TrainModel {
    parameters: Vec<(String, Tensor<2>)>,
}

impl TrainModel {
    /// Loads a checkpoint in f32 for training.
    ///
    /// # Errors
    /// Neither an adapter nor all weights are asked for, an unknown target, weights that cannot be read.
    pub fn from_checkpoint(_checkpoint: &Checkpoint, _options: &TrainOptions) -> Result<Self, LoadError> {
        Ok(Self { parameters: Vec::new() })
    }

    /// The trained leaves by name, in a fixed order. Matrices are [out, in]; norm weights are [1, H].
    pub fn parameters(&self) -> &[(String, Tensor<2>)] {
        &self.parameters
    }

    /// Replaces the leaves, in the order of [`Self::parameters`]; each is detached and gets a new gradient.
    ///
    /// # Panics
    /// The number of tensors or a shape differs: a mistake of the calling program.
    pub fn set_parameters(&mut self, values: Vec<Tensor<2>>) {
        assert_eq!(values.len(), self.parameters.len(), "one tensor per parameter");
    }

    /// log p(token[t + 1] | token[..= t]) inside each of the packed sequences `cu_seqlens[i]..cu_seqlens[i + 1]`:
    /// lengths minus one values per sequence, one after the other. Differentiable.
    ///
    /// # Errors
    /// Lengths that do not fit, a token outside the vocabulary, a sequence longer than the context.
    pub fn token_logprobs(&self, _tokens: &[u32], _cu_seqlens: &[u32]) -> Result<Tensor<1>, ForwardError> {
        Err(ForwardError::Batch { reason: "no layers".to_owned() })
    }

    /// The adapter as it is now; `None` when all weights are trained.
    pub fn adapter(&self) -> Option<Adapter> {
        None
    }

    /// Writes config.json, model.safetensors and the tokenizer of a fully trained model.
    ///
    /// # Errors
    /// The model trains an adapter, or the directory cannot be written.
    pub fn save_checkpoint(&self, _dir: &Path) -> Result<(), SaveError> {
        Err(SaveError::NotFull)
    }
}
