//! Why bytes from a peer were refused.

/// Why bytes could not be decoded. Always the sender's fault, never a reason to panic.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Fewer bytes than the format needs.
    #[error("{what} needs {needed_bytes} bytes but only {got_bytes} are there")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Bytes that the format needs.
        needed_bytes: usize,
        /// Bytes that were there.
        got_bytes: usize,
    },
    /// A length above the limit for its kind.
    #[error("{what} of {got_bytes} bytes is over the limit of {limit_bytes} bytes")]
    TooLarge {
        /// What was being read.
        what: &'static str,
        /// The limit, from [`crate::limits`].
        limit_bytes: usize,
        /// The announced length.
        got_bytes: usize,
    },
    /// A field with a value that the format does not allow.
    #[error("{what} has the invalid value {value}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// The value, as text.
        value: String,
    },
    /// A protobuf message that prost refused.
    #[error("{what} is not a valid message: {reason}")]
    Message {
        /// The message's name.
        what: &'static str,
        /// prost's reason.
        reason: String,
    },
    /// A signature that does not match its statement and key.
    #[error("signature on {domain} does not match its public key")]
    BadSignature {
        /// The statement's domain.
        domain: String,
    },
}

impl DecodeError {
    /// An [`DecodeError::Invalid`] for `what` with any displayable value.
    #[expect(clippy::needless_pass_by_value, reason = "callers pass numbers and fresh text alike")]
    pub fn invalid(what: &'static str, value: impl ToString) -> Self {
        Self::Invalid { what, value: value.to_string() }
    }

    /// Wraps prost's error for the message `what`.
    pub fn message(what: &'static str, error: &prost::DecodeError) -> Self {
        Self::Message { what, reason: error.to_string() }
    }
}
