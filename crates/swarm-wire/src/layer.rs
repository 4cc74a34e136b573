//! Contiguous ranges of decoder layers: what one stage of a pipeline holds.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::DecodeError;

/// Layers `start..end` of a model, half-open and never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LayerRange {
    start: u32,
    end: u32,
}

impl LayerRange {
    /// Layers `start..end`.
    ///
    /// # Errors
    /// When the range is empty or reversed.
    pub fn new(start: u32, end: u32) -> Result<Self, DecodeError> {
        if start >= end {
            return Err(DecodeError::invalid("layer range", format!("{start}..{end}")));
        }
        Ok(Self { start, end })
    }

    /// First layer.
    pub fn start(self) -> u32 {
        self.start
    }

    /// One past the last layer.
    pub fn end(self) -> u32 {
        self.end
    }

    /// Number of layers, at least one.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(self) -> u32 {
        self.end - self.start
    }

    /// Whether `layer` lies inside.
    pub fn contains(self, layer: u32) -> bool {
        (self.start..self.end).contains(&layer)
    }

    /// Whether the two ranges share a layer.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// As a standard range of indices.
    pub fn as_range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }

    /// Whether `ranges`, in order, cover layers `0..n_layers` exactly once.
    pub fn cover(ranges: &[Self], n_layers: u32) -> bool {
        let mut next = 0;
        for range in ranges {
            if range.start != next {
                return false;
            }
            next = range.end;
        }
        next == n_layers
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl std::str::FromStr for LayerRange {
    type Err = DecodeError;

    fn from_str(text: &str) -> Result<Self, DecodeError> {
        let invalid = || DecodeError::invalid("layer range (expected START..END)", text);
        let (start, end) = text.split_once("..").ok_or_else(invalid)?;
        Self::new(start.trim().parse().map_err(|_| invalid())?, end.trim().parse().map_err(|_| invalid())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cover_wants_every_layer_once_and_in_order() {
        let range = |a, b| LayerRange::new(a, b).unwrap();
        assert!(LayerRange::cover(&[range(0, 3), range(3, 5)], 5));
        assert!(!LayerRange::cover(&[range(0, 3), range(2, 5)], 5));
        assert!(!LayerRange::cover(&[range(0, 3)], 5));
        assert!(!LayerRange::cover(&[range(3, 5), range(0, 3)], 5));
    }

    #[test]
    fn text_round_trips_and_nonsense_is_refused() {
        let range: LayerRange = "3..7".parse().unwrap();
        assert_eq!(range.to_string(), "3..7");
        for bad in ["", "3", "7..3", "3..3", "a..b", "-1..2"] {
            assert!(bad.parse::<LayerRange>().is_err(), "{bad}");
        }
    }
}
