//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::answer::{self, Collected, Frame, Job, Writer, total};
use super::envelope::Envelope;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{Delta, TokenReport};
use super::prompt::Rendering;
use super::sampling::{self, MAX_TOKENS, MAX_TOP_LOGPROBS};
use super::tools;
use super::{Ask, Entry, JsonBody, Placement, Server, conversation, format, logprobs};
use crate::markup::{Part, ToolCall};
use crate::request::{FinishReason, Usage};

/// Answers a chat request.
///
/// # Errors
/// 400 naming the field, or what [`Server::start`] says.
pub(super) async fn respond(State(server): State<Arc<Server>>, body: JsonBody) -> Result<Response, ApiError> {
    let (job, frame, streams) = server.read(body, read).await?;
    if streams.stream {
        let n = job.generations.len();
        let writer = ChatWriter { frame, streams, choices: vec![Choice::default(); n], usages: vec![] };
        return answer::stream(job, writer).await;
    }
    let collected = answer::collect(job).await?;
    Ok(Json(frame.whole(collected)).into_response())
}

fn read(
    server: &Arc<Server>,
    body: &Fields<'_>,
    entry: Entry,
) -> Result<(Job, ChatFrame, Streams), ApiError> {
    body.unsupported("functions", &[json!([])])?;
    body.unsupported("function_call", &[json!("none"), json!("auto")])?;
    body.unsupported("audio", &[])?;
    body.unsupported("modalities", &[json!(["text"])])?;
    body.unsupported("web_search_options", &[])?;
    body.unsupported("prompt_logprobs", &[])?;
    body.unsupported("chat_template", &[])?;
    body.unsupported("documents", &[json!([])])?;
    body.unsupported("echo", &[json!(false)])?;
    body.hints()?;
    let adapter = server.model(body.text("model")?)?;
    let mut sampling = sampling::read(body, &server.state.defaults, server.fresh_seed())?;
    let wants_logprobs = body.flag("logprobs")?.unwrap_or(false);
    let top = body.count("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
    if top.is_some_and(|n| n > 0) && !wants_logprobs {
        return Err(body.fault("top_logprobs", "needs \"logprobs\": true"));
    }
    sampling.params.top_logprobs = top.unwrap_or(0);
    let streams = Streams::read(body)?;
    let placement = Placement::read(body, &server.state.limits)?;
    let format = format::read(body)?;
    let tools = tools::openai(body)?;
    let messages = conversation::chat(body)?;
    let prompt = server.render(messages, &tools, Rendering::read(body)?, "messages")?;
    let mut tokens = server.encode(&prompt.text, false)?;
    let context_tokens = server.state.engine.limits().context_tokens;
    sampling::truncate(body, context_tokens, sampling.max_tokens, std::slice::from_mut(&mut tokens))?;
    let frame = ChatFrame {
        envelope: server.envelope(body, "chatcmpl")?,
        server: Arc::clone(server),
        logprobs: wants_logprobs,
        shows_thoughts: body.flag("include_reasoning")?.unwrap_or(true),
        told_prompt: body.flag("return_token_ids")?.unwrap_or(false).then(|| tokens.clone()),
        prompt_tokens: tokens.len(),
    };
    let ask = Ask {
        placement,
        format,
        adapter,
        markup: Some(server.markup(&tools, prompt.in_reasoning)),
        thought_tokens: body.count("thinking_token_budget", 1, MAX_TOKENS)?,
        single_call: tools.is_single(),
        held_calls: tools.held_calls(),
        text_arguments: tools.text_arguments(),
        ..Ask::new(vec![tokens], sampling)
    };
    Ok((server.start(ask, entry)?, frame, streams))
}

/// `stream` and `stream_options`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Streams {
    pub stream: bool,
    pub usage: bool,
    /// Counts in every chunk: vLLM's `continuous_usage_stats`.
    pub every_chunk: bool,
}

impl Streams {
    /// # Errors
    /// 400 naming the field.
    pub(super) fn read(body: &Fields<'_>) -> Result<Self, ApiError> {
        let stream = body.flag("stream")?.unwrap_or(false);
        let options = body.object("stream_options")?;
        if options.is_some() && !stream {
            return Err(body.fault("stream_options", "needs \"stream\": true"));
        }
        let Some(options) = options else { return Ok(Self { stream, ..Self::default() }) };
        options.flag("include_obfuscation")?;
        let usage = options.flag("include_usage")?.unwrap_or(false);
        let every_chunk = usage && options.flag("continuous_usage_stats")?.unwrap_or(false);
        Ok(Self { stream, usage, every_chunk })
    }
}

/// `usage` as OpenAI reports it.
pub(super) fn usage_json(usage: &Usage) -> Value {
    json!({"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
           "total_tokens": usage.prompt_tokens + usage.completion_tokens,
           "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
           "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens}})
}

/// Why an answer ended, in OpenAI's words.
pub(super) fn finish_reason(reason: Option<FinishReason>, calls: bool) -> &'static str {
    match reason {
        Some(FinishReason::Length) => "length",
        Some(FinishReason::Stop) if calls => "tool_calls",
        Some(FinishReason::Stop) => "stop",
        Some(FinishReason::Aborted) => "abort",
        Some(FinishReason::Error) | None => "error",
    }
}

struct ChatFrame {
    envelope: Envelope,
    server: Arc<Server>,
    logprobs: bool,
    shows_thoughts: bool,
    /// The prompt, when the ids of its tokens and of the answers' are reported.
    told_prompt: Option<Vec<u32>>,
    prompt_tokens: usize,
}

impl ChatFrame {
    fn logprobs<'a>(&self, reports: impl IntoIterator<Item = &'a TokenReport>) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let content: Vec<Value> =
            reports.into_iter().map(|report| logprobs::chat_entry(&self.server.vocabulary, report)).collect();
        json!({"content": content, "refusal": null})
    }

    fn call(&self, choice: usize, index: usize, name: &str, arguments: &str) -> Value {
        json!({"id": format!("call_{}{choice:02}{index:03}", self.envelope.id), "type": "function",
               "function": {"name": name, "arguments": arguments}})
    }

    fn whole(&self, collected: Vec<Collected>) -> Value {
        let usage = total(collected.iter().map(|c| &c.usage));
        let choices: Vec<Value> = collected
            .into_iter()
            .enumerate()
            .map(|(index, one)| {
                let blank = one.content.trim().is_empty() && !one.calls.is_empty();
                let content = if blank { Value::Null } else { json!(one.content) };
                let mut message = json!({"role": "assistant", "content": content, "refusal": null});
                if !one.reasoning.is_empty() && self.shows_thoughts {
                    message["reasoning_content"] = json!(one.reasoning);
                }
                if !one.calls.is_empty() {
                    let calls = one.calls.iter().enumerate();
                    let calls = calls.map(|(i, call)| self.call(index, i, &call.name, &call.arguments));
                    message["tool_calls"] = calls.collect();
                }
                let mut choice = json!({"index": index, "message": message, "logprobs": self.logprobs(&one.reports),
                       "finish_reason": finish_reason(one.reason, !one.calls.is_empty()), "stop_reason": one.stop});
                if self.told_prompt.is_some() {
                    choice["token_ids"] = one.reports.iter().map(|report| report.id).collect();
                }
                choice
            })
            .collect();
        let mut answer = self.envelope.json("chat.completion");
        if let Some(prompt) = &self.told_prompt {
            answer["prompt_token_ids"] = json!(prompt);
        }
        answer["choices"] = json!(choices);
        answer["usage"] = usage_json(&usage);
        answer
    }
}

/// Where one choice of a stream stands.
#[derive(Debug, Clone, Default)]
struct Choice {
    /// A chunk was written.
    begun: bool,
    n_calls: usize,
    /// Tokens whose text is not certain yet: their reports wait for it.
    reports: Vec<TokenReport>,
    /// Tokens that are to be told and that no chunk has told of yet.
    ids: Vec<u32>,
    n_tokens: usize,
}

struct ChatWriter {
    frame: ChatFrame,
    streams: Streams,
    choices: Vec<Choice>,
    usages: Vec<Usage>,
}

impl ChatWriter {
    fn chunk(&mut self, choice: usize, delta: &Value, logprobs: &Value, finish: Option<&str>) -> Frame {
        let mut chunk = self.frame.envelope.json("chat.completion.chunk");
        chunk["choices"] =
            json!([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]);
        if let Some(prompt) = &self.frame.told_prompt {
            if !self.choices[choice].begun {
                chunk["prompt_token_ids"] = json!(prompt);
            }
            chunk["choices"][0]["token_ids"] = json!(std::mem::take(&mut self.choices[choice].ids));
        }
        self.choices[choice].begun = true;
        if self.streams.every_chunk {
            let completion_tokens = self.choices.iter().map(|c| c.n_tokens).sum();
            let prompt_tokens = self.frame.prompt_tokens;
            chunk["usage"] = usage_json(&Usage { prompt_tokens, completion_tokens, ..Usage::default() });
        } else if self.streams.usage {
            chunk["usage"] = Value::Null;
        }
        Frame::data(chunk.to_string())
    }

    fn report(&mut self, choice: usize, report: TokenReport) {
        let state = &mut self.choices[choice];
        state.n_tokens += 1;
        if self.frame.told_prompt.is_some() {
            state.ids.push(report.id);
        }
        if self.frame.logprobs {
            state.reports.push(report);
        }
    }

    fn parts(&mut self, choice: usize, parts: Vec<Part>, frames: &mut Vec<Frame>) {
        for part in parts {
            match part {
                Part::Content(text) => self.said(choice, &json!({"content": text}), frames),
                Part::Reasoning(_) if !self.frame.shows_thoughts => {}
                Part::Reasoning(text) => self.said(choice, &json!({"reasoning_content": text}), frames),
                Part::Call(ToolCall { name, arguments, .. }) => {
                    self.begin_call(choice, &name, frames);
                    self.arguments(choice, &arguments, frames);
                }
                Part::CallBegun(name) => self.begin_call(choice, &name, frames),
                Part::Arguments(text) => self.arguments(choice, &text, frames),
                Part::CallEnded => {}
            }
        }
    }

    fn begin_call(&mut self, choice: usize, name: &str, frames: &mut Vec<Frame>) {
        let index = self.choices[choice].n_calls;
        self.choices[choice].n_calls += 1;
        let mut call = self.frame.call(choice, index, name, "");
        call["index"] = json!(index);
        self.said(choice, &json!({"tool_calls": [call]}), frames);
    }

    /// More of the arguments of the call that began last.
    fn arguments(&mut self, choice: usize, text: &str, frames: &mut Vec<Frame>) {
        let index = self.choices[choice].n_calls - 1;
        let call = json!({"index": index, "function": {"arguments": text}});
        self.said(choice, &json!({"tool_calls": [call]}), frames);
    }

    /// A delta, with the tokens that it became certain with.
    fn said(&mut self, choice: usize, delta: &Value, frames: &mut Vec<Frame>) {
        let reports = std::mem::take(&mut self.choices[choice].reports);
        let logprobs = self.frame.logprobs(&reports);
        frames.push(self.chunk(choice, delta, &logprobs, None));
    }
}

impl Writer for ChatWriter {
    fn begin(&mut self) -> Vec<Frame> {
        Vec::new()
    }

    fn delta(&mut self, choice: usize, delta: Delta) -> Vec<Frame> {
        let mut frames = Vec::new();
        if !self.choices[choice].begun {
            let opening = json!({"role": "assistant", "content": ""});
            frames.push(self.chunk(choice, &opening, &Value::Null, None));
        }
        match delta {
            Delta::Prompt(_) => {}
            Delta::Token { parts, report } => {
                self.report(choice, report);
                self.parts(choice, parts, &mut frames);
            }
            Delta::End(ending) => {
                if let Some(report) = ending.report {
                    self.report(choice, report);
                }
                self.parts(choice, ending.parts, &mut frames);
                let reports = std::mem::take(&mut self.choices[choice].reports);
                let logprobs = if reports.is_empty() { Value::Null } else { self.frame.logprobs(&reports) };
                let finish = finish_reason(Some(ending.reason), self.choices[choice].n_calls > 0);
                frames.push(self.chunk(choice, &json!({}), &logprobs, Some(finish)));
                self.usages.push(ending.usage);
            }
        }
        frames
    }

    fn end(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        if self.streams.usage {
            let mut chunk = self.frame.envelope.json("chat.completion.chunk");
            chunk["choices"] = json!([]);
            chunk["usage"] = usage_json(&total(&self.usages));
            frames.push(Frame::data(chunk.to_string()));
        }
        frames.push(Frame::data("[DONE]"));
        frames
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Frame> {
        vec![Frame::data(error.body().to_string())]
    }
}
