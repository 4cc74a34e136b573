//! An inference engine in a library: continuous batching, paged KV cache, sampling, pipelines over peers, OpenAI HTTP.
//!
//! The core is pure: [`Engine`] plans batches, a [`StageRunner`] runs them (one stage here, several, or a pipeline of
//! peers), and tokens come back as events. The same request gives the same bits whatever runs beside it.
//!
//! ```
//! use parallax_engine::{AdapterFile, Batch, LogSoftmax, StageError, StageOutput, StageRunner, StageShape, Tensor};
//! use parallax_engine::{Engine, EngineConfig, Request};
//! # use swarm_wire::{LayerRange, PolicyVersion};
//!
//! /// A "model" whose likeliest next token is one more than the last.
//! struct Successor;
//! impl StageRunner for Successor {
//!     fn shape(&self) -> StageShape {
//!         let layers = LayerRange::new(0, 1).expect("one layer");
//!         StageShape { layers, n_layers: 1, hidden: 1, vocab: 8, max_context: 64, page_tokens: 4, n_pages: 16, state_slots: 0 }
//!     }
//!     fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
//!         let ids = input.to_ids(batch.n_rows())?;
//!         let rows = batch.wanted_rows();
//!         let mut logits = vec![0.0; rows.len() * 8];
//!         for (i, row) in rows.iter().enumerate() {
//!             logits[i * 8 + (ids[*row] as usize + 1) % 8] = 5.0;
//!         }
//!         Ok(StageOutput { hidden: None, logits: Some(Tensor::from_f32(&[rows.len(), 8], logits)) })
//!     }
//!     # fn set_adapter(&mut self, _: PolicyVersion, _: Option<&AdapterFile>) -> Result<(), StageError> { Ok(()) }
//!     # fn log_softmax(&self) -> LogSoftmax { |logits| {
//!     #     let sum: f32 = logits.iter().map(|l| l.exp()).sum();
//!     #     logits.iter().map(|l| l - sum.ln()).collect()
//!     # } }
//! }
//!
//! let mut runner = Successor;
//! let mut engine = Engine::new(runner.shape(), runner.log_softmax(), EngineConfig::default())?;
//! engine.add(Request::greedy(vec![1, 2], 3))?;
//! let mut ids = Vec::new();
//! while engine.is_busy() {
//!     ids.extend(engine.step(&mut runner).into_iter().filter_map(|e| e.token_id()));
//! }
//! assert_eq!(ids, [3, 4, 5]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Map
//! - [`request`]: requests, tokens, endings; [`sampling`]: how to choose; [`constraint`]: what may be chosen; [`config`],
//!   [`error`]
//! - [`engine`]: add, abort, step; [`batching`]: which rows run next, [`pace`]: how many; [`sequence`]: one request's progress
//! - [`speculate`]: guessing tokens that one pass then checks
//! - [`kv_cache`]: pages, page tables, prefixes; [`sampler`]: logits to a token; [`mod@score`]: given tokens; [`metrics`]: counters
//! - [`batch`], [`stage`], [`tap`]: the seam to whatever computes; `local`: over parallax-model (feature `local`)
//! - [`markup`]: reasoning and tool calls in a text, by model family
//! - [`stop_strings`]: cutting the text (characters are put together by the model crate's stream decoder)
//! - `structured`: grammars that answers follow (feature `structured`)
//! - `service`: the engine thread (feature `service`), pipelines over peers and their weights (feature `swarm`); `http`:
//!   OpenAI's and Anthropic's APIs (feature `http`)

#[cfg(test)]
extern crate self as parallax_engine;

mod adapter_file;
pub mod batch;
pub mod batching;
pub mod config;
pub mod constraint;
pub mod engine;
pub mod error;
#[cfg(feature = "http")]
pub mod http;
pub mod kv_cache;
#[cfg(feature = "local")]
pub mod local;
pub mod markup;
pub mod metrics;
pub mod pace;
pub mod request;
pub mod sampler;
pub mod sampling;
pub mod score;
pub mod sequence;
#[cfg(feature = "service")]
pub mod service;
pub mod speculate;
pub mod stage;
pub mod stop_strings;
#[cfg(feature = "structured")]
pub mod structured;
pub mod tap;

pub use adapter_file::{AdapterFile, AdapterParser};
pub use batch::{Batch, BatchSequence, CacheCopy, StageOutput, StateSave, Tensor, Want};
pub use config::{EngineConfig, OnSwap};
#[cfg(feature = "local")]
pub use constraint::ThoughtBudget;
pub use constraint::{Constraint, ConstraintState};
pub use engine::Engine;
pub use error::{ConfigError, Failure, OutOfPages, RequestError, StageError};
pub use metrics::EngineMetrics;
pub use request::{Completion, Event, FinishReason, Request, RequestEvent, RequestLimits, Token, Usage};
pub use sampler::Sampler;
pub use sampling::SamplingParams;
pub use score::{ScoreError, Scored, score};
#[cfg(feature = "service")]
pub use service::{EngineHandle, TokenStream};
pub use speculate::{DraftModel, Drafter, PromptLookup};
pub use stage::{LogSoftmax, Recovery, StageRunner, StageShape};
pub use stop_strings::StopStrings;
pub use tap::ActivationTap;
