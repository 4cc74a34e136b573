//! What all endpoints share: the engine, the tokenizer and what was prepared from them, and the way from a checked
//! request to answers in the making.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parallax_model::TokenBytes;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::answer::Job;
use super::error::ApiError;
use super::fields::Fields;
use super::format::Format;
use super::gate::Gate;
use super::generation::{ControlTokens, Generation, Reading};
use super::sampling::{Masked, Masks, Sampling};
use super::tools::{HeldCalls, TextArguments, Tools};
use super::{Caller, HttpLimits, HttpState, JsonBody, fields};
use crate::constraint::{Constraint, ThoughtBudget};
use crate::markup::{Dialect, MarkupOptions};
use crate::request::Request;
use crate::stop_strings::StopStrings;

/// Steps that a request can be put before or behind others.
const MAX_PRIORITY: i64 = 1000;
/// Longest salt of cached prefixes.
const MAX_SALT_BYTES: usize = 256;

/// A running server.
pub(super) struct Server {
    pub(super) state: HttpState,
    pub(super) gate: Gate,
    /// Turns to read requests.
    readers: Arc<Semaphore>,
    /// Bytes of each token.
    pub(super) vocabulary: Arc<[TokenBytes]>,
    controls: Arc<ControlTokens>,
    pub(super) dialect: Dialect,
    #[cfg(feature = "structured")]
    grammars: std::sync::OnceLock<Result<crate::structured::Grammars, String>>,
    started: u64,
    requests: AtomicU64,
    /// Held while the weights change: one change after the other.
    pub(super) updating: tokio::sync::Mutex<()>,
}

/// A request that was read and checked, ready to run.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// Token ids of each prompt.
    pub prompts: Vec<Vec<u32>>,
    pub sampling: Sampling,
    pub placement: Placement,
    /// What the answer must look like.
    pub format: Option<Format>,
    /// What its calls must look like.
    pub held_calls: HeldCalls,
    pub text_arguments: TextArguments,
    pub adapter: Option<String>,
    pub prompt_logprobs: bool,
    /// `None`: the text is taken as it is.
    pub markup: Option<MarkupOptions>,
    /// Most tokens of thoughts.
    pub thought_tokens: Option<usize>,
    pub single_call: bool,
}

/// Where a request stands among others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Placement {
    /// As vLLM counts: lower goes first.
    pub priority: i32,
    /// Cached prefixes are shared among requests of one salt.
    pub cache_salt: String,
}

impl Placement {
    /// vLLM's `priority` and `cache_salt`.
    ///
    /// # Errors
    /// 400 naming the field, also for a priority that the server leaves to nobody.
    pub(super) fn read(body: &Fields<'_>, limits: &HttpLimits) -> Result<Self, ApiError> {
        let priority = body.integer("priority", -MAX_PRIORITY..=MAX_PRIORITY)?.unwrap_or(0);
        if priority < 0 && !limits.urgent_requests {
            let why = "must not be negative: this server lets nobody go before others";
            return Err(body.fault("priority", why));
        }
        let cache_salt = body.text("cache_salt")?.unwrap_or_default();
        if cache_salt.len() > MAX_SALT_BYTES {
            return Err(body.fault("cache_salt", format!("must have at most {MAX_SALT_BYTES} bytes")));
        }
        let priority = i32::try_from(priority).expect("the range is small");
        Ok(Self { priority, cache_salt: cache_salt.to_owned() })
    }
}

/// A request that was let in.
#[derive(Debug)]
pub(super) struct Entry {
    /// Held until the answer has ended.
    pub seat: OwnedSemaphorePermit,
    pub caller: Caller,
}

impl Ask {
    /// A request for plain text.
    pub(super) fn new(prompts: Vec<Vec<u32>>, sampling: Sampling) -> Self {
        Self {
            prompts,
            sampling,
            placement: Placement::default(),
            format: None,
            held_calls: HeldCalls::Free,
            text_arguments: TextArguments::default(),
            adapter: None,
            prompt_logprobs: false,
            markup: None,
            thought_tokens: None,
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
            readers: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from))),
            controls: Arc::new(ControlTokens::new(&state.tokenizer, dialect.markers())),
            dialect,
            vocabulary: vocabulary.into(),
            #[cfg(feature = "structured")]
            grammars: std::sync::OnceLock::new(),
            started: unix_seconds(),
            requests: AtomicU64::new(0),
            updating: tokio::sync::Mutex::default(),
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

    pub(super) fn decode(&self, ids: &[u32], special: bool) -> Result<String, ApiError> {
        let tokenizer = &self.state.tokenizer;
        let text = if special { tokenizer.decode_with_special(ids) } else { tokenizer.decode(ids) };
        text.map_err(|e| ApiError::internal(e.to_string()))
    }

    /// How the answers of this model are read.
    pub(super) fn markup(&self, tools: &Tools, in_reasoning: bool) -> MarkupOptions {
        MarkupOptions {
            dialect: self.dialect,
            tools: tools.are_offered(),
            reasoning: true,
            in_reasoning,
            forced_call: tools.is_forced(),
        }
    }

    /// Takes a seat and reads a request on a thread that may take its time: megabytes of JSON, templates and tokens must
    /// not stop the streams of others. At most one for each core; the rest waits for its turn. Dropping the future lets
    /// the reading go on; what it has queued is aborted then.
    ///
    /// # Errors
    /// 429 when all seats are taken, 400 for what is no JSON object, and what `read` says.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        body: JsonBody,
        read: impl FnOnce(&Arc<Self>, &Fields<'_>, Entry) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let entry = Entry { seat: self.gate.seat()?, caller: body.caller };
        let closed = || ApiError::internal("this server has a bug");
        let turn = Arc::clone(&self.readers).acquire_owned().await.map_err(|_| closed())?;
        let server = Arc::clone(self);
        let reading = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let value = fields::parse(&body.bytes)?;
            read(&server, &Fields::of(&value, "")?, entry)
        });
        reading.await.map_err(|_| closed())?
    }

    /// Queues a request: one answer for each prompt and choice, choices of one prompt beside each other.
    ///
    /// # Errors
    /// 400 for what the engine refuses, 429 when there is no room, 503 when nobody can compute.
    pub(super) fn start(&self, ask: Ask, entry: Entry) -> Result<Job, ApiError> {
        self.check_ready()?;
        self.check_vocabulary("stop_token_ids", &ask.sampling.params.stop_ids)?;
        let constraint = self.masked(&ask.sampling, self.bounded(&ask, self.constraint(&ask)?)?)?;
        let limits = self.state.engine.limits();
        let Ask { prompts, sampling, placement, adapter, prompt_logprobs, markup, single_call, .. } = ask;
        let text_arguments = Arc::new(ask.text_arguments);
        let user = entry.caller.0.to_string();
        // What one key asked is no other key's business, not even by how fast an answer comes.
        let cache_salt = format!("{user} {}", placement.cache_salt);
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
                cache_salt: cache_salt.clone(),
                user: user.clone(),
                priority: -placement.priority,
                capture_hidden: false,
            };
            let streams = self.state.engine.submit_n(request, sampling.n)?;
            generations.extend(streams.into_iter().map(|tokens| {
                let reading = Reading {
                    decoder: self.state.tokenizer.stream(),
                    controls: Arc::clone(&self.controls),
                    markup,
                    text_arguments: Arc::clone(&text_arguments),
                    stops: StopStrings::new(sampling.stops.clone()),
                    include_stop: sampling.include_stop,
                    stop_ids: stop_ids.clone(),
                    single_call,
                    prompt_tokens,
                };
                Generation::new(tokens, reading)
            }));
        }
        Ok(Job { generations, seat: entry.seat })
    }

    /// Refuses token ids that the model does not have.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(super) fn check_vocabulary(&self, field: &str, ids: &[u32]) -> Result<(), ApiError> {
        let vocab = self.state.engine.limits().vocab;
        let Some(unknown) = ids.iter().find(|id| **id as usize >= vocab) else { return Ok(()) };
        let why = format!("{field} holds {unknown}, which is outside the vocabulary of {vocab}");
        Err(ApiError::invalid(Some(field), why))
    }

    /// The constraint without the tokens and words that the answer must not have, if there are any.
    fn masked(
        &self,
        sampling: &Sampling,
        then: Option<Arc<dyn Constraint>>,
    ) -> Result<Option<Arc<dyn Constraint>>, ApiError> {
        if sampling.allowed.is_none() && sampling.bad_words.is_empty() {
            return Ok(then);
        }
        self.check_vocabulary("allowed_token_ids", sampling.allowed.as_deref().unwrap_or_default())?;
        let mut bad_words = Vec::new();
        for word in &sampling.bad_words {
            let bare = if word.trim_start().is_empty() { word.as_str() } else { word.trim_start() };
            let plain = self.encode(bare, false)?;
            // As vLLM has it: also where it begins a word in a text, if that takes another first token and no more of them.
            let inside = self.encode(&format!(" {bare}"), false)?;
            if inside.len() == plain.len() && inside.first() != plain.first() {
                bad_words.push(inside);
            }
            bad_words.push(plain);
        }
        let masks = Arc::new(Masks::new(sampling.allowed.clone(), bad_words));
        Ok(Some(Arc::new(Masked { masks, then })))
    }

    /// The constraint with the bound on thoughts, where there is one.
    fn bounded(
        &self,
        ask: &Ask,
        then: Option<Arc<dyn Constraint>>,
    ) -> Result<Option<Arc<dyn Constraint>>, ApiError> {
        let Some(tokens) = ask.thought_tokens else { return Ok(then) };
        let [opening, end, closing] = self.dialect.thoughts();
        Ok(Some(Arc::new(ThoughtBudget {
            tokens,
            opening,
            end,
            closing: self.encode(closing, false)?,
            is_open: ask.markup.is_some_and(|markup| markup.in_reasoning),
            vocabulary: Arc::clone(&self.vocabulary),
            then,
        })))
    }

    #[cfg(not(feature = "structured"))]
    fn constraint(&self, ask: &Ask) -> Result<Option<Arc<dyn Constraint>>, ApiError> {
        let field = match (&ask.format, &ask.held_calls) {
            (Some(format), _) => format.field,
            (None, HeldCalls::Whole(_)) => "tool_choice",
            (None, HeldCalls::Each(_)) => "tools",
            (None, HeldCalls::Free | HeldCalls::BesideForm(_)) => return Ok(None),
        };
        let why = format!("{field}: this server was built without structured output");
        Err(ApiError::invalid(Some(field), why))
    }

    #[cfg(feature = "structured")]
    fn constraint(&self, ask: &Ask) -> Result<Option<Arc<dyn Constraint>>, ApiError> {
        use crate::markup::ToolSchema;
        use crate::structured::{GrammarError, Grammars};

        use super::format::{CallsOrForm, Form};
        /// What sampling follows.
        enum Held<'a> {
            Form(&'a Form),
            Call(&'a [ToolSchema]),
            Calls(&'a [ToolSchema]),
            CallsOrForm(&'a [ToolSchema], &'a Form),
        }
        let (field, held) = match (&ask.format, &ask.held_calls) {
            (None, HeldCalls::Free | HeldCalls::BesideForm(_)) => return Ok(None),
            (Some(format), HeldCalls::Whole(_)) => {
                let why = format!("tool_choice asks for a call and {} for a form: use one", format.field);
                return Err(ApiError::invalid(Some("tool_choice"), why));
            }
            (None, HeldCalls::Whole(tools)) => ("tool_choice", Held::Call(tools)),
            (None, HeldCalls::Each(tools)) => ("tools", Held::Calls(tools)),
            (Some(format), HeldCalls::Each(tools) | HeldCalls::BesideForm(tools))
                if format.form.leaves_calls() =>
            {
                (format.field, Held::CallsOrForm(tools, &format.form))
            }
            (Some(format), _) => (format.field, Held::Form(&format.form)),
        };
        let grammars = self.grammars.get_or_init(|| {
            let tokens = self.vocabulary.iter().map(|t| (t.bytes.clone(), t.special)).collect();
            Grammars::new(tokens, self.state.stop_ids.clone()).map_err(|e| e.to_string())
        });
        let grammars =
            grammars.as_ref().map_err(|why| ApiError::invalid(Some(field), format!("{field}: {why}")))?;
        let refused = |field: &'static str| {
            move |e: GrammarError| ApiError::invalid(Some(field), format!("{field}: {e}"))
        };
        let compiled: Arc<dyn Constraint> = match held {
            Held::Form(form) => grammars.compile(&form.spec()).map_err(refused(field))?,
            Held::Call(tools) => grammars.call(tools).map_err(refused(field))?,
            Held::Calls(tools) => grammars.calls(self.dialect, tools).map_err(refused(field))?,
            Held::CallsOrForm(tools, form) => {
                let calls = grammars.calls(self.dialect, tools).map_err(refused("tools"))?;
                let form = grammars.compile(&form.spec()).map_err(refused(field))?;
                let vocabulary = Arc::clone(&self.vocabulary);
                Arc::new(CallsOrForm::new(self.dialect, tools, calls, form, vocabulary))
            }
        };
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
