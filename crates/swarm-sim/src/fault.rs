//! What can go wrong on purpose, at a set time.

use crate::link::LinkConfig;
use crate::world::NodeId;

/// One fault.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// The node stops: its timers are gone, messages to it vanish. What it keeps is up to [`crate::Node::on_crash`].
    Crash(NodeId),
    /// A crashed node starts again.
    Restart(NodeId),
    /// Messages between the nodes of the list and all others vanish, those on their way included.
    Partition(Vec<NodeId>),
    /// All partitions end.
    Heal,
    /// The link from the first to the second node behaves like this from now on.
    Link(NodeId, NodeId, LinkConfig),
}
