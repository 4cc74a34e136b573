//! The attention of a block of rows to the pages of their sequence, for one key-value head.
//!
//! Scores first, for all keys; then the exact maximum, the exponentials and their sum; then the weighted values. Every
//! sum runs over keys (or head elements) in order, so a row does not notice its neighbours.

use std::cell::RefCell;
use std::ops::Range;

use super::{KvPages, RowRef, page_len};
use crate::dispatch::simd_kernel;
use crate::error::{KernelError, check_len, rows_of};
use crate::math;
use crate::parallel::Shared;
use crate::simd::{LANES, Line, Simd, exp, flat, read, write};

/// How pages are laid out: per head, keys [D, page tokens] and values [page tokens, D rounded up to lanes].
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub page_tokens: usize,
    pub head_dim: usize,
    /// D rounded up to whole vectors.
    padded: usize,
    n_kv_heads: usize,
}

impl Geometry {
    /// Checks the store and every row's place in it.
    pub(super) fn check(op: &'static str, kv: &KvPages<'_>, rows: &[RowRef]) -> Result<Self, KernelError> {
        if kv.page_tokens == 0 || !kv.page_tokens.is_multiple_of(LANES) {
            let rule = "must be a positive multiple of 16";
            return Err(KernelError::BadDimension { op, what: "page tokens", got: kv.page_tokens, rule });
        }
        let n_pages =
            rows_of(op, "key pages", kv.k.len(), page_len(kv.page_tokens, kv.n_kv_heads, kv.head_dim))?;
        check_len(op, "value pages", kv.k.len(), kv.v.len())?;
        for table in kv.tables {
            if let Some(&page) = table.iter().find(|&&page| page as usize >= n_pages) {
                return Err(KernelError::OutOfRange { op, what: "page", limit: n_pages, got: page as usize });
            }
        }
        for row in rows {
            let Some(table) = kv.tables.get(row.seq) else {
                return Err(KernelError::OutOfRange {
                    op,
                    what: "sequence",
                    limit: kv.tables.len(),
                    got: row.seq,
                });
            };
            let covered = table.len() * kv.page_tokens;
            if row.n_keys == 0 || row.n_keys > covered {
                return Err(KernelError::OutOfRange {
                    op,
                    what: "position of a row",
                    limit: covered,
                    got: row.n_keys.wrapping_sub(1),
                });
            }
        }
        Ok(Self {
            page_tokens: kv.page_tokens,
            head_dim: kv.head_dim,
            padded: kv.head_dim.next_multiple_of(LANES),
            n_kv_heads: kv.n_kv_heads,
        })
    }

    /// Where a head's keys (and values) lie.
    pub(super) fn head_region(&self, page: usize, head: usize) -> Range<usize> {
        let len = self.page_tokens * self.padded;
        let start = (page * self.n_kv_heads + head) * len;
        start..start + len
    }

    /// Stores one token's key and value in a head's region.
    pub(super) fn store(&self, keys: &mut [f32], values: &mut [f32], slot: usize, k: &[f32], v: &[f32]) {
        for (d, &k) in k.iter().enumerate() {
            keys[d * self.page_tokens + slot] = k;
        }
        values[slot * self.padded..][..self.head_dim].copy_from_slice(v);
    }
}

/// The queries of one block of rows that read one key-value head.
pub(super) struct Queries<'a> {
    /// [T, Q, D]
    pub q: &'a [f32],
    pub rows: &'a [RowRef],
    /// The block; all of one sequence.
    pub range: Range<usize>,
    pub n_heads: usize,
    /// The key-value head.
    pub head: usize,
    /// Query heads per key-value head.
    pub group: usize,
    pub scale: f32,
}

impl Queries<'_> {
    fn len(&self) -> usize {
        self.range.len() * self.group
    }

    /// Keys seen by query `i`.
    fn n_keys(&self, i: usize) -> usize {
        self.rows[self.range.start + i / self.group].n_keys
    }

    /// Index of query `i` in [T, Q].
    fn index(&self, i: usize) -> usize {
        (self.range.start + i / self.group) * self.n_heads + self.head * self.group + i % self.group
    }
}

thread_local! {
    static SCORES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

simd_kernel! {
    /// Writes the outputs of `queries`, which no other task may write, and their log-sum-exps.
    pub(super) fn attend(
        s;
        kv: &KvPages<'_>,
        geometry: Geometry,
        queries: &Queries<'_>,
        out: &Shared<'_, f32>,
        lse: Option<&Shared<'_, f32>>,
    ) {
        let mut scratch = SCORES.with(|s| std::mem::take(&mut *s.borrow_mut()));
        let mut first = 0;
        while first < queries.len() {
            let left = queries.len() - first;
            first += if S::TILE >= 24 && left >= 12 {
                tile::<S, 12>(s, kv, geometry, queries, first, &mut scratch, out, lse)
            } else if left >= 6 {
                tile::<S, 6>(s, kv, geometry, queries, first, &mut scratch, out, lse)
            } else if left >= 3 {
                tile::<S, 3>(s, kv, geometry, queries, first, &mut scratch, out, lse)
            } else {
                tile::<S, 1>(s, kv, geometry, queries, first, &mut scratch, out, lse)
            };
        }
        SCORES.with(|s| *s.borrow_mut() = scratch);
    }
}

/// `N` queries from `first` on; returns `N`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
fn tile<S: Simd, const N: usize>(
    s: S,
    kv: &KvPages<'_>,
    geometry: Geometry,
    queries: &Queries<'_>,
    first: usize,
    scratch: &mut Vec<Line>,
    out: &Shared<'_, f32>,
    lse: Option<&Shared<'_, f32>>,
) -> usize {
    let n_keys: [usize; N] = std::array::from_fn(|i| queries.n_keys(first + i));
    let (fewest, most) = n_keys.iter().fold((usize::MAX, 0), |(lo, hi), &n| (lo.min(n), hi.max(n)));
    let lines = most.div_ceil(LANES);
    scratch.resize((lines * N).max(scratch.len()), Line([0.0; LANES]));
    let pages = kv.tables[queries.rows[queries.range.start].seq].as_slice();
    let dim = geometry.head_dim;
    let q: [&[f32]; N] = std::array::from_fn(|i| &queries.q[queries.index(first + i) * dim..][..dim]);

    scores(s, kv, geometry, queries.head, pages, q, queries.scale, &mut scratch[..lines * N]);
    let mut inverse = [0.0f32; N];
    for i in 0..N {
        let (max, sum) = softmax(s, &mut scratch[i * lines..(i + 1) * lines], n_keys[i]);
        inverse[i] = 1.0 / sum;
        if let Some(lse) = lse {
            let at = queries.index(first + i);
            // SAFETY: one task owns a query, hence its entry.
            let entry = unsafe { lse.slice(at..at + 1) };
            entry[0] = max + math::ln(f64::from(sum)) as f32;
        }
    }
    let p: [&[f32]; N] = std::array::from_fn(|i| flat(&scratch[i * lines..(i + 1) * lines]));
    for column in (0..dim).step_by(LANES) {
        let acc = weighted(s, kv, geometry, queries.head, pages, p, n_keys, fewest, column);
        for i in 0..N {
            let start = queries.index(first + i) * dim;
            // SAFETY: one task owns a query, hence its output.
            let row = unsafe { out.slice(start..start + dim) };
            write(s, row, column, s.mul(acc[i], s.splat(inverse[i])));
        }
    }
    N
}

/// Scaled scores of `N` queries with the keys of `pages`, lines of sixteen keys per query.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
fn scores<S: Simd, const N: usize>(
    s: S,
    kv: &KvPages<'_>,
    geometry: Geometry,
    head: usize,
    pages: &[u32],
    q: [&[f32]; N],
    scale: f32,
    scores: &mut [Line],
) {
    let lines = scores.len() / N;
    let lines_per_page = geometry.page_tokens / LANES;
    let dim = geometry.head_dim;
    let q: [&[f32]; N] = std::array::from_fn(|i| &q[i][..dim]);
    for line in 0..lines {
        let region = geometry.head_region(pages[line / lines_per_page] as usize, head);
        let keys = kv.k[region].as_chunks::<LANES>().0;
        let first = line % lines_per_page;
        let mut acc = [s.splat(0.0); N];
        for d in 0..dim {
            let key = s.load(&keys[d * lines_per_page + first]);
            for i in 0..N {
                acc[i] = s.fma(s.splat(q[i][d]), key, acc[i]);
            }
        }
        for i in 0..N {
            s.store(s.mul(acc[i], s.splat(scale)), &mut scores[i * lines + line].0);
        }
    }
}

/// Turns the first `n` scores into `e^(score - max)` and the rest into zeros; returns the maximum and the sum.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [Line], n: usize) -> (f32, f32) {
    let used = n.div_ceil(LANES);
    if !n.is_multiple_of(LANES) {
        scores[used - 1].0[n % LANES..].fill(f32::NEG_INFINITY);
    }
    let mut max = s.splat(f32::NEG_INFINITY);
    for line in &scores[..used] {
        max = s.max(max, s.load(&line.0));
    }
    let largest = s.max_lane(max);
    let (shift, mut sum) = (s.splat(largest), s.splat(0.0));
    for line in &mut scores[..used] {
        let p = exp(s, s.sub(s.load(&line.0), shift));
        sum = s.add(sum, p);
        s.store(p, &mut line.0);
    }
    scores[used..].fill(Line([0.0; LANES]));
    (largest, s.sum(sum))
}

/// Sixteen columns of `sum over keys of p * value`. The keys that all queries see are walked together, the rest by each
/// query alone: a key that a query must not see cannot touch its sum, not even with a NaN.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
fn weighted<S: Simd, const N: usize>(
    s: S,
    kv: &KvPages<'_>,
    geometry: Geometry,
    head: usize,
    pages: &[u32],
    p: [&[f32]; N],
    n_keys: [usize; N],
    fewest: usize,
    column: usize,
) -> [S::F; N] {
    let tokens = geometry.page_tokens;
    let mut acc = [s.splat(0.0); N];
    for (page, first) in pages.iter().zip((0..fewest).step_by(tokens)) {
        let values = &kv.v[geometry.head_region(*page as usize, head)];
        let here = tokens.min(fewest - first);
        let p: [&[f32]; N] = std::array::from_fn(|i| &p[i][first..][..here]);
        for (j, value) in values.chunks_exact(geometry.padded).take(here).enumerate() {
            let value = read(s, value, column, 0.0);
            for i in 0..N {
                acc[i] = s.fma(s.splat(p[i][j]), value, acc[i]);
            }
        }
    }
    for i in 0..N {
        for key in fewest..n_keys[i] {
            let values = &kv.v[geometry.head_region(pages[key / tokens] as usize, head)];
            let value = read(s, &values[key % tokens * geometry.padded..], column, 0.0);
            acc[i] = s.fma(s.splat(p[i][key]), value, acc[i]);
        }
    }
    acc
}
