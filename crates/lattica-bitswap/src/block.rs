//! A block: bytes together with the CID that they were checked against. There is no way to build one that lies.

use bytes::Bytes;
use sha2::Digest;
use swarm_wire::limits::BLOCK_MAX_BYTES;
use swarm_wire::{Cid, cid};

use crate::BlockError;

/// Hash functions that blocks are named by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HashKind {
    /// Ours: fast everywhere.
    #[default]
    Blake3,
    /// For stock IPFS peers that know no BLAKE3.
    Sha2,
}

impl HashKind {
    /// The multihash code.
    pub fn code(self) -> u64 {
        match self {
            Self::Blake3 => cid::HASH_BLAKE3,
            Self::Sha2 => cid::HASH_SHA2_256,
        }
    }

    /// The kind with this multihash code.
    ///
    /// # Errors
    /// When it is a function that we cannot check.
    pub fn from_code(code: u64) -> Result<Self, BlockError> {
        match code {
            cid::HASH_BLAKE3 => Ok(Self::Blake3),
            cid::HASH_SHA2_256 => Ok(Self::Sha2),
            _ => Err(BlockError::UnknownHash { code }),
        }
    }

    /// The digest of `bytes`.
    pub fn digest(self, bytes: &[u8]) -> [u8; 32] {
        match self {
            Self::Blake3 => *blake3::hash(bytes).as_bytes(),
            Self::Sha2 => sha2::Sha256::digest(bytes).into(),
        }
    }
}

/// Bytes that match their CID, at most [`BLOCK_MAX_BYTES`] of them. Cloning shares the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Block {
    cid: Cid,
    bytes: Bytes,
}

impl Block {
    /// Names `bytes` by their hash, as a raw CIDv1.
    ///
    /// # Errors
    /// When there are more bytes than a block may have.
    pub fn new(hash: HashKind, bytes: Bytes) -> Result<Self, BlockError> {
        check_length(bytes.len())?;
        Ok(Self { cid: cid::raw(hash.code(), &hash.digest(&bytes)), bytes })
    }

    /// Checks `bytes` against the name that they should have.
    ///
    /// # Errors
    /// When they do not match, are too many, or the CID's hash cannot be checked here.
    pub fn verify(cid: Cid, bytes: Bytes) -> Result<Self, BlockError> {
        check_length(bytes.len())?;
        let hash = HashKind::from_code(cid.hash().code())?;
        if cid.hash().digest() != hash.digest(&bytes) {
            return Err(BlockError::HashMismatch { cid });
        }
        Ok(Self { cid, bytes })
    }

    /// For the wire's decoder, which derives the name from the bytes.
    pub(crate) fn from_checked(cid: Cid, bytes: Bytes) -> Self {
        debug_assert_eq!(
            HashKind::from_code(cid.hash().code()).map(|h| h.digest(&bytes).to_vec()).ok().as_deref(),
            Some(cid.hash().digest())
        );
        Self { cid, bytes }
    }

    /// The name.
    pub fn cid(&self) -> &Cid {
        &self.cid
    }

    /// The bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether this is the block of no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Block({}, {} bytes)", self.cid, self.bytes.len())
    }
}

fn check_length(got_bytes: usize) -> Result<(), BlockError> {
    if got_bytes > BLOCK_MAX_BYTES {
        return Err(BlockError::TooLarge { got_bytes, limit_bytes: BLOCK_MAX_BYTES });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_named_by_its_hash_and_nothing_else_passes() {
        for hash in [HashKind::Blake3, HashKind::Sha2] {
            let block = Block::new(hash, Bytes::from_static(b"hello")).unwrap();
            assert!(Block::verify(*block.cid(), Bytes::from_static(b"hello")).is_ok());
            assert!(matches!(
                Block::verify(*block.cid(), Bytes::from_static(b"hallo")),
                Err(BlockError::HashMismatch { .. })
            ));
        }
    }

    #[test]
    fn names_are_pinned() {
        let blake3 = Block::new(HashKind::Blake3, Bytes::from_static(b"hello")).unwrap();
        let sha2 = Block::new(HashKind::Sha2, Bytes::from_static(b"hello")).unwrap();
        assert_eq!(sha2.cid().to_string(), "bafkreibm6jg3ux5qumhcn2b3flc3tyu6dmlb4xa7u5bf44yegnrjhc4yeq");
        assert_eq!(&blake3.cid().to_bytes()[..6], [1, 0x55, 0x1e, 32, 0xea, 0x8f]);
    }

    #[test]
    fn oversized_blocks_are_refused() {
        let bytes = Bytes::from(vec![0; BLOCK_MAX_BYTES + 1]);
        assert!(matches!(Block::new(HashKind::Blake3, bytes), Err(BlockError::TooLarge { .. })));
    }
}
