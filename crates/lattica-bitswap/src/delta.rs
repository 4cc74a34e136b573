//! From one version of an artefact to the next: every block is the same, a patch of the block at its place before, or new.
//!
//! Which blocks are the same needs no saying: they have the same CID. A delta is an artefact of its own, kind
//! [`KIND`]: its first block, the index, names the blocks that are patched; each further block is one patch. Weights after a small step of training differ in few of their 16-bit words, and patches replace whole words,
//! so nothing drifts: what comes out is the block that the new manifest names, or is thrown away. The surprise: a lying
//! delta costs time only.

use bytes::Bytes;
use swarm_wire::generated::lattica::v1::DeltaIndex as Proto;
use swarm_wire::prost::Message;
use swarm_wire::{DecodeError, frame};

use crate::{BlockRef, Manifest};

/// What an artefact that is a delta says it is.
pub const KIND: &str = "delta";
/// Bytes of the words that patches replace: one bf16 or f16 weight, half an f32 one.
const WORD: usize = 2;
/// A patch of more than this share of its block is not worth the work.
const MAX_SHARE: f64 = 0.5;

/// The first block of a delta.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeltaIndex {
    /// Which blocks of the new version are patches, ascending; in the order of the blocks that follow the index.
    pub patched: Vec<u32>,
}

impl DeltaIndex {
    /// As it is stored.
    pub fn encode(&self) -> Bytes {
        let gaps = self.patched.iter().scan(0, |next, &chunk| {
            let gap = chunk - *next;
            *next = chunk + 1;
            Some(gap)
        });
        Proto { gaps: gaps.collect() }.encode_to_vec().into()
    }

    /// Reads an index for a version of `n_blocks`.
    ///
    /// # Errors
    /// When the bytes are no index, or name blocks that there are not.
    pub fn decode(bytes: &[u8], n_blocks: usize) -> Result<Self, DecodeError> {
        let message = Proto::decode(bytes).map_err(|e| DecodeError::message("delta index", &e))?;
        let mut patched = Vec::with_capacity(message.gaps.len().min(n_blocks));
        let mut next = 0u64;
        for gap in message.gaps {
            let chunk = next + u64::from(gap);
            if chunk >= n_blocks as u64 {
                return Err(DecodeError::invalid("patched block", format!("{chunk} of {n_blocks}")));
            }
            patched.push(chunk as u32);
            next = chunk + 1;
        }
        Ok(Self { patched })
    }
}

/// The block of `parent` that a patch for block `index` of `child` starts from: the one of the same length at the same
/// place and under the same hash function, unless it is the same block.
pub fn patchable(parent: &Manifest, child: &Manifest, index: usize) -> Option<BlockRef> {
    let old = *parent.blocks().get(index)?;
    let new = child.blocks()[index];
    let same_place = parent.block_start(index) == child.block_start(index) && old.length == new.length;
    // Under another hash the same block has another CID.
    let comparable = old.cid.hash().code() == new.cid.hash().code();
    (same_place && comparable && old.cid != new.cid).then_some(old)
}

/// What turns `old` into `new`, which is as long and another; `None` when that is hardly shorter than `new`.
///
/// For each word that differs: how many are the same before it, then its difference modulo 2^16, zigzag, both as varints.
/// A last byte without a partner counts as a word.
pub fn diff(old: &[u8], new: &[u8]) -> Option<Bytes> {
    let at_most = (new.len() as f64 * MAX_SHARE) as usize;
    let mut patch = Vec::with_capacity(new.len() / 32);
    let mut same = 0;
    for (a, b) in words(old).zip(words(new)) {
        if a == b {
            same += 1;
            continue;
        }
        frame::encode_length(same, &mut patch);
        frame::encode_length(usize::from(zigzag(b.wrapping_sub(a))), &mut patch);
        if patch.len() > at_most {
            return None;
        }
        same = 0;
    }
    (old.len() == new.len() && !patch.is_empty()).then(|| patch.into())
}

/// The bytes that `patch` makes of `old`: as many. Whether they are the right ones, their hash says.
///
/// # Errors
/// When the patch is malformed or reaches beyond the block.
pub fn apply(old: &[u8], patch: &[u8]) -> Result<Bytes, DecodeError> {
    let mut new = old.to_vec();
    let (mut rest, mut next) = (patch, 0);
    while !rest.is_empty() {
        let from = next + take_number(&mut rest, old.len())? * WORD;
        let difference = take_number(&mut rest, usize::from(u16::MAX))?;
        if from >= new.len() {
            return Err(DecodeError::invalid("patched byte", format!("{from} of {}", new.len())));
        }
        let to = new.len().min(from + WORD);
        let word = read(&new[from..to]).wrapping_add(unzigzag(difference as u16));
        new[from..to].copy_from_slice(&word.to_le_bytes()[..to - from]);
        next = from + WORD;
    }
    Ok(new.into())
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.chunks(WORD).map(read)
}

fn read(word: &[u8]) -> u16 {
    u16::from_le_bytes([word[0], word.get(1).copied().unwrap_or_default()])
}

/// Small differences of either sign are small numbers.
fn zigzag(difference: u16) -> u16 {
    (difference << 1) ^ if difference >> 15 == 1 { u16::MAX } else { 0 }
}

fn unzigzag(number: u16) -> u16 {
    (number >> 1) ^ if number & 1 == 1 { u16::MAX } else { 0 }
}

/// The next number, which is at most `limit`.
fn take_number(bytes: &mut &[u8], limit: usize) -> Result<usize, DecodeError> {
    let (number, length) = frame::decode_length("patch", bytes, limit)?.ok_or(DecodeError::Truncated {
        what: "patch",
        needed_bytes: 1,
        got_bytes: 0,
    })?;
    *bytes = &bytes[length..];
    Ok(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Weights of a model in bf16 and those after a step that changed `share` of them by a few units in the last place.
    fn weights(n: usize, share: f64) -> (Vec<u8>, Vec<u8>) {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let old: Vec<u16> = (0..n).map(|_| 0x3c00 + (random() & 0x83ff) as u16).collect();
        let changed = (share * f64::from(1u32 << 31)) as u32;
        let step = |word: u16, random: &mut dyn FnMut() -> u32| {
            let units = (random() % 4 + 1) as u16;
            if random() & 1 == 0 { word.wrapping_add(units) } else { word.wrapping_sub(units) }
        };
        let new: Vec<u16> =
            old.iter().map(|&word| if random() < changed { step(word, &mut random) } else { word }).collect();
        let bytes = |words: Vec<u16>| words.into_iter().flat_map(u16::to_le_bytes).collect();
        (bytes(old), bytes(new))
    }

    #[test]
    fn one_percent_of_the_weights_changed_is_less_than_three_percent_of_the_bytes() {
        let (old, new) = weights(1 << 19, 0.01);
        let patch = diff(&old, &new).unwrap();
        assert_eq!(apply(&old, &patch).unwrap(), new);
        let share = patch.len() as f64 / new.len() as f64;
        assert!((0.005..0.03).contains(&share), "{share}");
    }

    #[test]
    fn dense_changes_are_no_patch() {
        let (old, new) = weights(10_000, 0.9);
        assert_eq!(diff(&old, &new), None);
        assert_eq!(diff(b"abc", b"abcd"), None, "another length");
        assert_eq!(diff(b"abc", b"abc"), None, "an empty patch is no block");
    }

    #[test]
    fn the_encodings_are_pinned() {
        // Words 0 to 3 the same, word 4 one more, the odd byte two less.
        let (old, new) = ([7, 7, 7, 7, 7, 7, 7, 7, 1, 0, 5], [7, 7, 7, 7, 7, 7, 7, 7, 2, 0, 3]);
        assert_eq!(diff(&old, &new).unwrap()[..], [4, 2, 0, 3]);
        let index = DeltaIndex { patched: vec![0, 2, 200] };
        let encoded = index.encode();
        assert_eq!(encoded[..], [0x12, 4, 0, 1, 0xc5, 1]);
        assert_eq!(DeltaIndex::decode(&encoded, 201).unwrap(), index);
        assert!(DeltaIndex::decode(&encoded, 200).is_err(), "a block that there is not");
        assert!(DeltaIndex::decode(&encoded[..encoded.len() - 1], 201).is_err());
    }

    #[test]
    fn patches_that_reach_beyond_the_block_are_refused() {
        for patch in [&[4, 2][..], &[0], &[3, 2, 0, 2], &[0xff; 12], &[0, 0xff, 0xff, 0x7f]] {
            assert!(apply(&[1, 2, 3, 4, 5, 6, 7], patch).is_err(), "{patch:?}");
        }
        assert_eq!(apply(&[1, 2, 3], &[1, 2]).unwrap()[..], [1, 2, 4]);
    }

    proptest! {
        #[test]
        fn what_is_applied_is_what_was_meant(
            old in proptest::collection::vec(any::<u8>(), 0..300),
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        ) {
            let mut new = old.clone();
            for (at, byte) in edits.into_iter().filter(|_| !old.is_empty()) {
                let at = at.index(new.len());
                new[at] = byte;
            }
            if let Some(patch) = diff(&old, &new) {
                prop_assert_eq!(apply(&old, &patch).unwrap(), new);
            }
        }

        #[test]
        fn any_bytes_are_a_patch_or_an_error(
            old in proptest::collection::vec(any::<u8>(), 0..40), patch in proptest::collection::vec(any::<u8>(), 0..40)
        ) {
            if let Ok(new) = apply(&old, &patch) {
                prop_assert_eq!(new.len(), old.len());
            }
            let _ = DeltaIndex::decode(&patch, 100);
        }

        #[test]
        fn every_difference_round_trips(difference: u16) {
            prop_assert_eq!(unzigzag(zigzag(difference)), difference);
        }
    }
}
