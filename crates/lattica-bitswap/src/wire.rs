//! Bitswap 1.2.0 messages: the only place where a peer's bytes become wants, blocks and presences.
//!
//! A block on the wire carries no name, only the kind of its name (the prefix): the receiver hashes the bytes and so
//! learns what it got. A lie therefore shows as a block that nobody asked for.

use bytes::Bytes;
use prost::Message as _;
use swarm_wire::generated::bitswap as proto;
use swarm_wire::generated::bitswap::message::wantlist::{Entry as ProtoEntry, WantType};
use swarm_wire::generated::bitswap::message::{
    Block as ProtoBlock, BlockPresence, BlockPresenceType, Wantlist as ProtoWantlist,
};
use swarm_wire::limits::{BITSWAP_MESSAGE_MAX_BYTES, BLOCK_MAX_BYTES};
use swarm_wire::repeated::{self, Element};
use swarm_wire::{Cid, DecodeError, cid, frame};

use crate::{Block, HashKind, varint};

/// The protocol that stock IPFS peers speak too.
pub const PROTOCOL: &str = "/ipfs/bitswap/1.2.0";
/// Messages are filled up to about this many bytes, so that no message holds a stream for long.
pub const MESSAGE_TARGET_BYTES: usize = 1024 * 1024;
/// Wants, and presences, of one message that are looked at: twice the wants that a peer may have (each may be cancelled too).
const ENTRIES_MAX: usize = 4096;
/// Wants and presences of one message that are read at all. A stock peer's longest lists are below it; empty elements, of
/// which a message could hold two million, are not.
const ELEMENTS_MAX: usize = 64 * 1024;
/// The lists of a message: wants, blocks of 1.0, blocks, presences. Nobody is ever asked for as many blocks at a time.
const LISTS: [(&[u32], usize); 4] =
    [(&[1, 1], ELEMENTS_MAX), (&[2], ENTRIES_MAX), (&[3], ENTRIES_MAX), (&[4], ELEMENTS_MAX)];

/// What is wanted of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantKind {
    /// The block itself.
    Block,
    /// Only whether the peer has it.
    Have,
}

/// One line of a wantlist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WantEntry {
    /// Asks for a block or for its presence.
    Want {
        /// The block.
        cid: Cid,
        /// The block or its presence.
        kind: WantKind,
        /// Higher is served first.
        priority: i32,
        /// Whether an answer is wanted when the peer does not have it.
        send_dont_have: bool,
    },
    /// Takes an earlier want back.
    Cancel {
        /// The block.
        cid: Cid,
    },
}

/// One Bitswap message.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// Changes to the sender's wantlist.
    pub entries: Vec<WantEntry>,
    /// Whether `entries` replaces everything that the sender wanted before.
    pub full: bool,
    /// Blocks, named by hashing what came.
    pub blocks: Vec<Block>,
    /// Which blocks the sender has (`true`) and has not.
    pub presences: Vec<(Cid, bool)>,
    /// Bytes that the sender still has queued for the receiver.
    pub pending_bytes: u32,
}

impl Message {
    /// Reads one message, without its length prefix. Names with hashes that we cannot check are skipped: a stock peer
    /// may well want such blocks, and we have none.
    ///
    /// # Errors
    /// When the bytes are over the limit, have too many elements or are no message, or a block is over the limit or has an uncheckable prefix.
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        if bytes.len() > BITSWAP_MESSAGE_MAX_BYTES {
            return Err(DecodeError::TooLarge {
                what: "bitswap message",
                limit_bytes: BITSWAP_MESSAGE_MAX_BYTES,
                got_bytes: bytes.len(),
            });
        }
        for (path, most) in LISTS {
            repeated::check("list in a bitswap message", &bytes, (path, Element::Field), most)?;
        }
        let message =
            proto::Message::decode(bytes).map_err(|e| DecodeError::message("bitswap message", &e))?;
        let wantlist = message.wantlist.unwrap_or_default();
        let entries = wantlist.entries.iter().take(ENTRIES_MAX).filter_map(entry_from_proto).collect();
        let mut blocks = Vec::with_capacity(message.payload.len() + message.blocks.len());
        for block in message.payload {
            blocks.push(block_from_prefix(&block.prefix, block.data)?);
        }
        for data in message.blocks {
            // Bitswap 1.0 knows only SHA2-256. Our wants are raw CIDs, so that is what such bytes are here.
            blocks.push(Block::new(HashKind::Sha2, data).map_err(|e| DecodeError::invalid("block", e))?);
        }
        let presences = message
            .block_presences
            .iter()
            .take(ENTRIES_MAX)
            .filter_map(|p| Some((cid::decode(&p.cid).ok()?, p.r#type() == BlockPresenceType::PresenceHave)))
            .collect();
        Ok(Self {
            entries,
            full: wantlist.full,
            blocks,
            presences,
            pending_bytes: message.pending_bytes.max(0) as u32,
        })
    }

    /// The bytes of this message with their length prefix, as they go onto a stream.
    ///
    /// # Panics
    /// When the message is over the limit; [`Message::split`] keeps it below.
    pub fn encode(&self) -> Vec<u8> {
        let message = proto::Message {
            wantlist: (!self.entries.is_empty() || self.full).then(|| ProtoWantlist {
                entries: self.entries.iter().map(entry_to_proto).collect(),
                full: self.full,
            }),
            blocks: Vec::new(),
            payload: self
                .blocks
                .iter()
                .map(|b| ProtoBlock { prefix: prefix(b.cid()).into(), data: b.bytes().clone() })
                .collect(),
            block_presences: self
                .presences
                .iter()
                .map(|(cid, have)| BlockPresence {
                    cid: cid.to_bytes().into(),
                    r#type: if *have {
                        BlockPresenceType::PresenceHave as i32
                    } else {
                        BlockPresenceType::PresenceDontHave as i32
                    },
                })
                .collect(),
            pending_bytes: self.pending_bytes.min(i32::MAX as u32) as i32,
        };
        let length = message.encoded_len();
        assert!(length <= BITSWAP_MESSAGE_MAX_BYTES, "a bitswap message of {length} bytes was not split");
        frame::encode_message(&message, 0)
    }

    /// The same content as messages of about [`MESSAGE_TARGET_BYTES`]: only a single block may exceed that.
    pub fn split(self) -> Vec<Self> {
        let mut messages =
            vec![Self { full: self.full, pending_bytes: self.pending_bytes, ..Self::default() }];
        let mut room = MESSAGE_TARGET_BYTES;
        let mut with_room = |size: usize| {
            if size > room && room < MESSAGE_TARGET_BYTES {
                messages.push(Self { pending_bytes: self.pending_bytes, ..Self::default() });
                room = MESSAGE_TARGET_BYTES;
            }
            room = room.saturating_sub(size);
            messages.len() - 1
        };
        // A CID has 36 bytes; tags, priority and flags add less than 28.
        let slots: Vec<usize> = self.entries.iter().map(|_| with_room(64)).collect();
        let presence_slots: Vec<usize> = self.presences.iter().map(|_| with_room(64)).collect();
        let block_slots: Vec<usize> = self.blocks.iter().map(|b| with_room(b.len() + 32)).collect();
        for (entry, slot) in self.entries.into_iter().zip(slots) {
            messages[slot].entries.push(entry);
        }
        for (presence, slot) in self.presences.into_iter().zip(presence_slots) {
            messages[slot].presences.push(presence);
        }
        for (block, slot) in self.blocks.into_iter().zip(block_slots) {
            messages[slot].blocks.push(block);
        }
        messages
    }
}

fn entry_from_proto(entry: &ProtoEntry) -> Option<WantEntry> {
    let cid = cid::decode(&entry.block).ok()?;
    if entry.cancel {
        return Some(WantEntry::Cancel { cid });
    }
    let kind = match entry.want_type() {
        WantType::Block => WantKind::Block,
        WantType::Have => WantKind::Have,
    };
    Some(WantEntry::Want { cid, kind, priority: entry.priority, send_dont_have: entry.send_dont_have })
}

fn entry_to_proto(entry: &WantEntry) -> ProtoEntry {
    match entry {
        WantEntry::Want { cid, kind, priority, send_dont_have } => ProtoEntry {
            block: cid.to_bytes().into(),
            priority: *priority,
            cancel: false,
            want_type: match kind {
                WantKind::Block => WantType::Block as i32,
                WantKind::Have => WantType::Have as i32,
            },
            send_dont_have: *send_dont_have,
        },
        WantEntry::Cancel { cid } => {
            ProtoEntry { block: cid.to_bytes().into(), cancel: true, ..ProtoEntry::default() }
        }
    }
}

/// A CID without its digest: version, codec, hash function, digest length, each as an unsigned varint.
fn prefix(cid: &Cid) -> Vec<u8> {
    let mut out = Vec::with_capacity(8);
    for number in [u64::from(cid.version()), cid.codec(), cid.hash().code(), u64::from(cid.hash().size())] {
        varint::write(&mut out, number);
    }
    out
}

fn block_from_prefix(mut prefix: &[u8], data: Bytes) -> Result<Block, DecodeError> {
    if data.len() > BLOCK_MAX_BYTES {
        return Err(DecodeError::TooLarge {
            what: "block",
            limit_bytes: BLOCK_MAX_BYTES,
            got_bytes: data.len(),
        });
    }
    let mut numbers = [0u64; 4];
    for number in &mut numbers {
        *number = varint::read(&mut prefix)
            .ok_or_else(|| DecodeError::invalid("block prefix", "an endless or missing number"))?;
    }
    let [version, codec, hash_code, digest_bytes] = numbers;
    if version > 1 || digest_bytes != 32 || !prefix.is_empty() {
        return Err(DecodeError::invalid(
            "block prefix",
            format!("version {version}, digest {digest_bytes}"),
        ));
    }
    let hash = HashKind::from_code(hash_code).map_err(|e| DecodeError::invalid("block prefix", e))?;
    let raw = cid::raw(hash_code, &hash.digest(&data));
    let cid = if version == 0 {
        Cid::new_v0(*raw.hash()).map_err(|e| DecodeError::invalid("block prefix", e))?
    } else {
        Cid::new_v1(codec, *raw.hash())
    };
    // Hashed above; `verify` would hash a second time.
    Ok(Block::from_checked(cid, data))
}

#[cfg(test)]
mod tests;
