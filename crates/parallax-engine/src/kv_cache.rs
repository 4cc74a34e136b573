//! Which cache pages and state slots belong to which sequences. The memory behind the numbers is the runner's.
//!
//! Sequences share the full pages of a common prefix, which the prefix index finds by hash, and, after a fork, a last
//! page that is not full. A shared page is never written: whoever writes next gets a copy ([`KvCache::reserve`] notes it
//! for the runner). Pages that nobody holds keep their content for later requests until the room is needed.
//!
//! A recurrent model has one state per sequence beside the pages. Nobody can begin in the middle of what a state has seen, so
//! copies of it are kept at the ends of some pages ([`KvCache::plan_saves`] says which), and a later request uses the pages
//! of its beginning up to the last of them that has a kept state.
//! [`KvCache::check_integrity`] states the rules, and the tests hold them against a naive model.

mod page_table;
mod pool;
mod prefix_index;
mod states;

use std::collections::BTreeMap;
use std::ops::Range;

use swarm_wire::RequestId;

use crate::batch::{CacheCopy, StateSave};
use crate::error::OutOfPages;
pub use page_table::PageTable;
pub use pool::PagePool;
pub use prefix_index::{BlockHash, PrefixIndex};
pub use states::StateSlots;

/// Tokens of a prompt between two kept states, about: what a prompt with the beginning of another computes again at most. A state
/// is as large as the keys and values of some hundred to two thousand tokens.
pub const KEPT_EVERY_TOKENS: usize = 1024;

/// The page pool, the prefix index, the state slots, and the tables of all sequences that hold pages.
#[derive(Debug, Clone)]
pub struct KvCache {
    page_tokens: usize,
    pool: PagePool,
    index: PrefixIndex,
    states: StateSlots,
    tables: BTreeMap<RequestId, PageTable>,
    copies: Vec<CacheCopy>,
    state_copies: Vec<CacheCopy>,
}

impl KvCache {
    /// An empty cache of `n_pages` pages of `page_tokens` positions, with slots for recurrent states if the model has such.
    pub fn new(n_pages: usize, page_tokens: usize, state_slots: usize) -> Self {
        Self {
            page_tokens: page_tokens.max(1),
            pool: PagePool::new(n_pages),
            index: PrefixIndex::default(),
            states: StateSlots::new(state_slots),
            tables: BTreeMap::new(),
            copies: Vec::new(),
            state_copies: Vec::new(),
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

    /// The slots of recurrent states.
    pub fn states(&self) -> &StateSlots {
        &self.states
    }

    /// Pages for `tokens` positions.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Gives `request`, which holds nothing, the pages that the index knows of the beginning of `tokens`, and a state where the
    /// model is recurrent. Returns how many positions they cover, always fewer than there are tokens: the last one has to run.
    ///
    /// # Errors
    /// All slots of states are held; nothing has changed then.
    pub fn attach(
        &mut self,
        request: RequestId,
        root: BlockHash,
        tokens: &[u32],
    ) -> Result<usize, OutOfPages> {
        debug_assert!(!self.tables.contains_key(&request), "a prefix comes first");
        let usable = tokens.len().saturating_sub(1) / self.page_tokens;
        let mut known = Vec::new();
        let mut chain = root;
        for block in tokens.chunks_exact(self.page_tokens).take(usable) {
            chain = chain.then(block);
            let Some(page) = self.index.page(&chain) else { break };
            known.push((page, chain));
        }
        let mut table = PageTable::default();
        let mut n = known.len();
        if !self.states.is_empty() {
            let last = known.iter().rposition(|(page, _)| self.states.kept(*page).is_some());
            let state = if let Some(last) = last {
                let (from, to) = self.states.take_behind(known[last].0)?;
                self.state_copies.push(CacheCopy { from, to });
                to
            } else {
                self.states.take()?
            };
            n = last.map_or(0, |last| last + 1);
            (table.state, table.known) = (Some(state), known.len());
        }
        if let Some((_, chain)) = known[..n].last() {
            (table.indexed, table.chain) = (n, Some(*chain));
        }
        for (page, _) in &known[..n] {
            self.pool.share(*page);
            table.append(&[*page]);
        }
        if n > 0 || table.state.is_some() {
            self.tables.insert(request, table);
        }
        Ok(n * self.page_tokens)
    }

    /// Where copies of the state of `request` are kept while it runs the positions `rows`, of `tokens` tokens that are known and
    /// `prompt_tokens` of its prompt; none where the model is not recurrent. [`Self::publish`], after the step, keeps
    /// those before which all tokens stay.
    ///
    /// They are at the end of the last full page before the newest token: of a prompt, so that the same one and the next turn
    /// of a chat begin there, and of the answer, where each takes the place of the one before once it is known to stay; and of all
    /// pages that end among guesses, since nobody knows how many of those are right. Then every [`KEPT_EVERY_TOKENS`] of a prompt, for
    /// prompts that part from it somewhere; and where the pages end that were known when it began: there others have parted from
    /// it already.
    pub fn plan_saves(
        &mut self,
        request: RequestId,
        rows: Range<usize>,
        tokens: usize,
        prompt_tokens: usize,
    ) -> Vec<StateSave> {
        let every = (KEPT_EVERY_TOKENS / self.page_tokens).max(1);
        let Some(table) = self.tables.get_mut(&request).filter(|table| table.state.is_some()) else {
            return Vec::new();
        };
        let pages_before = |end: usize| end.saturating_sub(1) / self.page_tokens;
        for n in rows.start.div_ceil(self.page_tokens).max(1)..=pages_before(rows.end) {
            let position = n * self.page_tokens;
            let of_answer = position > prompt_tokens;
            let wanted =
                n >= pages_before(tokens) || n == table.known || (!of_answer && n.is_multiple_of(every));
            if !wanted || self.states.kept(table.pages()[n - 1]).is_some() {
                continue;
            }
            let Ok(slot) = self.states.take() else { break };
            let position = u32::try_from(position).expect("a context has fewer than 2^32 positions");
            table.saves.push((StateSave { position, slot }, of_answer));
        }
        table.saves.iter().map(|(save, _)| *save).collect()
    }

    /// The first `tokens.len()` positions of `request` are written: full pages among them can answer others from now on, and so
    /// can the states that were kept before them.
    pub fn publish(&mut self, request: RequestId, root: BlockHash, tokens: &[u32]) {
        let Some(table) = self.tables.get_mut(&request) else { return };
        let mut saves = std::mem::take(&mut table.saves);
        let mut blocks = tokens.chunks_exact(self.page_tokens).skip(table.indexed);
        loop {
            // A state is kept where the index looks for it: the page may be another sequence's with the same content.
            let known = table.chain.and_then(|chain| Some((chain, self.index.page(&chain)?)));
            saves.retain(|(save, of_answer)| match known {
                Some((chain, page)) if save.position as usize == table.indexed * self.page_tokens => {
                    // What another sequence has kept there before is not this one's to give up later.
                    if self.states.keep(save.slot, page)
                        && *of_answer
                        && let Some(before) = table.newest.replace(chain)
                        && let Some(page) = self.index.page(&before)
                    {
                        self.states.discard(page);
                    }
                    false
                }
                _ => true,
            });
            let Some(block) = blocks.next() else { break };
            let chain = table.chain.unwrap_or(root).then(block);
            self.index.insert(chain, table.pages()[table.indexed]);
            (table.indexed, table.chain) = (table.indexed + 1, Some(chain));
        }
        // Behind guesses that were wrong.
        saves.iter().for_each(|(save, _)| self.states.give_back(save.slot));
    }

    /// Gives `child`, which holds nothing, the pages of the first `positions` positions of `parent`, and a copy of its state, which
    /// stands behind them.
    ///
    /// # Errors
    /// All slots of states are held; nothing has changed then.
    pub fn fork(&mut self, parent: RequestId, child: RequestId, positions: usize) -> Result<(), OutOfPages> {
        debug_assert!(!self.tables.contains_key(&child), "a child begins with its parent's pages");
        let Some(parent) = self.tables.get(&parent) else { return Ok(()) };
        let mut table = parent.beginning(positions.div_ceil(self.page_tokens));
        if let Some(from) = parent.state {
            let to = self.states.take()?;
            self.state_copies.push(CacheCopy { from, to });
            table.state = Some(to);
        }
        table.pages().iter().for_each(|page| self.pool.share(*page));
        if !table.is_empty() {
            self.tables.insert(child, table);
        }
        Ok(())
    }

    /// Makes positions `written..tokens` of `request` writable: covers them with pages, and copies the page in which they
    /// begin if somebody else holds it too. Where the model is recurrent it has a state from then on. All or nothing.
    ///
    /// # Errors
    /// Fewer pages or states can be taken than are needed; nothing has changed then.
    pub fn reserve(&mut self, request: RequestId, written: usize, tokens: usize) -> Result<(), OutOfPages> {
        let held = self.pages(request);
        let missing = self.pages_for(tokens).saturating_sub(held.len());
        let first = written / self.page_tokens;
        let shared = tokens > written && held.get(first).is_some_and(|page| self.pool.holders(*page) > 1);
        let stateless =
            !self.states.is_empty() && self.tables.get(&request).is_none_or(|table| table.state.is_none());
        if stateless && self.states.n_available() == 0 {
            return Err(OutOfPages { needed: 1, free: 0 });
        }
        let (index, states) = (&mut self.index, &mut self.states);
        let mut pages = self.pool.take(missing + usize::from(shared), |evicted| {
            index.remove(evicted);
            states.discard(evicted);
        })?;
        if pages.is_empty() && !stateless {
            return Ok(());
        }
        let table = self.tables.entry(request).or_default();
        if stateless {
            table.state = Some(self.states.take().expect("one was available"));
        }
        if shared {
            let to = pages.pop().expect("one more page was taken");
            let from = table.replace(first, to);
            self.copies.push(CacheCopy { from, to });
            self.pool.give_back(from, self.index.contains(from));
        }
        table.append(&pages);
        Ok(())
    }

    /// Copies that were noted since the last call. The runner makes them in this order, before anything else.
    pub fn take_copies(&mut self) -> Vec<CacheCopy> {
        std::mem::take(&mut self.copies)
    }

    /// The same for slots of states.
    pub fn take_state_copies(&mut self) -> Vec<CacheCopy> {
        std::mem::take(&mut self.state_copies)
    }

    /// The table of `request`; empty if it holds nothing.
    pub fn pages(&self, request: RequestId) -> &[u32] {
        self.tables.get(&request).map_or(&[], |t| t.pages())
    }

    /// The slot of the state of `request`; 0 if it has none.
    pub fn state(&self, request: RequestId) -> u32 {
        self.tables.get(&request).and_then(|t| t.state).unwrap_or(0)
    }

    /// Gives all pages of `request` back, and its state. Returns how many pages it held.
    pub fn release(&mut self, request: RequestId) -> usize {
        let Some(table) = self.tables.remove(&request) else { return 0 };
        if let Some(state) = table.state {
            // The copy that it would have begun with need not be made if it was noted last: then nobody copies on from there.
            self.state_copies.pop_if(|copy| copy.to == state);
            self.states.give_back(state);
        }
        table.saves.iter().for_each(|(save, _)| self.states.give_back(save.slot));
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
        self.states.discard_all();
        for table in self.tables.values_mut() {
            (table.indexed, table.chain, table.newest) = (usize::MAX, None, None);
        }
    }

    /// Every page is held by as many tables as are counted, or idle and known, or free and unknown; every slot of a state by one
    /// table, or it is kept at the end of a known page, or free.
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
        assert!(!self.tables.values().any(PageTable::is_empty), "tables that hold nothing are removed");
        let recurrent = !self.states.is_empty();
        assert!(
            self.tables.values().all(|t| t.state.is_some() == recurrent),
            "sequences have a state, or none has"
        );
        let held =
            self.tables.values().flat_map(|t| t.state.into_iter().chain(t.saves.iter().map(|s| s.0.slot)));
        self.states.check_integrity(held, |page| self.index.contains(page));
    }
}
