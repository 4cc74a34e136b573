//! Why no plan could be made, and why a member was refused.

use swarm_wire::LayerRange;

use crate::NodeId;

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// No node at all.
    #[error("no node has joined: start one with `parallax join`")]
    NoNodes,
    /// The nodes together cannot hold the model.
    #[error(
        "need room for {missing_layers} more of {n_layers} layers ({missing_bytes} bytes): let more nodes join, or give them more memory"
    )]
    NotEnoughMemory {
        /// Layers that no node has room for.
        missing_layers: u32,
        /// Layers of the model.
        n_layers: u32,
        /// Bytes that those layers need.
        missing_bytes: u64,
    },
    /// Pinned ranges leave layers that no other node can take.
    #[error("the pinned layers leave no way to cover the model: {reason}")]
    PinsLeaveGap {
        /// What is in the way.
        reason: String,
    },
    /// A pinned range outside of the model.
    #[error("node {node} pins layers {layers}, but the model has {n_layers} layers")]
    PinOutside {
        /// Who.
        node: NodeId,
        /// The pinned range.
        layers: LayerRange,
        /// Layers of the model.
        n_layers: u32,
    },
    /// A profile with a value that is not a positive finite number.
    #[error("node {node} reports {what} = {value}, which must be a positive number")]
    BadProfile {
        /// Who.
        node: NodeId,
        /// The field.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// Two nodes with the same id.
    #[error("node {node} is listed twice")]
    DuplicateNode {
        /// Who.
        node: NodeId,
    },
    /// The exact search was asked for too many nodes.
    #[error("the exact search takes at most {limit} nodes, not {n_nodes}: use the algorithm `cover`")]
    TooManyNodes {
        /// How many there are.
        n_nodes: usize,
        /// The most it takes.
        limit: usize,
    },
    /// No algorithm of that name.
    #[error("there is no algorithm `{name}` here: use `exact` (few nodes), `cover` (many), or `auto`")]
    UnknownAlgorithm {
        /// What was asked for.
        name: String,
    },
    /// A model without layers or with absurd sizes.
    #[error("model profile `{model}` is not usable: {what}")]
    BadModel {
        /// Which.
        model: String,
        /// Why.
        what: &'static str,
    },
    /// A configuration that contradicts itself.
    #[error("bad coordinator configuration: {what}")]
    BadConfig {
        /// Why.
        what: &'static str,
    },
}

/// Why other weights cannot take the place of those that serve.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StagingError {
    /// Nobody serves.
    #[error("the swarm does not serve: {0}")]
    NoPlan(PlanError),
    /// A member of the plan says no.
    #[error("{node} cannot stage them: {reason}")]
    Refused {
        /// Who.
        node: NodeId,
        /// Why.
        reason: String,
    },
}

/// Why a member was not let in.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The swarm is full.
    #[error("the swarm is full: {limit} members")]
    Full {
        /// The bound.
        limit: usize,
    },
    /// A newer process of the same peer has joined already.
    #[error("node {node} has joined with the newer incarnation {newest}; {incarnation} is a ghost")]
    Ghost {
        /// Who.
        node: NodeId,
        /// The late incarnation.
        incarnation: u64,
        /// The one that counts.
        newest: u64,
    },
    /// A profile that no plan can use.
    #[error(transparent)]
    Profile(#[from] PlanError),
}
