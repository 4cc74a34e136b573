//! Answers on their way out: collected whole, or written as server-sent events while they grow.
//!
//! An endpoint gives a [`Writer`], a state machine from deltas to events; waiting, merging choices and failures are the
//! same for all of them and live here.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;

use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, SelectAll, Stream, StreamExt as _};
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;
use super::generation::{Delta, Generation, TokenReport};
use crate::markup::{Part, ToolCall};
use crate::request::{FinishReason, Usage};

/// The answers to one request. Dropping it aborts what is not finished.
pub(super) struct Job {
    /// One for each choice, in order.
    pub generations: Vec<Generation>,
    /// Given back when the answers have ended.
    pub seat: OwnedSemaphorePermit,
}

type Steps = SelectAll<Pin<Box<dyn Stream<Item = (usize, Result<Delta, ApiError>)> + Send>>>;

fn steps(generations: Vec<Generation>) -> Steps {
    stream::select_all(generations.into_iter().enumerate().map(|(choice, generation)| {
        let one = stream::unfold(generation, move |mut generation| async move {
            let step = generation.next().await?;
            Some(((choice, step), generation))
        });
        Box::pin(one) as Pin<Box<dyn Stream<Item = _> + Send>>
    }))
}

/// One whole answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Collected {
    pub reasoning: String,
    pub content: String,
    pub calls: Vec<ToolCall>,
    pub reports: Vec<TokenReport>,
    pub prompt_logprobs: Vec<f32>,
    pub reason: Option<FinishReason>,
    pub stop: Option<String>,
    pub usage: Usage,
}

impl Collected {
    fn take(&mut self, delta: Delta) {
        if let Delta::Prompt(logprobs) = delta {
            self.prompt_logprobs = logprobs;
            return;
        }
        let (parts, report, ending) = delta.split();
        self.reports.extend(report);
        if let Some(ending) = ending {
            (self.reason, self.stop, self.usage) = (Some(ending.reason), ending.stop, ending.usage);
        }
        for part in parts {
            match part {
                Part::Reasoning(text) => self.reasoning.push_str(&text),
                Part::Content(text) => self.content.push_str(&text),
                Part::Call(call) => self.calls.push(call),
                Part::CallBegun(name) => self.calls.push(ToolCall::new(&name, String::new())),
                Part::Arguments(text) => {
                    self.calls.last_mut().expect("a call has begun").arguments.push_str(&text);
                }
                Part::CallEnded => {}
            }
        }
    }
}

/// Waits for all choices; the first failure is the answer to the whole request.
pub(super) async fn collect(job: Job) -> Result<Vec<Collected>, ApiError> {
    let mut collected = vec![Collected::default(); job.generations.len()];
    let mut steps = steps(job.generations);
    while let Some((choice, step)) = steps.next().await {
        collected[choice].take(step?);
    }
    drop(job.seat);
    Ok(collected)
}

/// Drives a writer of whose events nobody hears, to its end.
pub(super) async fn written<W: Writer>(job: Job, mut writer: W) -> Result<W, ApiError> {
    let mut steps = steps(job.generations);
    while let Some((choice, step)) = steps.next().await {
        writer.delta(choice, step?);
    }
    writer.end();
    drop(job.seat);
    Ok(writer)
}

/// The tokens of the answers to one prompt: it counts once, answers add up. What one of them had to compute was not
/// cached, even if the others took it over.
pub(super) fn total<'a>(usages: impl IntoIterator<Item = &'a Usage>) -> Usage {
    let sum = usages.into_iter().copied().reduce(|sum, usage| Usage {
        prompt_tokens: sum.prompt_tokens.max(usage.prompt_tokens),
        cached_tokens: sum.cached_tokens.min(usage.cached_tokens),
        completion_tokens: sum.completion_tokens + usage.completion_tokens,
        reasoning_tokens: sum.reasoning_tokens + usage.reasoning_tokens,
    });
    sum.unwrap_or_default()
}

/// One server-sent event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// Its name, where the API has names.
    pub event: Option<&'static str>,
    pub data: String,
}

impl Frame {
    /// An event without a name.
    pub(super) fn data(data: impl Into<String>) -> Self {
        Self { event: None, data: data.into() }
    }

    /// A named event.
    pub(super) fn named(event: &'static str, data: &Value) -> Self {
        Self { event: Some(event), data: data.to_string() }
    }
}

/// Writes the events of one API. Called in the order `begin`, `delta`.., and `end` or `fail`.
pub(super) trait Writer: Send + 'static {
    fn begin(&mut self) -> Vec<Frame>;
    fn delta(&mut self, choice: usize, delta: Delta) -> Vec<Frame>;
    fn end(&mut self) -> Vec<Frame>;
    fn fail(&mut self, error: &ApiError) -> Vec<Frame>;
}

/// Streams the answers. The first step is awaited before the status is sent, so that a failure at the start has a proper
/// status.
pub(super) async fn stream(job: Job, mut writer: impl Writer) -> Result<Response, ApiError> {
    let mut steps = steps(job.generations);
    let Some((choice, first)) = steps.next().await else { return Err(ApiError::internal("no answer")) };
    let first = first?;
    let mut queue: VecDeque<Frame> = writer.begin().into();
    queue.extend(writer.delta(choice, first));
    let state = (steps, writer, queue, Some(job.seat));
    let events = stream::unfold(state, |(mut steps, mut writer, mut queue, mut seat)| async move {
        loop {
            if let Some(frame) = queue.pop_front() {
                let event = SseEvent::default().data(frame.data);
                let event = match frame.event {
                    Some(name) => event.event(name),
                    None => event,
                };
                return Some((Ok::<_, Infallible>(event), (steps, writer, queue, seat)));
            }
            // The seat is given back with the last step: nothing follows but what is queued.
            seat.as_ref()?;
            match steps.next().await {
                Some((choice, Ok(delta))) => queue.extend(writer.delta(choice, delta)),
                Some((_, Err(error))) => {
                    queue.extend(writer.fail(&error));
                    seat = None;
                    steps.clear();
                }
                None => {
                    queue.extend(writer.end());
                    seat = None;
                }
            }
        }
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}
