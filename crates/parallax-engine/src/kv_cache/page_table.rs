//! The pages of one sequence, in the order of its positions.

use super::prefix_index::BlockHash;

/// Pages of one sequence: position `p` lives in `pages()[p / page_tokens]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageTable {
    pages: Vec<u32>,
    /// How many of the first pages the prefix index has been told of, and their chain.
    pub(super) indexed: usize,
    pub(super) chain: Option<BlockHash>,
}

impl PageTable {
    /// The pages, by position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Covers further positions with `pages`.
    pub fn append(&mut self, pages: &[u32]) {
        self.pages.extend_from_slice(pages);
    }

    /// Puts `page` in the place of the one at `index`, which is returned.
    pub(super) fn replace(&mut self, index: usize, page: u32) -> u32 {
        std::mem::replace(&mut self.pages[index], page)
    }

    /// Its first `n` pages, as another sequence would hold them.
    pub(super) fn beginning(&self, n: usize) -> Self {
        assert!(
            self.indexed <= n || self.chain.is_none(),
            "only pages that both sequences have are in the index"
        );
        Self { pages: self.pages[..n].to_vec(), indexed: self.indexed, chain: self.chain }
    }
}
