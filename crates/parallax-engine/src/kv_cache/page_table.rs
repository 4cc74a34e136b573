//! The pages of one sequence, in the order of its positions.

use super::prefix_index::BlockHash;
use crate::batch::StateSave;

/// Pages of one sequence: position `p` lives in `pages()[p / page_tokens]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageTable {
    pages: Vec<u32>,
    /// How many of the first pages the prefix index has been told of, and their chain.
    pub(super) indexed: usize,
    pub(super) chain: Option<BlockHash>,
    /// Slot of the sequence's recurrent state.
    pub(super) state: Option<u32>,
    /// Copies that the step under way makes of it, and whether each is of the answer.
    pub(super) saves: Vec<(StateSave, bool)>,
    /// Pages that were known when it began, whether or not a state was kept behind them.
    pub(super) known: usize,
    /// The chain of the page at whose end the newest state is that this sequence kept of its answer.
    pub(super) newest: Option<BlockHash>,
}

impl PageTable {
    /// The pages, by position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// It holds nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.state.is_none()
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
        let (pages, indexed, chain) = (self.pages[..n].to_vec(), self.indexed, self.chain);
        Self { pages, indexed, chain, ..Self::default() }
    }
}
