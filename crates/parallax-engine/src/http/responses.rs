//! OpenAI's responses API: `POST /v1/responses`.
//!
//! Nothing is stored: a request carries its whole conversation, and `previous_response_id` is refused with the remedy.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::answer::{self, Frame, Job, Writer};
use super::error::ApiError;
use super::fields::{Fields, wrong};
use super::generation::{Delta, TokenReport};
use super::prompt::Rendering;
use super::sampling::{self, MAX_TOKENS, MAX_TOP_LOGPROBS};
use super::{Ask, Entry, JsonBody, Placement, Server, conversation, format, logprobs, tools, unix_seconds};
use crate::markup::{Part, ToolCall};
use crate::request::{FinishReason, Usage};

/// What OpenAI's server can add to an answer. Of these, ours knows the log-probabilities.
const INCLUDED: [&str; 8] = [
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];
const LOGPROBS: &str = "message.output_text.logprobs";

/// Answers a responses request.
///
/// # Errors
/// 400 naming the field, or what [`Server::start`] says.
pub(super) async fn respond(State(server): State<Arc<Server>>, body: JsonBody) -> Result<Response, ApiError> {
    let (job, writer, streams) = server.read(body, read).await?;
    if streams {
        return answer::stream(job, writer).await;
    }
    Ok(Json(answer::written(job, writer).await?.finished()).into_response())
}

/// The job, its writer, and whether it is to be streamed.
fn read(
    server: &Arc<Server>,
    body: &Fields<'_>,
    entry: Entry,
) -> Result<(Job, ResponseWriter, bool), ApiError> {
    let adapter = server.model(body.text("model")?)?;
    if body.has("previous_response_id") || body.has("conversation") {
        let name = if body.has("conversation") { "conversation" } else { "previous_response_id" };
        return Err(
            body.fault(name, "is not supported: this server keeps nothing, send the whole conversation")
        );
    }
    for (name, harmless) in [
        ("background", json!(false)),
        ("max_tool_calls", Value::Null),
        ("prompt", Value::Null),
        ("n", json!(1)),
        ("truncate_prompt_tokens", Value::Null),
        ("return_token_ids", json!(false)),
        ("include_reasoning", json!(true)),
    ] {
        body.unsupported(name, &[harmless])?;
    }
    body.hints()?;
    // A prompt that does not fit is refused with either.
    let truncation = body.choice("truncation", &[("auto", "auto"), ("disabled", "disabled")])?;
    let top = body.count("top_logprobs", 0, MAX_TOP_LOGPROBS)?;
    let wants_logprobs = includes_logprobs(body)?;
    if top.is_some_and(|n| n > 0) && !wants_logprobs {
        return Err(body.fault("top_logprobs", "needs \"include\": [\"message.output_text.logprobs\"]"));
    }
    let mut sampling = sampling::read(body, &server.state.defaults, server.fresh_seed())?;
    sampling.max_tokens = body.count("max_output_tokens", 1, MAX_TOKENS)?.or(sampling.max_tokens);
    sampling.params.top_logprobs = top.unwrap_or(0);
    let streams = body.flag("stream")?.unwrap_or(false);
    let form = form(body)?;
    let mut rendering = Rendering { opens_turn: true, ..Rendering::default() };
    let reasoning = body.object("reasoning")?;
    if let Some(reasoning) = &reasoning {
        reasoning.text("summary")?;
        rendering.take_effort(reasoning, "effort")?;
    }
    let offered = tools::openai(body)?;
    let messages = conversation::responses(body)?;
    let prompt = server.render(messages, &offered, rendering, "input")?;
    let tokens = server.encode(&prompt.text, false)?;
    let ask = Ask {
        placement: Placement::read(body, &server.state.limits)?,
        format: form,
        adapter,
        markup: Some(server.markup(&offered, prompt.in_reasoning)),
        thought_tokens: body.count("thinking_token_budget", 1, MAX_TOKENS)?,
        single_call: offered.is_single(),
        held_calls: offered.held_calls(),
        text_arguments: offered.text_arguments(),
        ..Ask::new(vec![tokens], sampling)
    };
    let kept = |name: &str, default: Value| body.get(name).cloned().unwrap_or(default);
    let thinking = |name: &str| reasoning.as_ref().and_then(|reasoning| reasoning.get(name));
    let frame = json!({
        "object": "response", "created_at": unix_seconds(), "error": null, "incomplete_details": null,
        "instructions": kept("instructions", Value::Null), "metadata": kept("metadata", json!({})),
        "model": body.text("model")?.unwrap_or(&server.state.model_name), "output": [],
        "parallel_tool_calls": !offered.single, "previous_response_id": null,
        "temperature": kept("temperature", json!(server.state.defaults.temperature)),
        "top_p": kept("top_p", json!(server.state.defaults.top_p)),
        "max_output_tokens": kept("max_output_tokens", Value::Null),
        "text": kept("text", json!({"format": {"type": "text"}})),
        "tools": kept("tools", json!([])), "tool_choice": kept("tool_choice", json!("auto")),
        "top_logprobs": top.unwrap_or(0), "store": false, "status": "in_progress", "usage": null,
        "reasoning": {"effort": thinking("effort"), "summary": thinking("summary")}, "background": false,
        "truncation": truncation.unwrap_or("disabled"), "user": kept("user", Value::Null),
        "service_tier": "default",
    });
    let reporter = wants_logprobs.then(|| Arc::clone(server));
    let writer = ResponseWriter::new(server.answer_id(), frame, reporter);
    Ok((server.start(ask, entry)?, writer, streams))
}

/// `text.format`, or one of vLLM's guided fields.
fn form(body: &Fields<'_>) -> Result<Option<format::Format>, ApiError> {
    let mut form = format::read(body)?;
    let Some(text) = body.object("text")? else { return Ok(form) };
    text.verbosity()?;
    if let Some(asked) = text.object("format")?
        && let Some(own) = format::response_format(&asked, "text.format", false)?
        && let Some(other) = form.replace(own)
    {
        return Err(text.fault("format", format!("and {} both ask for a form: use one", other.field)));
    }
    Ok(form)
}

/// Whether `include` asks for log-probabilities. Other things that OpenAI knows are never there.
fn includes_logprobs(body: &Fields<'_>) -> Result<bool, ApiError> {
    let mut found = false;
    for (path, item) in body.list("include")?.unwrap_or_default() {
        let word = item.as_str().ok_or_else(|| wrong(&path, "a string", item))?;
        if !INCLUDED.contains(&word) {
            let why = format!("{path} must be one of {}, not {word:?}", INCLUDED.join(", "));
            return Err(ApiError::invalid(Some(&path), why));
        }
        found |= word == LOGPROBS;
    }
    Ok(found)
}

/// The item that is being written.
#[derive(Debug, Clone, PartialEq)]
enum Item {
    /// Its text, and its tokens if they are reported.
    Message(String, Vec<Value>),
    Reasoning(String),
    /// Its name, its arguments, and whether they are complete.
    Call(String, String, bool),
}

/// `response.created`, `response.in_progress`, then for each item `output_item.added`, its deltas and `output_item.done`,
/// then `response.completed` or `response.incomplete`. Every event has a sequence number.
struct ResponseWriter {
    id: String,
    frame: Value,
    output: Vec<Value>,
    open: Option<Item>,
    n_events: usize,
    ending: Option<(FinishReason, Usage)>,
    /// What knows the texts of tokens, if they are reported.
    reporter: Option<Arc<Server>>,
    /// Tokens whose text is not certain yet.
    reports: Vec<Value>,
}

impl ResponseWriter {
    fn new(id: String, mut frame: Value, reporter: Option<Arc<Server>>) -> Self {
        frame["id"] = json!(format!("resp_{id}"));
        let (output, reports) = (Vec::new(), Vec::new());
        Self { id, frame, output, open: None, n_events: 0, ending: None, reporter, reports }
    }

    fn report(&mut self, report: &TokenReport) {
        if let Some(server) = self.reporter.as_ref().filter(|_| !report.reasoning) {
            self.reports.push(logprobs::chat_entry(&server.vocabulary, report));
        }
    }

    fn event(&mut self, name: &'static str, mut data: Value) -> Frame {
        data["type"] = json!(name);
        data["sequence_number"] = json!(self.n_events);
        self.n_events += 1;
        Frame::named(name, &data)
    }

    fn item_id(&self, kind: &str) -> String {
        format!("{kind}_{}{:03}", self.id, self.output.len())
    }

    fn message(&self, text: Option<(&str, &[Value])>) -> Value {
        let status = if text.is_some() { "completed" } else { "in_progress" };
        let content = text.map(|(text, logprobs)| text_part(text, logprobs));
        let content: Vec<Value> = content.into_iter().collect();
        json!({"id": self.item_id("msg"), "type": "message", "role": "assistant", "status": status, "content": content})
    }

    fn reasoning(&self, text: &str, status: &str) -> Value {
        let content =
            if status == "completed" { json!([{"type": "reasoning_text", "text": text}]) } else { json!([]) };
        json!({"id": self.item_id("rs"), "type": "reasoning", "status": status, "summary": [], "content": content})
    }

    fn part(&mut self, part: Part, frames: &mut Vec<Frame>) {
        match part {
            Part::Content(text) if text.is_empty() => {}
            Part::Reasoning(text) if text.is_empty() => {}
            // White space between calls is no message of its own.
            Part::Content(text)
                if !matches!(self.open, Some(Item::Message(..)))
                    && text.trim().is_empty()
                    && (!self.output.is_empty() || matches!(self.open, Some(Item::Call(..)))) => {}
            Part::Content(text) => {
                if !matches!(self.open, Some(Item::Message(..))) {
                    self.close(frames);
                    self.begin_item(&self.message(None), &text_part("", &[]), frames);
                    self.open = Some(Item::Message(String::new(), Vec::new()));
                }
                let (id, index) = (self.item_id("msg"), self.output.len());
                let reports = std::mem::take(&mut self.reports);
                if let Some(Item::Message(all, reported)) = &mut self.open {
                    all.push_str(&text);
                    reported.extend_from_slice(&reports);
                }
                frames.push(self.event(
                    "response.output_text.delta",
                    json!({"item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": reports}),
                ));
            }
            Part::Reasoning(text) => {
                if !matches!(self.open, Some(Item::Reasoning(_))) {
                    self.close(frames);
                    let item = self.reasoning("", "in_progress");
                    self.begin_item(&item, &json!({"type": "reasoning_text", "text": ""}), frames);
                    self.open = Some(Item::Reasoning(String::new()));
                }
                let (id, index) = (self.item_id("rs"), self.output.len());
                if let Some(Item::Reasoning(all)) = &mut self.open {
                    all.push_str(&text);
                }
                frames.push(self.event(
                    "response.reasoning_text.delta",
                    json!({"item_id": id, "output_index": index, "content_index": 0, "delta": text}),
                ));
            }
            Part::Call(ToolCall { name, arguments, .. }) => {
                self.begin_call(name, frames);
                self.arguments(&arguments, frames);
                self.end_call(frames);
            }
            Part::CallBegun(name) => self.begin_call(name, frames),
            Part::Arguments(text) => self.arguments(&text, frames),
            Part::CallEnded => self.end_call(frames),
        }
    }

    fn call(&self, name: &str, arguments: &str, status: &str) -> Value {
        let call_id = format!("call_{}{:03}", self.id, self.output.len());
        json!({"id": self.item_id("fc"), "type": "function_call", "call_id": call_id, "name": name,
               "arguments": arguments, "status": status})
    }

    fn begin_call(&mut self, name: String, frames: &mut Vec<Frame>) {
        self.close(frames);
        let item = self.call(&name, "", "in_progress");
        let added = json!({"output_index": self.output.len(), "item": item});
        frames.push(self.event("response.output_item.added", added));
        self.open = Some(Item::Call(name, String::new(), false));
    }

    /// More of the open call's arguments.
    fn arguments(&mut self, text: &str, frames: &mut Vec<Frame>) {
        self.reports.clear();
        if let Some(Item::Call(_, arguments, _)) = &mut self.open {
            arguments.push_str(text);
        }
        let delta = json!({"item_id": self.item_id("fc"), "output_index": self.output.len(), "delta": text});
        frames.push(self.event("response.function_call_arguments.delta", delta));
    }

    fn end_call(&mut self, frames: &mut Vec<Frame>) {
        if let Some(Item::Call(_, _, is_complete)) = &mut self.open {
            *is_complete = true;
        }
        self.close(frames);
    }

    fn begin_item(&mut self, item: &Value, part: &Value, frames: &mut Vec<Frame>) {
        let index = self.output.len();
        frames.push(self.event("response.output_item.added", json!({"output_index": index, "item": item})));
        let added = json!({"item_id": item["id"], "output_index": index, "content_index": 0, "part": part});
        frames.push(self.event("response.content_part.added", added));
    }

    fn end_item(&mut self, item: Value, frames: &mut Vec<Frame>) {
        let index = self.output.len();
        frames.push(self.event("response.output_item.done", json!({"output_index": index, "item": item})));
        self.output.push(item);
    }

    /// Finishes the open item.
    fn close(&mut self, frames: &mut Vec<Frame>) {
        let Some(open) = self.open.take() else { return };
        let index = self.output.len();
        let (item, done, text, logprobs) = match open {
            Item::Message(text, reports) => {
                let item = self.message(Some((&text, &reports)));
                (item, "response.output_text.done", text, Some(reports))
            }
            Item::Reasoning(text) => {
                (self.reasoning(&text, "completed"), "response.reasoning_text.done", text, None)
            }
            Item::Call(name, arguments, is_complete) => {
                let status = if is_complete { "completed" } else { "incomplete" };
                let item = self.call(&name, &arguments, status);
                let done = json!({"item_id": item["id"], "output_index": index, "name": name,
                                  "arguments": arguments});
                frames.push(self.event("response.function_call_arguments.done", done));
                return self.end_item(item, frames);
            }
        };
        let id = item["id"].clone();
        let mut finished = json!({"item_id": id, "output_index": index, "content_index": 0, "text": text});
        if let Some(logprobs) = logprobs {
            finished["logprobs"] = json!(logprobs);
        }
        frames.push(self.event(done, finished));
        let part =
            json!({"item_id": id, "output_index": index, "content_index": 0, "part": item["content"][0]});
        frames.push(self.event("response.content_part.done", part));
        self.end_item(item, frames);
    }

    /// The whole response.
    fn finished(&self) -> Value {
        let (reason, usage) = self.ending.unwrap_or_else(|| (FinishReason::Stop, Usage::default()));
        let mut response = self.frame.clone();
        let cut = match reason {
            FinishReason::Length => Some("max_output_tokens"),
            FinishReason::Aborted => Some("abort"),
            FinishReason::Stop | FinishReason::Error => None,
        };
        response["status"] = json!(if cut.is_some() { "incomplete" } else { "completed" });
        if let Some(why) = cut {
            response["incomplete_details"] = json!({"reason": why});
        }
        response["output"] = json!(self.output);
        response["usage"] = json!({"input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens});
        response
    }
}

fn text_part(text: &str, logprobs: &[Value]) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

impl Writer for ResponseWriter {
    fn begin(&mut self) -> Vec<Frame> {
        let response = self.frame.clone();
        vec![
            self.event("response.created", json!({"response": response})),
            self.event("response.in_progress", json!({"response": response})),
        ]
    }

    fn delta(&mut self, _choice: usize, delta: Delta) -> Vec<Frame> {
        let mut frames = Vec::new();
        let (parts, report, ending) = delta.split();
        if let Some(report) = &report {
            self.report(report);
        }
        if let Some(ending) = ending {
            self.ending = Some((ending.reason, ending.usage));
        }
        for part in parts {
            self.part(part, &mut frames);
        }
        frames
    }

    fn end(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        self.close(&mut frames);
        let response = self.finished();
        let name =
            if response["status"] == "incomplete" { "response.incomplete" } else { "response.completed" };
        frames.push(self.event(name, json!({"response": response})));
        frames
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Frame> {
        let mut response = self.frame.clone();
        response["status"] = json!("failed");
        response["error"] = json!({"code": "server_error", "message": error.body()["error"]["message"]});
        vec![self.event("response.failed", json!({"response": response}))]
    }
}

#[cfg(test)]
mod tests {
    use super::super::generation::Ending;
    use super::*;

    fn token(parts: Vec<Part>) -> Delta {
        let report = TokenReport { id: 0, logprob: 0.0, version: 0, reasoning: false, top: vec![] };
        Delta::Token { parts, report }
    }

    #[test]
    fn arguments_come_in_pieces_and_broken_ones_are_incomplete() {
        let begun = || token(vec![Part::CallBegun("w".into()), Part::Arguments("{\"c\":".into())]);
        let mut writer = ResponseWriter::new("1".into(), json!({}), None);
        let mut frames = writer.delta(0, begun());
        frames.extend(writer.delta(0, token(vec![Part::Arguments("1}".into()), Part::CallEnded])));
        assert_eq!(
            frames.iter().filter_map(|f| f.event).collect::<Vec<_>>(),
            [
                "response.output_item.added",
                "response.function_call_arguments.delta",
                "response.function_call_arguments.delta",
                "response.function_call_arguments.done",
                "response.output_item.done",
            ]
        );
        // The second breaks off; white space behind it is no message.
        frames.extend(writer.delta(0, begun()));
        frames.extend(writer.delta(0, token(vec![Part::Content("\n".into())])));
        frames.extend(writer.end());
        let data: Vec<Value> = frames.iter().map(|f| serde_json::from_str(&f.data).unwrap()).collect();
        let done: Vec<&Value> = data.iter().filter(|d| d["type"] == "response.output_item.done").collect();
        let ends: Vec<(&Value, &Value)> =
            done.iter().map(|d| (&d["item"]["arguments"], &d["item"]["status"])).collect();
        let (whole, open) = (json!("{\"c\":1}"), json!("{\"c\":"));
        assert_eq!(ends, [(&whole, &json!("completed")), (&open, &json!("incomplete"))]);
        assert_eq!(data[0]["item"]["id"], done[0]["item"]["id"]);
        assert_eq!(writer.finished()["output"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn an_answer_that_was_cut_off_says_by_what() {
        for (reason, event, why) in [
            (FinishReason::Stop, "response.completed", Value::Null),
            (FinishReason::Length, "response.incomplete", json!("max_output_tokens")),
            (FinishReason::Aborted, "response.incomplete", json!("abort")),
        ] {
            let mut writer = ResponseWriter::new("1".into(), json!({}), None);
            let parts = vec![Part::Content("a".into())];
            let ending = Ending { parts, report: None, reason, stop: None, usage: Usage::default() };
            writer.delta(0, Delta::End(ending));
            let last = writer.end().pop().unwrap();
            let response = serde_json::from_str::<Value>(&last.data).unwrap()["response"].clone();
            assert_eq!((last.event, &response["incomplete_details"]["reason"]), (Some(event), &why));
            assert_eq!(response["output"][0]["content"][0]["text"], "a", "{response}");
        }
    }
}
