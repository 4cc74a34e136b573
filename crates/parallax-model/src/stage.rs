//! `Stage`: the contiguous range of layers that one node holds, with its paged key-value store.

use crate::{
    adapter::Adapter,
    checkpoint::Checkpoint,
    error::{AdapterError, ForwardError, LoadError},
    options::LoadOptions,
};

/// Which rows of a sequence need the output head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Want {
    /// None: the rows only fill the key-value store.
    #[default]
    Nothing,
    /// The last row.
    LastLogits,
    /// Every row.
    AllLogits,
}

/// The rows of one sequence in a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequenceRows {
    /// Position of the first row.
    pub start: u32,
    /// Number of rows; position `start + rows` is the next free one.
    pub rows: u32,
    /// Page table: pages of the store covering positions `0..start + rows`.
    pub pages: Vec<u32>,
    /// Which rows need logits.
    pub want: Want,
}

/// What one forward pass runs: the rows of several sequences, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForwardBatch {
    /// The sequences.
    pub sequences: Vec<SequenceRows>,
}

impl ForwardBatch {
    /// T: rows of all sequences.
    pub fn n_rows(&self) -> usize {
        self.sequences.iter().map(|s| s.rows as usize).sum()
    }

    /// Rows that need logits.
    pub fn n_wanted(&self) -> usize {
        let wanted = |s: &SequenceRows| match s.want {
            Want::Nothing => 0,
            Want::LastLogits => s.rows.min(1) as usize,
            Want::AllLogits => s.rows as usize,
        };
        self.sequences.iter().map(wanted).sum()
    }
}

/// What enters a stage.
#[derive(Clone, Copy, Debug)]
pub enum StageInput<'a> {
    /// Token ids, one per row: the first stage.
    Tokens(&'a [u32]),
    /// Hidden rows of the stage before. [T, H]
    Hidden(&'a [f32]),
}

/// What leaves a stage.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageOutput {
    /// [T, H]: input of the next stage; on the last stage the rows after the final norm.
    pub hidden: Vec<f32>,
    /// [wanted rows, V] in the order of the rows; empty except on the last stage.
    pub logits: Vec<f32>,
}

/// A range of layers, loaded and ready. One forward pass at a time; `Send`, so that a thread can own it.
#[derive(Debug)]
pub struct Stage {
    options: LoadOptions,
}

impl Stage {
    /// Loads the layers `options.layers`; the embedding too when they start at 0, the final norm and the head
    /// when they end at the last.
    ///
    /// # Errors
    /// A layer range or size that does not fit, a device that is not there, weights that cannot be read.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, LoadError> {
        let n_layers = checkpoint.config().n_layers;
        if options.layers.is_empty() || options.layers.end > n_layers {
            let (start, end) = (options.layers.start, options.layers.end);
            return Err(LoadError::Layers { start, end, n_layers });
        }
        Ok(Self { options: options.clone() })
    }

    /// How it was loaded.
    pub fn options(&self) -> &LoadOptions {
        &self.options
    }

    /// Computes a batch: writes the key-value store at the rows' positions and returns what leaves.
    ///
    /// # Errors
    /// A batch that does not fit together or leaves the context, a token outside the vocabulary, a hidden state
    /// that is not finite.
    pub fn forward(
        &mut self,
        _batch: &ForwardBatch,
        _input: StageInput<'_>,
    ) -> Result<StageOutput, ForwardError> {
        Err(ForwardError::Batch { reason: "this build has no device: enable the feature `cpu`".to_owned() })
    }

    /// Applies an adapter from the next forward pass on, un-merged; `None` removes it. Modules of layers that
    /// this stage does not hold are ignored.
    ///
    /// # Errors
    /// A module or shape that the model does not have.
    pub fn set_adapter(&mut self, _adapter: Option<&Adapter>) -> Result<(), AdapterError> {
        Ok(())
    }
}
