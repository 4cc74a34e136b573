//! What a handler answers when it does not do what it was asked: a code for programs and a sentence for people.

use std::fmt;

use swarm_wire::generated::lattica::v1::RpcStatus;

/// Why a call was refused, in the words that gRPC made common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StatusCode {
    /// The request itself is wrong; repeating it will not help.
    InvalidArgument,
    /// The thing asked for does not exist.
    NotFound,
    /// A limit was reached; try later or elsewhere.
    ResourceExhausted,
    /// Not possible in the present state.
    FailedPrecondition,
    /// The peer has no such method.
    Unimplemented,
    /// The handler broke.
    Internal,
    /// Not at the moment; try again.
    Unavailable,
    /// The caller's time was over before the work was done.
    DeadlineExceeded,
    /// The caller may not do this.
    PermissionDenied,
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// For programs.
    pub code: StatusCode,
    /// For people.
    pub message: String,
}

impl Status {
    /// A refusal with `code` and `message`.
    pub fn new(code: StatusCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The request itself is wrong.
    pub fn invalid_argument(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::InvalidArgument, message.to_string())
    }

    /// The thing asked for does not exist.
    pub fn not_found(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::NotFound, message.to_string())
    }

    /// A limit was reached.
    pub fn resource_exhausted(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::ResourceExhausted, message.to_string())
    }

    /// Not possible in the present state.
    pub fn failed_precondition(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::FailedPrecondition, message.to_string())
    }

    /// The handler broke.
    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::Internal, message.to_string())
    }

    /// Not at the moment.
    pub fn unavailable(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::Unavailable, message.to_string())
    }

    /// The caller may not do this.
    pub fn permission_denied(message: impl fmt::Display) -> Self {
        Self::new(StatusCode::PermissionDenied, message.to_string())
    }
}

impl fmt::Display for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidArgument => "invalid argument",
            Self::NotFound => "not found",
            Self::ResourceExhausted => "resource exhausted",
            Self::FailedPrecondition => "failed precondition",
            Self::Unimplemented => "unimplemented",
            Self::Internal => "internal error",
            Self::Unavailable => "unavailable",
            Self::DeadlineExceeded => "deadline exceeded",
            Self::PermissionDenied => "permission denied",
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() { self.code.fmt(f) } else { write!(f, "{}: {}", self.code, self.message) }
    }
}

impl std::error::Error for Status {}

impl From<StatusCode> for RpcStatus {
    fn from(code: StatusCode) -> Self {
        match code {
            StatusCode::InvalidArgument => Self::InvalidArgument,
            StatusCode::NotFound => Self::NotFound,
            StatusCode::ResourceExhausted => Self::ResourceExhausted,
            StatusCode::FailedPrecondition => Self::FailedPrecondition,
            StatusCode::Unimplemented => Self::Unimplemented,
            StatusCode::Internal => Self::Internal,
            StatusCode::Unavailable => Self::Unavailable,
            StatusCode::DeadlineExceeded => Self::DeadlineExceeded,
            StatusCode::PermissionDenied => Self::PermissionDenied,
        }
    }
}

/// The code on the wire, or `None` for "all is well". A number that we do not know counts as internal: the peer is
/// newer than we are and certainly did not succeed.
pub(crate) fn code_from_wire(status: i32) -> Option<StatusCode> {
    Some(match RpcStatus::try_from(status) {
        Ok(RpcStatus::Ok) => return None,
        Ok(RpcStatus::InvalidArgument) => StatusCode::InvalidArgument,
        Ok(RpcStatus::NotFound) => StatusCode::NotFound,
        Ok(RpcStatus::ResourceExhausted) => StatusCode::ResourceExhausted,
        Ok(RpcStatus::FailedPrecondition) => StatusCode::FailedPrecondition,
        Ok(RpcStatus::Unimplemented) => StatusCode::Unimplemented,
        Ok(RpcStatus::Unavailable) => StatusCode::Unavailable,
        Ok(RpcStatus::DeadlineExceeded) => StatusCode::DeadlineExceeded,
        Ok(RpcStatus::PermissionDenied) => StatusCode::PermissionDenied,
        Ok(RpcStatus::Internal) | Err(_) => StatusCode::Internal,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_survive_the_wire_and_unknown_ones_are_failures() {
        for code in [
            StatusCode::InvalidArgument,
            StatusCode::NotFound,
            StatusCode::ResourceExhausted,
            StatusCode::FailedPrecondition,
            StatusCode::Unimplemented,
            StatusCode::Internal,
            StatusCode::Unavailable,
            StatusCode::DeadlineExceeded,
            StatusCode::PermissionDenied,
        ] {
            assert_eq!(code_from_wire(RpcStatus::from(code) as i32), Some(code));
        }
        assert_eq!(code_from_wire(0), None);
        assert_eq!(code_from_wire(77), Some(StatusCode::Internal));
    }
}
