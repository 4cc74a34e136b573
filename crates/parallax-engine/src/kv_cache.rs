//! Which cache pages belong to which sequences. The memory behind the numbers is the runner's.
//!
//! Sequences share the full pages of a common prefix, which the prefix index finds by hash, and, after a fork, a last
//! page that is not full. A shared page is never written: whoever writes next gets a copy ([`KvCache::reserve`] notes it
//! for the runner). Pages that nobody holds keep their content for later requests until the room is needed.
//! [`KvCache::check_integrity`] states the rules, and the tests hold them against a naive model.

mod page_table;
mod pool;
mod prefix_index;

use std::collections::BTreeMap;

use swarm_wire::RequestId;

use crate::batch::PageCopy;
use crate::error::OutOfPages;
pub use page_table::PageTable;
pub use pool::PagePool;
pub use prefix_index::{BlockHash, PrefixIndex};

/// The page pool, the prefix index, and the tables of all sequences that hold pages.
#[derive(Debug, Clone)]
pub struct KvCache {
    page_tokens: usize,
    pool: PagePool,
    index: PrefixIndex,
    tables: BTreeMap<RequestId, PageTable>,
    copies: Vec<PageCopy>,
}

impl KvCache {
    /// An empty cache of `n_pages` pages of `page_tokens` positions.
    pub fn new(n_pages: usize, page_tokens: usize) -> Self {
        Self {
            page_tokens: page_tokens.max(1),
            pool: PagePool::new(n_pages),
            index: PrefixIndex::default(),
            tables: BTreeMap::new(),
            copies: Vec::new(),
        }
    }

    /// Pages in all.
    pub fn n_pages(&self) -> usize {
        self.pool.n_pages()
    }

    /// Pages that no sequence holds; the prefix index may still know some of them.
    pub fn n_free(&self) -> usize {
        self.pool.n_available()
    }

    /// Pages that the prefix index knows, held or not.
    pub fn n_indexed(&self) -> usize {
        self.index.len()
    }

    /// Pages for `tokens` positions.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Gives `request`, which holds nothing, the pages that the index knows of the beginning of `tokens`. Returns how many
    /// positions they cover, always fewer than there are tokens: the last one has to run.
    pub fn attach(&mut self, request: RequestId, root: BlockHash, tokens: &[u32]) -> usize {
        debug_assert!(self.pages(request).is_empty(), "a prefix comes first");
        let usable = tokens.len().saturating_sub(1) / self.page_tokens;
        let mut table = PageTable::default();
        let mut chain = root;
        for block in tokens.chunks_exact(self.page_tokens).take(usable) {
            let next = chain.then(block);
            let Some(page) = self.index.page(&next) else { break };
            chain = next;
            self.pool.share(page);
            table.append(&[page]);
        }
        let n = table.pages().len();
        if n > 0 {
            (table.indexed, table.chain) = (n, Some(chain));
            self.tables.insert(request, table);
        }
        n * self.page_tokens
    }

    /// The first `tokens.len()` positions of `request` are written: full pages among them can answer others from now on.
    pub fn publish(&mut self, request: RequestId, root: BlockHash, tokens: &[u32]) {
        let Some(table) = self.tables.get_mut(&request) else { return };
        for block in tokens.chunks_exact(self.page_tokens).skip(table.indexed) {
            let chain = table.chain.unwrap_or(root).then(block);
            self.index.insert(chain, table.pages()[table.indexed]);
            (table.indexed, table.chain) = (table.indexed + 1, Some(chain));
        }
    }

    /// Gives `child`, which holds nothing, the pages of the first `positions` positions of `parent`.
    pub fn fork(&mut self, parent: RequestId, child: RequestId, positions: usize) {
        debug_assert!(self.pages(child).is_empty(), "a child begins with its parent's pages");
        let Some(table) = self.tables.get(&parent) else { return };
        let table = table.beginning(self.pages_for(positions));
        table.pages().iter().for_each(|page| self.pool.share(*page));
        if !table.pages().is_empty() {
            self.tables.insert(child, table);
        }
    }

    /// Makes positions `written..tokens` of `request` writable: covers them with pages, and copies the page in which they
    /// begin if somebody else holds it too. All or nothing.
    ///
    /// # Errors
    /// Fewer pages can be taken than are needed; nothing has changed then.
    pub fn reserve(&mut self, request: RequestId, written: usize, tokens: usize) -> Result<(), OutOfPages> {
        let held = self.pages(request);
        let missing = self.pages_for(tokens).saturating_sub(held.len());
        let first = written / self.page_tokens;
        let shared = tokens > written && held.get(first).is_some_and(|page| self.pool.holders(*page) > 1);
        let index = &mut self.index;
        let mut pages = self.pool.take(missing + usize::from(shared), |evicted| index.remove(evicted))?;
        if pages.is_empty() {
            return Ok(());
        }
        let table = self.tables.entry(request).or_default();
        if shared {
            let to = pages.pop().expect("one more page was taken");
            let from = table.replace(first, to);
            self.copies.push(PageCopy { from, to });
            self.pool.give_back(from, self.index.contains(from));
        }
        table.append(&pages);
        Ok(())
    }

    /// Copies that were noted since the last call. The runner makes them in this order, before anything else.
    pub fn take_copies(&mut self) -> Vec<PageCopy> {
        std::mem::take(&mut self.copies)
    }

    /// The table of `request`; empty if it holds nothing.
    pub fn pages(&self, request: RequestId) -> &[u32] {
        self.tables.get(&request).map_or(&[], |t| t.pages())
    }

    /// Gives all pages of `request` back. Returns how many it held.
    pub fn release(&mut self, request: RequestId) -> usize {
        let Some(table) = self.tables.remove(&request) else { return 0 };
        // The end of a chain is useless without its beginning, so it is idle for longer.
        for page in table.pages().iter().rev() {
            self.pool.give_back(*page, self.index.contains(*page));
        }
        table.pages().len()
    }

    /// Nothing that was written before can answer any more.
    pub fn forget(&mut self) {
        self.index.clear();
        self.pool.free_idle();
        for table in self.tables.values_mut() {
            (table.indexed, table.chain) = (usize::MAX, None);
        }
    }

    /// Every page is held by as many tables as are counted, or idle and known, or free and unknown.
    ///
    /// # Panics
    /// When that does not hold, which is a bug of this module.
    pub fn check_integrity(&self) {
        self.index.check_integrity();
        let mut holders = vec![0u32; self.n_pages()];
        for &page in self.tables.values().flat_map(|t| t.pages()) {
            holders[page as usize] += 1;
        }
        let mut unheld = vec![0u32; self.n_pages()];
        for &page in self.pool.free_pages() {
            unheld[page as usize] += 1;
            assert!(!self.index.contains(page), "page {page} is free but in the index");
        }
        for page in self.pool.idle_pages() {
            unheld[page as usize] += 1;
            assert!(self.index.contains(page), "page {page} is idle but not in the index");
        }
        for (page, count) in holders.iter().enumerate() {
            let number = u32::try_from(page).expect("page numbers are 32 bits");
            assert_eq!(*count, self.pool.holders(number), "holders of page {page}");
            assert_eq!(unheld[page], u32::from(*count == 0), "page {page} is held, idle or free");
        }
        assert!(self.tables.values().all(|t| !t.pages().is_empty()), "tables without pages are removed");
    }
}
