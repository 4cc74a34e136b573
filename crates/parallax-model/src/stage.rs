//! `Stage`: the contiguous range of layers that one node holds, with its paged key-value store.

mod batch;

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use burn::tensor::{Device, Tensor, TensorData};

use crate::{
    adapter::Adapter,
    checkpoint::Checkpoint,
    config::{LayerConfig, ModelConfig},
    device,
    error::{AdapterError, ForwardError, LoadError},
    layer::{self, AdapterSlot, Attend, LayerWeights, Linear, LinearWeight, NormWeights, Route},
    load::{self, Loader, Rotations},
    ops::{
        self,
        attention::{KvStore, PagedRows},
        delta::StateStore,
        fused::FusedParts,
        head,
    },
    options::{KvFormat, LoadOptions},
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
    /// Slot of its recurrent state, below [`Stage::state_slots`]; only recurrent layers look at it. Rows from position 0 begin
    /// anew, others where the state stands; within a batch every sequence has its own slot.
    pub state: u32,
    /// Position of the first row.
    pub start: u32,
    /// Number of rows; position `start + rows` is the next free one.
    pub rows: u32,
    /// Page table: pages of the store covering positions `0..start + rows`.
    pub pages: Vec<u32>,
    /// Which rows need logits.
    pub want: Want,
    /// The last so many positions of the sequence, of these rows or of batches before, may be taken back: the next rows begin
    /// at any of them, or behind. At most 128 together with the rows of a batch that has some. Only recurrent layers look at
    /// it, elsewhere every position can be taken back.
    pub drafted: u32,
    /// Copies of the recurrent state to keep on the way, by rising positions.
    pub saves: Vec<StateSave>,
    /// Number of the resident adapter ([`Stage::add_adapter`]) that its rows pass through; `None` is the one that
    /// [`Stage::set_adapter`] installed, if any.
    pub adapter: Option<u32>,
}

/// A copy of a recurrent state to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSave {
    /// Of the state before the row at this position, which is in the batch.
    pub position: u32,
    /// Where to; nobody else's slot in the batch.
    pub slot: u32,
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
    config: ModelConfig,
    options: LoadOptions,
    device: Device,
    route: Route,
    layers: Vec<LayerWeights>,
    /// Of each layer, with its adapters; empty when these have changed, until the next pass.
    fused: Vec<Arc<FusedParts>>,
    embedding: Option<LinearWeight>,
    head: Option<(NormWeights, Linear)>,
    store: Arc<KvStore>,
    states: Arc<StateStore>,
    weight_bytes: u64,
    /// What sequences get that name no adapter.
    default_adapter: AdapterSlot,
    /// Resident adapters by number.
    adapters: BTreeMap<u32, AdapterSlot>,
}

/// Resident adapters of one stage: each costs memory, and a little time in every pass that uses it.
const MAX_ADAPTERS: usize = 256;

impl Stage {
    /// Loads the layers `options.layers`; the embedding too when they start at 0, the final norm and the head
    /// when they end at the last.
    ///
    /// # Errors
    /// A layer range or size that does not fit, a device that is not there, weights that cannot be read.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, LoadError> {
        let (device, route) = device::open(options.device)?;
        Self::load_on(checkpoint, options, device, route).map_err(|e| e.within(checkpoint.location()))
    }

    pub(crate) fn load_on(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        device: Device,
        route: Route,
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config().clone();
        let n_layers = config.n_layers;
        let range = options.layers.clone();
        if range.is_empty() || range.end > n_layers {
            return Err(LoadError::Layers { start: range.start, end: range.end, n_layers });
        }
        check_store(options, &config, route)?;
        if route != Route::Kernels && !config.runs_composed() {
            return Err(LoadError::Device {
                device: options.device.to_string(),
                reason: format!("{} runs on the CPU only", config.family.name()),
            });
        }
        #[cfg(feature = "gpu")]
        if route == Route::Gpu
            && let Some(dim) = config.layers[range.clone()].iter().filter_map(LayerConfig::head_dim).max()
            && dim > parallax_kernels::gpu::attention::HEAD_DIM_MAX
        {
            return Err(LoadError::Device {
                device: options.device.to_string(),
                reason: format!("heads of {dim} elements run on the CPU only"),
            });
        }
        let loader = Loader {
            index: checkpoint.index(),
            config: &config,
            dtype: options.dtype,
            device: device.clone(),
            route,
            keep_transposed: false,
        };
        if route != Route::Kernels && options.kv_format != KvFormat::F32 {
            return Err(LoadError::Device {
                device: options.device.to_string(),
                reason: format!(
                    "a key-value store in {} exists on the CPU only; leave it at f32",
                    options.kv_format
                ),
            });
        }
        let mut rotations = Rotations::new(&config, options.kv_pages * options.kv_page_tokens);
        let layers = range.clone().map(|i| loader.layer(i, &mut rotations)).collect::<Result<Vec<_>, _>>()?;
        let embedding = (range.start == 0).then(|| loader.table(load::EMBEDDING)).transpose()?;
        let head = if range.end == n_layers {
            let weight = match &embedding {
                Some(table) if config.tied_embeddings => table.clone(),
                _ => loader.table(load::head_name(&config))?,
            };
            Some((loader.final_norm()?, Linear::bare(weight)))
        } else {
            None
        };
        let (held, pages, page_tokens) =
            (&config.layers[range.clone()], options.kv_pages, options.kv_page_tokens);
        let store = match route {
            Route::Kernels => KvStore::new(held, pages, page_tokens, options.kv_format),
            #[cfg(feature = "gpu")]
            Route::Gpu => KvStore::on_device(held, pages, page_tokens, &device),
            Route::Composed => KvStore::tensors(held, pages, page_tokens, &device),
        };
        // What did not fit is told now, not by the first pass.
        device.sync().map_err(|e| LoadError::Device {
            device: options.device.to_string(),
            reason: format!("uploading the weights failed: {e}"),
        })?;
        let store = Arc::new(store);
        let slots = config.state_slots((pages * page_tokens) as u64, options.kv_format);
        let mut stage = Self {
            config,
            options: options.clone(),
            device,
            route,
            layers,
            fused: Vec::new(),
            embedding,
            head,
            store,
            states: Arc::new(StateStore::new(slots)),
            weight_bytes: 0,
            default_adapter: AdapterSlot::default(),
            adapters: BTreeMap::new(),
        };
        stage.weight_bytes = stage.count_bytes();
        Ok(stage)
    }

    fn count_bytes(&self) -> u64 {
        let linears = self.layers.iter().flat_map(LayerWeights::linears);
        let mut bytes: usize = linears.map(|l| l.weight.bytes()).sum();
        bytes += self.layers.iter().map(LayerWeights::inner_bytes).sum::<usize>();
        bytes += self.embedding.as_ref().map_or(0, LinearWeight::bytes);
        let shared_table = self.embedding.is_some() && self.config.tied_embeddings;
        bytes += self.head.as_ref().filter(|_| !shared_table).map_or(0, |(_, head)| head.weight.bytes());
        bytes as u64
    }

    /// How it was loaded.
    pub fn options(&self) -> &LoadOptions {
        &self.options
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The layers it holds.
    pub fn layers(&self) -> Range<usize> {
        self.options.layers.clone()
    }

    /// Whether tokens enter here.
    pub fn is_first(&self) -> bool {
        self.embedding.is_some()
    }

    /// Whether logits leave here.
    pub fn is_last(&self) -> bool {
        self.head.is_some()
    }

    /// Bytes of the linear weights and tables in memory; what one decode step reads.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Whether some layer keeps a state per sequence instead of something per token.
    pub fn is_recurrent(&self) -> bool {
        self.config.layers[self.options.layers.clone()].iter().any(LayerConfig::is_recurrent)
    }

    /// Recurrent states that it can hold; none where no layer of the model is recurrent.
    pub fn state_slots(&self) -> usize {
        self.states.len()
    }

    /// Bytes of the key-value store and the recurrent states once every page and slot has been written; not the inputs of guesses
    /// that may yet be taken back, a few rows of each sequence that has such.
    pub fn kv_bytes(&self) -> u64 {
        let held = &self.config.layers[self.options.layers.clone()];
        let state: u64 = held.iter().map(LayerConfig::state_bytes).sum();
        self.store.bytes() as u64 + state * self.state_slots() as u64
    }

    /// Tokens that fit into the key-value store.
    pub fn kv_capacity_tokens(&self) -> usize {
        self.options.kv_pages * self.options.kv_page_tokens
    }

    /// Copies the keys and values of page `from` into page `to`, in every layer: before somebody writes on a page that others
    /// read.
    ///
    /// # Errors
    /// A page that the store does not have.
    pub fn copy_page(&mut self, from: u32, to: u32) -> Result<(), ForwardError> {
        let n_pages = self.options.kv_pages;
        if let Some(page) = [from, to].into_iter().find(|page| *page as usize >= n_pages) {
            return Err(ForwardError::Batch {
                reason: format!("page {page} of a store of {n_pages} was to be copied"),
            });
        }
        self.store.copy_page(from as usize, to as usize);
        Ok(())
    }

    /// Copies a recurrent state, in every layer: a sequence that continues another begins so.
    ///
    /// # Errors
    /// A slot that is not there.
    pub fn copy_state(&mut self, from: u32, to: u32) -> Result<(), ForwardError> {
        self.states.copy(from, to)
    }

    /// Computes a batch: writes the key-value store at the rows' positions and returns what leaves.
    ///
    /// # Errors
    /// A batch that does not fit together or leaves the context, a token outside the vocabulary, a hidden state
    /// that is not finite, or a device that failed.
    pub fn forward(
        &mut self,
        batch: &ForwardBatch,
        input: StageInput<'_>,
    ) -> Result<StageOutput, ForwardError> {
        let rows = Arc::new(batch::rows(batch, &self.options, &self.config)?);
        self.choose_adapters(batch)?;
        if self.fused.is_empty() {
            self.fused = self.layers.iter().map(|layer| Arc::new(layer.fused())).collect();
        }
        let x = self.enter(batch, input)?;
        if !self.is_recurrent() {
            return self.run(batch, x, rows);
        }
        let sequences = Arc::clone(&rows.sequences);
        self.states.begin(&sequences)?;
        let output = self.run(batch, x, rows)?;
        self.states.commit(&sequences);
        Ok(output)
    }

    fn run(
        &self,
        batch: &ForwardBatch,
        mut x: Tensor<2>,
        rows: Arc<PagedRows>,
    ) -> Result<StageOutput, ForwardError> {
        let (store, states) = (Arc::clone(&self.store), Arc::clone(&self.states));
        let attend = Attend::Paged { store, states, rows };
        for (index, (layer, parts)) in self.layers.iter().zip(&self.fused).enumerate() {
            x = layer::forward_fused(layer, parts, x, index, &attend, self.route);
        }
        let Some((norm, head)) = &self.head else {
            let hidden = values(x)?;
            self.check_finite("leaving", &hidden, batch)?;
            return Ok(StageOutput { hidden, logits: Vec::new() });
        };
        let x = norm.forward(x, self.route);
        let wanted = batch::wanted_rows(batch);
        if self.route != Route::Kernels {
            // A device has all of the pass before it is asked for the first value.
            let logits =
                (!wanted.is_empty()).then(|| head.forward(&ops::composed::select(&x, &wanted), self.route));
            let hidden = values(x)?;
            self.check_finite("leaving", &hidden, batch)?;
            let logits = logits.map_or(Ok(Vec::new()), values)?;
            return Ok(StageOutput { hidden, logits: self.bend(logits) });
        }
        let hidden = values(x)?;
        self.check_finite("leaving", &hidden, batch)?;
        let logits = if wanted.is_empty() {
            Vec::new()
        } else {
            let picked = ops::linear::pick(&hidden, self.config.hidden, &wanted);
            self.bend(values(head.forward(&self.matrix(picked), self.route))?)
        };
        Ok(StageOutput { hidden, logits })
    }

    /// Logits as the configuration scales and caps them.
    fn bend(&self, mut logits: Vec<f32>) -> Vec<f32> {
        head::bend(&mut logits, self.config.logit_scale, self.config.logit_softcap);
        logits
    }

    fn matrix(&self, values: Vec<f32>) -> Tensor<2> {
        let shape = [values.len() / self.config.hidden, self.config.hidden];
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// The hidden state that enters the first layer.
    fn enter(&self, batch: &ForwardBatch, input: StageInput<'_>) -> Result<Tensor<2>, ForwardError> {
        let n_rows = batch.n_rows();
        let mismatch = |what: &str, got: usize, expected: usize| ForwardError::Batch {
            reason: format!("{what} has {got} entries for {n_rows} rows, expected {expected}"),
        };
        match (input, &self.embedding) {
            (StageInput::Tokens(tokens), Some(table)) => {
                if tokens.len() != n_rows {
                    return Err(mismatch("the token list", tokens.len(), n_rows));
                }
                layer::embed(table, tokens, &self.config, self.route, &self.device)
            }
            (StageInput::Hidden(hidden), None) => {
                if hidden.len() != n_rows * self.config.hidden {
                    return Err(mismatch("the hidden state", hidden.len(), n_rows * self.config.hidden));
                }
                self.check_finite("entering", hidden, batch)?;
                Ok(self.matrix(hidden.to_vec()))
            }
            (StageInput::Tokens(_), None) => Err(ForwardError::Batch {
                reason: format!("tokens given to layers {:?}, which take hidden states", self.options.layers),
            }),
            (StageInput::Hidden(_), Some(_)) => Err(ForwardError::Batch {
                reason: "hidden states given to the first stage, which takes tokens".to_owned(),
            }),
        }
    }

    fn check_finite(
        &self,
        side: &'static str,
        hidden: &[f32],
        batch: &ForwardBatch,
    ) -> Result<(), ForwardError> {
        // One pass without branches, over bits: a maximum of integers may be taken in any order, so it vectorises. The
        // position is looked for only when there is something to find.
        let magnitude = |v: &f32| v.to_bits() & !(1 << 31);
        if hidden.iter().fold(0, |most, v| magnitude(v).max(most)) < f32::INFINITY.to_bits() {
            return Ok(());
        }
        let row = hidden.iter().position(|v| !v.is_finite()).unwrap_or(0) / self.config.hidden;
        let (sequence, position) = batch::locate(batch, row);
        let Range { start, end } = self.options.layers;
        Err(ForwardError::NotFinite { side, start, end, sequence, position })
    }

    /// Applies an adapter from the next forward pass on, un-merged; `None` removes it. Modules of layers that
    /// this stage does not hold are ignored.
    ///
    /// # Errors
    /// A module or shape that the model does not have; the adapter applied before stays.
    pub fn set_adapter(&mut self, adapter: Option<&Adapter>) -> Result<(), AdapterError> {
        self.fused.clear();
        let slot = &self.default_adapter;
        load::attach(&mut self.layers, &self.options.layers, &self.config, slot, adapter, &self.device)
    }

    /// Makes an adapter resident under a number, beside others, for the sequences that name it
    /// ([`SequenceRows::adapter`]); an adapter that had the number is replaced. Sequences with different adapters may
    /// share a batch: each row has the bits that it has alone.
    ///
    /// # Errors
    /// A module or shape that the model does not have, or too many adapters; those applied before stay.
    pub fn add_adapter(&mut self, id: u32, adapter: &Adapter) -> Result<(), AdapterError> {
        if self.adapters.len() >= MAX_ADAPTERS && !self.adapters.contains_key(&id) {
            return Err(AdapterError::TooMany { limit: MAX_ADAPTERS });
        }
        let slot = AdapterSlot { id: Some(id), ..AdapterSlot::default() };
        self.fused.clear();
        let range = &self.options.layers;
        load::attach(&mut self.layers, range, &self.config, &slot, Some(adapter), &self.device)?;
        self.adapters.insert(id, slot);
        Ok(())
    }

    /// Removes a resident adapter; whether there was one. Sequences must not name it any more.
    pub fn remove_adapter(&mut self, id: u32) -> bool {
        let Some(slot) = self.adapters.remove(&id) else { return false };
        self.fused.clear();
        let range = &self.options.layers;
        load::attach(&mut self.layers, range, &self.config, &slot, None, &self.device)
            .expect("removing checks nothing that could fail");
        true
    }

    /// Removes all resident adapters.
    pub fn remove_adapters(&mut self) {
        for id in self.adapters.keys().copied().collect::<Vec<_>>() {
            self.remove_adapter(id);
        }
    }

    /// Tells each adapter which rows of the batch are its own.
    fn choose_adapters(&self, batch: &ForwardBatch) -> Result<(), ForwardError> {
        let named = |id: Option<u32>| {
            let mut first = 0;
            let mut rows = Vec::new();
            for sequence in &batch.sequences {
                if sequence.adapter == id {
                    rows.extend(first..first + sequence.rows);
                }
                first += sequence.rows;
            }
            rows
        };
        for (i, sequence) in batch.sequences.iter().enumerate() {
            if let Some(id) = sequence.adapter.filter(|id| !self.adapters.contains_key(id)) {
                let resident: Vec<String> = self.adapters.keys().map(u32::to_string).collect();
                let resident = resident.join(", ");
                return Err(ForwardError::Batch {
                    reason: format!("sequence {i} names adapter {id}, resident are [{resident}]"),
                });
            }
        }
        let all_default = batch.sequences.iter().all(|sequence| sequence.adapter.is_none());
        self.default_adapter.rows.set((!all_default).then(|| named(None)));
        for (id, slot) in &self.adapters {
            slot.rows.set(Some(named(Some(*id))));
        }
        Ok(())
    }
}

/// Values of a tensor, row-major; waits for its device.
fn values(x: Tensor<2>) -> Result<Vec<f32>, ForwardError> {
    let data = x.try_into_data().map_err(|e| ForwardError::Device { reason: e.to_string() })?;
    Ok(data.try_to_vec().expect("activations are f32"))
}

/// Largest key-value store of one layer: what can be addressed with room to spare.
const MAX_STORE_BYTES: usize = 1 << 39;
/// The same on a GPU, whose kernels count f32 keys and values in 32 bits each.
#[cfg(feature = "gpu")]
const MAX_DEVICE_STORE_BYTES: usize = 8 * (u32::MAX as usize);

fn check_store(options: &LoadOptions, config: &ModelConfig, route: Route) -> Result<(), LoadError> {
    let most = match route {
        #[cfg(feature = "gpu")]
        Route::Gpu => MAX_DEVICE_STORE_BYTES,
        _ => MAX_STORE_BYTES,
    };
    let size = |what, value, reason: &str| Err(LoadError::Size { what, value, reason: reason.to_owned() });
    if !(1..=4096).contains(&options.kv_page_tokens) || !options.kv_page_tokens.is_multiple_of(16) {
        return size("kv_page_tokens", options.kv_page_tokens, "it must be a multiple of 16, at most 4096");
    }
    let per_token = usize::try_from(config.kv_bytes_per_token_layer(options.kv_format)).unwrap_or(usize::MAX);
    let bytes = options.kv_pages.saturating_mul(options.kv_page_tokens).saturating_mul(per_token);
    if options.kv_pages == 0 || options.kv_pages > u32::MAX as usize || bytes >= most {
        return size(
            "kv_pages",
            options.kv_pages,
            "the store would be empty, or larger than can be addressed",
        );
    }
    Ok(())
}

#[cfg(test)]
#[cfg(feature = "train")]
mod tests;
