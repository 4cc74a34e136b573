//! What a node tells its application.

use swarm_wire::PeerId;

/// Something changed. Sent to everybody who called `Node::events`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetEvent {
    /// The first connection to a peer stands.
    Connected(PeerId),
    /// The last connection to a peer is gone: it left, died, or cannot be reached any more.
    Disconnected(PeerId),
    /// A peer that was reached through a relay is now reached directly; new calls and streams use the direct path.
    DirectPath(PeerId),
    /// The node listens on a further address.
    Listening(String),
    /// Somebody confirmed that the node can be reached at this address.
    Reachable(String),
    /// A relay keeps a slot for us: peers reach us through it.
    RelayReserved(PeerId),
}
