//! Watching activations: what leaves a stage can be recorded, never changed.

use crate::batch::{Batch, Tensor};
use swarm_wire::LayerRange;

/// Sees what leaves a stage. Slow taps slow the stage: copy and return.
pub trait ActivationTap: Send {
    /// `hidden` are the rows [T, H] that left `layers` for `batch`; after the last layer, the final-norm rows.
    fn observe(&mut self, batch: &Batch, layers: LayerRange, hidden: &Tensor);
}
