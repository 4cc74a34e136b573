//! Announcements to everybody who listens to a topic: small ones. What is large is published as blocks, and its CID is
//! announced. Pure: names, limits and what a listener says of a message.

use bytes::Bytes;
use swarm_wire::PeerId;
use swarm_wire::limits::NAME_MAX_BYTES;

/// Largest announcement: a signed statement with a few CIDs fits, a tensor does not.
pub const MESSAGE_MAX_BYTES: usize = 4096;
/// Topics that one node listens to.
pub const TOPICS_MAX: usize = 64;
/// Messages that wait for one listener; further ones are lost to it and still passed on.
pub const QUEUE_MAX: usize = 256;

/// What a listener says of a message before anybody else gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is delivered here and passed on.
    Accept,
    /// It is neither, and whoever passed it on loses standing: after a few of these nothing is taken from it.
    Reject,
    /// It is neither, and nobody is to blame.
    Ignore,
}

/// An announcement that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Who made and signed it; checked.
    pub author: PeerId,
    /// Who passed it on to us.
    pub relayed_by: PeerId,
    /// What is announced.
    pub data: Bytes,
}

/// The name of a topic on the wire: networks never share one. `None` when `topic` is empty or longer than 256 bytes.
pub fn topic_name(network: &str, topic: &str) -> Option<String> {
    (1..=NAME_MAX_BYTES).contains(&topic.len()).then(|| format!("/lattica/{network}/{topic}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_of_two_networks_are_two() {
        assert_eq!(topic_name("a", "snapshots").unwrap(), "/lattica/a/snapshots");
        assert_ne!(topic_name("a", "snapshots"), topic_name("b", "snapshots"));
        assert_eq!((topic_name("a", ""), topic_name("a", &"x".repeat(257))), (None, None));
    }
}
