//! What a client is told when a request cannot be served, in OpenAI's shape and in Anthropic's.

use std::fmt;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::error::{Failure, RequestError, StageError};

/// How long a client should wait when the queue is full.
const QUEUE_RETRY: Duration = Duration::from_secs(2);

/// An answer other than the one that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    retry_after: Option<Duration>,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status.as_u16(), self.message)
    }
}

impl std::error::Error for ApiError {}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, retry_after: None }
    }

    /// 400: the request is malformed; `param` names the field.
    pub fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        let param = param.filter(|p| !p.is_empty()).map(str::to_owned);
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message) }
    }

    /// 401: the API key is missing or wrong.
    pub fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "authentication_error",
            "missing or wrong API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
        )
    }

    /// 404: no such model or adapter.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    /// 404: no such route.
    pub fn no_route(method: &Method, path: &str) -> Self {
        Self::not_found(format!(
            "there is no {method} {path} here: OpenAI's routes are under /v1, which its clients take as the end of base_url; \
             Anthropic's clients add /v1 themselves"
        ))
    }

    /// 405: the route exists under another method.
    pub fn method_not_allowed(method: &Method, path: &str) -> Self {
        let message = format!("{path} does not take {method}: the header `allow` says what it takes");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// 408: the body did not arrive in time.
    pub fn timed_out(limit: Duration) -> Self {
        let message = format!("the request body did not arrive within {limit:?}");
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", message)
    }

    /// 413: the body is too large.
    pub fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the request body is larger than {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    }

    /// 415: the body is not declared as JSON.
    pub fn unsupported_media(content_type: Option<&str>) -> Self {
        let mut message = "send the body as content-type application/json".to_owned();
        if let Some(other) = content_type {
            message += &format!(", not {other:?}");
        }
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// 429: too many requests at once or in a minute.
    pub fn busy(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// 503: nobody can compute at the moment.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message);
        Self { retry_after: Some(Duration::from_secs(1)), ..error }
    }

    /// 500: the computation broke.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The status code.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// OpenAI's body: `{"error": {"message", "type", "param", "code"}}`.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param,
                         "code": self.status.as_u16()}})
    }

    /// Anthropic's body: `{"type": "error", "error": {"type", "message"}}`.
    pub fn anthropic_body(&self) -> Value {
        let kind = match self.status {
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            StatusCode::INTERNAL_SERVER_ERROR => "api_error",
            _ => self.kind,
        };
        json!({"type": "error", "error": {"type": kind, "message": self.message}})
    }

    fn respond(&self, body: Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_millis().div_ceil(1000).max(1);
            let value = HeaderValue::from_str(&seconds.to_string()).expect("digits are a header value");
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        if self.status == StatusCode::REQUEST_TIMEOUT {
            // The rest of the body would be taken for the next request (RFC 9110, 15.5.9).
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// As a response in Anthropic's shape.
    pub(super) fn into_anthropic_response(self) -> Response {
        let body = self.anthropic_body();
        self.respond(body)
    }
}

impl From<RequestError> for ApiError {
    /// The engine's refusal.
    fn from(error: RequestError) -> Self {
        let text = error.to_string();
        match error {
            RequestError::QueueFull { .. } => Self::busy(text, QUEUE_RETRY),
            RequestError::Stopped => Self::unavailable(text),
            RequestError::Parameter { field, .. } => Self::invalid(Some(field), text),
            RequestError::EmptyPrompt
            | RequestError::PromptTooLong { .. }
            | RequestError::UnknownToken { .. } => Self::invalid(Some("prompt"), text),
            RequestError::UnknownAdapter { .. } => Self::not_found(text),
        }
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::invalid(None, format!("the path cannot be read: {}", rejection.body_text()))
    }
}

impl From<Failure> for ApiError {
    /// A failure while the answer was made: 400 when the request itself leaves nothing to say, 503 when trying again can
    /// help, else 500.
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        match failure {
            Failure::Refused(refused) => refused.into(),
            Failure::Sampling(_) => Self::invalid(None, text),
            Failure::Stage(StageError::Lost { .. } | StageError::NotReady { .. }) | Failure::Stopped => {
                Self::unavailable(text)
            }
            Failure::Stage(_) => Self::internal(text),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.body();
        let mut response = self.respond(body);
        // For whoever knows that the client speaks another API.
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::SampleError;

    #[test]
    fn a_failure_says_whether_trying_again_helps() {
        let reason = || "why".to_owned();
        for (failure, status) in [
            (Failure::Sampling(SampleError::NothingAllowed { position: 3 }), 400),
            (Failure::Refused(RequestError::QueueFull { queued: 3 }), 429),
            (Failure::Stage(StageError::Forward { layers: "0..2".into(), reason: reason() }), 500),
            (Failure::Stage(StageError::NotReady { reason: reason() }), 503),
            (Failure::Stopped, 503),
        ] {
            let error = ApiError::from(failure);
            assert_eq!(
                (error.status().as_u16(), error.retry_after.is_some()),
                (status, [429, 503].contains(&status))
            );
        }
    }
}
