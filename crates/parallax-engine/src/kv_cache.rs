//! Which cache pages belong to which sequence. The memory behind the numbers is the runner's.
//!
//! Pages are exclusive: a page is free or in exactly one table, which [`KvCache::check_integrity`] states and the
//! tests hold against a naive model.

mod page_table;
mod pool;

use std::collections::BTreeMap;

use swarm_wire::RequestId;

use crate::error::OutOfPages;
pub use page_table::PageTable;
pub use pool::PagePool;

/// The page pool and the tables of all sequences that hold pages.
#[derive(Debug, Clone)]
pub struct KvCache {
    page_tokens: usize,
    pool: PagePool,
    tables: BTreeMap<RequestId, PageTable>,
}

impl KvCache {
    /// An empty cache of `n_pages` pages of `page_tokens` positions.
    pub fn new(n_pages: usize, page_tokens: usize) -> Self {
        Self { page_tokens: page_tokens.max(1), pool: PagePool::new(n_pages), tables: BTreeMap::new() }
    }

    /// Pages in all.
    pub fn n_pages(&self) -> usize {
        self.pool.n_pages()
    }

    /// Pages that no sequence holds.
    pub fn n_free(&self) -> usize {
        self.pool.n_free()
    }

    /// Pages for `tokens` positions.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Makes the table of `request` cover `tokens` positions. All or nothing.
    ///
    /// # Errors
    /// Fewer pages are free than are missing; nothing has changed then.
    pub fn reserve(&mut self, request: RequestId, tokens: usize) -> Result<(), OutOfPages> {
        let held = self.tables.get(&request).map_or(0, |t| t.pages().len());
        let needed = self.pages_for(tokens).saturating_sub(held);
        let pages = self.pool.take(needed)?;
        if !pages.is_empty() {
            self.tables.entry(request).or_default().append(&pages);
        }
        Ok(())
    }

    /// The table of `request`; empty if it holds nothing.
    pub fn pages(&self, request: RequestId) -> &[u32] {
        self.tables.get(&request).map_or(&[], |t| t.pages())
    }

    /// Gives all pages of `request` back. Returns how many.
    pub fn release(&mut self, request: RequestId) -> usize {
        let Some(table) = self.tables.remove(&request) else { return 0 };
        self.pool.give_back(table.pages());
        table.pages().len()
    }

    /// Every page is free or in exactly one table.
    ///
    /// # Panics
    /// When that does not hold, which is a bug of this module.
    pub fn check_integrity(&self) {
        let mut seen = vec![0u32; self.n_pages()];
        let held = self.tables.values().flat_map(|t| t.pages());
        for &page in held.chain(self.pool.free_pages()) {
            seen[page as usize] += 1;
        }
        for (page, count) in seen.iter().enumerate() {
            assert_eq!(*count, 1, "page {page} is held or free {count} times");
        }
        assert!(self.tables.values().all(|t| !t.pages().is_empty()), "tables without pages are removed");
    }
}
