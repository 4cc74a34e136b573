//! Why a proof cannot be built. A prover that cannot prove says so; it never sends an empty proof.

/// Why a commitment or an opening cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProveError {
    /// A commitment needs at least one row.
    #[error("no hidden row was recorded: commit after at least one output token")]
    NoRows,
    /// Rows and tokens do not match.
    #[error(
        "{n_rows} hidden rows were recorded for {n_tokens} sampled tokens and {n_logprobs} log-probabilities"
    )]
    RowsAndTokensDiffer {
        /// Recorded rows.
        n_rows: usize,
        /// Sampled tokens.
        n_tokens: usize,
        /// Reported log-probabilities.
        n_logprobs: usize,
    },
    /// A hidden row holds NaN or infinity; it commits to nothing.
    #[error("the hidden row of output token {position} is not finite at column {column}")]
    NotFinite {
        /// Index of the output token.
        position: usize,
        /// Column of the row.
        column: usize,
    },
    /// The challenge is for another commitment.
    #[error("the challenge names another commitment")]
    OtherCommitment,
    /// An opening was asked for before the commitment was made.
    #[error("nothing was committed yet")]
    NotCommitted,
}
