//! Which page holds which block of tokens: the prefix index.
//!
//! A full page is known by a hash over everything that its keys and values depend on: the hash of the page before it,
//! which begins with model, weights version, adapter and salt, and its own tokens. Two pages with one hash therefore hold
//! the same bits, and a page of other weights can never answer.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Hash of a chain of full pages, the last one included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// The beginning of a chain: what keys and values depend on besides the tokens. `adapter` identifies its content;
    /// `salt` separates callers that must not learn from each other's cache hits.
    pub fn root(model: &str, version: u64, adapter: Option<&[u8; 32]>, salt: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("parallax-engine prefix chain 1");
        for text in [model, salt] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.update(&version.to_le_bytes());
        hasher.update(&[u8::from(adapter.is_some())]);
        hasher.update(adapter.unwrap_or(&[0; 32]));
        Self(*hasher.finalize().as_bytes())
    }

    /// The chain with one more page of `tokens`.
    #[must_use]
    pub fn then(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for id in tokens {
            hasher.update(&id.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

/// Pages by the hash of their chain.
#[derive(Debug, Clone, Default)]
pub struct PrefixIndex {
    pages: HashMap<BlockHash, u32>,
    hashes: HashMap<u32, BlockHash>,
}

impl PrefixIndex {
    /// The page of a chain.
    pub fn page(&self, hash: &BlockHash) -> Option<u32> {
        self.pages.get(hash).copied()
    }

    /// Whether something is known of `page`.
    pub fn contains(&self, page: u32) -> bool {
        self.hashes.contains_key(&page)
    }

    /// Pages in the index.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// `page` holds `hash`, unless another page is known to.
    pub fn insert(&mut self, hash: BlockHash, page: u32) {
        if let Entry::Vacant(entry) = self.pages.entry(hash) {
            entry.insert(page);
            let before = self.hashes.insert(page, hash);
            assert!(before.is_none(), "a page is written once between two evictions");
        }
    }

    /// The content of `page` is lost.
    pub fn remove(&mut self, page: u32) {
        if let Some(hash) = self.hashes.remove(&page) {
            self.pages.remove(&hash);
        }
    }

    /// Nothing is known any more.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.hashes.clear();
    }

    /// Both directions agree.
    ///
    /// # Panics
    /// When they do not, which is a bug of this module.
    pub fn check_integrity(&self) {
        assert_eq!(self.pages.len(), self.hashes.len());
        for (page, hash) in &self.hashes {
            assert_eq!(self.pages.get(hash), Some(page), "page {page} is found under its hash");
        }
    }
}
