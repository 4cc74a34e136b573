//! Errors, one enum per operation family. Messages name the thing and the remedy.

use std::path::PathBuf;

/// A model configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The architecture has no forward pass here.
    #[error("unknown architecture {architecture:?}; supported are {supported}")]
    UnknownArchitecture {
        /// As the file names it.
        architecture: String,
        /// The supported ones, for the message.
        supported: String,
    },
    /// A required field is absent.
    #[error("the model configuration lacks {field:?}; is the file complete?")]
    Missing {
        /// Name of the field in the file.
        field: String,
    },
    /// A field has a value that cannot be right.
    #[error("the model configuration has {field} = {value}: {reason}")]
    Invalid {
        /// Name of the field.
        field: String,
        /// Its value, printed.
        value: String,
        /// What it should be.
        reason: String,
    },
    /// Not JSON.
    #[error("the model configuration is not valid: {0}")]
    Json(#[from] serde_json::Error),
}

/// A checkpoint that cannot be opened or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither a file, a directory, `tiny` nor a repository in the local cache.
    #[error(
        "no model {model:?}: it is neither `tiny`, a GGUF file, a directory with config.json, nor a repository in the local hub cache ({cache}); give a path, or fetch it with `parallax fetch`"
    )]
    NotFound {
        /// What was asked for.
        model: String,
        /// The cache that was searched.
        cache: String,
    },
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The file's structure is broken: truncated or corrupt.
    #[error("{path}: {reason}; the file is truncated or corrupt, fetch it again")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was wrong, and where.
        reason: String,
    },
    /// A part of a file in several parts is not there.
    #[error("{path} is not there, part {number} of {count} of the model; fetch it into the same folder")]
    MissingPart {
        /// The missing file.
        path: PathBuf,
        /// Which part, from one.
        number: u64,
        /// How many there are.
        count: u64,
    },
    /// A tensor the model needs is not in the checkpoint.
    #[error("tensor {name:?} is not in the checkpoint, which has {n_tensors} tensors; is it complete?")]
    MissingTensor {
        /// Its name in the file.
        name: String,
        /// Number of tensors there are.
        n_tensors: usize,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor {name:?} has shape {found:?}, the configuration asks for {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape from the configuration.
        expected: Vec<usize>,
    },
    /// A number format without a reader.
    #[error("tensor {name:?} is stored as {dtype}; readable are {readable}")]
    UnsupportedDtype {
        /// Its name.
        name: String,
        /// The stored format.
        dtype: String,
        /// The formats that can be read.
        readable: &'static str,
    },
    /// The configuration is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// One of the above that says itself only what is wrong, with the place where it is.
    #[error("{path}: {source}")]
    In {
        /// The file or directory that was opened.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Self>,
    },
}

impl OpenError {
    /// Names the checkpoint, where the error does not do so itself.
    pub(crate) fn within(self, path: &std::path::Path) -> Self {
        match self {
            Self::MissingTensor { .. }
            | Self::Shape { .. }
            | Self::UnsupportedDtype { .. }
            | Self::Config(_) => Self::In { path: path.to_owned(), source: Box::new(self) },
            named => named,
        }
    }
}

/// A stage that cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The layer range does not fit the model.
    #[error("layers {start}..{end} are not a non-empty range within the model's {n_layers} layers")]
    Layers {
        /// First layer asked for.
        start: usize,
        /// One past the last.
        end: usize,
        /// Layers of the model.
        n_layers: usize,
    },
    /// The device was not compiled in or is not present.
    #[error("device {device} is not available: {reason}")]
    Device {
        /// What was asked for.
        device: String,
        /// Why not.
        reason: String,
    },
    /// A size that cannot be served.
    #[error("{what} = {value} is out of range: {reason}")]
    Size {
        /// The option.
        what: &'static str,
        /// Its value.
        value: usize,
        /// The bound.
        reason: String,
    },
    /// Reading the weights.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A tokenizer that was to be kept beside trained weights.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Packing the weights for the kernels.
    #[error("tensor {name:?}: {reason}")]
    Pack {
        /// Its name.
        name: String,
        /// What the kernels said.
        reason: String,
    },
}

impl LoadError {
    /// Names the checkpoint, where the error does not do so itself.
    pub(crate) fn within(self, path: &std::path::Path) -> Self {
        match self {
            Self::Open(error) => Self::Open(error.within(path)),
            other => other,
        }
    }
}

/// A forward pass that was refused or gave something that is not a number.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// Rows, pages or input lengths do not agree.
    #[error("forward batch: {reason}")]
    Batch {
        /// What does not agree.
        reason: String,
    },
    /// A token id past the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    Token {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A position past the model's context.
    #[error("position {position} is past the context of {max_context} tokens")]
    Context {
        /// The position.
        position: usize,
        /// The model's context length.
        max_context: usize,
    },
    /// NaN or infinity at a stage boundary.
    #[error(
        "hidden state is not finite {side} layers {start}..{end}, sequence {sequence}, position {position}"
    )]
    NotFinite {
        /// "entering" or "leaving".
        side: &'static str,
        /// First layer of the stage.
        start: usize,
        /// One past the last layer.
        end: usize,
        /// Index of the sequence in the batch.
        sequence: usize,
        /// Position of the row in its sequence.
        position: u32,
    },
    /// A GPU did not do what it was asked, in this pass or before: it ran out of memory, or is gone. Nothing loads
    /// the stage again by itself.
    #[error("the device failed, start the program again: {reason}")]
    Device {
        /// What its driver says.
        reason: String,
    },
}

/// A tokenizer that cannot be built or a text it cannot take.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The checkpoint brings no tokenizer.
    #[error(
        "{0} has no tokenizer: neither a tokenizer.json nor a tiktoken.model, nor a vocabulary of its own"
    )]
    Missing(PathBuf),
    /// A pre-tokenizer kind without an equivalent here.
    #[error("the GGUF file's tokenizer is {model:?} with pre-tokenizer {pre:?}; supported are {supported}")]
    Unsupported {
        /// `tokenizer.ggml.model`.
        model: String,
        /// `tokenizer.ggml.pre`.
        pre: String,
        /// The supported ones.
        supported: String,
    },
    /// Broken definition.
    #[error("tokenizer definition: {0}")]
    Invalid(String),
    /// Encoding or decoding.
    #[error("tokenizer: {0}")]
    Run(String),
    /// One of the above, with the file that it is about.
    #[error("{path}: {source}")]
    In {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Self>,
    },
}

impl TokenizerError {
    /// Names the file.
    pub(crate) fn within(self, path: &std::path::Path) -> Self {
        Self::In { path: path.to_owned(), source: Box::new(self) }
    }
}

/// A chat template that cannot be compiled or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// Syntax.
    #[error("chat template does not compile: {0}")]
    Compile(String),
    /// Rendering, `raise_exception` included.
    #[error("chat template: {0}")]
    Render(String),
}

/// An adapter that cannot be used with a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The file is not a safetensors adapter.
    #[error("adapter: {0}")]
    Invalid(String),
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// As many resident adapters as a stage takes.
    #[error("{limit} adapters are resident already; remove one first")]
    TooMany {
        /// The bound.
        limit: usize,
    },
    /// A module that no adapter can change here.
    #[error(
        "adapter has {tensor:?}: adapters of routed experts and of routers are not supported; merge it into its base model"
    )]
    Experts {
        /// The tensor's name.
        tensor: String,
    },
    /// A module that the model does not have.
    #[error("adapter names module {module:?}, which the model does not have")]
    UnknownModule {
        /// Its name.
        module: String,
    },
    /// Shapes do not fit.
    #[error("adapter module {module:?}: {which} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Module name.
        module: String,
        /// "A" or "B".
        which: &'static str,
        /// Shape in the adapter.
        found: [usize; 2],
        /// Shape the model needs.
        expected: [usize; 2],
    },
}

/// A checkpoint or adapter that cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// Serialisation.
    #[error("{path}: {reason}")]
    Encode {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// Only a fully trained model is saved as a checkpoint; a LoRA model saves its adapter.
    #[error("the model trains an adapter: save the adapter, or load it with full = true")]
    NotFull,
}
