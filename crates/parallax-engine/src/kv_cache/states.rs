//! Slots of recurrent states: one for each sequence that holds pages, and kept states, which later sequences begin with.
//!
//! A kept state is that at the end of a page that the prefix index knows, and goes with it. Where slots run out, the
//! one that has been unused for longest goes: its page stays known, but nobody can begin behind it.

use std::collections::BTreeMap;

use super::pool::PagePool;
use crate::error::OutOfPages;

/// All slots, by number; none where no layer is recurrent.
#[derive(Debug, Clone)]
pub struct StateSlots {
    /// Held by sequences, and for copies that a step is to make; idle with a kept state; or free.
    pool: PagePool,
    /// Kept states by their page.
    slots: BTreeMap<u32, u32>,
    /// The other way round.
    pages: BTreeMap<u32, u32>,
}

impl StateSlots {
    /// Free slots.
    pub fn new(n_slots: usize) -> Self {
        Self { pool: PagePool::new(n_slots), slots: BTreeMap::new(), pages: BTreeMap::new() }
    }

    /// Slots in all.
    pub fn len(&self) -> usize {
        self.pool.n_pages()
    }

    /// The model has no recurrent layers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Slots that can be taken, those of kept states among them.
    pub fn n_available(&self) -> usize {
        self.pool.n_available()
    }

    /// Kept states.
    pub fn n_kept(&self) -> usize {
        self.slots.len()
    }

    /// The slot of the state that is kept at the end of `page`.
    pub fn kept(&self, page: u32) -> Option<u32> {
        self.slots.get(&page).copied()
    }

    /// Takes a slot for one holder.
    ///
    /// # Errors
    /// All are held.
    pub fn take(&mut self) -> Result<u32, OutOfPages> {
        let (slots, pages) = (&mut self.slots, &mut self.pages);
        let taken = self.pool.take(1, |evicted| {
            let page = pages.remove(&evicted).expect("idle slots have a page");
            slots.remove(&page);
        })?;
        Ok(taken[0])
    }

    /// Takes a slot to go on in from the state that is kept at the end of `page`, which is used by that. Returns the slots of both.
    ///
    /// # Errors
    /// All others are held.
    pub fn take_behind(&mut self, page: u32) -> Result<(u32, u32), OutOfPages> {
        let kept = self.slots[&page];
        self.pool.share(kept);
        let taken = self.take();
        self.pool.give_back(kept, true);
        taken.map(|slot| (kept, slot))
    }

    /// A held slot is free again.
    pub fn give_back(&mut self, slot: u32) {
        self.pool.give_back(slot, false);
    }

    /// What a held slot has is kept as the state at the end of `page`, unless there is one. Returns whether it was.
    pub fn keep(&mut self, slot: u32, page: u32) -> bool {
        let new = !self.slots.contains_key(&page);
        self.pool.give_back(slot, new);
        if new {
            self.slots.insert(page, slot);
            self.pages.insert(slot, page);
        }
        new
    }

    /// The state that is kept at the end of `page`, if any, is of no use any more.
    pub fn discard(&mut self, page: u32) {
        if let Some(slot) = self.slots.remove(&page) {
            self.pages.remove(&slot);
            self.pool.free(slot);
        }
    }

    /// No kept state is of use any more.
    pub fn discard_all(&mut self) {
        self.slots.clear();
        self.pages.clear();
        self.pool.free_idle();
    }

    /// Every slot has as many holders as `held` counts; the others are free, or kept at the end of `indexed` pages.
    ///
    /// # Panics
    /// When that does not hold, which is a bug of this module.
    pub fn check_integrity(&self, held: impl Iterator<Item = u32>, indexed: impl Fn(u32) -> bool) {
        let mut holders = vec![0; self.len()];
        held.for_each(|slot| holders[slot as usize] += 1);
        for (slot, count) in (0u32..).zip(holders) {
            assert_eq!(self.pool.holders(slot), count, "holders of state slot {slot}");
        }
        for slot in self.pool.idle_pages() {
            assert!(self.pages.contains_key(&slot), "state slot {slot} is idle without a page");
        }
        assert_eq!(self.pool.idle_pages().count(), self.pages.len(), "kept states are idle");
        assert_eq!(self.slots.len(), self.pages.len());
        for (page, slot) in &self.slots {
            assert_eq!(self.pages.get(slot), Some(page), "slot {slot} is found by its page");
            assert!(indexed(*page), "page {page} has a kept state but is not in the index");
        }
    }
}
