//! From a checkpoint on disk to a forward pass over any contiguous range of layers, on Burn.
//!
//! One definition of the forward pass (`Stage` and `TrainModel` share `layer.rs`), read by the
//! engine, the trainer and the verifier: if the three disagreed, importance ratios would drift and honest
//! provers would be convicted.
//!
//! ```no_run
//! use parallax_model::{Checkpoint, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, Want};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::resolve("models/SmolLM2-135M-Instruct.Q4_1.gguf")?;
//! let tokens = checkpoint.tokenizer()?.encode("Gravity is", false)?;
//! let mut stage = Stage::load(&checkpoint, &LoadOptions::whole(&checkpoint))?;
//! let (rows, want) = (tokens.len() as u32, Want::LastLogits);
//! let rows = SequenceRows { rows, pages: vec![0], want, ..SequenceRows::default() };
//! let output = stage.forward(&ForwardBatch { sequences: vec![rows] }, StageInput::Tokens(&tokens))?;
//! println!("{:?}", parallax_model::logprob::argmax(&output.logits));
//! # Ok(()) }
//! ```
//!
//! # Map
//! - [`config`]: a model's layers as data, from config.json or GGUF metadata; `arch/`: what is special about each
//!   architecture, one short file each; [`catalogue`]: known checkpoints
//! - `checkpoint`: one checkpoint, whatever its container; [`hub`]: names of models elsewhere and the cache of what was fetched; `weights/`: GGUF, safetensors, names
//! - [`tokenizer`], [`chat_template`]: text <-> tokens, messages -> prompt
//! - `layer`: runs any layer that the configuration describes; `ops/`: the hot operations as Burn extension ops, fused for inference, and composed of Burn's own
//! - `load`: weights packed for the kernels; `stage`: what one node holds; `train`: the same layers with gradients
//! - `adapter`: LoRA adapters, PEFT names; [`logprob`]: the one log-probability

#![cfg_attr(
    not(feature = "train"),
    allow(
        dead_code,
        reason = "operations carry their gradients, and readers serve loaders, that are not compiled in"
    )
)]

#[cfg(all(feature = "gpu", not(any(feature = "cuda", feature = "wgpu"))))]
compile_error!("the feature `gpu` is what `cuda` and `wgpu` share: choose one of them");

mod adapter;
mod arch;
pub mod catalogue;
pub mod chat_template;
mod checkpoint;
pub mod config;
#[cfg(feature = "cpu")]
mod device;
mod error;
mod files;
pub mod hub;
#[cfg(feature = "cpu")]
mod layer;
#[cfg(feature = "cpu")]
mod load;
pub mod logprob;
#[cfg(feature = "cpu")]
mod ops;
mod options;
#[cfg(feature = "cpu")]
mod stage;
#[cfg(test)]
#[cfg(feature = "train")]
mod testing;
pub mod tokenizer;
#[cfg(feature = "train")]
pub mod train;
pub mod weights;

pub use adapter::{Adapter, LoraTensors};
pub use chat_template::{ChatMessage, ChatTemplate, Conversation};
pub use checkpoint::{Checkpoint, GenerationDefaults, TensorSpan};
pub use config::{Family, LayerConfig, ModelConfig, RopeScaling};
pub use error::{
    AdapterError, ConfigError, ForwardError, LoadError, OpenError, SaveError, TemplateError, TokenizerError,
};
pub use options::{BaseDtype, DeviceKind, KvFormat, LoadOptions, WeightDtype};
#[cfg(feature = "cpu")]
pub use stage::{ForwardBatch, SequenceRows, Stage, StageInput, StageOutput, StateSave, Want};
pub use tokenizer::{StreamDecoder, TokenBytes, Tokenizer};
#[cfg(feature = "train")]
pub use train::{LoraConfig, TrainModel, TrainOptions};
