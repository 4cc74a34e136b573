//! What models and nodes cost: bytes and time per layer. Times come from measurements at the node; [`roofline`] is the
//! prior for a node that has not run the model yet.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use swarm_wire::LayerRange;

use crate::PlanError;

/// A node in a plan: the text of its peer id, or any name in a cluster file.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// The node called `name`.
    pub fn new(name: impl AsRef<str>) -> Self {
        Self(Arc::from(name.as_ref()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.0)
    }
}

impl From<&swarm_wire::PeerId> for NodeId {
    fn from(peer: &swarm_wire::PeerId) -> Self {
        Self::new(peer.to_string())
    }
}

/// What a model's parts weigh, all layers alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelProfile {
    /// For people.
    pub name: String,
    /// Decoder layers.
    pub n_layers: u32,
    /// Weight bytes of one layer, as loaded.
    pub layer_bytes: u64,
    /// Embedding table, held by the first stage.
    #[serde(default)]
    pub embedding_bytes: u64,
    /// Final norm and head, held by the last stage. For a tied head this is the table's size again: a stage that is
    /// first and last holds it once (see [`ModelProfile::tied`]).
    #[serde(default)]
    pub head_bytes: u64,
    /// Whether embedding and head are the same bytes.
    #[serde(default)]
    pub tied: bool,
    /// Cache bytes of one position in one layer: keys and values, or its share of recurrent states where those take more.
    #[serde(default)]
    pub kv_bytes_per_token_layer: u64,
    /// Floating point operations of one layer for one token; 0 means two per weight at two bytes each.
    #[serde(default)]
    pub layer_flops: f64,
    /// Hidden size: a row between stages has this many values.
    #[serde(default)]
    pub hidden: u32,
}

impl ModelProfile {
    /// A model of alike layers without embedding and head: for tests and what-if questions.
    pub fn uniform(name: &str, n_layers: u32, layer_bytes: u64) -> Self {
        Self {
            name: name.to_owned(),
            n_layers,
            layer_bytes,
            embedding_bytes: 0,
            head_bytes: 0,
            tied: false,
            kv_bytes_per_token_layer: 0,
            layer_flops: 0.0,
            hidden: 0,
        }
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// When there are no layers, layers weigh nothing, or there are more than [`MAX_LAYERS`].
    pub fn validate(&self) -> Result<(), PlanError> {
        let bad = |what| Err(PlanError::BadModel { model: self.name.clone(), what });
        if self.n_layers == 0 || self.layer_bytes == 0 {
            return bad("it needs at least one layer, and layers have bytes");
        }
        if self.n_layers > MAX_LAYERS {
            return bad("more than 1024 layers");
        }
        Ok(())
    }

    /// Bytes beside the layers on a stage that is first, last, both or neither.
    pub fn endpoint_bytes(&self, first: bool, last: bool) -> u64 {
        match (first, last) {
            (true, true) if self.tied => self.embedding_bytes.max(self.head_bytes),
            (true, true) => self.embedding_bytes.saturating_add(self.head_bytes),
            (true, false) => self.embedding_bytes,
            (false, true) => self.head_bytes,
            (false, false) => 0,
        }
    }

    /// Bytes of one layer with room for `context_tokens` cached positions.
    pub fn layer_bytes_with_cache(&self, context_tokens: u64) -> u64 {
        self.layer_bytes.saturating_add(self.kv_bytes_per_token_layer.saturating_mul(context_tokens))
    }

    /// Layers that fit into `memory_bytes` at this place of a chain.
    pub fn capacity(&self, memory_bytes: u64, context_tokens: u64, first: bool, last: bool) -> u32 {
        let free = memory_bytes.saturating_sub(self.endpoint_bytes(first, last));
        let layers = free / self.layer_bytes_with_cache(context_tokens).max(1);
        u32::try_from(layers).unwrap_or(u32::MAX).min(self.n_layers)
    }
}

/// More layers than any model here has; bounds the planner's tables.
pub const MAX_LAYERS: u32 = 1024;

/// One node's memory and speed for one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeProfile {
    /// Who.
    pub id: NodeId,
    /// Memory for weights and cache, bytes.
    pub memory_bytes: u64,
    /// Time of one layer for one token, milliseconds.
    pub decode_ms_per_layer: f64,
    /// Time of final norm and head for one token, milliseconds.
    #[serde(default)]
    pub head_ms: f64,
    /// Time of one layer per prompt token in prefill, milliseconds.
    #[serde(default)]
    pub prefill_ms_per_layer_token: f64,
    /// Fixed time of a visit: frames, scheduling; milliseconds.
    #[serde(default)]
    pub overhead_ms: f64,
    /// The operator's wish: exactly these layers.
    #[serde(default)]
    pub pinned: Option<LayerRange>,
}

impl NodeProfile {
    /// A node with so much memory that takes so long for a layer.
    pub fn new(id: &str, memory_bytes: u64, decode_ms_per_layer: f64) -> Self {
        Self {
            id: NodeId::new(id),
            memory_bytes,
            decode_ms_per_layer,
            head_ms: 0.0,
            prefill_ms_per_layer_token: 0.0,
            overhead_ms: 0.0,
            pinned: None,
        }
    }

    /// Milliseconds of one visit to a stage of `n_layers` layers.
    pub fn stage_ms(&self, n_layers: u32, last: bool) -> f64 {
        self.overhead_ms
            + f64::from(n_layers) * self.decode_ms_per_layer
            + if last { self.head_ms } else { 0.0 }
    }

    /// Checks numbers and pin.
    ///
    /// # Errors
    /// When a time is not finite, negative (or zero where it must not be), or the pin lies outside of the model.
    pub fn validate(&self, model: &ModelProfile) -> Result<(), PlanError> {
        let bad = |what, value| Err(PlanError::BadProfile { node: self.id.clone(), what, value });
        if !(self.decode_ms_per_layer.is_finite() && self.decode_ms_per_layer > 0.0) {
            return bad("decode_ms_per_layer", self.decode_ms_per_layer);
        }
        for (what, value) in [
            ("head_ms", self.head_ms),
            ("overhead_ms", self.overhead_ms),
            ("prefill_ms_per_layer_token", self.prefill_ms_per_layer_token),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return bad(what, value);
            }
        }
        if let Some(layers) = self.pinned
            && layers.end() > model.n_layers
        {
            return Err(PlanError::PinOutside { node: self.id.clone(), layers, n_layers: model.n_layers });
        }
        Ok(())
    }
}

/// Milliseconds of one layer for one token by the roofline: weights stream through memory once, each weight costs two
/// operations. `bandwidth_gbps` is gigabytes per second; `tflops` may be 0 when unknown (decode is bandwidth bound).
pub fn roofline(model: &ModelProfile, bandwidth_gbps: f64, tflops: f64) -> (f64, f64) {
    let per_byte_ms = 1.0 / (bandwidth_gbps * 1e6);
    let flops = if model.layer_flops > 0.0 { model.layer_flops } else { model.layer_bytes as f64 };
    let compute_ms = |flops: f64| if tflops > 0.0 { flops / (tflops * 1e9) } else { 0.0 };
    let layer_ms = (model.layer_bytes as f64 * per_byte_ms).max(compute_ms(flops));
    let head_ms = (model.head_bytes as f64 * per_byte_ms).max(compute_ms(model.head_bytes as f64));
    (layer_ms, head_ms)
}

/// Round-trip times between nodes; pairs that were never measured have a default.
#[derive(Debug, Clone, PartialEq)]
pub struct RttMatrix {
    known: HashMap<(NodeId, NodeId), f64>,
    default_ms: f64,
}

impl Default for RttMatrix {
    fn default() -> Self {
        Self { known: HashMap::new(), default_ms: 1.0 }
    }
}

impl RttMatrix {
    /// No pair measured yet; every pair counts as `default_ms`.
    pub fn with_default(default_ms: f64) -> Self {
        Self { known: HashMap::new(), default_ms }
    }

    /// Records a measurement, for both directions. Values that are not finite and non-negative are ignored.
    pub fn set(&mut self, a: &NodeId, b: &NodeId, rtt_ms: f64) {
        if rtt_ms.is_finite() && rtt_ms >= 0.0 {
            self.known.insert((a.clone(), b.clone()), rtt_ms);
            self.known.insert((b.clone(), a.clone()), rtt_ms);
        }
    }

    /// Milliseconds there and back.
    pub fn get(&self, a: &NodeId, b: &NodeId) -> f64 {
        if a == b {
            return 0.0;
        }
        self.known.get(&(a.clone(), b.clone())).copied().unwrap_or(self.default_ms)
    }

    /// Forgets a node.
    pub fn remove(&mut self, node: &NodeId) {
        self.known.retain(|(a, b), _| a != node && b != node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_pays_for_embedding_head_and_cache() {
        let mut model = ModelProfile::uniform("m", 10, 100);
        model.embedding_bytes = 250;
        model.head_bytes = 250;
        model.kv_bytes_per_token_layer = 1;
        assert_eq!(model.capacity(1000, 0, false, false), 10);
        assert_eq!(model.capacity(1000, 0, true, false), 7);
        assert_eq!(model.capacity(1000, 0, true, true), 5);
        model.tied = true;
        assert_eq!(model.capacity(1000, 0, true, true), 7);
        assert_eq!(model.capacity(1000, 100, false, false), 5);
        assert_eq!(model.capacity(100, 0, true, false), 0);
    }

    #[test]
    fn roofline_is_the_slower_of_memory_and_compute() {
        let model = ModelProfile::uniform("m", 1, 1_000_000_000);
        assert!((roofline(&model, 100.0, 0.0).0 - 10.0).abs() < 1e-9);
        assert!((roofline(&model, 100.0, 0.01).0 - 100.0).abs() < 1e-9);
    }

    #[test]
    fn absurd_profiles_are_refused() {
        let model = ModelProfile::uniform("m", 4, 1);
        for ms in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(NodeProfile::new("n", 1, ms).validate(&model).is_err());
        }
        let mut pinned = NodeProfile::new("n", 1, 1.0);
        pinned.pinned = Some(LayerRange::new(2, 5).unwrap());
        assert!(matches!(pinned.validate(&model), Err(PlanError::PinOutside { .. })));
    }
}
