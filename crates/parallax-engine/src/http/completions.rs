//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::answer::{self, Collected, Frame, Job, Writer};
use super::chat::{Streams, finish_reason, usage_json};
use super::envelope::Envelope;
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::generation::{Delta, TokenReport};
use super::sampling::{self, MAX_TOP_LOGPROBS, token_id};
use super::{Ask, Entry, JsonBody, Placement, Server, format, logprobs};
use crate::markup::Part;
use crate::request::Usage;

/// Prompts of one request.
const MAX_PROMPTS: usize = 64;

/// Answers a completion request.
///
/// # Errors
/// 400 naming the field, or what [`Server::start`] says.
pub(super) async fn respond(State(server): State<Arc<Server>>, body: JsonBody) -> Result<Response, ApiError> {
    let (job, frame, streams) = server.read(body, read).await?;
    if streams.stream {
        let n = job.generations.len();
        let writer =
            TextWriter { frame, streams, choices: vec![Choice::default(); n], usages: vec![None; n] };
        return answer::stream(job, writer).await;
    }
    let collected = answer::collect(job).await?;
    Ok(Json(frame.whole(&collected)?).into_response())
}

fn read(
    server: &Arc<Server>,
    body: &Fields<'_>,
    entry: Entry,
) -> Result<(Job, TextFrame, Streams), ApiError> {
    body.unsupported("suffix", &[json!("")])?;
    body.unsupported("thinking_token_budget", &[])?;
    body.hints()?;
    let wants_prompt = prompt_logprobs(body)?;
    let adapter = server.model(body.text("model")?)?;
    let mut sampling = sampling::read(body, &server.state.defaults, server.fresh_seed())?;
    if sampling.max_tokens.is_none() {
        // OpenAI's default for this API.
        sampling.max_tokens = Some(16.max(sampling.params.min_tokens));
    }
    let logprobs = body.count("logprobs", 0, MAX_TOP_LOGPROBS)?;
    sampling.params.top_logprobs = logprobs.unwrap_or(0);
    let streams = Streams::read(body)?;
    let echo = body.flag("echo")?.unwrap_or(false);
    if echo && streams.stream {
        return Err(body.fault("echo", "is not supported together with \"stream\": true"));
    }
    if wants_prompt && streams.stream {
        return Err(body.fault("prompt_logprobs", "is not supported together with \"stream\": true"));
    }
    let placement = Placement::read(body, &server.state.limits)?;
    let format = format::read(body)?;
    let special = body.flag("add_special_tokens")?.unwrap_or(true);
    let mut prompts = prompts(body, server, special)?;
    let context_tokens = server.state.engine.limits().context_tokens;
    sampling::truncate(body, context_tokens, sampling.max_tokens, &mut prompts)?;
    let frame = TextFrame {
        envelope: server.envelope(body, "cmpl")?,
        server: Arc::clone(server),
        logprobs: logprobs.is_some(),
        prompt_tokens: prompts.iter().map(Vec::len).sum(),
        echoed: echo.then(|| prompts.clone()),
        scored: wants_prompt.then(|| prompts.clone()),
        told: body.flag("return_token_ids")?.unwrap_or(false).then(|| prompts.clone()),
        n: sampling.n,
    };
    let ask = Ask {
        placement,
        format,
        adapter,
        prompt_logprobs: wants_prompt || (echo && logprobs.is_some()),
        ..Ask::new(prompts, sampling)
    };
    Ok((server.start(ask, entry)?, frame, streams))
}

/// vLLM's `prompt_logprobs`: 0 asks for the prompt's own tokens. Others instead of them are not kept.
fn prompt_logprobs(body: &Fields<'_>) -> Result<bool, ApiError> {
    match body.count("prompt_logprobs", 0, MAX_TOP_LOGPROBS)? {
        None => Ok(false),
        Some(0) => Ok(true),
        Some(_) => {
            Err(body.fault("prompt_logprobs", "must be 0: of the prompt, only its own tokens are reported"))
        }
    }
}

/// A text, a list of texts, a list of token ids, or a list of such lists.
fn prompts(body: &Fields<'_>, server: &Server, special: bool) -> Result<Vec<Vec<u32>>, ApiError> {
    let items = match body.get("prompt") {
        None => return Err(body.missing("prompt")),
        Some(Value::String(text)) => return Ok(vec![server.encode(text, special)?]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong("prompt", "a string, or a list of strings or token ids", other)),
    };
    let ids = |path: &str, items: &[Value]| -> Result<Vec<u32>, ApiError> {
        items.iter().enumerate().map(|(i, item)| token_id(&format!("{path}[{i}]"), item)).collect()
    };
    match items.first() {
        None => Err(body.fault("prompt", "must not be empty")),
        Some(Value::Number(_)) => Ok(vec![ids("prompt", items)?]),
        Some(_) if items.len() > MAX_PROMPTS => {
            Err(body
                .fault("prompt", format!("holds {} prompts, at most {MAX_PROMPTS} are taken", items.len())))
        }
        Some(_) => items
            .iter()
            .enumerate()
            .map(|(i, item)| match item {
                Value::String(text) => server.encode(text, special),
                Value::Array(list) => ids(&format!("prompt[{i}]"), list),
                other => Err(wrong(&format!("prompt[{i}]"), "a string or a list of token ids", other)),
            })
            .collect(),
    }
}

struct TextFrame {
    envelope: Envelope,
    server: Arc<Server>,
    logprobs: bool,
    /// Of all prompts.
    prompt_tokens: usize,
    /// The prompts, when answers begin with them.
    echoed: Option<Vec<Vec<u32>>>,
    /// The prompts, when their log-probabilities are reported.
    scored: Option<Vec<Vec<u32>>>,
    /// The prompts, when the ids of their tokens and of the answers' are reported.
    told: Option<Vec<Vec<u32>>>,
    /// Choices for each prompt.
    n: usize,
}

impl TextFrame {
    /// Each prompt counts once, every answer counts.
    fn usage(&self, usages: &[Usage]) -> Usage {
        let mut sum = Usage::default();
        for of_prompt in usages.chunks(self.n) {
            let one = answer::total(of_prompt);
            sum.prompt_tokens += one.prompt_tokens;
            sum.cached_tokens += one.cached_tokens;
            sum.completion_tokens += one.completion_tokens;
        }
        sum
    }

    fn whole(&self, collected: &[Collected]) -> Result<Value, ApiError> {
        let mut choices = Vec::with_capacity(collected.len());
        for (index, one) in collected.iter().enumerate() {
            let prompt = self.echoed.as_ref().map(|prompts| prompts[index / self.n].as_slice());
            // Without special tokens, as an answer is.
            let shown = prompt.map(|prompt| self.server.decode(prompt, false)).transpose()?;
            let mut text = shown.unwrap_or_default();
            text.push_str(&one.content);
            let echoed = prompt.map(|prompt| (prompt, one.prompt_logprobs.as_slice()));
            let report = self
                .logprobs
                .then(|| logprobs::completion(&self.server.vocabulary, echoed, &one.reports, &mut 0));
            let mut choice = json!({"index": index, "text": text, "logprobs": report,
                "finish_reason": finish_reason(one.reason, false), "stop_reason": one.stop});
            if let Some(prompts) = &self.scored {
                let prompt = &prompts[index / self.n];
                choice["prompt_logprobs"] =
                    logprobs::prompt(&self.server.vocabulary, prompt, &one.prompt_logprobs);
            }
            if let Some(prompts) = &self.told {
                choice["prompt_token_ids"] = json!(prompts[index / self.n]);
                choice["token_ids"] = one.reports.iter().map(|report| report.id).collect();
            }
            choices.push(choice);
        }
        let usages: Vec<Usage> = collected.iter().map(|one| one.usage).collect();
        let mut answer = self.envelope.json("text_completion");
        answer["choices"] = json!(choices);
        answer["usage"] = usage_json(&self.usage(&usages));
        Ok(answer)
    }
}

#[derive(Debug, Clone, Default)]
struct Choice {
    reports: Vec<TokenReport>,
    /// Tokens that are to be told and that no chunk has told of yet.
    ids: Vec<u32>,
    /// The ids of the prompt's tokens were told.
    told: bool,
    offset: usize,
    n_tokens: usize,
}

struct TextWriter {
    frame: TextFrame,
    streams: Streams,
    choices: Vec<Choice>,
    usages: Vec<Option<Usage>>,
}

impl TextWriter {
    fn chunk(&mut self, choice: usize, text: &str, finish: Option<&str>) -> Frame {
        let state = &mut self.choices[choice];
        let reports = std::mem::take(&mut state.reports);
        let report = (self.frame.logprobs && !reports.is_empty())
            .then(|| logprobs::completion(&self.frame.server.vocabulary, None, &reports, &mut state.offset));
        let mut chunk = self.frame.envelope.json("text_completion");
        chunk["choices"] =
            json!([{"index": choice, "text": text, "logprobs": report, "finish_reason": finish}]);
        if let Some(prompts) = &self.frame.told {
            if !std::mem::replace(&mut state.told, true) {
                chunk["choices"][0]["prompt_token_ids"] = json!(prompts[choice / self.frame.n]);
            }
            chunk["choices"][0]["token_ids"] = json!(std::mem::take(&mut state.ids));
        }
        if self.streams.every_chunk {
            let completion_tokens = self.choices.iter().map(|c| c.n_tokens).sum();
            let prompt_tokens = self.frame.prompt_tokens;
            chunk["usage"] = usage_json(&Usage { prompt_tokens, completion_tokens, ..Usage::default() });
        }
        Frame::data(chunk.to_string())
    }
}

fn text_of(parts: Vec<Part>) -> String {
    parts
        .into_iter()
        .filter_map(|part| if let Part::Content(text) = part { Some(text) } else { None })
        .collect()
}

impl Writer for TextWriter {
    fn begin(&mut self) -> Vec<Frame> {
        Vec::new()
    }

    fn delta(&mut self, choice: usize, delta: Delta) -> Vec<Frame> {
        let (parts, report, ending) = delta.split();
        if let Some(report) = report {
            self.choices[choice].n_tokens += 1;
            if self.frame.told.is_some() {
                self.choices[choice].ids.push(report.id);
            }
            if self.frame.logprobs {
                self.choices[choice].reports.push(report);
            }
        }
        let text = text_of(parts);
        match ending {
            Some(ending) => {
                self.usages[choice] = Some(ending.usage);
                vec![self.chunk(choice, &text, Some(finish_reason(Some(ending.reason), false)))]
            }
            None if text.is_empty() => Vec::new(),
            None => vec![self.chunk(choice, &text, None)],
        }
    }

    fn end(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        if self.streams.usage {
            let usages: Vec<Usage> = self.usages.iter().map(|u| u.unwrap_or_default()).collect();
            let mut chunk = self.frame.envelope.json("text_completion");
            chunk["choices"] = json!([]);
            chunk["usage"] = usage_json(&self.frame.usage(&usages));
            frames.push(Frame::data(chunk.to_string()));
        }
        frames.push(Frame::data("[DONE]"));
        frames
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Frame> {
        vec![Frame::data(error.body().to_string())]
    }
}
