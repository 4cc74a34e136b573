//! Answers in OpenAI's JSON: whole, or as server-sent events.

use std::convert::Infallible;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use serde_json::{Value, json};

use super::error::ApiError;
use super::generation::{Generation, Piece};
use super::openai::Common;

/// Which of the two APIs is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `/v1/chat/completions`.
    Chat { logprobs: bool },
    /// `/v1/completions`.
    Text,
}

struct Frame {
    shape: Shape,
    model: String,
    id: String,
    created: u64,
}

/// Runs a generation to its end, or streams it when the client asked for that. The first piece is awaited before the
/// status is sent, so that a failure at the start has a proper status.
pub(super) async fn respond(
    mut generation: Generation,
    common: &Common,
    shape: Shape,
    model: String,
    id: String,
) -> Result<Response, ApiError> {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let frame = Frame { shape, model, id, created };
    if common.stream != Some(true) {
        return whole(generation, &frame).await;
    }
    let usage = common.stream_options.as_ref().is_some_and(|o| o.include_usage);
    let Some(first) = generation.next().await else { return Err(ApiError::internal("no answer")) };
    let first = first?;
    Ok(Sse::new(events(generation, first, frame, usage)).keep_alive(KeepAlive::default()).into_response())
}

async fn whole(mut generation: Generation, frame: &Frame) -> Result<Response, ApiError> {
    let (mut text, mut finish, mut logprobs) = (String::new(), "stop", Vec::new());
    while let Some(piece) = generation.next().await {
        match piece? {
            Piece::Token { text: more, logprob } => {
                logprobs.push(
                    json!({"token": more, "logprob": logprob, "bytes": more.as_bytes(), "top_logprobs": []}),
                );
                text.push_str(&more);
            }
            Piece::End { text: rest, reason } => {
                text.push_str(&rest);
                finish = reason.as_str();
            }
        }
    }
    let choice = match frame.shape {
        Shape::Chat { logprobs: wanted } => json!({"index": 0, "finish_reason": finish,
            "logprobs": wanted.then(|| json!({"content": logprobs, "refusal": null})),
            "message": {"role": "assistant", "content": text, "refusal": null}}),
        Shape::Text => json!({"index": 0, "finish_reason": finish, "logprobs": null, "text": text}),
    };
    let mut answer = frame.envelope(false);
    answer["choices"] = json!([choice]);
    answer["usage"] = usage_of(&generation);
    Ok(Json(answer).into_response())
}

/// Where a stream of events stands.
enum Next {
    Piece(Piece),
    Await,
    Usage,
    Done,
    Closed,
}

fn events(
    generation: Generation,
    first: Piece,
    frame: Frame,
    usage: bool,
) -> impl Stream<Item = Result<SseEvent, Infallible>> {
    let role = match frame.shape {
        Shape::Chat { .. } => Some(frame.chunk(&json!({"role": "assistant", "content": ""}), None, None)),
        Shape::Text => None,
    };
    let opening = stream::iter(role.map(|chunk| Ok(SseEvent::default().data(chunk.to_string()))));
    let rest = stream::unfold(
        (generation, frame, Next::Piece(first)),
        move |(mut generation, frame, next)| async move {
            let (event, next) = match next {
                Next::Closed => return None,
                Next::Done => (SseEvent::default().data("[DONE]"), Next::Closed),
                Next::Usage => {
                    let mut chunk = frame.envelope(true);
                    chunk["choices"] = json!([]);
                    chunk["usage"] = usage_of(&generation);
                    (SseEvent::default().data(chunk.to_string()), Next::Done)
                }
                Next::Piece(piece) => frame.event(&piece, usage),
                Next::Await => match generation.next().await {
                    Some(Ok(piece)) => frame.event(&piece, usage),
                    Some(Err(error)) => (SseEvent::default().data(error.body().to_string()), Next::Closed),
                    None => return None,
                },
            };
            Some((Ok(event), (generation, frame, next)))
        },
    );
    futures::StreamExt::chain(opening, rest)
}

impl Frame {
    fn event(&self, piece: &Piece, usage: bool) -> (SseEvent, Next) {
        let (chunk, next) = match piece {
            Piece::Token { text, logprob } => {
                (self.chunk(&json!({"content": text}), None, Some(*logprob)), Next::Await)
            }
            Piece::End { text, reason } => {
                let delta = if text.is_empty() { json!({}) } else { json!({"content": text}) };
                (
                    self.chunk(&delta, Some(reason.as_str()), None),
                    if usage { Next::Usage } else { Next::Done },
                )
            }
        };
        (SseEvent::default().data(chunk.to_string()), next)
    }

    fn chunk(&self, delta: &Value, finish: Option<&str>, logprob: Option<f32>) -> Value {
        let choice = match self.shape {
            Shape::Chat { logprobs } => {
                let content = logprob.filter(|_| logprobs).map(|p| {
                    let token = delta["content"].as_str().unwrap_or_default();
                    json!({"content": [{"token": token, "logprob": p, "bytes": token.as_bytes(), "top_logprobs": []}],
                           "refusal": null})
                });
                json!({"index": 0, "delta": delta, "logprobs": content, "finish_reason": finish})
            }
            Shape::Text => {
                let text = delta["content"].as_str().unwrap_or_default();
                json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish})
            }
        };
        let mut chunk = self.envelope(true);
        chunk["choices"] = json!([choice]);
        chunk
    }

    fn envelope(&self, streamed: bool) -> Value {
        let (prefix, object) = match (self.shape, streamed) {
            (Shape::Chat { .. }, false) => ("chatcmpl-", "chat.completion"),
            (Shape::Chat { .. }, true) => ("chatcmpl-", "chat.completion.chunk"),
            (Shape::Text, _) => ("cmpl-", "text_completion"),
        };
        json!({"id": format!("{prefix}{}", self.id), "object": object, "created": self.created, "model": self.model})
    }
}

fn usage_of(generation: &Generation) -> Value {
    let (prompt, completion) = (generation.prompt_tokens, generation.completion_tokens);
    json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
}
