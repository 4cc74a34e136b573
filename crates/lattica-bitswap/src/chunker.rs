//! Bytes to blocks, always the same way: leaves of a fixed length, so that two publishers of one file get one root.

use bytes::Bytes;
use swarm_wire::limits::BLOCK_MAX_BYTES;

use crate::{Block, HashKind};

/// Length of a leaf. Peers in the wild refuse blocks above 2 MiB; 1 MiB keeps a message's turn short.
pub const LEAF_BYTES: usize = 1024 * 1024;

/// Cuts `bytes` into leaves of `leaf_bytes` (the last one shorter), without copying them.
///
/// # Panics
/// When `leaf_bytes` is 0 or more than a block may have: the caller's choice, never a peer's.
pub fn chunk(hash: HashKind, bytes: &Bytes, leaf_bytes: usize) -> impl Iterator<Item = Block> {
    assert!((1..=BLOCK_MAX_BYTES).contains(&leaf_bytes), "leaf of {leaf_bytes} bytes");
    let bytes = bytes.clone();
    let n_leaves = bytes.len().div_ceil(leaf_bytes);
    (0..n_leaves).map(move |i| {
        let end = bytes.len().min((i + 1) * leaf_bytes);
        Block::new(hash, bytes.slice(i * leaf_bytes..end)).expect("a leaf is within the block limit")
    })
}

/// The lengths of the leaves of an artefact part with `total_bytes`, as [`chunk`] cuts it.
pub fn leaf_lengths(total_bytes: u64, leaf_bytes: usize) -> impl Iterator<Item = usize> {
    let leaf = leaf_bytes as u64;
    (0..total_bytes.div_ceil(leaf)).map(move |i| (total_bytes - i * leaf).min(leaf) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn leaves_join_to_the_input(bytes in proptest::collection::vec(any::<u8>(), 0..500), leaf in 1usize..64) {
            let bytes = Bytes::from(bytes);
            let blocks: Vec<Block> = chunk(HashKind::Blake3, &bytes, leaf).collect();
            let joined: Vec<u8> = blocks.iter().flat_map(|b| b.bytes().to_vec()).collect();
            prop_assert_eq!(&joined[..], &bytes[..]);
            let lengths: Vec<usize> = blocks.iter().map(Block::len).collect();
            prop_assert_eq!(lengths, leaf_lengths(bytes.len() as u64, leaf).collect::<Vec<_>>());
        }
    }
}
