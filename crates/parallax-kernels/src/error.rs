//! What a kernel can refuse: operands whose sizes, indices or block structure do not fit together.

/// A kernel's operands do not fit together. Nothing was computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// An operand has the wrong number of elements.
    #[error("{op}: {what} has {got} elements, expected {expected}")]
    ShapeMismatch {
        /// The kernel.
        op: &'static str,
        /// The operand.
        what: &'static str,
        /// Elements that the other operands imply.
        expected: usize,
        /// Elements that were given.
        got: usize,
    },
    /// A block-quantised weight needs an inner dimension that is a multiple of its block.
    #[error("{op}: inner dimension {k} is not a multiple of {block}; keep this tensor in f32 or bf16")]
    RaggedBlocks {
        /// The kernel.
        op: &'static str,
        /// Inner dimension that was given.
        k: usize,
        /// Weights per block.
        block: usize,
    },
    /// A weight format that is only read.
    #[error("there is no quantiser to {kind:?}; quantise to Q8_0, Q6K or Q4_0 instead")]
    NoQuantizer {
        /// The format.
        kind: crate::dtype::WeightKind,
    },
    /// An index or count lies outside its range.
    #[error("{op}: {what} is {got}, must be below {limit}")]
    OutOfRange {
        /// The kernel.
        op: &'static str,
        /// The quantity.
        what: &'static str,
        /// First value that is too large.
        limit: usize,
        /// Value that was given.
        got: usize,
    },
    /// A dimension violates a rule of the kernel.
    #[error("{op}: {what} is {got}, {rule}")]
    BadDimension {
        /// The kernel.
        op: &'static str,
        /// The dimension.
        what: &'static str,
        /// Value that was given.
        got: usize,
        /// The rule, as a phrase that ends the message.
        rule: &'static str,
    },
    /// A device did not do what was asked of it.
    #[error("{op} failed on the device: {reason}")]
    Device {
        /// The kernel, or the copy.
        op: &'static str,
        /// What the device's driver or compiler says.
        reason: String,
    },
}

/// `Ok` when `got` elements are what the other operands imply.
pub(crate) fn check_len(
    op: &'static str,
    what: &'static str,
    expected: usize,
    got: usize,
) -> Result<(), KernelError> {
    if expected == got { Ok(()) } else { Err(KernelError::ShapeMismatch { op, what, expected, got }) }
}

/// Number of rows of width `width` in `len` elements, or a mismatch.
pub(crate) fn rows_of(
    op: &'static str,
    what: &'static str,
    len: usize,
    width: usize,
) -> Result<usize, KernelError> {
    if width == 0 {
        return Err(KernelError::BadDimension { op, what: "row width", got: 0, rule: "must be positive" });
    }
    let rows = len / width;
    check_len(op, what, rows * width, len)?;
    Ok(rows)
}
