//! The pages of one sequence, in the order of its positions.

/// Pages of one sequence: position `p` lives in `pages()[p / page_tokens]`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageTable {
    pages: Vec<u32>,
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
}
