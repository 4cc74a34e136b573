//! What a node remembers of its peers.

use serde::Serialize;
use swarm_wire::PeerId;

/// A peer as this node sees it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PeerInfo {
    /// The peer.
    pub peer: PeerId,
    /// Addresses under which it may be dialled, the most promising first.
    pub addrs: Vec<String>,
    /// Whether a connection stands.
    pub connected: bool,
    /// Whether the best connection goes through a relay.
    pub relayed: bool,
    /// Smoothed round trip, once measured.
    pub rtt_ms: Option<f64>,
}
