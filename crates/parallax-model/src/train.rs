//! The same layers on an autodiff device: gradients for an adapter, or for all weights.
//!
//! On the CPU its values equal [`crate::Stage`]'s bit for bit (weights of the same format, same kernels, same adapter formula).

mod init;
mod recompute;
mod save;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

pub use init::LoraConfig;
pub use recompute::Pass;

use crate::{
    adapter::{Adapter, LoraTensors, modules},
    checkpoint::Checkpoint,
    config::{LayerConfig, Mixer, Mlp, ModelConfig, Norm, NormKind, Projection},
    error::{AdapterError, ConfigError, ForwardError, LoadError, OpenError},
    layer::{
        self, AdapterSlot, AroundWeights, Attend, AttentionWeights, DenseMlpWeights, LayerWeights, Linear,
        LinearWeight, MixerWeights, MlpWeights, NormWeights, Route,
    },
    load::{self, Loader, Rotations},
    ops::{
        attention::Geometry,
        composed,
        head::{BentLogProbs, DenseHead, FrozenHead, Targets},
        run1, run2,
    },
    options::BaseDtype,
};

/// What to train.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainOptions {
    /// An adapter on frozen weights.
    pub lora: Option<LoraConfig>,
    /// All weights.
    pub full: bool,
}

#[derive(Clone, Debug)]
enum Mode {
    /// Frozen weights; parameters are A and B of each of these modules, in this order.
    Lora { rank: usize, alpha: f32, modules: Vec<String> },
    /// Parameters are all weights, in the order of `init::full_parameters`.
    Full,
}

/// A model whose parameters have gradients.
///
/// With an adapter the parameters are `layers.3.q_proj.lora_a` [rank, in] and `.lora_b` [out, rank]. With all
/// weights they are `embed_tokens`, per layer `input_norm`, `qkv_proj` (q, k, v stacked), `qkv_bias`, `q_norm`,
/// `k_norm`, `o_proj`, `o_bias`, `mixer_post_norm`, `post_norm`, `gate_up_proj` (stacked), `gate_up_bias`,
/// `down_proj`, `down_bias`, `mlp_post_norm`, of these those that the layer has, then `norm` and, when not tied,
/// `lm_head`; matrices are [out, in], norms and biases [1, n].
#[derive(Debug)]
pub struct TrainModel {
    config: ModelConfig,
    device: Device,
    route: Route,
    /// Of each layer.
    geometries: Vec<Arc<Geometry>>,
    mode: Mode,
    parameters: Vec<(String, Tensor<2>)>,
    /// Frozen weights; empty when all are trained.
    frozen: Option<Frozen>,
    /// Files to write beside saved weights.
    text_files: Vec<(String, Vec<u8>)>,
    recomputes: bool,
}

#[derive(Clone, Debug)]
struct Frozen {
    layers: Vec<LayerWeights>,
    embedding: LinearWeight,
    norm: NormWeights,
    head: LinearWeight,
}

/// Everything a forward pass reads, assembled from the parameters anew each time: gradients belong to one pass.
struct Assembled {
    layers: Vec<LayerWeights>,
    embedding: LinearWeight,
    norm: NormWeights,
    head: LinearWeight,
}

/// Longest training sequence, in tokens: bounds the rotary table.
pub const MAX_SEQUENCE_TOKENS: usize = 1 << 14;

/// Whether logits are more than a product with the head.
fn bends_logits(config: &ModelConfig) -> bool {
    config.logit_softcap.is_some() || config.logit_scale.to_bits() != 1.0f32.to_bits()
}

const TRAINABLE: &str = "models with other layers were refused";

/// Attention of each layer besides its weights.
///
/// # Errors
/// Layers without gradients.
fn geometries(config: &ModelConfig) -> Result<Vec<Arc<Geometry>>, LoadError> {
    if !config.trains() {
        let reason = "it can be run but not trained: its layers have no gradients here";
        return Err(invalid("architecture", config.family.name().to_owned(), reason));
    }
    let mut rotations = Rotations::new(config, MAX_SEQUENCE_TOKENS);
    let layer = |layer: &LayerConfig| match &layer.mixer {
        Mixer::Attention(a) => rotations.geometry(a, None),
        Mixer::Latent(_) | Mixer::Delta(_) => unreachable!("{TRAINABLE}"),
    };
    config.layers.iter().map(layer).collect()
}

/// The leaves of a fully trained model, taken in the order of `init::full_parameters`.
struct Leaves<I> {
    next: I,
}

impl<I: Iterator<Item = Tensor<2>>> Leaves<I> {
    fn take(&mut self) -> Tensor<2> {
        self.next.next().expect("the parameters are those of the configuration")
    }

    fn vector(&mut self) -> Tensor<1> {
        let matrix = self.take();
        let [_, n] = matrix.dims();
        matrix.reshape([n])
    }

    fn norm(&mut self, norm: &Norm) -> NormWeights {
        let stored = self.vector();
        let weight = match norm.kind {
            NormKind::Rms => stored,
            NormKind::RmsPlusOne => stored.add_scalar(1.0),
        };
        NormWeights { weight, eps: norm.eps }
    }

    fn linear(&mut self, projection: &Projection) -> Linear {
        let weight = LinearWeight::Dense(self.take());
        Linear { bias: projection.bias.then(|| self.vector()), ..Linear::bare(weight) }
    }

    fn layer(&mut self, c: &LayerConfig, geometry: &Arc<Geometry>) -> LayerWeights {
        let before = c.mixer_norms.before.map(|norm| self.norm(&norm));
        let mixer = match &c.mixer {
            Mixer::Attention(a) => MixerWeights::Attention(AttentionWeights {
                geometry: Arc::clone(geometry),
                qkv: self.linear(&a.qkv),
                head_norms: a.head_norms.map(|norms| [self.norm(&norms.q), self.norm(&norms.k)]),
                o: self.linear(&a.o),
                gate: None,
            }),
            Mixer::Latent(_) | Mixer::Delta(_) => unreachable!("{TRAINABLE}"),
        };
        let mixer_norms = AroundWeights { before, after: c.mixer_norms.after.map(|norm| self.norm(&norm)) };
        let before = c.mlp_norms.before.map(|norm| self.norm(&norm));
        let mlp = match &c.mlp {
            Mlp::Dense(m) => MlpWeights::Dense(DenseMlpWeights {
                gate_up: self.linear(&m.gate_up),
                down: self.linear(&m.down),
                activation: m.activation,
            }),
            Mlp::Experts(_) => unreachable!("{TRAINABLE}"),
        };
        let mlp_norms = AroundWeights { before, after: c.mlp_norms.after.map(|norm| self.norm(&norm)) };
        LayerWeights { mixer_norms, mixer, mlp_norms, mlp, residual_scale: c.residual_scale }
    }
}

fn invalid(field: &str, value: String, reason: &str) -> LoadError {
    let (field, reason) = (field.to_owned(), reason.to_owned());
    LoadError::Open(OpenError::Config(ConfigError::Invalid { field, value, reason }))
}

impl TrainModel {
    /// Loads a checkpoint for training: trained weights in f32, frozen ones as [`LoraConfig::base_dtype`] says.
    ///
    /// # Errors
    /// Neither or both of an adapter and all weights are asked for, an unknown target, weights that cannot be
    /// read; or all weights of a checkpoint whose tokenizer is broken.
    pub fn from_checkpoint(checkpoint: &Checkpoint, options: &TrainOptions) -> Result<Self, LoadError> {
        Self::load_on(checkpoint, options, Route::Kernels).map_err(|e| e.within(checkpoint.location()))
    }

    pub(crate) fn load_on(
        checkpoint: &Checkpoint,
        options: &TrainOptions,
        route: Route,
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config().clone();
        let device = Device::flex().autodiff();
        // An adapter is saved without them.
        let text_files = if options.full { checkpoint.text_files()? } else { Vec::new() };
        let geometries = geometries(&config)?;
        let (mode, parameters, frozen) = match (&options.lora, options.full) {
            (None, true) => {
                let parameters = init::read_parameters(checkpoint.index(), &config, &device)?;
                (Mode::Full, parameters, None)
            }
            (Some(lora), false) => {
                let (modules, parameters) = init::lora_parameters(lora, &config, &device)?;
                let frozen = Self::freeze(checkpoint, lora.base_dtype, &device, route)?;
                (Mode::Lora { rank: lora.rank, alpha: lora.alpha, modules }, parameters, Some(frozen))
            }
            (lora, full) => {
                let value = format!("lora {}, full {full}", lora.is_some());
                return Err(invalid("train options", value, "exactly one of them is trained"));
            }
        };
        Ok(Self {
            config,
            device,
            route,
            geometries,
            mode,
            parameters,
            frozen,
            text_files,
            recomputes: false,
        })
    }

    /// A new model with random weights, all trained: normal with standard deviation 0.02, the matrices that
    /// write into the residual stream divided by sqrt(2 · layers) (GPT-2's scheme).
    ///
    /// # Errors
    /// The configuration is not valid.
    pub fn new_random(config: &ModelConfig, seed: u64) -> Result<Self, LoadError> {
        config.validate().map_err(OpenError::Config)?;
        let device = Device::flex().autodiff();
        let geometries = geometries(config)?;
        let parameters = init::random_parameters(config, seed, &device);
        Ok(Self {
            config: config.clone(),
            device,
            route: Route::Kernels,
            geometries,
            mode: Mode::Full,
            parameters,
            frozen: None,
            text_files: Vec::new(),
            recomputes: false,
        })
    }

    fn freeze(
        checkpoint: &Checkpoint,
        dtype: BaseDtype,
        device: &Device,
        route: Route,
    ) -> Result<Frozen, LoadError> {
        let config = checkpoint.config();
        let loader = Loader {
            index: checkpoint.index(),
            config,
            dtype: dtype.weights(),
            device: device.clone(),
            route,
            keep_transposed: dtype == BaseDtype::F32,
        };
        let mut rotations = Rotations::new(config, MAX_SEQUENCE_TOKENS);
        let layers =
            (0..config.n_layers).map(|i| loader.layer(i, &mut rotations)).collect::<Result<_, _>>()?;
        // The table needs no transposed copy: its gradient is never asked for, unless logits are made of it.
        let keep_transposed = loader.keep_transposed && bends_logits(config);
        let tables = Loader { keep_transposed, device: device.clone(), ..loader };
        let embedding = tables.table(load::EMBEDDING)?;
        let head =
            if config.tied_embeddings { embedding.clone() } else { tables.table(load::head_name(config))? };
        Ok(Frozen { layers, embedding, norm: tables.final_norm()?, head })
    }

    /// The same model once more, to compute with at the same time: frozen weights are shared, parameters are its own.
    #[must_use]
    pub fn replica(&self) -> Self {
        let own = |(name, tensor): &(String, Tensor<2>)| {
            let data = tensor.clone().inner().into_data();
            (name.clone(), Tensor::from_data(data, &self.device).require_grad())
        };
        Self {
            config: self.config.clone(),
            device: self.device.clone(),
            route: self.route,
            geometries: self.geometries.clone(),
            mode: self.mode.clone(),
            parameters: self.parameters.iter().map(own).collect(),
            frozen: self.frozen.clone(),
            text_files: self.text_files.clone(),
            recomputes: self.recomputes,
        }
    }

    /// Whether those who train it should keep only the layers' inputs for the backward pass ([`Self::checkpointed_logprobs`]).
    pub fn set_activation_checkpointing(&mut self, on: bool) {
        self.recomputes = on;
    }

    /// What [`Self::set_activation_checkpointing`] said; off at first.
    pub fn activation_checkpointing(&self) -> bool {
        self.recomputes
    }

    /// Bytes of memory that frozen linear layers and tables take; 0 where all weights are trained. Replicas share them.
    pub fn frozen_bytes(&self) -> usize {
        let Some(frozen) = &self.frozen else { return 0 };
        let linears = frozen.layers.iter().flat_map(LayerWeights::linears);
        let layers: usize = linears.map(|linear| linear.weight.bytes()).sum();
        let head = if self.config.tied_embeddings { 0 } else { frozen.head.bytes() };
        layers + frozen.embedding.bytes() + head
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The autodiff device that parameters and results live on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The trained leaves by name, in a fixed order.
    pub fn parameters(&self) -> &[(String, Tensor<2>)] {
        &self.parameters
    }

    /// Replaces the leaves, in the order of [`Self::parameters`]; each is detached and gets a new gradient.
    ///
    /// # Panics
    /// The number of tensors or a shape differs: a mistake of the calling program.
    pub fn set_parameters(&mut self, values: Vec<Tensor<2>>) {
        assert_eq!(values.len(), self.parameters.len(), "one tensor per parameter");
        for ((name, parameter), value) in self.parameters.iter_mut().zip(values) {
            assert_eq!(parameter.dims(), value.dims(), "shape of {name}");
            let data = value.into_data();
            *parameter = Tensor::from_data(data, &self.device).require_grad();
        }
    }

    /// `leaf` makes of a parameter what the pass reads.
    fn assemble(&self, leaf: impl Fn(&Tensor<2>) -> Tensor<2>) -> Assembled {
        match (&self.mode, &self.frozen) {
            (Mode::Lora { rank, alpha, modules }, Some(frozen)) => {
                let mut layers = frozen.layers.clone();
                let scale = alpha / *rank as f32;
                for (module, pair) in modules.iter().zip(self.parameters.chunks_exact(2)) {
                    let place = modules::split(module).and_then(|(layer, name)| {
                        // Models that train have each module in one place, in order.
                        let part = modules::module_of(&self.config, layer, name)?.parts.pop()?;
                        Some((load::linear_at(&mut layers[layer], part.place)?, part.offset))
                    });
                    let (linear, offset) = place.expect("modules were checked when they were made");
                    let (a, b) = (leaf(&pair[0].1), leaf(&pair[1].1));
                    linear.add_module(&AdapterSlot::default(), a, b, offset, scale);
                }
                let (embedding, head) = (frozen.embedding.clone(), frozen.head.clone());
                Assembled { layers, embedding, norm: frozen.norm.clone(), head }
            }
            _ => self.assemble_full(leaf),
        }
    }

    fn assemble_full(&self, leaf: impl Fn(&Tensor<2>) -> Tensor<2>) -> Assembled {
        let mut leaves = Leaves { next: self.parameters.iter().map(|(_, tensor)| leaf(tensor)) };
        let embedding = LinearWeight::Dense(leaves.take());
        let layers = self.config.layers.iter().zip(&self.geometries);
        let layers = layers.map(|(config, geometry)| leaves.layer(config, geometry)).collect();
        let norm = leaves.norm(&self.config.final_norm);
        let head =
            if self.config.tied_embeddings { embedding.clone() } else { LinearWeight::Dense(leaves.take()) };
        Assembled { layers, embedding, norm, head }
    }

    /// log p(token[t + 1] | token[..= t]) inside each of the packed sequences `cu_seqlens[i]..cu_seqlens[i + 1]`:
    /// lengths minus one values per sequence, one after the other. Differentiable.
    ///
    /// # Errors
    /// Lengths that do not fit, a token outside the vocabulary, a sequence longer than the context.
    pub fn token_logprobs(&self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<Tensor<1>, ForwardError> {
        let (positions, targets) = self.check(tokens, cu_seqlens)?;
        let weights = self.assemble(Tensor::clone);
        let mut x = layer::embed(&weights.embedding, tokens, &self.config, self.route, &self.device)?;
        let attend = Attend::packed(positions, cu_seqlens);
        for (index, layer) in weights.layers.iter().enumerate() {
            x = layer::forward(layer, x, index, &attend, self.route);
        }
        Ok(self.logprobs(weights, x, targets))
    }

    /// Of the last layer's output `x` `[T, H]`.
    fn logprobs(&self, weights: Assembled, x: Tensor<2>, targets: Targets) -> Tensor<1> {
        let x = weights.norm.forward(x, self.route);
        let targets = Arc::new(targets);
        let (vocab, hidden) = (self.config.vocab, self.config.hidden);
        if bends_logits(&self.config) {
            let head = Linear::bare(weights.head);
            let logits = head.forward(&composed::select(&x, &targets.rows), self.route);
            let (scale, softcap) = (self.config.logit_scale, self.config.logit_softcap);
            return match self.route {
                Route::Kernels => run1(logits, BentLogProbs { vocab, scale, softcap, targets }),
                _ => composed::logprobs(composed::softcap(logits.mul_scalar(scale), softcap), &targets),
            };
        }
        match (weights.head, self.route) {
            (LinearWeight::Packed(weight), _) => run1(x, FrozenHead { weight, targets }),
            (LinearWeight::Dense(weight), Route::Kernels) => {
                run2(x, weight, DenseHead { vocab, hidden, targets })
            }
            (LinearWeight::Dense(weight), _) => composed::token_logprobs(&x, weight, &targets),
            #[cfg(feature = "gpu")]
            (LinearWeight::Device(_), _) => unreachable!("training loads its weights on the CPU"),
        }
    }

    /// Positions of all rows, and what each row but the last of its sequence predicts.
    fn check(&self, tokens: &[u32], cu_seqlens: &[u32]) -> Result<(Vec<u32>, Targets), ForwardError> {
        let whole = cu_seqlens.first() == Some(&0)
            && cu_seqlens.last().is_some_and(|n| *n as usize == tokens.len())
            && cu_seqlens.windows(2).all(|w| w[0] + 2 <= w[1]);
        if !whole {
            return Err(ForwardError::Batch {
                reason: format!(
                    "sequence bounds {cu_seqlens:?} do not cut {} tokens into sequences of at least two",
                    tokens.len()
                ),
            });
        }
        let max_context = self.config.max_context.min(MAX_SEQUENCE_TOKENS);
        let mut positions = Vec::with_capacity(tokens.len());
        let mut targets = Targets { rows: Vec::new(), tokens: Vec::new() };
        for bounds in cu_seqlens.windows(2) {
            let n = bounds[1] - bounds[0];
            if n as usize > max_context {
                return Err(ForwardError::Context { position: n as usize - 1, max_context });
            }
            positions.extend(0..n);
            targets.rows.extend(bounds[0]..bounds[1] - 1);
            targets.tokens.extend_from_slice(&tokens[bounds[0] as usize + 1..bounds[1] as usize]);
        }
        Ok((positions, targets))
    }

    /// The adapter as it is now; `None` when all weights are trained.
    pub fn adapter(&self) -> Option<Adapter> {
        let Mode::Lora { rank, alpha, modules } = &self.mode else { return None };
        let values = |t: &Tensor<2>| -> Vec<f32> {
            t.clone().inner().into_data().try_to_vec().expect("parameters are f32")
        };
        let tensors = modules
            .iter()
            .zip(self.parameters.chunks_exact(2))
            .map(|(module, pair)| {
                let ([_, inputs], [outputs, _]) = (pair[0].1.dims(), pair[1].1.dims());
                let (a, b) = (values(&pair[0].1), values(&pair[1].1));
                (module.clone(), LoraTensors { a, b, inputs, outputs })
            })
            .collect();
        Some(Adapter { rank: *rank, alpha: *alpha, tensors })
    }

    /// Continues from an adapter of the same rank and modules.
    ///
    /// # Errors
    /// The adapter has other modules, another rank, or the model trains all weights.
    pub fn set_adapter(&mut self, adapter: &Adapter) -> Result<(), AdapterError> {
        adapter.check(&self.config)?;
        let Mode::Lora { rank, alpha, modules } = &mut self.mode else {
            return Err(AdapterError::Invalid(
                "the model trains all weights, it takes no adapter".to_owned(),
            ));
        };
        if adapter.rank != *rank || !adapter.tensors.keys().eq(modules.iter()) {
            return Err(AdapterError::Invalid(format!(
                "rank {} and {} modules do not match the model's rank {rank} and {} modules",
                adapter.rank,
                adapter.tensors.len(),
                modules.len()
            )));
        }
        *alpha = adapter.alpha;
        for (pair, t) in self.parameters.chunks_exact_mut(2).zip(adapter.tensors.values()) {
            let leaf = |values: &[f32], shape: [usize; 2]| {
                Tensor::from_data(TensorData::new(values.to_vec(), shape), &self.device).require_grad()
            };
            pair[0].1 = leaf(&t.a, [adapter.rank, t.inputs]);
            pair[1].1 = leaf(&t.b, [t.outputs, adapter.rank]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
