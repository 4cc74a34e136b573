//! Spread frames: the only place where a peer's bytes become messages of a spread.

use bytes::Bytes;
use prost::Message as _;
use swarm_wire::generated::lattica::v1::spread_frame::Body;
use swarm_wire::generated::lattica::v1::{
    SpreadChunk, SpreadChunks, SpreadComing, SpreadFrame, SpreadPeer, SpreadPeers,
};
use swarm_wire::limits::BLOCK_MAX_BYTES;
use swarm_wire::repeated::{self, Element};
use swarm_wire::{Cid, DecodeError, PeerId, cid, frame};

use super::{Bitmap, SpreadMessage};

/// The protocol's name.
pub const PROTOCOL: &str = "/lattica/spread/1.0.0";
/// No frame is longer: one block and what goes with it.
pub const FRAME_MAX_BYTES: usize = BLOCK_MAX_BYTES + 1024;
/// Peers in one frame.
pub const PEERS_MAX: usize = 16;
/// Addresses of one peer.
const ADDRESSES_MAX: usize = 4;
const ADDRESS_MAX_BYTES: usize = 256;

/// A peer and where it may be reached.
pub type Contact = (PeerId, Vec<String>);

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The opener names the artefact.
    Hello(Cid),
    /// Other members.
    Peers(Vec<Contact>),
    /// Peers are wanted.
    AskPeers,
    /// A message of the state machine.
    Message(SpreadMessage),
    /// A block's bytes, unchecked.
    Chunk {
        /// Which.
        index: u32,
        /// Its bytes.
        bytes: Bytes,
    },
}

impl Frame {
    /// The frame with its length before it.
    pub fn encode(self) -> Vec<u8> {
        let body = match self {
            Self::Hello(root) => Body::Hello(root.to_bytes().into()),
            Self::Peers(peers) => Body::Peers(SpreadPeers {
                peers: peers
                    .into_iter()
                    .take(PEERS_MAX)
                    .map(|(peer, addresses)| SpreadPeer {
                        peer: Bytes::copy_from_slice(peer.as_bytes()),
                        addresses: addresses.into_iter().take(ADDRESSES_MAX).collect(),
                    })
                    .collect(),
            }),
            Self::AskPeers => Body::AskPeers(true),
            Self::Message(message) => match message {
                SpreadMessage::Holds(bitmap) => Body::Holds(bitmap.to_bytes().into()),
                SpreadMessage::Have(indices) => Body::Have(SpreadChunks { indices }),
                SpreadMessage::Request(chunk) => Body::Request(chunk),
                SpreadMessage::Cancel(chunk) => Body::Cancel(chunk),
                SpreadMessage::Refuse(chunk) => Body::Refuse(chunk),
                SpreadMessage::Busy(chunk) => Body::Busy(chunk),
                SpreadMessage::Offer(chunk) => Body::Offer(chunk),
                SpreadMessage::Decline(chunk) => Body::Decline(chunk),
                SpreadMessage::Coming { chunk, lot } => Body::Coming(SpreadComing { index: chunk, lot }),
            },
            Self::Chunk { index, bytes } => Body::Chunk(SpreadChunk { index, data: bytes }),
        };
        frame::encode_message(&SpreadFrame { body: Some(body) }, 0)
    }

    /// A frame from its payload, for an artefact of `n_chunks` blocks (0 where none is agreed on yet).
    ///
    /// # Errors
    /// When it is malformed, or names more peers, addresses or chunks than there can be.
    pub fn decode(payload: Bytes, n_chunks: u32) -> Result<Self, DecodeError> {
        debug_assert!(n_chunks as usize <= BLOCK_MAX_BYTES / 32, "a manifest names no more blocks");
        let what = "spread frame";
        let number = |chunk: u32| {
            if chunk < n_chunks { Ok(chunk) } else { Err(DecodeError::invalid("chunk number", chunk)) }
        };
        let lists: [(&[u32], Element, usize); 3] = [
            (&[2, 1], Element::Field, PEERS_MAX),
            (&[2, 1, 2], Element::Field, PEERS_MAX * ADDRESSES_MAX),
            (&[5, 1], Element::Varint, n_chunks as usize),
        ];
        for (path, element, most) in lists {
            repeated::check("list in a spread frame", &payload, (path, element), most)?;
        }
        let message = SpreadFrame::decode(payload).map_err(|e| DecodeError::message(what, &e))?;
        Ok(match message.body.ok_or_else(|| DecodeError::invalid(what, "without a body"))? {
            Body::Hello(root) => Self::Hello(cid::decode(&root)?),
            Body::Peers(peers) => {
                Self::Peers(peers.peers.into_iter().map(contact).collect::<Result<_, _>>()?)
            }
            Body::AskPeers(_) => Self::AskPeers,
            Body::Holds(bytes) => Self::Message(SpreadMessage::Holds(Bitmap::from_bytes(n_chunks, &bytes)?)),
            Body::Have(SpreadChunks { indices }) => {
                let chunks = indices.into_iter().map(number).collect::<Result<_, _>>()?;
                Self::Message(SpreadMessage::Have(chunks))
            }
            Body::Request(chunk) => Self::Message(SpreadMessage::Request(number(chunk)?)),
            Body::Cancel(chunk) => Self::Message(SpreadMessage::Cancel(number(chunk)?)),
            Body::Refuse(chunk) => Self::Message(SpreadMessage::Refuse(number(chunk)?)),
            Body::Busy(chunk) => Self::Message(SpreadMessage::Busy(number(chunk)?)),
            Body::Offer(chunk) => Self::Message(SpreadMessage::Offer(number(chunk)?)),
            Body::Decline(chunk) => Self::Message(SpreadMessage::Decline(number(chunk)?)),
            Body::Coming(SpreadComing { index, lot }) => {
                Self::Message(SpreadMessage::Coming { chunk: number(index)?, lot })
            }
            Body::Chunk(SpreadChunk { index, data }) => Self::Chunk { index: number(index)?, bytes: data },
        })
    }
}

fn contact(peer: SpreadPeer) -> Result<Contact, DecodeError> {
    let SpreadPeer { peer, addresses } = peer;
    if addresses.len() > ADDRESSES_MAX || addresses.iter().any(|a| a.len() > ADDRESS_MAX_BYTES) {
        return Err(DecodeError::invalid("addresses of a peer in a spread frame", addresses.len()));
    }
    Ok((PeerId::from_bytes(&peer)?, addresses))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payload(frame: Frame) -> Bytes {
        let bytes = frame.encode();
        let (payload, rest) = frame::decode("test", &bytes, FRAME_MAX_BYTES).unwrap().unwrap();
        assert!(rest.is_empty());
        Bytes::copy_from_slice(payload)
    }

    #[test]
    fn frames_round_trip() {
        let peer = PeerId::from_ed25519(&[7; 32]);
        let root = cid::raw(crate::HashKind::Blake3.code(), &[3; 32]);
        let messages = [
            SpreadMessage::Holds(Bitmap::full(9)),
            SpreadMessage::Have(vec![0, 8]),
            SpreadMessage::Request(1),
            SpreadMessage::Cancel(2),
            SpreadMessage::Refuse(3),
            SpreadMessage::Busy(4),
            SpreadMessage::Offer(5),
            SpreadMessage::Decline(6),
            SpreadMessage::Coming { chunk: 7, lot: u32::MAX },
        ];
        let others = [
            Frame::Hello(root),
            Frame::Peers(vec![(peer, vec!["/ip4/127.0.0.1/tcp/1".to_owned()])]),
            Frame::AskPeers,
            Frame::Chunk { index: 7, bytes: Bytes::from_static(b"chunk") },
        ];
        for frame in messages.into_iter().map(Frame::Message).chain(others) {
            assert_eq!(Frame::decode(payload(frame.clone()), 9).unwrap(), frame);
        }
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let numbers: [fn(u32) -> SpreadMessage; 8] = [
            |chunk| SpreadMessage::Have(vec![chunk]),
            SpreadMessage::Request,
            SpreadMessage::Cancel,
            SpreadMessage::Refuse,
            SpreadMessage::Busy,
            SpreadMessage::Offer,
            SpreadMessage::Decline,
            |chunk| SpreadMessage::Coming { chunk, lot: 0 },
        ];
        for message in numbers {
            assert!(Frame::decode(payload(Frame::Message(message(8))), 9).is_ok());
            assert!(Frame::decode(payload(Frame::Message(message(9))), 9).is_err());
        }
        let chunk = Frame::Chunk { index: 9, bytes: Bytes::new() };
        assert!(Frame::decode(payload(chunk), 9).is_err());
        assert!(Frame::decode(payload(Frame::Message(SpreadMessage::Holds(Bitmap::full(17)))), 9).is_err());
        let peer = PeerId::from_ed25519(&[7; 32]);
        let long = Frame::Peers(vec![(peer, vec!["x".repeat(300)])]);
        assert!(Frame::decode(payload(long), 9).is_err());
        assert!(Frame::decode(Bytes::new(), 9).is_err());
    }

    #[test]
    fn a_frame_of_empty_elements_is_refused_before_it_grows() {
        let nested = |key: u8, list: Vec<u8>| {
            let mut frame = vec![key];
            frame::encode_length(list.len(), &mut frame);
            Bytes::from([frame, list].concat())
        };
        let peers = nested(0x12, [0x0a, 0].repeat(1_000_000));
        let addresses = nested(0x12, nested(0x0a, [0x12, 0].repeat(1_000_000)).to_vec());
        let have = nested(0x2a, nested(0x0a, vec![0; 2_000_000]).to_vec());
        for frame in [peers, addresses, have] {
            let error = Frame::decode(frame, 9).unwrap_err();
            assert!(error.to_string().contains("elements"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), n in 0u32..100) {
            let _ = Frame::decode(Bytes::from(bytes), n);
        }
    }
}
