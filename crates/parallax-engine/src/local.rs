//! Stages on this machine: one `parallax_model::Stage`, or several in a chain. The chain gives the bits of the whole.

use std::any::Any;
use std::borrow::Cow;
use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;

use parallax_model::{
    Adapter, Checkpoint, ForwardBatch, LoadError, LoadOptions, SequenceRows, Stage, StageInput,
    StateSave as ModelSave, Want as ModelWant,
};
use swarm_wire::{DType, LayerRange, PolicyVersion};

use crate::adapter_file::{AdapterFile, AdapterParser};
use crate::batch::{Batch, StageOutput, Tensor, Want};
use crate::error::StageError;
use crate::stage::{LogSoftmax, StageRunner, StageShape};
use crate::tap::ActivationTap;

/// The workspace's one log-softmax, for runners whose last stage is elsewhere.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    parallax_model::logprob::log_softmax(logits)
}

/// One loaded stage as a runner.
pub struct LocalStage {
    stage: Stage,
    shape: StageShape,
    tap: Option<Box<dyn ActivationTap>>,
}

impl std::fmt::Debug for LocalStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalStage").field("shape", &self.shape).field("tap", &self.tap.is_some()).finish()
    }
}

impl LocalStage {
    /// Loads a stage.
    ///
    /// # Errors
    /// Weights that cannot be read, or options that do not fit the model.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, LoadError> {
        Ok(Self::new(Stage::load(checkpoint, options)?))
    }

    /// A stage that is loaded already.
    ///
    /// # Panics
    /// With more than 2^32 layers.
    pub fn new(stage: Stage) -> Self {
        let (config, options) = (stage.config(), stage.options());
        let layer = |n: usize| u32::try_from(n).expect("a model has fewer than 2^32 layers");
        let layers = stage.layers();
        let shape = StageShape {
            layers: LayerRange::new(layer(layers.start), layer(layers.end))
                .expect("a loaded stage has layers"),
            n_layers: layer(config.n_layers),
            hidden: config.hidden,
            vocab: config.vocab,
            max_context: config.max_context,
            page_tokens: options.kv_page_tokens,
            n_pages: options.kv_pages,
            state_slots: stage.state_slots(),
        };
        Self { stage, shape, tap: None }
    }

    /// Shows every output to `tap` from now on.
    pub fn set_tap(&mut self, tap: Box<dyn ActivationTap>) {
        self.tap = Some(tap);
    }

    /// The stage inside.
    pub fn stage(&self) -> &Stage {
        &self.stage
    }

    fn model_batch(batch: &Batch) -> ForwardBatch {
        let sequences = batch.sequences.iter().map(|s| SequenceRows {
            state: s.state,
            start: s.start,
            rows: s.rows,
            drafted: s.drafted,
            saves: s.saves.iter().map(|s| ModelSave { position: s.position, slot: s.slot }).collect(),
            adapter: s.adapter,
            pages: s.pages.clone(),
            want: match s.want {
                Want::Nothing => ModelWant::Nothing,
                Want::LastLogits => ModelWant::LastLogits,
                Want::AllLogits => ModelWant::AllLogits,
            },
        });
        ForwardBatch { sequences: sequences.collect() }
    }

    /// What leaves the stage for `input` rows, still as numbers.
    fn run(
        &mut self,
        batch: &Batch,
        input: StageInput<'_>,
    ) -> Result<parallax_model::StageOutput, StageError> {
        let layers = self.shape.layers;
        let failed = |e: parallax_model::ForwardError| StageError::Forward {
            layers: layers.to_string(),
            reason: e.to_string(),
        };
        for copy in &batch.copies {
            self.stage.copy_page(copy.from, copy.to).map_err(failed)?;
        }
        for copy in &batch.state_copies {
            self.stage.copy_state(copy.from, copy.to).map_err(failed)?;
        }
        let output = self.stage.forward(&Self::model_batch(batch), input).map_err(failed)?;
        if let Some(tap) = &mut self.tap {
            tap.observe(
                batch,
                layers,
                &Tensor::from_f32(&[batch.n_rows(), self.shape.hidden], output.hidden.as_slice()),
            );
        }
        Ok(output)
    }

    fn pack(&self, batch: &Batch, output: parallax_model::StageOutput) -> StageOutput {
        let (hidden, vocab) = (self.shape.hidden, self.shape.vocab);
        if !self.shape.is_last() {
            return StageOutput {
                hidden: Some(Tensor::from_f32(&[batch.n_rows(), hidden], output.hidden)),
                logits: None,
            };
        }
        let wanted = batch.wanted_rows();
        let rows = || {
            let values: Vec<f32> = wanted
                .iter()
                .flat_map(|row| &output.hidden[row * hidden..(row + 1) * hidden])
                .copied()
                .collect();
            Tensor::from_f32(&[wanted.len(), hidden], values)
        };
        StageOutput {
            hidden: batch.want_hidden.then(rows),
            logits: (!wanted.is_empty()).then(|| Tensor::from_f32(&[wanted.len(), vocab], output.logits)),
        }
    }
}

/// What was read before, or is read now.
fn parsed(file: &AdapterFile) -> Result<Cow<'_, Adapter>, String> {
    match file.parsed::<Adapter>() {
        Some(adapter) => Ok(Cow::Borrowed(adapter)),
        None => Adapter::from_bytes(file).map(Cow::Owned).map_err(|e| e.to_string()),
    }
}

fn parse(bytes: &[u8]) -> Result<Arc<dyn Any + Send + Sync>, String> {
    Adapter::from_bytes(bytes).map(|adapter| Arc::new(adapter) as Arc<_>).map_err(|e| e.to_string())
}

fn misfit(reason: impl Display) -> StageError {
    StageError::Unfit { reason: format!("the adapter does not fit: {reason}") }
}

/// To all stages of a chain, or to none.
fn set_adapter(
    stages: &mut [LocalStage],
    version: PolicyVersion,
    adapter: Option<&AdapterFile>,
) -> Result<(), StageError> {
    let wrong = |reason| StageError::Adapter { version, reason };
    let adapter = adapter.map(parsed).transpose().map_err(wrong)?;
    if let Some(adapter) = &adapter {
        adapter.check(stages[0].stage.config()).map_err(|e| wrong(e.to_string()))?;
    }
    let mut stages = stages.iter_mut().map(|s| &mut s.stage);
    stages.try_for_each(|stage| stage.set_adapter(adapter.as_deref())).map_err(|e| wrong(e.to_string()))
}

/// To all stages of a chain, or to none.
fn add_adapter(stages: &mut [LocalStage], id: u32, adapter: &AdapterFile) -> Result<(), StageError> {
    let adapter = parsed(adapter).map_err(misfit)?;
    adapter.check(stages[0].stage.config()).map_err(misfit)?;
    stages.iter_mut().try_for_each(|s| s.stage.add_adapter(id, &adapter)).map_err(misfit)
}

impl StageRunner for LocalStage {
    fn shape(&self) -> StageShape {
        self.shape
    }

    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        let rows = batch.n_rows();
        let output = if input.dtype() == DType::U32 {
            let ids = input.to_ids(rows)?;
            self.run(batch, StageInput::Tokens(&ids))?
        } else {
            let hidden = input.to_f32_rows(rows, self.shape.hidden)?;
            self.run(batch, StageInput::Hidden(&hidden))?
        };
        Ok(self.pack(batch, output))
    }

    fn set_adapter(
        &mut self,
        version: PolicyVersion,
        adapter: Option<&AdapterFile>,
    ) -> Result<(), StageError> {
        set_adapter(std::slice::from_mut(self), version, adapter)
    }

    fn adapter_parser(&self) -> Option<AdapterParser> {
        Some(parse)
    }

    fn add_adapter(&mut self, id: u32, adapter: &AdapterFile) -> Result<(), StageError> {
        add_adapter(std::slice::from_mut(self), id, adapter)
    }

    fn remove_adapter(&mut self, id: u32) {
        self.stage.remove_adapter(id);
    }

    fn remove_adapters(&mut self) {
        self.stage.remove_adapters();
    }

    fn log_softmax(&self) -> LogSoftmax {
        log_softmax
    }
}

/// A whole model as a chain of stages in this process.
#[derive(Debug)]
pub struct Pipeline {
    stages: Vec<LocalStage>,
}

impl Pipeline {
    /// Cuts the model into `n_stages` parts of nearly equal length and loads them. `loaded` hears of every part.
    ///
    /// # Errors
    /// No stages or more than layers, and what [`LocalStage::load`] says.
    pub fn load(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        n_stages: usize,
        mut loaded: impl FnMut(usize),
    ) -> Result<Self, LoadError> {
        let n_layers = checkpoint.config().n_layers;
        let mut stages = Vec::with_capacity(n_stages.min(n_layers));
        for layers in cut(n_layers, n_stages) {
            // An impossible cut is an empty range, which `load` refuses by name.
            stages.push(LocalStage::load(checkpoint, &LoadOptions { layers, ..options.clone() })?);
            loaded(stages.len());
        }
        Ok(Self { stages })
    }

    /// The parts, first to last.
    pub fn stages(&self) -> &[LocalStage] {
        &self.stages
    }

    /// Bytes of weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.stages.iter().map(|s| s.stage.weight_bytes()).sum()
    }
}

/// Half-open ranges that cover `n_layers`, the first ones longer by one where it does not divide.
fn cut(n_layers: usize, n_stages: usize) -> Vec<Range<usize>> {
    if n_stages == 0 || n_stages > n_layers {
        return std::iter::once(n_layers..n_layers).collect();
    }
    (0..n_stages)
        .map(|i| (i * n_layers).div_ceil(n_stages)..((i + 1) * n_layers).div_ceil(n_stages))
        .collect()
}

impl StageRunner for Pipeline {
    fn shape(&self) -> StageShape {
        let (first, last) = (&self.stages[0].shape, &self.stages[self.stages.len() - 1].shape);
        let layers = LayerRange::new(first.layers.start(), last.layers.end()).expect("stages are in order");
        StageShape { layers, ..*first }
    }

    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        let ids = input.to_ids(batch.n_rows())?;
        let mut output = self.stages[0].run(batch, StageInput::Tokens(&ids))?;
        for stage in &mut self.stages[1..] {
            output = stage.run(batch, StageInput::Hidden(&output.hidden))?;
        }
        let last = self.stages.last().expect("a pipeline has stages");
        Ok(last.pack(batch, output))
    }

    fn set_adapter(
        &mut self,
        version: PolicyVersion,
        adapter: Option<&AdapterFile>,
    ) -> Result<(), StageError> {
        set_adapter(&mut self.stages, version, adapter)
    }

    fn adapter_parser(&self) -> Option<AdapterParser> {
        Some(parse)
    }

    fn add_adapter(&mut self, id: u32, adapter: &AdapterFile) -> Result<(), StageError> {
        add_adapter(&mut self.stages, id, adapter)
    }

    fn remove_adapter(&mut self, id: u32) {
        for stage in &mut self.stages {
            stage.stage.remove_adapter(id);
        }
    }

    fn remove_adapters(&mut self) {
        self.stages.iter_mut().for_each(|stage| stage.stage.remove_adapters());
    }

    fn log_softmax(&self) -> LogSoftmax {
        log_softmax
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_cover_every_layer_once_and_differ_by_one_at_most() {
        for n_layers in 1..40 {
            for n_stages in 1..=n_layers {
                let ranges = cut(n_layers, n_stages);
                assert_eq!(
                    ranges.iter().cloned().flatten().collect::<Vec<_>>(),
                    (0..n_layers).collect::<Vec<_>>()
                );
                let lengths = ranges.iter().map(Range::len);
                assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1, "{ranges:?}");
            }
        }
        assert!(cut(3, 4)[0].is_empty() && cut(3, 0)[0].is_empty());
    }
}
