//! The coordinator on a network: heartbeats in, plans out. [`MembershipServer`] runs at the head, [`MemberClient`] at
//! every other member; all calls go from member to head.

mod client;
mod server;

use std::time::Duration;

pub use client::{JoinOptions, MemberClient, find_head};
pub use server::{Answer, MembershipServer};

use lattica_net::CallError;

/// Which model does this swarm serve?
pub const DESCRIBE: &str = "parallax/v1/describe";
/// Take part.
pub const JOIN: &str = "parallax/v1/join";
/// Still here; what shall I run?
pub const HEARTBEAT: &str = "parallax/v1/heartbeat";
/// Goodbye.
pub const LEAVE: &str = "parallax/v1/leave";

/// How long one of these calls may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The DHT key under which the head of a swarm announces itself.
pub fn head_key(swarm: &str) -> Vec<u8> {
    format!("parallax/v1/head/{swarm}").into_bytes()
}

/// Why a member could not find or join a swarm.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwarmError {
    /// Nobody who was asked is the head of this swarm.
    #[error(
        "no head of swarm `{swarm}` found within {waited:?} among {asked} peers: start one with `parallax serve --swarm {swarm}`, or pass its address with --bootstrap"
    )]
    NoHead {
        /// The swarm's name.
        swarm: String,
        /// How long was searched.
        waited: Duration,
        /// How many peers were asked.
        asked: usize,
    },
    /// The head did not answer, or refused.
    #[error("head {head}: {source}")]
    Call {
        /// The head.
        head: swarm_wire::PeerId,
        /// What it said.
        source: CallError,
    },
    /// The head's answer makes no sense.
    #[error("head {head} answered with a malformed message: {source}")]
    Malformed {
        /// The head.
        head: swarm_wire::PeerId,
        /// Why.
        source: swarm_wire::DecodeError,
    },
}

#[cfg(test)]
mod tests;
