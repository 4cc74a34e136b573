//! The free list of pages. Last freed, first taken: its memory is the likeliest to be warm.

use crate::error::OutOfPages;

/// Free pages, by number.
#[derive(Debug, Clone)]
pub struct PagePool {
    n_pages: usize,
    free: Vec<u32>,
}

impl PagePool {
    /// A pool in which pages `0..n_pages` are free.
    ///
    /// # Panics
    /// With more than 2^32 pages.
    pub fn new(n_pages: usize) -> Self {
        let end = u32::try_from(n_pages).expect("page numbers are 32 bits");
        Self { n_pages, free: (0..end).rev().collect() }
    }

    /// Pages in all.
    pub fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Pages that can be taken.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// The free pages, in no particular order.
    pub fn free_pages(&self) -> &[u32] {
        &self.free
    }

    /// Takes `n` pages, or none.
    ///
    /// # Errors
    /// Fewer are free.
    pub fn take(&mut self, n: usize) -> Result<Vec<u32>, OutOfPages> {
        let Some(rest) = self.free.len().checked_sub(n) else {
            return Err(OutOfPages { needed: n, free: self.free.len() });
        };
        let mut pages = self.free.split_off(rest);
        pages.reverse();
        Ok(pages)
    }

    /// Gives pages back that were taken from here.
    pub fn give_back(&mut self, pages: &[u32]) {
        self.free.extend(pages.iter().rev());
        debug_assert!(self.free.len() <= self.n_pages, "pages were given back twice");
    }
}
