//! One answer as text: tokens from the engine become pieces of text, cut at stop strings, never half a character.

use parallax_model::StreamDecoder;

use super::error::ApiError;
use crate::error::RequestError;
use crate::request::{Event, FinishReason, Request};
use crate::sampling::SamplingParams;
use crate::service::{EngineHandle, TokenStream};
use crate::stop_strings::StopStrings;

/// A step of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Piece {
    /// One token and the text that became complete with it, possibly empty.
    Token { text: String, logprob: f32 },
    /// The end: the text that was still held back, and why it ended.
    End { text: String, reason: FinishReason },
}

/// An answer in the making. Dropping it aborts the request.
pub(super) struct Generation {
    tokens: TokenStream,
    stop_ids: Vec<u32>,
    decoder: StreamDecoder,
    stops: StopStrings,
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    ended: bool,
}

impl Generation {
    pub(super) fn start(
        engine: &EngineHandle,
        prompt: Vec<u32>,
        sampling: SamplingParams,
        decoder: StreamDecoder,
        stops: StopStrings,
    ) -> Result<Self, ApiError> {
        let prompt_tokens = prompt.len();
        let stop_ids = sampling.stop_ids.clone();
        let request = Request { prompt, sampling, ..Request::default() };
        let tokens = engine.submit(request).map_err(|error| match error {
            RequestError::QueueFull { .. } => ApiError::busy(error.to_string()),
            RequestError::Stopped => ApiError::unavailable(error.to_string()),
            RequestError::Parameter { field, .. } => ApiError::invalid(field, error.to_string()),
            _ => ApiError::invalid(None, error.to_string()),
        })?;
        Ok(Self { tokens, stop_ids, decoder, stops, prompt_tokens, completion_tokens: 0, ended: false })
    }

    /// The next piece; `None` after the end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        if self.ended {
            return None;
        }
        let mut event = self.tokens.next().await;
        while let Some(Event::PromptLogprobs(_)) = event {
            event = self.tokens.next().await;
        }
        let piece = match event {
            Some(Event::Token(token)) => self.token(token.id, token.logprob),
            Some(Event::Finished { reason: FinishReason::Error, error, .. }) => {
                Err(ApiError::unavailable(error.unwrap_or_else(|| "the computation broke".to_owned())))
            }
            Some(Event::Finished { reason, .. }) => self.finish(reason),
            Some(Event::PromptLogprobs(_)) | None => Err(ApiError::unavailable("the engine has stopped")),
        };
        self.ended = !matches!(piece, Ok(Piece::Token { .. }));
        Some(piece)
    }

    fn token(&mut self, id: u32, logprob: f32) -> Result<Piece, ApiError> {
        self.completion_tokens += 1;
        if self.stop_ids.contains(&id) {
            return Ok(Piece::Token { text: String::new(), logprob });
        }
        let text = self.decoder.push(id).map_err(|e| ApiError::internal(e.to_string()))?;
        let (text, stopped) = self.stops.push(&text);
        if stopped {
            return Ok(Piece::End { text, reason: FinishReason::Stop });
        }
        Ok(Piece::Token { text, logprob })
    }

    fn finish(&mut self, reason: FinishReason) -> Result<Piece, ApiError> {
        let rest = self.decoder.finish().map_err(|e| ApiError::internal(e.to_string()))?;
        let (mut text, stopped) = self.stops.push(&rest);
        if !stopped {
            text.push_str(&self.stops.finish());
        }
        Ok(Piece::End { text, reason: if stopped { FinishReason::Stop } else { reason } })
    }
}
