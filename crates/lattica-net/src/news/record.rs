//! Peer records: who is where, in signed envelopes (libp2p's RFC 0002 and 0003). Bytes of others become checked values here;
//! the formats and signatures are libp2p's own work. Feature `records`, which `service` has.

use libp2p_core::peer_record::FromEnvelopeError;
use libp2p_core::{PeerRecord, SignedEnvelope};
use swarm_wire::{DecodeError, PeerId};

use super::STATEMENT_MAX_BYTES;
use crate::addr::without_peer;

/// Where a peer says that it can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The peer, whose key signed it.
    pub author: PeerId,
    /// When: Unix time in seconds.
    pub written_s: u64,
    /// Its addresses, without the peer at their end. None is checked for being plausible.
    pub addresses: Vec<String>,
}

/// A record as RFC 0003 has it.
///
/// # Errors
/// When it is longer than any statement, malformed, or not signed by the peer that it is about.
pub fn decode(statement: &[u8]) -> Result<Record, DecodeError> {
    decode_as(statement, PeerRecord::from_signed_envelope_interop)
}

/// A record as RFC 0003 has it, or as libp2p's rendezvous does (with another name of what is signed).
///
/// # Errors
/// As [`decode`].
pub fn decode_of_any_form(statement: &[u8]) -> Result<Record, DecodeError> {
    decode_as(statement, PeerRecord::from_signed_envelope).or_else(|_| decode(statement))
}

fn decode_as(
    statement: &[u8],
    read: impl FnOnce(SignedEnvelope) -> Result<PeerRecord, FromEnvelopeError>,
) -> Result<Record, DecodeError> {
    let invalid = |reason: String| DecodeError::invalid("peer record", reason);
    if statement.len() > STATEMENT_MAX_BYTES {
        return Err(invalid(format!("{} bytes", statement.len())));
    }
    let envelope =
        SignedEnvelope::from_protobuf_encoding(statement).map_err(|error| invalid(error.to_string()))?;
    let record = read(envelope).map_err(|error| invalid(error.to_string()))?;
    let addresses = record.addresses().iter().map(|address| without_peer(address).to_string()).collect();
    Ok(Record {
        author: PeerId::from_bytes(&record.peer_id().to_bytes())?,
        written_s: record.seq(),
        addresses,
    })
}
