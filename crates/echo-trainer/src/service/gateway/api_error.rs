//! What is refused, and how the client hears of it.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::sessions::Refused;
use super::store::StoreError;

/// An error of the API: `{"detail": message}` with this status.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) detail: String,
}

impl ApiError {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "`map_err` gives an error itself, `bad` and `busy` pass it on"
    )]
    pub(super) fn new(status: StatusCode, detail: impl ToString) -> Self {
        Self { status, detail: detail.to_string() }
    }

    pub(super) fn bad(detail: impl ToString) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    pub(super) fn busy(detail: impl ToString) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, detail)
    }

    pub(super) fn not_found(what: &str, id: &str) -> Self {
        let id: String = id.chars().take(200).collect();
        let detail = format!("no {what} {id:?}; it ended with its session, or this server was started again");
        Self::new(StatusCode::NOT_FOUND, detail)
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let status = match refused {
            Refused::NoSession => StatusCode::GONE,
            Refused::NoRoom => StatusCode::TOO_MANY_REQUESTS,
        };
        Self::new(status, refused)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let status = match &error {
            StoreError::Unknown { .. } => StatusCode::NOT_FOUND,
            _ if error.is_users() => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(json!({"detail": self.detail}))).into_response()
    }
}
