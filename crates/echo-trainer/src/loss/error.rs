//! Why a policy loss could not be computed.

/// Why a loss could not be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// A setting out of range.
    #[error("loss setting {setting} = {value} is out of range")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Its value.
        value: f64,
    },
    /// Two settings that contradict each other.
    #[error("loss settings contradict each other: {reason}")]
    Conflict {
        /// Which, and what to do.
        reason: &'static str,
    },
    /// A list of the wrong length.
    #[error("{what} has {got} entries where {needed} are needed")]
    Shape {
        /// Which list.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that fits.
        needed: usize,
    },
    /// Offsets that do not cover the rows in order.
    #[error("sequence offsets must rise from 0 to {rows}")]
    Offsets {
        /// The number of rows.
        rows: usize,
    },
    /// A divergence term without a reference policy.
    #[error(
        "the KL weight is {weight} but no reference log-probabilities are given; set it to 0 or provide them"
    )]
    NoReference {
        /// The weight.
        weight: f64,
    },
    /// NaN or infinity in what the model returned.
    #[error("log-probability of row {row} is {value}; the forward pass diverged, lower the learning rate")]
    NotFinite {
        /// The first such row.
        row: usize,
        /// Its value.
        value: f64,
    },
}
