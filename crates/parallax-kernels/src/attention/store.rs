//! Keys and values of one layer in pages that sequences share, as f32, bf16 or eight-bit blocks.
//!
//! Keys are stored transposed within a page: sixteen keys are the lanes of a score, and no score needs a horizontal
//! sum. What is read back is the same for all readers: a row is rounded once, when it is stored, by itself alone, and
//! every code widens to an f32 exactly. Attention over a rounded store therefore has the bits of attention over an f32
//! store that holds the rounded numbers.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use half::bf16;

use super::RowRef;
use crate::dtype::BLOCK;
use crate::error::{KernelError, check_len};
use crate::parallel::{Shared, share, task_count};
use crate::pool;
use crate::simd::{LANES, Simd};

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 32-bit floats: as computed.
    #[default]
    F32,
    /// 16-bit brain floats: each number within 2^-8 of itself.
    Bf16,
    /// Signed bytes, and a bf16 scale for each 32 elements of a head's row: each number within 0.51 / 127 of the largest
    /// of its block.
    Q8,
}

/// Every format with its name.
const NAMES: [(&str, KvFormat); 3] = [("f32", KvFormat::F32), ("bf16", KvFormat::Bf16), ("q8", KvFormat::Q8)];

impl KvFormat {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Q8];

    /// Bytes of one head's row of `n` elements, keys or values.
    pub fn row_bytes(self, n: usize) -> usize {
        match self {
            Self::F32 => 4 * n,
            Self::Bf16 => 2 * n,
            Self::Q8 => n + 2 * n.div_ceil(BLOCK),
        }
    }
}

impl FromStr for KvFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        found.map(|(_, format)| *format).ok_or_else(|| {
            let known = NAMES.map(|(name, _)| name).join(", ");
            format!("unknown cache format {text:?}; known are {known}")
        })
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES[*self as usize].0)
    }
}

/// Where the rows of a batch lie: row `t` is the newest of the first `rows[t].n_keys` positions of its sequence, whose
/// pages, in order of position, are `tables[rows[t].seq]`.
#[derive(Debug, Clone, Copy)]
pub struct Paging<'a> {
    /// Rows of the batch. `[T]`
    pub rows: &'a [RowRef],
    /// Pages of each sequence.
    pub tables: &'a [Vec<u32>],
}

/// How a store is laid out: per page and head a region; keys as [D, page tokens], values as [page tokens, D rounded up
/// to lanes]. Scales the same way, with blocks in place of elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub page_tokens: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// D rounded up to whole vectors.
    pub padded: usize,
    /// Scales of a head's row.
    pub blocks: usize,
}

impl Geometry {
    fn new(page_tokens: usize, n_kv_heads: usize, head_dim: usize) -> Result<Self, KernelError> {
        let op = "key-value store";
        if page_tokens == 0 || !page_tokens.is_multiple_of(LANES) {
            let rule = "must be a positive multiple of 16";
            return Err(KernelError::BadDimension { op, what: "page tokens", got: page_tokens, rule });
        }
        if n_kv_heads == 0 || head_dim == 0 {
            let rule = "heads and their elements must be positive";
            return Err(KernelError::BadDimension { op, what: "key-value width", got: 0, rule });
        }
        let (padded, blocks) = (head_dim.next_multiple_of(LANES), head_dim.div_ceil(BLOCK));
        Ok(Self { page_tokens, n_kv_heads, head_dim, padded, blocks })
    }

    /// A head's cells within a page.
    fn cells(&self, page: usize, head: usize) -> Range<usize> {
        let len = self.page_tokens * self.padded;
        let start = (page * self.n_kv_heads + head) * len;
        start..start + len
    }

    /// A head's scales within a page.
    fn scales(&self, page: usize, head: usize) -> Range<usize> {
        let len = self.page_tokens * self.blocks;
        let start = (page * self.n_kv_heads + head) * len;
        start..start + len
    }
}

/// An element as it is stored.
pub(super) trait Element: Copy + Send + Sync + 'static {
    const ZERO: Self;
    /// Elements of a row that share a scale; beyond any row where there are no scales.
    const SPAN: usize;
    /// Whether reading costs more than a load.
    const ROUNDED: bool = true;
    /// Gives the cells of at most 32 elements to `put`, and the bits of their scale, a bf16, back.
    fn encode(block: &[f32], put: impl FnMut(usize, Self)) -> u16;
    /// Sixteen cells, without their scale.
    fn widen<S: Simd>(s: S, cells: &[Self; LANES]) -> S::F;
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    const SPAN: usize = usize::MAX;
    const ROUNDED: bool = false;

    fn encode(block: &[f32], mut put: impl FnMut(usize, Self)) -> u16 {
        block.iter().enumerate().for_each(|(i, v)| put(i, *v));
        0
    }
    #[inline(always)]
    fn widen<S: Simd>(s: S, cells: &[Self; LANES]) -> S::F {
        s.load(cells)
    }
}

/// Bits of a bf16.
impl Element for u16 {
    const ZERO: Self = 0;
    const SPAN: usize = usize::MAX;

    fn encode(block: &[f32], mut put: impl FnMut(usize, Self)) -> u16 {
        block.iter().enumerate().for_each(|(i, v)| put(i, bf16::from_f32(*v).to_bits()));
        0
    }
    #[inline(always)]
    fn widen<S: Simd>(s: S, cells: &[Self; LANES]) -> S::F {
        s.widen_bf16(cells)
    }
}

impl Element for i8 {
    const ZERO: Self = 0;
    const SPAN: usize = BLOCK;

    /// A scale is rounded up, so that no code exceeds 127; a code times a scale has at most 15 bits and is exact in f32.
    fn encode(block: &[f32], mut put: impl FnMut(usize, Self)) -> u16 {
        // By bits, a NaN is the largest: its block's scale becomes NaN, and an infinity's infinite.
        let largest = block.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
        let exact = f32::from_bits(largest) / 127.0;
        let scale = if exact.is_nan() {
            bf16::NAN
        } else {
            bf16::from_bits((exact.to_bits().div_ceil(1 << 16)) as u16)
        };
        let step = scale.to_f32();
        for (i, v) in block.iter().enumerate() {
            let code = if step > 0.0 { (v / step).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
            put(i, code as i8);
        }
        scale.to_bits()
    }
    #[inline(always)]
    fn widen<S: Simd>(s: S, cells: &[Self; LANES]) -> S::F {
        s.widen_i8(cells)
    }
}

/// Keys or values.
#[derive(Debug, Clone)]
pub(super) struct Half<E> {
    cells: Vec<E>,
    scales: Vec<u16>,
}

/// A head's part of a page, to be read.
#[derive(Clone, Copy)]
pub(super) struct Region<'a, E> {
    pub cells: &'a [E],
    pub scales: &'a [u16],
}

impl<E: Element> Half<E> {
    /// Zeros; the operating system hands out the memory when a page is first written.
    fn zeroed(geometry: Geometry, n_pages: usize) -> Self {
        let mut half = Self { cells: Vec::new(), scales: Vec::new() };
        half.cells = vec![E::ZERO; geometry.cells(n_pages, 0).start];
        if E::SPAN == BLOCK {
            half.scales = vec![0; geometry.scales(n_pages, 0).start];
        }
        half
    }

    fn copy_page(&mut self, from: usize, to: usize, n_pages: usize) {
        let len = self.cells.len() / n_pages;
        self.cells.copy_within(from * len..(from + 1) * len, to * len);
        let len = self.scales.len() / n_pages;
        self.scales.copy_within(from * len..(from + 1) * len, to * len);
    }

    fn bytes(&self) -> usize {
        size_of_val(self.cells.as_slice()) + size_of_val(self.scales.as_slice())
    }

    #[inline(always)]
    pub(super) fn region(&self, geometry: Geometry, page: u32, head: usize) -> Region<'_, E> {
        let scales = if E::SPAN == BLOCK { geometry.scales(page as usize, head) } else { 0..0 };
        Region { cells: &self.cells[geometry.cells(page as usize, head)], scales: &self.scales[scales] }
    }
}

impl<E: Element> Region<'_, E> {
    /// The scales of the sixteen keys of line `line` for the block of element `d`.
    #[inline(always)]
    pub(super) fn key_scale<S: Simd>(&self, s: S, geometry: Geometry, d: usize, line: usize) -> S::F {
        if E::SPAN != BLOCK {
            return s.splat(1.0);
        }
        s.widen_bf16(&self.scales.as_chunks::<LANES>().0[d / BLOCK * (geometry.page_tokens / LANES) + line])
    }

    /// Element `d` of the sixteen keys of line `line`; their scale as [`Region::key_scale`] gives it.
    #[inline(always)]
    pub(super) fn key<S: Simd>(&self, s: S, geometry: Geometry, d: usize, line: usize, scale: S::F) -> S::F {
        self.scaled(s, &self.cells.as_chunks::<LANES>().0[d * (geometry.page_tokens / LANES) + line], scale)
    }

    /// Cells times their scale.
    #[inline(always)]
    pub(super) fn scaled<S: Simd>(&self, s: S, cells: &[E; LANES], scale: S::F) -> S::F {
        let cells = E::widen(s, cells);
        if E::SPAN == BLOCK { s.mul(cells, scale) } else { cells }
    }

    /// Sixteen elements from `16 * column` on of the value in `slot`.
    #[inline(always)]
    pub(super) fn value<S: Simd>(
        &self,
        s: S,
        geometry: Geometry,
        slot: usize,
        column: usize,
    ) -> Option<S::F> {
        let cells = self.cells.as_chunks::<LANES>().0.get(slot * (geometry.padded / LANES) + column)?;
        let cells = E::widen(s, cells);
        if E::SPAN != BLOCK {
            return Some(cells);
        }
        let scale = *self.scales.get(slot * geometry.blocks + column * LANES / BLOCK)?;
        Some(s.mul(cells, s.splat(bf16::from_bits(scale).to_f32())))
    }
}

/// Keys and values alike.
#[derive(Debug, Clone)]
pub(super) struct Pair<E> {
    pub keys: Half<E>,
    pub values: Half<E>,
}

impl<E: Element> Pair<E> {
    fn zeroed(geometry: Geometry, n_pages: usize, n_value_pages: usize) -> Self {
        Self { keys: Half::zeroed(geometry, n_pages), values: Half::zeroed(geometry, n_value_pages) }
    }

    fn append(&mut self, geometry: Geometry, paging: &Paging<'_>, k: &[f32], v: &[f32]) {
        let Self { keys, values } = self;
        let (k_cells, k_scales) = (Shared::new(&mut keys.cells), Shared::new(&mut keys.scales));
        let (v_cells, v_scales) = (Shared::new(&mut values.cells), Shared::new(&mut values.scales));
        let Geometry { page_tokens, n_kv_heads: heads, head_dim, padded, blocks } = geometry;
        let tasks = task_count(heads, paging.rows.len() * head_dim * 4);
        pool::run(tasks, |task| {
            for (head, (t, row)) in share(heads, tasks, task)
                .flat_map(|head| paging.rows.iter().enumerate().map(move |row| (head, row)))
            {
                let position = row.n_keys - 1;
                let (page, slot) =
                    (paging.tables[row.seq][position / page_tokens] as usize, position % page_tokens);
                let cells = geometry.cells(page, head);
                let scales = if E::SPAN == BLOCK { geometry.scales(page, head) } else { 0..0 };
                let new = (t * heads + head) * head_dim..(t * heads + head + 1) * head_dim;
                // SAFETY: a head's region in any page is touched by the one task that owns the head.
                let (to, to_scales) =
                    unsafe { (k_cells.slice(cells.clone()), k_scales.slice(scales.clone())) };
                for (b, block) in k[new.clone()].chunks(BLOCK).enumerate() {
                    let scale = E::encode(block, |i, e| to[(b * BLOCK + i) * page_tokens + slot] = e);
                    if let Some(to) = to_scales.get_mut(b * page_tokens + slot) {
                        *to = scale;
                    }
                }
                if v.is_empty() {
                    continue;
                }
                // SAFETY: as above.
                let (to, to_scales) = unsafe { (v_cells.slice(cells), v_scales.slice(scales)) };
                for (b, block) in v[new].chunks(BLOCK).enumerate() {
                    let scale = E::encode(block, |i, e| to[slot * padded + b * BLOCK + i] = e);
                    if let Some(to) = to_scales.get_mut(slot * blocks + b) {
                        *to = scale;
                    }
                }
            }
        });
    }
}

impl Pair<f32> {
    /// A store of one head for `lines` lines of keys, a page each.
    pub(super) fn block(head_dim: usize, lines: usize) -> (Geometry, Self) {
        let blocks = head_dim.div_ceil(BLOCK);
        let padded = head_dim.next_multiple_of(LANES);
        let geometry = Geometry { page_tokens: LANES, n_kv_heads: 1, head_dim, padded, blocks };
        (geometry, Self::zeroed(geometry, lines, lines))
    }

    /// The keys and the values of a page of such a store.
    pub(super) fn page_mut(
        &mut self,
        geometry: Geometry,
        page: usize,
    ) -> (&mut [[f32; LANES]], &mut [[f32; LANES]]) {
        let cells = geometry.cells(page, 0);
        let (keys, values) = (&mut self.keys.cells[cells.clone()], &mut self.values.cells[cells]);
        (keys.as_chunks_mut().0, values.as_chunks_mut().0)
    }
}

#[derive(Debug, Clone)]
pub(super) enum Data {
    F32(Pair<f32>),
    Bf16(Pair<u16>),
    Q8(Pair<i8>),
}

/// Evaluates an expression with the pair of whichever format.
macro_rules! with_pair {
    ($data:expr, $pair:ident => $e:expr) => {
        match $data {
            crate::attention::store::Data::F32($pair) => $e,
            crate::attention::store::Data::Bf16($pair) => $e,
            crate::attention::store::Data::Q8($pair) => $e,
        }
    };
}
pub(super) use with_pair;

/// One layer's keys and values, a whole number of pages.
#[derive(Debug, Clone)]
pub struct KvPages {
    pub(super) geometry: Geometry,
    pub(super) data: Data,
    n_pages: usize,
    format: KvFormat,
}

impl KvPages {
    /// Zeroed pages of `page_tokens` tokens (a multiple of 16) with K heads of D elements; the operating system hands
    /// out the memory when a page is first written.
    ///
    /// # Errors
    /// Sizes that no store has.
    pub fn new(
        format: KvFormat,
        n_pages: usize,
        page_tokens: usize,
        n_kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, KernelError> {
        let geometry = Geometry::new(page_tokens, n_kv_heads, head_dim)?;
        Ok(Self::with(format, geometry, n_pages, n_pages))
    }

    /// Keys alone, of one head.
    pub(super) fn keys(
        format: KvFormat,
        n_pages: usize,
        page_tokens: usize,
        width: usize,
    ) -> Result<Self, KernelError> {
        Ok(Self::with(format, Geometry::new(page_tokens, 1, width)?, n_pages, 0))
    }

    fn with(format: KvFormat, geometry: Geometry, n_pages: usize, n_value_pages: usize) -> Self {
        let data = match format {
            KvFormat::F32 => Data::F32(Pair::zeroed(geometry, n_pages, n_value_pages)),
            KvFormat::Bf16 => Data::Bf16(Pair::zeroed(geometry, n_pages, n_value_pages)),
            KvFormat::Q8 => Data::Q8(Pair::zeroed(geometry, n_pages, n_value_pages)),
        };
        Self { geometry, data, n_pages, format }
    }

    /// An f32 store of this shape with the memory of `old`. Its pages hold anything: nobody reads what he has not
    /// written.
    pub(super) fn reusing(
        old: Option<Self>,
        n_pages: usize,
        page_tokens: usize,
        n_kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, KernelError> {
        let mut new = Self::new(KvFormat::F32, 0, page_tokens, n_kv_heads, head_dim)?;
        if let (Some(Self { data: Data::F32(old), .. }), Data::F32(pair)) = (old, &mut new.data) {
            *pair = old;
        }
        if let Data::F32(pair) = &mut new.data {
            pair.keys.cells.resize(new.geometry.cells(n_pages, 0).start, 0.0);
            pair.values.cells.resize(new.geometry.cells(n_pages, 0).start, 0.0);
        }
        Ok(Self { n_pages, ..new })
    }

    /// How numbers are kept.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Pages of the store.
    pub fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Bytes in memory when all pages are written.
    pub fn bytes(&self) -> usize {
        with_pair!(&self.data, pair => pair.keys.bytes() + pair.values.bytes())
    }

    /// Copies page `from` over page `to`.
    ///
    /// # Errors
    /// A page that the store does not have.
    pub fn copy_page(&mut self, from: usize, to: usize) -> Result<(), KernelError> {
        let limit = self.n_pages;
        if let Some(got) = [from, to].into_iter().find(|page| *page >= limit) {
            return Err(KernelError::OutOfRange { op: "copy_page", what: "page", limit, got });
        }
        with_pair!(&mut self.data, pair => {
            pair.keys.copy_page(from, to, limit);
            pair.values.copy_page(from, to, limit);
        });
        Ok(())
    }

    /// Checks every row's place.
    pub(super) fn check(&self, op: &'static str, paging: &Paging<'_>) -> Result<(), KernelError> {
        let (tables, tokens) = (paging.tables, self.geometry.page_tokens);
        for table in tables {
            if let Some(&page) = table.iter().find(|&&page| page as usize >= self.n_pages) {
                let limit = self.n_pages;
                return Err(KernelError::OutOfRange { op, what: "page", limit, got: page as usize });
            }
        }
        for row in paging.rows {
            let Some(table) = tables.get(row.seq) else {
                let limit = tables.len();
                return Err(KernelError::OutOfRange { op, what: "sequence", limit, got: row.seq });
            };
            let limit = table.len() * tokens;
            if row.n_keys == 0 || row.n_keys > limit {
                let got = row.n_keys.wrapping_sub(1);
                return Err(KernelError::OutOfRange { op, what: "position of a row", limit, got });
            }
        }
        Ok(())
    }

    /// Stores `k` and `v` [T, K, D]; a store of keys alone takes no values.
    pub(super) fn append(
        &mut self,
        op: &'static str,
        paging: &Paging<'_>,
        k: &[f32],
        v: Option<&[f32]>,
    ) -> Result<(), KernelError> {
        self.check(op, paging)?;
        let geometry = self.geometry;
        let len = paging.rows.len() * geometry.n_kv_heads * geometry.head_dim;
        check_len(op, "k", len, k.len())?;
        if let Some(v) = v {
            check_len(op, "v", len, v.len())?;
        }
        with_pair!(&mut self.data, pair => pair.append(geometry, paging, k, v.unwrap_or_default()));
        Ok(())
    }

    /// Fills every cell and scale with what must not be read.
    #[cfg(test)]
    pub(super) fn poison(&mut self) {
        match &mut self.data {
            Data::F32(pair) => [&mut pair.keys, &mut pair.values].map(|half| half.cells.fill(f32::NAN)),
            Data::Bf16(pair) => {
                [&mut pair.keys, &mut pair.values].map(|half| half.cells.fill(bf16::NAN.to_bits()))
            }
            Data::Q8(pair) => {
                [&mut pair.keys, &mut pair.values].map(|half| half.scales.fill(bf16::NAN.to_bits()))
            }
        };
    }
}

#[cfg(test)]
mod tests;
