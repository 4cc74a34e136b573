//! Anthropic's API: `POST /v1/messages` and `POST /v1/messages/count_tokens`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::answer::{self, Collected, Frame, Job, Writer};
use super::conversation::{call_value, text_content, within_limits};
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::format;
use super::generation::Delta;
use super::prompt::{Prompt, Rendering};
use super::sampling::{MAX_TOKENS, Sampling};
use super::tools::{self, Tools};
use super::{Ask, Entry, JsonBody, Server};
use crate::markup::{Part, ToolCall};
use crate::request::{FinishReason, Usage};
use crate::sampling::SamplingParams;

/// Stop sequences of a request.
const MAX_STOPS: usize = 64;

/// Answers a messages request.
///
/// # Errors
/// 400 naming the field, or what [`Server::start`] says.
pub(super) async fn respond(State(server): State<Arc<Server>>, body: JsonBody) -> Result<Response, ApiError> {
    let (job, frame, prompt_tokens, streams) = server.read(body, read).await?;
    if streams {
        let writer = MessageWriter::new(frame, prompt_tokens);
        return answer::stream(job, writer).await;
    }
    let mut collected = answer::collect(job).await?;
    let one = collected.pop().ok_or_else(|| ApiError::internal("no answer"))?;
    Ok(Json(frame.whole(&one)).into_response())
}

/// The job, what the answer's objects have in common, tokens of the prompt, and whether it is to be streamed.
fn read(
    server: &Arc<Server>,
    body: &Fields<'_>,
    entry: Entry,
) -> Result<(Job, MessageFrame, usize, bool), ApiError> {
    let asked = Asked::read(server, body)?;
    let max_tokens = body.count("max_tokens", 1, MAX_TOKENS)?.ok_or_else(|| body.missing("max_tokens"))?;
    let defaults = &server.state.defaults;
    let params = SamplingParams {
        temperature: body.number("temperature", 0.0..=1.0)?.unwrap_or(defaults.temperature),
        top_p: body.number("top_p", f32::MIN_POSITIVE..=1.0)?.unwrap_or(defaults.top_p),
        top_k: body.count("top_k", 0, i64::from(i32::MAX))?.unwrap_or(defaults.top_k),
        // These two are vLLM's.
        min_p: body.number("min_p", 0.0..=0.999)?.unwrap_or(defaults.min_p),
        repetition_penalty: defaults.repetition_penalty,
        seed: body
            .integer("seed", i64::MIN..=i64::MAX)?
            .map_or_else(|| server.fresh_seed(), i64::cast_unsigned),
        ..SamplingParams::default()
    };
    let sampling = Sampling {
        max_tokens: Some(max_tokens),
        stops: body.texts("stop_sequences", MAX_STOPS)?,
        ..Sampling::new(params)
    };
    if let Thinking::AtMost(budget) = asked.thinking
        && budget >= max_tokens
    {
        let why = format!("must be less than max_tokens, {max_tokens}");
        return Err(body.fault("thinking.budget_tokens", why));
    }
    let streams = body.flag("stream")?.unwrap_or(false);
    let tokens = server.encode(&asked.prompt.text, false)?;
    let prompt_tokens = tokens.len();
    let ask = Ask {
        adapter: asked.adapter,
        format: format::output_config(body)?,
        markup: Some(server.markup(&asked.tools, asked.prompt.in_reasoning)),
        thought_tokens: match asked.thinking {
            Thinking::AtMost(budget) => Some(budget),
            Thinking::AsItLikes | Thinking::Unseen => None,
        },
        single_call: asked.tools.is_single(),
        held_calls: asked.tools.held_calls(),
        text_arguments: asked.tools.text_arguments(),
        ..Ask::new(vec![tokens], sampling)
    };
    let frame = MessageFrame {
        id: server.answer_id(),
        model: body.text("model")?.unwrap_or(&server.state.model_name).to_owned(),
        shows_thoughts: asked.thinking != Thinking::Unseen,
    };
    Ok((server.start(ask, entry)?, frame, prompt_tokens, streams))
}

/// Counts the tokens of a prompt.
///
/// # Errors
/// 400 naming the field.
pub(super) async fn count_tokens(
    State(server): State<Arc<Server>>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let count = |server: &Arc<Server>, body: &Fields<'_>, _: Entry| {
        let asked = Asked::read(server, body)?;
        Ok(server.encode(&asked.prompt.text, false)?.len())
    };
    let tokens = server.read(body, count).await?;
    Ok(Json(json!({"input_tokens": tokens})))
}

/// What `thinking` says about thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thinking {
    /// Nothing, or "adaptive".
    AsItLikes,
    /// "enabled": so many tokens of them.
    AtMost(usize),
    /// "disabled": models that can leave them out do, those of others are left out of the answer.
    Unseen,
}

/// What both endpoints read.
struct Asked {
    adapter: Option<String>,
    thinking: Thinking,
    tools: Tools,
    prompt: Prompt,
}

impl Asked {
    fn read(server: &Server, body: &Fields<'_>) -> Result<Self, ApiError> {
        let adapter = server.model(Some(body.required_text("model")?))?;
        body.unsupported("mcp_servers", &[json!([])])?;
        body.unsupported("container", &[])?;
        body.unsupported("context_management", &[json!({}), json!({"edits": []})])?;
        // What tells others something and changes no answer here.
        if let Some(metadata) = body.object("metadata")? {
            metadata.text("user_id")?;
        }
        body.text("service_tier")?;
        body.object("cache_control")?;
        let tools = tools::anthropic(body)?;
        let mut rendering = Rendering { opens_turn: true, ..Rendering::default() };
        let mut thinks = Thinking::AsItLikes;
        if let Some(thinking) = body.object("thinking")? {
            let words = [("enabled", "enabled"), ("disabled", "disabled"), ("adaptive", "adaptive")];
            let kind = thinking.choice("type", &words)?.ok_or_else(|| thinking.missing("type"))?;
            let budget = thinking.count("budget_tokens", 1, MAX_TOKENS)?;
            thinks = match kind {
                "enabled" => Thinking::AtMost(budget.ok_or_else(|| thinking.missing("budget_tokens"))?),
                "disabled" => Thinking::Unseen,
                _ => Thinking::AsItLikes,
            };
            rendering.variables.insert("enable_thinking".to_owned(), json!(thinks != Thinking::Unseen));
        }
        if let Some(config) = body.object("output_config")? {
            rendering.take_output_effort(&config)?;
        }
        let messages = conversation(body)?;
        rendering.continues = messages.len() > 1 && messages.last().is_some_and(|m| m["role"] == "assistant");
        if messages.last().is_some_and(|m| m.get("tool_calls").is_some()) {
            let why = "must not end with a tool_use: send its tool_result";
            return Err(body.fault("messages", why));
        }
        if rendering.continues && matches!(thinks, Thinking::AtMost(_)) {
            let why =
                "cannot be enabled where the last message is the assistant's: the model goes on with that";
            return Err(body.fault("thinking", why));
        }
        let prompt = server.render(messages, &tools, rendering, "messages")?;
        Ok(Self { adapter, thinking: thinks, tools, prompt })
    }
}

/// `system` and `messages` as templates expect them.
fn conversation(body: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let mut messages = Vec::new();
    if let Some(system) = text_content(body, "system", &["text"])? {
        messages.push(json!({"role": "system", "content": system}));
    }
    let items = body.list("messages")?.ok_or_else(|| body.missing("messages"))?;
    within_limits(body, "messages", items.len())?;
    for (path, item) in items {
        let message = Fields::of(item, path)?;
        let roles = [("user", "user"), ("assistant", "assistant")];
        let role = message.choice("role", &roles)?.ok_or_else(|| message.missing("role"))?;
        match message.get("content") {
            None => return Err(message.missing("content")),
            Some(Value::String(text)) => messages.push(json!({"role": role, "content": text})),
            Some(Value::Array(_)) => blocks(&message, role, &mut messages)?,
            Some(other) => {
                return Err(wrong(&message.path("content"), "a string or a list of blocks", other));
            }
        }
    }
    Ok(messages)
}

/// One message's blocks: results of tools become messages of their own, before the text beside them.
fn blocks(message: &Fields<'_>, role: &str, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let (mut text, mut thoughts, mut calls, mut results) = (String::new(), String::new(), vec![], vec![]);
    let items = message.list("content")?.unwrap_or_default();
    if items.is_empty() {
        return Err(message.fault("content", "must not be empty"));
    }
    for (path, item) in items {
        let block = Fields::of(item, path)?;
        match (block.required_text("type")?, role) {
            ("text", _) => text.push_str(block.required_text("text")?),
            ("thinking", "assistant") => thoughts.push_str(block.required_text("thinking")?),
            ("redacted_thinking", "assistant") => {}
            ("tool_use", "assistant") => {
                block.object("input")?.ok_or_else(|| block.missing("input"))?;
                // As it is: an argument that is null stays.
                let input = block.get("input").expect("it was seen a moment ago");
                calls.push(call_value(block.required_text("id")?, block.required_text("name")?, input));
            }
            ("tool_result", "user") => {
                let id = block.required_text("tool_use_id")?;
                block.flag("is_error")?;
                let content = text_content(&block, "content", &["text"])?.unwrap_or_default();
                results.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            }
            (kind, _) => {
                return Err(
                    block.fault("type", format!("{kind:?} is not supported in a message of the {role}"))
                );
            }
        }
    }
    let has_results = !results.is_empty();
    messages.extend(results);
    if text.is_empty() && calls.is_empty() && has_results {
        return Ok(());
    }
    let mut out = json!({"role": role, "content": text});
    if !thoughts.is_empty() {
        out["reasoning_content"] = json!(thoughts);
    }
    if !calls.is_empty() {
        out["tool_calls"] = Value::Array(calls);
    }
    messages.push(out);
    Ok(())
}

fn usage_json(usage: &Usage) -> Value {
    json!({"input_tokens": usage.prompt_tokens - usage.cached_tokens.min(usage.prompt_tokens),
           "cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached_tokens,
           "output_tokens": usage.completion_tokens})
}

fn stop_reason(reason: Option<FinishReason>, stop: Option<&String>, calls: bool) -> &'static str {
    match (reason, stop) {
        (_, Some(_)) => "stop_sequence",
        (Some(FinishReason::Length), _) => "max_tokens",
        // Whoever sends back what there is has it continued.
        (Some(FinishReason::Aborted), _) => "pause_turn",
        _ if calls => "tool_use",
        _ => "end_turn",
    }
}

struct MessageFrame {
    id: String,
    model: String,
    shows_thoughts: bool,
}

/// What stands where Anthropic's API has a signature of thoughts: their digest. Nobody checks it when they come back.
fn signature(thoughts: &blake3::Hasher) -> String {
    thoughts.finalize().to_hex()[..32].to_owned()
}

impl MessageFrame {
    fn json(&self, content: &[Value], usage: &Usage) -> Value {
        json!({"id": format!("msg_{}", self.id), "type": "message", "role": "assistant", "model": self.model,
               "content": content, "stop_reason": null, "stop_sequence": null, "usage": usage_json(usage)})
    }

    fn call_id(&self, index: usize) -> String {
        format!("toolu_{}{index:03}", self.id)
    }

    fn whole(&self, one: &Collected) -> Value {
        let mut content = Vec::new();
        if !one.reasoning.is_empty() && self.shows_thoughts {
            let mut thoughts = blake3::Hasher::new();
            thoughts.update(one.reasoning.as_bytes());
            let signature = signature(&thoughts);
            content.push(json!({"type": "thinking", "thinking": one.reasoning, "signature": signature}));
        }
        if !one.content.trim().is_empty() || content.is_empty() && one.calls.is_empty() {
            content.push(json!({"type": "text", "text": one.content}));
        }
        for (i, ToolCall { name, arguments, .. }) in one.calls.iter().enumerate() {
            // Those that the model did not write to their end are shown as Anthropic tells clients to send them back.
            let input: Value =
                serde_json::from_str(arguments).unwrap_or_else(|_| json!({"INVALID_JSON": arguments}));
            content.push(json!({"type": "tool_use", "id": self.call_id(i), "name": name, "input": input}));
        }
        let mut answer = self.json(&content, &one.usage);
        answer["stop_reason"] = json!(stop_reason(one.reason, one.stop.as_ref(), !one.calls.is_empty()));
        answer["stop_sequence"] = json!(one.stop);
        answer
    }
}

/// Which block is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
    Call,
}

/// `message_start`, then for each block `content_block_start`, `content_block_delta`.., `content_block_stop`, then
/// `message_delta` and `message_stop`.
struct MessageWriter {
    frame: MessageFrame,
    prompt_tokens: usize,
    open: Option<Block>,
    /// Of the open block.
    thoughts: blake3::Hasher,
    /// Blocks that were begun.
    n_blocks: usize,
    n_calls: usize,
    ending: Option<(&'static str, Option<String>, Usage)>,
}

impl MessageWriter {
    fn new(frame: MessageFrame, prompt_tokens: usize) -> Self {
        let thoughts = blake3::Hasher::new();
        Self { frame, prompt_tokens, open: None, thoughts, n_blocks: 0, n_calls: 0, ending: None }
    }

    fn start_block(&mut self, block: &Value) -> Frame {
        self.n_blocks += 1;
        let index = self.n_blocks - 1;
        Frame::named(
            "content_block_start",
            &json!({"type": "content_block_start", "index": index, "content_block": block}),
        )
    }

    fn block_delta(&self, delta: &Value) -> Frame {
        let index = self.n_blocks - 1;
        Frame::named(
            "content_block_delta",
            &json!({"type": "content_block_delta", "index": index, "delta": delta}),
        )
    }

    fn stop_block(&self) -> Frame {
        let index = self.n_blocks - 1;
        Frame::named("content_block_stop", &json!({"type": "content_block_stop", "index": index}))
    }

    fn close(&mut self, frames: &mut Vec<Frame>) {
        let Some(block) = self.open.take() else { return };
        if block == Block::Thinking {
            let delta = json!({"type": "signature_delta", "signature": signature(&self.thoughts)});
            frames.push(self.block_delta(&delta));
            self.thoughts.reset();
        }
        frames.push(self.stop_block());
    }

    fn open(&mut self, block: Block, start: &Value, frames: &mut Vec<Frame>) {
        self.close(frames);
        frames.push(self.start_block(start));
        self.open = Some(block);
    }

    fn open_text(&mut self, frames: &mut Vec<Frame>) {
        self.open(Block::Text, &json!({"type": "text", "text": ""}), frames);
    }

    fn begin_call(&mut self, name: &str, frames: &mut Vec<Frame>) {
        let id = self.frame.call_id(self.n_calls);
        self.n_calls += 1;
        self.open(Block::Call, &json!({"type": "tool_use", "id": id, "name": name, "input": {}}), frames);
    }

    fn arguments(&self, text: &str, frames: &mut Vec<Frame>) {
        frames.push(self.block_delta(&json!({"type": "input_json_delta", "partial_json": text})));
    }

    fn part(&mut self, part: Part, frames: &mut Vec<Frame>) {
        match part {
            // White space between calls is no block of its own.
            Part::Content(text)
                if matches!(self.open, None | Some(Block::Call))
                    && self.n_calls > 0
                    && text.trim().is_empty() => {}
            Part::Content(text) => {
                if self.open != Some(Block::Text) {
                    self.open_text(frames);
                }
                frames.push(self.block_delta(&json!({"type": "text_delta", "text": text})));
            }
            Part::Reasoning(_) if !self.frame.shows_thoughts => {}
            Part::Reasoning(text) => {
                if self.open != Some(Block::Thinking) {
                    let start = json!({"type": "thinking", "thinking": "", "signature": ""});
                    self.open(Block::Thinking, &start, frames);
                }
                self.thoughts.update(text.as_bytes());
                frames.push(self.block_delta(&json!({"type": "thinking_delta", "thinking": text})));
            }
            Part::Call(ToolCall { name, arguments, .. }) => {
                self.begin_call(&name, frames);
                self.arguments(&arguments, frames);
                self.close(frames);
            }
            Part::CallBegun(name) => self.begin_call(&name, frames),
            Part::Arguments(text) => self.arguments(&text, frames),
            Part::CallEnded => self.close(frames),
        }
    }
}

impl Writer for MessageWriter {
    fn begin(&mut self) -> Vec<Frame> {
        let usage = Usage { prompt_tokens: self.prompt_tokens, ..Usage::default() };
        let message = self.frame.json(&[], &usage);
        vec![
            Frame::named("message_start", &json!({"type": "message_start", "message": message})),
            Frame::named("ping", &json!({"type": "ping"})),
        ]
    }

    fn delta(&mut self, _choice: usize, delta: Delta) -> Vec<Frame> {
        let mut frames = Vec::new();
        let (parts, _, ending) = delta.split();
        for part in parts {
            self.part(part, &mut frames);
        }
        if let Some(ending) = ending {
            let reason = stop_reason(Some(ending.reason), ending.stop.as_ref(), self.n_calls > 0);
            self.ending = Some((reason, ending.stop, ending.usage));
        }
        frames
    }

    fn end(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        if self.n_blocks == 0 {
            self.open_text(&mut frames);
        }
        self.close(&mut frames);
        let (reason, stop, usage) =
            self.ending.take().unwrap_or_else(|| ("end_turn", None, Usage::default()));
        frames.push(Frame::named(
            "message_delta",
            &json!({"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": stop},
                   "usage": usage_json(&usage)}),
        ));
        frames.push(Frame::named("message_stop", &json!({"type": "message_stop"})));
        frames
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Frame> {
        vec![Frame::named("error", &error.anthropic_body())]
    }
}

#[cfg(test)]
mod tests;
