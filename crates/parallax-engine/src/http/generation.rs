//! One answer as it grows: tokens from the engine become text, cut at stop strings, never half a character; the text
//! becomes thoughts, content and calls.

use std::collections::BTreeMap;
use std::sync::Arc;

use parallax_model::{StreamDecoder, Tokenizer};

use super::error::ApiError;
use super::tools::TextArguments;
use crate::error::Failure;
use crate::markup::{Markup, MarkupOptions, Part};
use crate::request::{Event, FinishReason, Token, Usage};
use crate::service::TokenStream;
use crate::stop_strings::StopStrings;

/// A token in a report of log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TokenReport {
    pub id: u32,
    pub logprob: f32,
    /// Of the weights that made it.
    pub version: u64,
    /// It belongs to the thoughts.
    pub reasoning: bool,
    /// The likeliest tokens instead of it.
    pub top: Vec<(u32, f32)>,
}

/// A step of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Delta {
    /// Log-probabilities of the prompt's tokens from the second on.
    Prompt(Vec<f32>),
    /// A token, and what became certain with it: often nothing.
    Token { parts: Vec<Part>, report: TokenReport },
    /// The end.
    End(Ending),
}

impl Delta {
    /// What is shown, what is reported, and how it ended.
    pub(super) fn split(self) -> (Vec<Part>, Option<TokenReport>, Option<Ending>) {
        match self {
            Self::Prompt(_) => (Vec::new(), None, None),
            Self::Token { parts, report } => (parts, Some(report), None),
            Self::End(mut ending) => (std::mem::take(&mut ending.parts), ending.report.take(), Some(ending)),
        }
    }
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ending {
    /// What was held back until now.
    pub parts: Vec<Part>,
    /// The token that ended a stop string: it comes with the end.
    pub report: Option<TokenReport>,
    pub reason: FinishReason,
    /// The stop string that was met.
    pub stop: Option<String>,
    pub usage: Usage,
}

/// Which control tokens of a vocabulary are part of the text: the markers of the model's dialect.
#[derive(Debug, Clone, Default)]
pub(super) struct ControlTokens {
    /// Every control token with its text if that is kept.
    tokens: BTreeMap<u32, Option<String>>,
}

impl ControlTokens {
    /// The control tokens of a tokenizer, of which `markers` are kept.
    pub(super) fn new(tokenizer: &Tokenizer, markers: &[&str]) -> Self {
        let kept = |text: String| markers.contains(&text.as_str()).then_some(text);
        let tokens = tokenizer.special_tokens().into_iter().map(|(id, text)| (id, kept(text))).collect();
        Self { tokens }
    }
}

/// What turns tokens into parts.
#[derive(Debug)]
pub(super) struct Reading {
    pub decoder: StreamDecoder,
    pub controls: Arc<ControlTokens>,
    /// Keep the markers: off for plain completions, whose text has no structure.
    pub markup: Option<MarkupOptions>,
    /// What models that write arguments as plain text mean by them.
    pub text_arguments: Arc<TextArguments>,
    pub stops: StopStrings,
    pub include_stop: bool,
    pub stop_ids: Vec<u32>,
    /// Calls after the first are dropped.
    pub single_call: bool,
    pub prompt_tokens: usize,
}

/// An answer in the making. Dropping it aborts the request.
pub(super) struct Generation {
    tokens: TokenStream,
    reading: Reading,
    markup: Markup,
    n_tokens: usize,
    n_reasoning: usize,
    cached_tokens: usize,
    n_calls: usize,
    ended: bool,
}

impl Generation {
    pub(super) fn new(tokens: TokenStream, reading: Reading) -> Self {
        let tools = reading.text_arguments.keys().cloned();
        let markup = Markup::for_tools(reading.markup.unwrap_or_default(), tools);
        Self {
            tokens,
            reading,
            markup,
            n_tokens: 0,
            n_reasoning: 0,
            cached_tokens: 0,
            n_calls: 0,
            ended: false,
        }
    }

    /// The next step; `None` after the end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        if self.ended {
            return None;
        }
        let delta = loop {
            break match self.tokens.next().await {
                Some(Event::Prompt { cached_tokens, logprobs }) => {
                    self.cached_tokens = cached_tokens;
                    let Some(logprobs) = logprobs else { continue };
                    Ok(Delta::Prompt(logprobs))
                }
                Some(Event::Token(token)) => self.token(token),
                Some(Event::Finished { reason: FinishReason::Error, error, .. }) => {
                    Err(error.unwrap_or(Failure::Stopped).into())
                }
                Some(Event::Finished { reason, usage, .. }) => self.finish(reason, usage),
                None => Err(Failure::Stopped.into()),
            };
        };
        self.ended = !matches!(delta, Ok(Delta::Token { .. } | Delta::Prompt(_)));
        Some(delta)
    }

    fn token(&mut self, token: Token) -> Result<Delta, ApiError> {
        self.n_tokens += 1;
        let text = self.text_of(token.id)?;
        let (text, met) = self.reading.stops.push(&text);
        // The markers around thoughts are of them.
        let thought = self.markup.is_reasoning();
        let mut parts = self.take(&text);
        let reasoning = thought || self.markup.is_reasoning();
        self.n_reasoning += usize::from(reasoning);
        let report = TokenReport {
            id: token.id,
            logprob: token.logprob,
            version: token.version.0,
            reasoning,
            top: token.top_logprobs,
        };
        let Some(stop) = met else { return Ok(Delta::Token { parts, report }) };
        if self.reading.include_stop {
            parts.extend(self.take(&stop));
        }
        parts.extend(self.rest());
        // The stream is dropped with this answer, which aborts the rest of the request.
        let usage = Usage {
            prompt_tokens: self.reading.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.n_tokens,
            reasoning_tokens: self.n_reasoning,
        };
        let (report, reason) = (Some(report), FinishReason::Stop);
        Ok(Delta::End(Ending { parts, report, reason, stop: Some(stop), usage }))
    }

    fn text_of(&mut self, id: u32) -> Result<String, ApiError> {
        let internal = |e: parallax_model::TokenizerError| ApiError::internal(e.to_string());
        if let Some(control) = self.reading.controls.tokens.get(&id) {
            let marker = control.as_ref().filter(|_| self.reading.markup.is_some());
            let Some(marker) = marker else { return Ok(String::new()) };
            let mut text = self.reading.decoder.finish().map_err(internal)?;
            text.push_str(marker);
            return Ok(text);
        }
        if self.reading.stop_ids.contains(&id) {
            return Ok(String::new());
        }
        self.reading.decoder.push(id).map_err(internal)
    }

    fn take(&mut self, text: &str) -> Vec<Part> {
        match self.reading.markup {
            Some(_) => {
                let parts = self.markup.push(text);
                self.limited(parts)
            }
            None if text.is_empty() => Vec::new(),
            None => vec![Part::Content(text.to_owned())],
        }
    }

    /// What the markup still holds.
    fn rest(&mut self) -> Vec<Part> {
        let parts = self.markup.finish();
        self.limited(parts)
    }

    fn limited(&mut self, mut parts: Vec<Part>) -> Vec<Part> {
        for part in &mut parts {
            if let Part::Call(call) = part
                && let Some(texts) = self.reading.text_arguments.get(&call.name)
            {
                call.keep_texts(|argument| texts.contains(argument));
            }
        }
        parts.retain(|part| {
            let is_call = matches!(part, Part::Call(_));
            self.n_calls += usize::from(is_call);
            !(is_call && self.reading.single_call && self.n_calls > 1)
        });
        parts
    }

    fn finish(&mut self, reason: FinishReason, usage: Usage) -> Result<Delta, ApiError> {
        let rest = self.reading.decoder.finish().map_err(|e| ApiError::internal(e.to_string()))?;
        let (mut text, stop) = self.reading.stops.push(&rest);
        if stop.is_none() {
            text.push_str(&self.reading.stops.finish());
        }
        let mut parts = self.take(&text);
        parts.extend(self.rest());
        let reason = if stop.is_some() { FinishReason::Stop } else { reason };
        let usage = Usage { reasoning_tokens: self.n_reasoning, ..usage };
        Ok(Delta::End(Ending { parts, report: None, reason, stop, usage }))
    }
}
