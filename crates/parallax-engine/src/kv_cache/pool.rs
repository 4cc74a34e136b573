//! Counted pages (or slots of states, which are kept in the same way). A page is held by sequences (how many is counted), idle (nobody holds it, but the prefix index knows
//! what is in it), or free.
//!
//! Last freed, first taken: its memory is the likeliest to be warm. When none is free, the page that has been idle for
//! longest is given up.

use std::collections::BTreeMap;

use crate::error::OutOfPages;

/// All pages, by number.
#[derive(Debug, Clone)]
pub struct PagePool {
    /// How many sequences hold each page.
    holders: Vec<u32>,
    free: Vec<u32>,
    /// Idle pages by the time at which they became idle; times are unique.
    idle: BTreeMap<u64, u32>,
    /// The key in `idle`, for idle pages.
    idle_since: Vec<Option<u64>>,
    clock: u64,
}

impl PagePool {
    /// A pool in which pages `0..n_pages` are free.
    ///
    /// # Panics
    /// With more than 2^32 pages.
    pub fn new(n_pages: usize) -> Self {
        let end = u32::try_from(n_pages).expect("page numbers are 32 bits");
        Self {
            holders: vec![0; n_pages],
            free: (0..end).rev().collect(),
            idle: BTreeMap::new(),
            idle_since: vec![None; n_pages],
            clock: 0,
        }
    }

    /// Pages in all.
    pub fn n_pages(&self) -> usize {
        self.holders.len()
    }

    /// Pages that can be taken: free and idle ones.
    pub fn n_available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// The free pages, in no particular order.
    pub fn free_pages(&self) -> &[u32] {
        &self.free
    }

    /// The idle pages, longest idle first.
    pub fn idle_pages(&self) -> impl Iterator<Item = u32> + '_ {
        self.idle.values().copied()
    }

    /// Sequences that hold `page`.
    pub fn holders(&self, page: u32) -> u32 {
        self.holders[page as usize]
    }

    /// Takes `n` pages for one holder each, or none. `evicted` hears of the idle ones among them, whose content is lost.
    ///
    /// # Errors
    /// Fewer can be taken.
    pub fn take(&mut self, n: usize, mut evicted: impl FnMut(u32)) -> Result<Vec<u32>, OutOfPages> {
        if n > self.n_available() {
            return Err(OutOfPages { needed: n, free: self.n_available() });
        }
        let mut pages = Vec::with_capacity(n);
        for _ in 0..n {
            let page = self.free.pop().unwrap_or_else(|| {
                let (_, page) = self.idle.pop_first().expect("available pages are free or idle");
                self.idle_since[page as usize] = None;
                evicted(page);
                page
            });
            self.holders[page as usize] = 1;
            pages.push(page);
        }
        Ok(pages)
    }

    /// One more sequence holds `page`, which is held or idle.
    pub fn share(&mut self, page: u32) {
        if let Some(since) = self.idle_since[page as usize].take() {
            self.idle.remove(&since);
        }
        self.holders[page as usize] += 1;
    }

    /// One sequence less holds `page`. When it was the last one, the page becomes idle if `keep`, free otherwise.
    pub fn give_back(&mut self, page: u32, keep: bool) {
        let holders = &mut self.holders[page as usize];
        *holders = holders.checked_sub(1).expect("pages are given back once by each holder");
        if *holders > 0 {
            return;
        }
        if keep {
            self.clock += 1;
            self.idle.insert(self.clock, page);
            self.idle_since[page as usize] = Some(self.clock);
        } else {
            self.free.push(page);
        }
    }

    /// An idle page becomes free.
    pub fn free(&mut self, page: u32) {
        let since = self.idle_since[page as usize].take().expect("the page is idle");
        self.idle.remove(&since);
        self.free.push(page);
    }

    /// Every idle page becomes free.
    pub fn free_idle(&mut self) {
        while let Some((_, page)) = self.idle.pop_first() {
            self.idle_since[page as usize] = None;
            self.free.push(page);
        }
    }
}
