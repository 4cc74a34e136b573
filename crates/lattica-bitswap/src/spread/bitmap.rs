//! Which chunks a peer has: one bit each, in manifest order.

use swarm_wire::DecodeError;

/// A set of chunk numbers below a fixed count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    n_chunks: u32,
    count: u32,
}

impl Bitmap {
    /// No chunk of `n_chunks`.
    pub fn empty(n_chunks: u32) -> Self {
        Self { words: vec![0; n_chunks.div_ceil(64) as usize], n_chunks, count: 0 }
    }

    /// All chunks of `n_chunks`.
    pub fn full(n_chunks: u32) -> Self {
        let mut all = Self::empty(n_chunks);
        for chunk in 0..n_chunks {
            all.insert(chunk);
        }
        all
    }

    /// Whether `chunk` is in the set; a number beyond the count is not.
    pub fn contains(&self, chunk: u32) -> bool {
        chunk < self.n_chunks && self.words[chunk as usize / 64] >> (chunk % 64) & 1 == 1
    }

    /// Adds `chunk`; `false` when it was there or is beyond the count.
    pub fn insert(&mut self, chunk: u32) -> bool {
        let new = chunk < self.n_chunks && !self.contains(chunk);
        if new {
            self.words[chunk as usize / 64] |= 1 << (chunk % 64);
            self.count += 1;
        }
        new
    }

    /// Takes `chunk` out; `false` when it was not there.
    pub fn remove(&mut self, chunk: u32) -> bool {
        let there = self.contains(chunk);
        if there {
            self.words[chunk as usize / 64] &= !(1 << (chunk % 64));
            self.count -= 1;
        }
        there
    }

    /// How many chunks are in the set.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether every chunk is in the set.
    pub fn is_full(&self) -> bool {
        self.count == self.n_chunks
    }

    /// How many chunks there are in all.
    pub fn n_chunks(&self) -> u32 {
        self.n_chunks
    }

    /// The chunks of the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        bits(self.words.iter().copied())
    }

    /// The chunks of the set that are not in `other`, ascending.
    pub fn minus(&self, other: &Self) -> impl Iterator<Item = u32> {
        debug_assert_eq!(self.n_chunks, other.n_chunks, "sets of one artefact");
        bits(self.words.iter().zip(&other.words).map(|(a, b)| a & !b))
    }

    /// The set as bytes, chunk 0 in the lowest bit of the first byte.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.truncate(self.n_chunks.div_ceil(8) as usize);
        bytes
    }

    /// A set of `n_chunks` from its bytes.
    ///
    /// # Errors
    /// When the length does not fit, or a bit beyond the last chunk is set.
    pub fn from_bytes(n_chunks: u32, bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() != n_chunks.div_ceil(8) as usize {
            let needed = n_chunks.div_ceil(8);
            return Err(DecodeError::invalid(
                "have bitmap",
                format!("{} bytes instead of {needed}", bytes.len()),
            ));
        }
        let mut words = vec![0u64; n_chunks.div_ceil(64) as usize];
        for (i, &byte) in bytes.iter().enumerate() {
            words[i / 8] |= u64::from(byte) << (i % 8 * 8);
        }
        let used = n_chunks % 64;
        if used != 0 && words.last().is_some_and(|last| last >> used != 0) {
            return Err(DecodeError::invalid("have bitmap", "bits beyond the last chunk"));
        }
        let count = words.iter().map(|w| w.count_ones()).sum();
        Ok(Self { words, n_chunks, count })
    }
}

/// The numbers of the bits that are set, ascending.
fn bits(words: impl Iterator<Item = u64>) -> impl Iterator<Item = u32> {
    words.enumerate().flat_map(|(i, word)| {
        let mut rest = word;
        std::iter::from_fn(move || {
            let bit = rest.trailing_zeros();
            rest &= rest.checked_sub(1)?;
            Some(i as u32 * 64 + bit)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equals_a_set_and_round_trips(n in 1u32..300, steps in proptest::collection::vec((any::<bool>(), 0u32..320), 0..200)) {
            let (mut bitmap, mut set) = (Bitmap::empty(n), BTreeSet::new());
            for (add, chunk) in steps {
                if add {
                    prop_assert_eq!(bitmap.insert(chunk), chunk < n && set.insert(chunk));
                } else {
                    prop_assert_eq!(bitmap.remove(chunk), set.remove(&chunk));
                }
            }
            prop_assert_eq!(bitmap.iter().collect::<Vec<_>>(), set.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(bitmap.count() as usize, set.len());
            let mut thirds = Bitmap::empty(n);
            for chunk in (0..n).step_by(3) {
                thirds.insert(chunk);
            }
            let expected: Vec<u32> = set.iter().copied().filter(|chunk| chunk % 3 != 0).collect();
            prop_assert_eq!(bitmap.minus(&thirds).collect::<Vec<_>>(), expected);
            prop_assert_eq!(bitmap.is_full(), set.len() == n as usize);
            prop_assert_eq!(Bitmap::from_bytes(n, &bitmap.to_bytes()).unwrap(), bitmap);
        }

        #[test]
        fn foreign_bytes_are_refused_or_in_range(n in 1u32..200, bytes in proptest::collection::vec(any::<u8>(), 0..30)) {
            match Bitmap::from_bytes(n, &bytes) {
                Ok(bitmap) => prop_assert!(bitmap.iter().all(|c| c < n)),
                Err(_) => prop_assert!(bytes.len() != n.div_ceil(8) as usize || n % 8 != 0),
            }
        }
    }

    #[test]
    fn full_is_full() {
        for n in [1, 63, 64, 65, 130] {
            let full = Bitmap::full(n);
            assert!(full.is_full() && !full.contains(n));
            assert_eq!(full.iter().count(), n as usize);
        }
    }
}
