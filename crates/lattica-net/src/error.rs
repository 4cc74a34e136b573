//! Why something could not be done: one enum per kind of operation, each message naming the thing and the remedy.

use std::time::Duration;

use swarm_wire::{DecodeError, PeerId};

use crate::access::{Refusal, SwarmKeyError};
use crate::status::{Status, StatusCode};

/// A field of [`crate::NodeConfig`] that is out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value} but must be {allowed}")]
pub struct ConfigError {
    /// The field.
    pub field: &'static str,
    /// Its value, as text.
    pub value: String,
    /// What is allowed.
    pub allowed: &'static str,
}

/// Why an identity could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The key file exists but is not one of ours.
    #[error("key file {path} is {got_bytes} bytes but a key is 32; move it away to have a new one made")]
    Malformed {
        /// The file.
        path: String,
        /// Its length.
        got_bytes: u64,
    },
    /// Others may read the key file.
    #[error("key file {path} can be read by others (mode {mode:o}); run chmod 600 on it")]
    TooOpen {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// The operating system refused.
    #[error("key file {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The reason.
        source: std::io::Error,
    },
}

/// Why the file of a swarm key could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwarmKeyFileError {
    /// The file holds something else.
    #[error(
        "swarm key file {path}: {source}; make one with lattica-node swarm-key FILE and copy it to every member"
    )]
    Malformed {
        /// The file.
        path: String,
        /// What is wrong.
        source: SwarmKeyError,
    },
    /// Others may read the file.
    #[error("swarm key file {path} can be read by others (mode {mode:o}); run chmod 600 on it")]
    TooOpen {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// The operating system refused.
    #[error("swarm key file {path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The reason.
        source: std::io::Error,
    },
}

/// Why a node could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address that is not a multiaddress, or of a kind that is not supported.
    #[error("address {address} cannot be used: {reason}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A listen address is taken.
    #[error(
        "port of {address} is already in use; stop the other process or listen on another port (0 picks a free one)"
    )]
    PortInUse {
        /// The address.
        address: String,
    },
    /// The operating system refused to listen.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address.
        address: String,
        /// The reason.
        reason: String,
    },
    /// Something that every node needs could not be set up.
    #[error("cannot set up {what}: {reason}")]
    Setup {
        /// What was being set up.
        what: &'static str,
        /// The reason.
        reason: String,
    },
}

/// Why a peer could not be dialled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// Not a multiaddress.
    #[error("{address} is not a multiaddress: {reason}")]
    Address {
        /// The text.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No address is known for the peer.
    #[error("no address is known for peer {peer}; dial one of its addresses or a bootstrap node first")]
    NoAddress {
        /// The peer.
        peer: PeerId,
    },
    /// Nobody answered, or the handshake broke.
    #[error("cannot connect to {target}: {reason}")]
    Unreachable {
        /// The address or peer.
        target: String,
        /// The reason, per address tried.
        reason: String,
    },
    /// The peer is not a member of this node's swarm, or this node not one of the peer's.
    #[error("peer {peer} does not belong to this swarm: {refusal}")]
    Refused {
        /// The peer.
        peer: String,
        /// The reason.
        refusal: Refusal,
    },
    /// Somebody else answered.
    #[error("{address} is peer {got}, not {expected}; the address is out of date")]
    WrongPeer {
        /// The address.
        address: String,
        /// The peer that was expected.
        expected: PeerId,
        /// The peer that answered.
        got: String,
    },
    /// The dial took too long.
    #[error("no connection to {target} within {timeout:?}")]
    Timeout {
        /// The address or peer.
        target: String,
        /// The time allowed.
        timeout: Duration,
    },
    /// The node was shut down.
    #[error("the node was shut down")]
    ShutDown,
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// No connection to the peer could be made, or it takes no calls over one that stands; then the call may have left.
    #[error("peer {peer} cannot be reached: {reason}")]
    Unreachable {
        /// The peer.
        peer: PeerId,
        /// Why no connection could be made, or how the peer met the call.
        reason: String,
    },
    /// The peer did not answer in time.
    #[error("peer {peer} did not answer {method} within {timeout:?}")]
    Timeout {
        /// The peer.
        peer: PeerId,
        /// The method.
        method: String,
        /// The time allowed.
        timeout: Duration,
    },
    /// The connection broke while the call was under way; the peer may or may not have done the work.
    #[error("connection to peer {peer} was lost during {method}")]
    ConnectionLost {
        /// The peer.
        peer: PeerId,
        /// The method.
        method: String,
    },
    /// The peer answered that it did not do it.
    #[error("peer {peer} answered {method} with {status}")]
    Remote {
        /// The peer.
        peer: PeerId,
        /// The method.
        method: String,
        /// Its answer.
        status: Status,
    },
    /// The body is larger than a call may carry.
    #[error(
        "body of {got_bytes} bytes for {method} is over the limit of {limit_bytes}; use a stream or publish it as blocks"
    )]
    TooLarge {
        /// The method.
        method: String,
        /// The body's length.
        got_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// Nobody was named whom to ask.
    #[error("{method} was asked of no peer: name at least one")]
    NoPeers {
        /// The method.
        method: String,
    },
    /// A method name that cannot be sent.
    #[error("method name {method:?} is empty or longer than 256 bytes")]
    BadMethod {
        /// The name.
        method: String,
    },
    /// The node was shut down.
    #[error("the node was shut down")]
    ShutDown,
}

impl CallError {
    /// The status code that the peer answered with, when it answered.
    pub fn remote_code(&self) -> Option<StatusCode> {
        match self {
            Self::Remote { status, .. } => Some(status.code),
            _ => None,
        }
    }
}

/// Why a stream could not be opened or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// There is no connection to the peer and none could be made.
    #[error("peer {peer} cannot be reached: {reason}")]
    Unreachable {
        /// The peer.
        peer: PeerId,
        /// Why no connection could be made.
        reason: String,
    },
    /// The peer does not speak the protocol.
    #[error("peer {peer} does not speak {protocol}; it may run another version or another role")]
    Unsupported {
        /// The peer.
        peer: PeerId,
        /// The protocol.
        protocol: String,
    },
    /// The connection broke.
    #[error("connection to peer {peer} was lost")]
    ConnectionLost {
        /// The peer.
        peer: PeerId,
    },
    /// The peer did not agree to the stream in time.
    #[error("peer {peer} did not open a {protocol} stream in time")]
    Timeout {
        /// The peer.
        peer: PeerId,
        /// The protocol.
        protocol: String,
    },
    /// A protocol name that cannot be used.
    #[error("protocol name {protocol:?} must begin with '/' and have at most 140 bytes")]
    BadProtocol {
        /// The name.
        protocol: String,
    },
    /// The peer sent something that its protocol forbids.
    #[error("peer {peer} sent what its protocol forbids: {source}")]
    Malformed {
        /// The peer.
        peer: PeerId,
        /// What was wrong.
        source: DecodeError,
    },
    /// The stream ended in the middle of something.
    #[error("stream with peer {peer} broke: {source}")]
    Io {
        /// The peer.
        peer: PeerId,
        /// The reason.
        source: std::io::Error,
    },
    /// The node was shut down.
    #[error("the node was shut down")]
    ShutDown,
}

/// Why an announcement or a subscription failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GossipError {
    /// The node was started without gossip.
    #[error("gossip is off; set NodeConfig::gossip")]
    Off,
    /// The topic's name cannot be used.
    #[error("a topic's name is 1 to 256 bytes, not {got_bytes}")]
    BadTopic {
        /// Its length.
        got_bytes: usize,
    },
    /// The announcement is too large.
    #[error(
        "an announcement of {got_bytes} bytes is over the limit of {limit_bytes}; publish it as blocks and announce its CID"
    )]
    TooLarge {
        /// Its length.
        got_bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// This node listens to the topic already.
    #[error("this node listens to {topic} already; drop the other subscription first")]
    Subscribed {
        /// The topic.
        topic: String,
    },
    /// This node listens to as many topics as it may.
    #[error("this node listens to {limit} topics already")]
    TooManyTopics {
        /// The limit.
        limit: usize,
    },
    /// Nobody who listens is known.
    #[error("no peer that listens to the topic is known yet; connect to one first")]
    NoListeners,
    /// The announcement was refused.
    #[error("topic {topic}: {reason}")]
    Refused {
        /// The topic.
        topic: String,
        /// The reason.
        reason: String,
    },
    /// The node was shut down.
    #[error("the node was shut down")]
    ShutDown,
}

/// Why the distributed table did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DhtError {
    /// No other peer is known.
    #[error("no other peer of the network is known yet; connect to a bootstrap node first")]
    NoPeers,
    /// Too few peers stored the record.
    #[error("record could not be stored at any peer: {reason}")]
    NotStored {
        /// The reason.
        reason: String,
    },
    /// The query took too long.
    #[error("the query was not answered in time")]
    Timeout,
    /// A record cannot be published as it is.
    #[error("the record cannot be published: {0}")]
    Unfit(#[from] crate::dht::Refusal),
    /// A key that is kept for signed records.
    #[error("only signed records stand under such a key: use publish_record, or another key")]
    ReservedKey,
    /// As much runs or waits as this node keeps at once.
    #[error("{running} DHT queries or announcements run or wait already; try again when some have ended")]
    Busy {
        /// How many.
        running: usize,
    },
    /// The record is too large, or the local store is full.
    #[error("the local record store refused: {reason}")]
    Store {
        /// The reason.
        reason: String,
    },
    /// The node was shut down.
    #[error("the node was shut down")]
    ShutDown,
}

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The stream broke or ended in the middle of a frame.
    #[error("stream broke: {0}")]
    Io(#[from] std::io::Error),
    /// The peer sent something else.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
}
