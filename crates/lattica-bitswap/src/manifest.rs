//! What an artefact is: its name, its parts, and the blocks that hold its bytes. The encoded manifest is a block itself,
//! so that one CID, the root, names the whole artefact.

use bytes::Bytes;
use prost::Message;
use swarm_wire::generated::lattica::v1 as proto;
use swarm_wire::limits::{BLOCK_MAX_BYTES, NAME_MAX_BYTES};
use swarm_wire::repeated::{self, Element};
use swarm_wire::{Cid, DecodeError, cid};

use crate::{Block, HashKind, ManifestError};

/// The bytes of the shortest entry in an encoded manifest: its field, its length, and a name of one byte.
const ENTRY_MIN_BYTES: usize = 5;

/// Whence an artefact can be made with fewer bytes; see [`crate::delta`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Update {
    /// Root of the version before.
    pub parent: Cid,
    /// Root of the delta between them.
    pub delta: Cid,
}

/// A named part of an artefact: a file, or a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Unique in its manifest, 1 to 256 bytes.
    pub name: String,
    /// Where it starts in the artefact's bytes.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u64,
}

/// One block of an artefact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRef {
    /// The block's name.
    pub cid: Cid,
    /// How many bytes it has, at least one.
    pub length: u32,
}

/// The table of contents of an artefact. Valid by construction: block lengths sum to `total_bytes`, entries lie inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    name: String,
    kind: String,
    total_bytes: u64,
    entries: Vec<Entry>,
    blocks: Vec<BlockRef>,
    /// Where each block starts; one more element than `blocks`.
    starts: Vec<u64>,
    hash: HashKind,
    update: Option<Update>,
}

impl Manifest {
    /// Describes an artefact whose bytes are those of `blocks`, in this order.
    ///
    /// # Errors
    /// When an entry reaches beyond the bytes or a name is empty, too long or used twice, or a block is empty, too long
    /// or not named by `hash`.
    pub fn new(
        name: &str,
        kind: &str,
        hash: HashKind,
        entries: Vec<Entry>,
        blocks: Vec<BlockRef>,
    ) -> Result<Self, ManifestError> {
        let total_bytes = blocks.iter().map(|b| u64::from(b.length)).sum();
        Self::checked(name.to_owned(), kind.to_owned(), total_bytes, hash, entries, blocks)
    }

    fn checked(
        name: String,
        kind: String,
        total_bytes: u64,
        hash: HashKind,
        entries: Vec<Entry>,
        blocks: Vec<BlockRef>,
    ) -> Result<Self, ManifestError> {
        check_name("artefact name", &name)?;
        check_name("artefact kind", &kind)?;
        let mut starts = Vec::with_capacity(blocks.len() + 1);
        let mut sum_bytes = 0u64;
        for block in &blocks {
            if block.length == 0 || block.length as usize > BLOCK_MAX_BYTES {
                return Err(DecodeError::invalid("block length in a manifest", block.length).into());
            }
            if block.cid.hash().code() != hash.code() {
                return Err(DecodeError::invalid("block hash in a manifest", block.cid).into());
            }
            starts.push(sum_bytes);
            sum_bytes += u64::from(block.length);
        }
        starts.push(sum_bytes);
        if sum_bytes != total_bytes {
            return Err(ManifestError::LengthSum { name, total_bytes, sum_bytes });
        }
        let mut seen = std::collections::HashSet::new();
        for entry in &entries {
            check_name("entry name", &entry.name)?;
            if !seen.insert(entry.name.as_str()) {
                return Err(ManifestError::DuplicateEntry { name, entry: entry.name.clone() });
            }
            if entry.offset.checked_add(entry.length).is_none_or(|end| end > total_bytes) {
                let Entry { name: entry, offset, length } = entry.clone();
                return Err(ManifestError::EntryOutside { name, entry, offset, length, total_bytes });
            }
        }
        Ok(Self { name, kind, total_bytes, entries, blocks, starts, hash, update: None })
    }

    /// Reads a manifest from the bytes of its block.
    ///
    /// # Errors
    /// When the bytes are no manifest, lengths do not add up, or an entry reaches beyond the artefact.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > BLOCK_MAX_BYTES {
            return Err(DecodeError::TooLarge {
                what: "manifest",
                limit_bytes: BLOCK_MAX_BYTES,
                got_bytes: bytes.len(),
            }
            .into());
        }
        // An entry has a name: none is shorter than five bytes, though empty ones could be written in two.
        let entries = (&[4][..], Element::Field);
        repeated::check("entries in a manifest", bytes, entries, bytes.len() / ENTRY_MIN_BYTES)?;
        let message = proto::Manifest::decode(bytes).map_err(|e| DecodeError::message("manifest", &e))?;
        let hash = HashKind::from_code(u64::from(message.hash_code))
            .map_err(|e| DecodeError::invalid("manifest hash", e))?;
        if message.digests.len() != message.block_bytes.len() * 32 {
            return Err(DecodeError::Truncated {
                what: "manifest digests",
                needed_bytes: message.block_bytes.len() * 32,
                got_bytes: message.digests.len(),
            }
            .into());
        }
        let blocks = message
            .digests
            .chunks_exact(32)
            .zip(&message.block_bytes)
            .map(|(digest, &length)| BlockRef {
                cid: cid::raw(hash.code(), digest.try_into().expect("chunks of 32 bytes")),
                length,
            })
            .collect();
        let update = message.update.map(|u| -> Result<_, DecodeError> {
            Ok(Update { parent: cid::decode(&u.parent)?, delta: cid::decode(&u.delta)? })
        });
        let entries = message
            .entries
            .into_iter()
            .map(|e| Entry { name: e.name, offset: e.offset, length: e.length })
            .collect();
        let manifest = Self::checked(message.name, message.kind, message.total_bytes, hash, entries, blocks)?;
        Ok(manifest.with_update(update.transpose()?))
    }

    /// The same, made from another version. It is another artefact: its root differs, its blocks do not.
    #[must_use]
    pub fn with_update(self, update: Option<Update>) -> Self {
        Self { update, ..self }
    }

    /// The manifest as a block; its CID is the artefact's root.
    ///
    /// # Errors
    /// When it is larger than one block may be (about 59,000 blocks).
    pub fn to_block(&self) -> Result<Block, ManifestError> {
        let mut digests = Vec::with_capacity(self.blocks.len() * 32);
        for block in &self.blocks {
            digests.extend_from_slice(block.cid.hash().digest());
        }
        let message = proto::Manifest {
            name: self.name.clone(),
            kind: self.kind.clone(),
            total_bytes: self.total_bytes,
            entries: self
                .entries
                .iter()
                .map(|e| proto::ManifestEntry { name: e.name.clone(), offset: e.offset, length: e.length })
                .collect(),
            hash_code: self.hash.code() as u32,
            digests: digests.into(),
            block_bytes: self.blocks.iter().map(|b| b.length).collect(),
            update: self.update.map(|u| proto::ManifestUpdate {
                parent: u.parent.to_bytes().into(),
                delta: u.delta.to_bytes().into(),
            }),
        };
        let bytes = message.encode_to_vec();
        let got_bytes = bytes.len();
        Block::new(self.hash, Bytes::from(bytes)).map_err(|_| ManifestError::TooLarge {
            name: self.name.clone(),
            got_bytes,
            limit_bytes: BLOCK_MAX_BYTES,
        })
    }

    /// What it can be made from.
    pub fn update(&self) -> Option<Update> {
        self.update
    }

    /// What the artefact is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its bytes are, for example `weights`, `adapter` or `file`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// How many bytes it has.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Its named parts.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The part with this name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name == name)
    }

    /// Its blocks, in the order of its bytes.
    pub fn blocks(&self) -> &[BlockRef] {
        &self.blocks
    }

    /// Where block `index` starts in the artefact.
    pub fn block_start(&self, index: usize) -> u64 {
        self.starts[index]
    }

    /// The indices of the blocks that hold `offset .. offset + length`; `None` when the span ends beyond the artefact.
    pub fn blocks_of_span(&self, offset: u64, length: u64) -> Option<std::ops::Range<usize>> {
        let end = offset.checked_add(length).filter(|&end| end <= self.total_bytes)?;
        if length == 0 {
            return Some(0..0);
        }
        let first = self.starts.partition_point(|&start| start <= offset) - 1;
        let last = self.starts.partition_point(|&start| start < end);
        Some(first..last)
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), ManifestError> {
    if name.is_empty() || name.len() > NAME_MAX_BYTES {
        return Err(
            DecodeError::invalid(what, format!("of {} bytes (1 to {NAME_MAX_BYTES})", name.len())).into()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunker;

    fn sample(total: usize, leaf: usize) -> Manifest {
        let bytes = Bytes::from((0..total).map(|i| i as u8).collect::<Vec<_>>());
        let blocks = chunker::chunk(HashKind::Blake3, &bytes, leaf)
            .map(|b| BlockRef { cid: *b.cid(), length: b.len() as u32 })
            .collect();
        let entries = vec![Entry { name: "all".into(), offset: 0, length: total as u64 }];
        Manifest::new("sample", "test", HashKind::Blake3, entries, blocks).unwrap()
    }

    proptest! {
        #[test]
        fn manifests_round_trip_and_spans_are_covered(
            total in 1usize..400, leaf in 1usize..50, from in 0.0f64..1.0, size in 0.0f64..1.0
        ) {
            let manifest = sample(total, leaf);
            let block = manifest.to_block().unwrap();
            prop_assert_eq!(&Manifest::decode(block.bytes()).unwrap(), &manifest);
            let update = Update { parent: *block.cid(), delta: cid::raw(cid::HASH_BLAKE3, &[1; 32]) };
            let next = manifest.clone().with_update(Some(update));
            prop_assert_eq!(&Manifest::decode(next.to_block().unwrap().bytes()).unwrap(), &next);
            let offset = (from * total as f64) as u64;
            let length = (size * (total as u64 - offset) as f64) as u64;
            let range = manifest.blocks_of_span(offset, length).unwrap();
            // The naive model: every block that shares a byte with the span.
            let naive: Vec<usize> = (0..manifest.blocks().len())
                .filter(|&i| manifest.starts[i] < offset + length && manifest.starts[i + 1] > offset)
                .filter(|_| length > 0)
                .collect();
            prop_assert_eq!(range.collect::<Vec<_>>(), naive);
        }

        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::decode(&bytes);
        }
    }

    #[test]
    fn truncated_manifests_are_refused() {
        let block = sample(300, 100).to_block().unwrap();
        for cut in 1..block.len() {
            assert!(Manifest::decode(&block.bytes()[..cut]).is_err(), "{cut} of {}", block.len());
        }
    }

    #[test]
    fn the_encoding_is_pinned() {
        let block = sample(5, 5).to_block().unwrap();
        let hex: String = block.bytes().iter().map(|b| format!("{b:02x}")).collect();
        let digest: String =
            HashKind::Blake3.digest(&[0, 1, 2, 3, 4]).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, format!("0a0673616d706c65120474657374180522070a03616c6c1805281e3220{digest}3a0105"));
    }

    #[test]
    fn contradictions_are_refused() {
        let good = sample(300, 100);
        let encode = |change: &dyn Fn(&mut proto::Manifest)| {
            let mut message = proto::Manifest::decode(&good.to_block().unwrap().bytes()[..]).unwrap();
            change(&mut message);
            Manifest::decode(&message.encode_to_vec())
        };
        assert!(encode(&|_| ()).is_ok());
        assert!(matches!(encode(&|m| m.total_bytes += 1), Err(ManifestError::LengthSum { .. })));
        assert!(matches!(encode(&|m| m.entries[0].length += 1), Err(ManifestError::EntryOutside { .. })));
        assert!(matches!(
            encode(&|m| m.entries[0].offset = u64::MAX),
            Err(ManifestError::EntryOutside { .. })
        ));
        assert!(matches!(
            encode(&|m| m.entries.push(m.entries[0].clone())),
            Err(ManifestError::DuplicateEntry { .. })
        ));
        assert!(encode(&|m| m.block_bytes[0] = 0).is_err());
        assert!(encode(&|m| m.block_bytes[0] = u32::MAX).is_err());
        assert!(encode(&|m| m.hash_code = 0).is_err());
        assert!(encode(&|m| m.digests = Bytes::new()).is_err());
        assert!(encode(&|m| m.update = Some(proto::ManifestUpdate::default())).is_err());
        assert!(encode(&|m| m.name = "x".repeat(300)).is_err());
    }
}
