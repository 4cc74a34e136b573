//! What all endpoints share: the engine, the tokenizer and what was prepared from them, and the way from a checked
//! request to answers in the making.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parallax_model::TokenBytes;
use serde_json::{Value, json};

use super::HttpState;
use super::answer::Job;
use super::error::ApiError;
use super::format::Format;
use super::gate::Gate;
use super::generation::{ControlTokens, Generation, Reading};
use super::sampling::Sampling;
use super::tools::Tools;
use crate::constraint::Constraint;
use crate::markup::{Dialect, MarkupOptions};
use crate::request::Request;
use crate::stop_strings::StopStrings;

/// A running server.
pub(super) struct Server {
    pub(super) state: HttpState,
    pub(super) gate: Gate,
    /// Bytes of each token.
    pub(super) vocabulary: Vec<TokenBytes>,
    controls: Arc<ControlTokens>,
    dialect: Dialect,
    #[cfg(feature = "structured")]
    grammars: std::sync::OnceLock<Result<crate::structured::Grammars, String>>,
    started: u64,
    requests: AtomicU64,
}

/// A request that was read and checked, ready to run.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// Token ids of each prompt.
    pub prompts: Vec<Vec<u32>>,
    pub sampling: Sampling,
    /// What the answer must look like.
    pub format: Option<Format>,
    /// The schema of the call that must be made.
    pub forced: Option<Value>,
    pub adapter: Option<String>,
    pub prompt_logprobs: bool,
    /// `None`: the text is taken as it is.
    pub markup: Option<MarkupOptions>,
    pub single_call: bool,
}

impl Ask {
    /// A request for plain text.
    pub(super) fn new(prompts: Vec<Vec<u32>>, sampling: Sampling) -> Self {
        Self {
            prompts,
            sampling,
            format: None,
            forced: None,
            adapter: None,
            prompt_logprobs: false,
            markup: None,
            single_call: false,
        }
    }
}

impl Server {
    pub(super) fn new(state: HttpState) -> Self {
        let dialect =
            state.template.as_ref().map_or_else(Dialect::default, |t| Dialect::of_template(t.source()));
        // A tokenizer that cannot be written out still serves; only what speaks of single tokens is empty then.
        let vocabulary = state.tokenizer.token_table().unwrap_or_else(|error| {
            tracing::warn!(%error, "the vocabulary cannot be listed: no token texts, no structured output");
            Vec::new()
        });
        Self {
            gate: Gate::new(&state.limits),
            controls: Arc::new(ControlTokens::new(&state.tokenizer, dialect.markers())),
            dialect,
            vocabulary,
            #[cfg(feature = "structured")]
            grammars: std::sync::OnceLock::new(),
            started: unix_seconds(),
            requests: AtomicU64::new(0),
            state,
        }
    }

    pub(super) fn check_ready(&self) -> Result<(), ApiError> {
        match &self.state.readiness {
            Some(ready) => ready().map_err(ApiError::unavailable),
            None => Ok(()),
        }
    }

    /// The adapter that a model's name stands for; `None` is the model itself.
    ///
    /// # Errors
    /// 404 for a name that is neither.
    pub(super) fn model(&self, asked: Option<&str>) -> Result<Option<String>, ApiError> {
        let Some(name) = asked.filter(|name| *name != self.state.model_name) else { return Ok(None) };
        let adapters = self.state.engine.adapters();
        if adapters.contains(name) {
            return Ok(Some(name.to_owned()));
        }
        let served: Vec<&str> = std::iter::once(self.state.model_name.as_str())
            .chain(adapters.iter().map(String::as_str))
            .collect();
        Err(ApiError::not_found(format!("model: {name:?} is not served here; this server has {served:?}")))
    }

    pub(super) fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ApiError> {
        self.state
            .tokenizer
            .encode(text, special)
            .map_err(|e| ApiError::invalid(None, format!("the prompt cannot be tokenised: {e}")))
    }

    pub(super) fn decode(&self, ids: &[u32]) -> Result<String, ApiError> {
        self.state.tokenizer.decode_with_special(ids).map_err(|e| ApiError::internal(e.to_string()))
    }

    /// How the answers of this model are read.
    pub(super) fn markup(&self, tools: &Tools, in_reasoning: bool) -> MarkupOptions {
        MarkupOptions {
            dialect: self.dialect,
            tools: tools.are_offered(),
            reasoning: true,
            in_reasoning,
            forced_call: tools.forced_schema().is_some(),
        }
    }

    /// Queues a request: one answer for each prompt and choice, choices of one prompt beside each other.
    ///
    /// # Errors
    /// 400 for what the engine refuses, 429 when there is no room, 503 when nobody can compute.
    pub(super) fn start(&self, ask: Ask) -> Result<Job, ApiError> {
        self.check_ready()?;
        let seat = self.gate.seat()?;
        let constraint = self.constraint(&ask)?;
        let limits = self.state.engine.limits();
        let Ask { prompts, sampling, adapter, prompt_logprobs, markup, single_call, .. } = ask;
        let mut generations = Vec::with_capacity(prompts.len() * sampling.n);
        for prompt in prompts {
            let room = limits.context_tokens.saturating_sub(prompt.len()).max(1);
            let mut params = sampling.params.clone();
            params.max_tokens = sampling.max_tokens.unwrap_or(room);
            if !sampling.ignore_eos {
                params.stop_ids.extend_from_slice(&self.state.stop_ids);
            }
            let stop_ids = params.stop_ids.clone();
            let prompt_tokens = prompt.len();
            let request = Request {
                prompt,
                sampling: params,
                constraint: constraint.clone(),
                prompt_logprobs,
                adapter: adapter.clone(),
                ..Request::default()
            };
            let streams = self.state.engine.submit_n(request, sampling.n)?;
            generations.extend(streams.into_iter().map(|tokens| {
                let reading = Reading {
                    decoder: self.state.tokenizer.stream(),
                    controls: Arc::clone(&self.controls),
                    markup,
                    stops: StopStrings::new(sampling.stops.clone()),
                    include_stop: sampling.include_stop,
                    stop_ids: stop_ids.clone(),
                    single_call,
                    prompt_tokens,
                };
                Generation::new(tokens, reading)
            }));
        }
        Ok(Job { generations, seat })
    }

    #[cfg(not(feature = "structured"))]
    fn constraint(&self, ask: &Ask) -> Result<Option<Arc<dyn Constraint>>, ApiError> {
        let field = match (&ask.format, &ask.forced) {
            (None, None) => return Ok(None),
            (Some(format), _) => format.field,
            (None, Some(_)) => "tool_choice",
        };
        let why = format!("{field}: this server cannot hold its answers to a form");
        Err(ApiError::invalid(Some(field), why))
    }

    #[cfg(feature = "structured")]
    fn constraint(&self, ask: &Ask) -> Result<Option<Arc<dyn Constraint>>, ApiError> {
        use crate::structured::{GrammarSpec, Grammars};

        use super::format::Form;
        let (field, spec) = match (&ask.format, &ask.forced) {
            (None, None) => return Ok(None),
            (Some(format), Some(_)) => {
                let why = format!("tool_choice asks for a call and {} for a form: use one", format.field);
                return Err(ApiError::invalid(Some("tool_choice"), why));
            }
            (None, Some(schema)) => ("tool_choice", GrammarSpec::JsonSchema(schema.clone())),
            (Some(format), None) => {
                let spec = match &format.form {
                    Form::Schema(schema) => GrammarSpec::JsonSchema(schema.clone()),
                    Form::Object => GrammarSpec::JsonObject,
                    Form::Regex(regex) => GrammarSpec::Regex(regex.clone()),
                    Form::Grammar(grammar) => GrammarSpec::Grammar(grammar.clone()),
                    Form::Choice(choices) => GrammarSpec::Choice(choices.clone()),
                };
                (format.field, spec)
            }
        };
        let grammars = self.grammars.get_or_init(|| {
            let tokens = self.vocabulary.iter().map(|t| (t.bytes.clone(), t.special)).collect();
            Grammars::new(tokens, self.state.stop_ids.clone()).map_err(|e| e.to_string())
        });
        let grammars =
            grammars.as_ref().map_err(|why| ApiError::invalid(Some(field), format!("{field}: {why}")))?;
        let compiled =
            grammars.compile(&spec).map_err(|e| ApiError::invalid(Some(field), format!("{field}: {e}")))?;
        // Thoughts that the prompt has opened are free; the form begins behind them.
        let in_reasoning = ask.markup.is_some_and(|markup| markup.in_reasoning);
        Ok(Some(if in_reasoning { grammars.after(compiled, "</think>") } else { compiled }))
    }

    /// A seed for a request that names none: different for every request and every start of the server.
    pub(super) fn fresh_seed(&self) -> u64 {
        let n = self.requests.fetch_add(1, Ordering::Relaxed);
        let mut hash = blake3::Hasher::new();
        hash.update(&self.started.to_le_bytes())
            .update(&n.to_le_bytes())
            .update(&std::process::id().to_le_bytes());
        u64::from_le_bytes(hash.finalize().as_bytes()[..8].try_into().expect("eight of 32 bytes"))
    }

    pub(super) fn answer_id(&self) -> String {
        format!("{:016x}", self.fresh_seed())
    }

    /// Names what seeds are repeatable under: the model and the version of its weights.
    pub(super) fn fingerprint(&self) -> String {
        let version = self.state.engine.version();
        let hash = blake3::hash(format!("{} {}", self.state.model_name, version.0).as_bytes());
        format!("fp_{}", &hash.to_hex()[..10])
    }

    /// The models that requests may name.
    pub(super) fn models(&self) -> Vec<Value> {
        let limit = self.state.engine.limits().context_tokens;
        let card = |id: &str, parent: Option<&str>| {
            json!({"id": id, "object": "model", "created": self.started, "owned_by": "parallax", "root": id,
                   "parent": parent, "max_model_len": limit})
        };
        let model = self.state.model_name.as_str();
        let adapters = self.state.engine.adapters();
        std::iter::once(card(model, None))
            .chain(adapters.iter().map(|name| card(name, Some(model))))
            .collect()
    }
}

pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
