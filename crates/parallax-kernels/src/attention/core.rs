//! The attention of a block of rows to the pages of their sequence, for one key-value head.
//!
//! Scores first, for all keys; then the exact maximum, the exponentials and their sum; then the weighted values. Every
//! sum runs over keys (or head elements) in order, so a row does not notice its neighbours.

use std::cell::RefCell;
use std::ops::Range;

use super::store::{Element, Geometry, Pair, with_pair};
use super::{KvPages, Paging, Scoring};
use crate::dispatch::simd_kernel;
use crate::math;
use crate::parallel::Shared;
use crate::simd::{LANES, Line, Simd, exp, flat, tanh, write};

/// The queries of one block of rows that read one key-value head.
pub(super) struct Queries<'a> {
    /// [T, Q, D]
    pub q: &'a [f32],
    pub paging: &'a Paging<'a>,
    /// The block; all of one sequence.
    pub range: Range<usize>,
    pub n_heads: usize,
    /// The key-value head.
    pub head: usize,
    /// Query heads per key-value head.
    pub group: usize,
    pub scoring: &'a Scoring<'a>,
}

impl Queries<'_> {
    fn len(&self) -> usize {
        self.range.len() * self.group
    }

    /// Keys seen by query `i`.
    fn n_keys(&self, i: usize) -> usize {
        self.paging.rows[self.range.start + i / self.group].n_keys
    }

    /// Pages of the sequence.
    fn pages(&self) -> &[u32] {
        &self.paging.tables[self.paging.rows[self.range.start].seq]
    }

    /// Index of query `i` in [T, Q].
    fn index(&self, i: usize) -> usize {
        (self.range.start + i / self.group) * self.n_heads + self.head * self.group + i % self.group
    }
}

/// Queries, what they read and where their outputs go.
struct Task<'a, E: Element> {
    kv: &'a Pair<E>,
    geometry: Geometry,
    queries: &'a Queries<'a>,
    out: &'a Shared<'a, f32>,
}

impl<E: Element> Task<'_, E> {
    /// Elements [D] of query `i`.
    fn query(&self, i: usize) -> &[f32] {
        &self.queries.q[self.queries.index(i) * self.geometry.head_dim..][..self.geometry.head_dim]
    }
}

/// Keys whose values are taken for all columns before the next ones.
const VALUE_BLOCK: usize = 128;

thread_local! {
    static SCORES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

simd_kernel! {
    /// Writes the outputs of `queries`, which no other task may write, and their log-sum-exps.
    pub(super) fn attend(
        s;
        kv: &KvPages,
        queries: &Queries<'_>,
        out: &Shared<'_, f32>,
        lse: Option<&Shared<'_, f32>>,
    ) {
        with_pair!(&kv.data, pair => tiles(s, &Task { kv: pair, geometry: kv.geometry, queries, out }, lse));
    }
}

#[inline(always)]
fn tiles<S: Simd, E: Element>(s: S, task: &Task<'_, E>, lse: Option<&Shared<'_, f32>>) {
    let mut scratch = SCORES.with(|s| std::mem::take(&mut *s.borrow_mut()));
    let (mut first, n) = (0, task.queries.len());
    while first < n {
        let left = n - first;
        first += if S::TILE >= 24 && left >= 12 {
            tile::<S, E, 12>(s, task, first, &mut scratch, lse)
        } else if left >= 6 {
            tile::<S, E, 6>(s, task, first, &mut scratch, lse)
        } else if left >= 3 {
            tile::<S, E, 3>(s, task, first, &mut scratch, lse)
        } else {
            tile::<S, E, 1>(s, task, first, &mut scratch, lse)
        };
    }
    SCORES.with(|s| *s.borrow_mut() = scratch);
}

/// `N` queries from `first` on; returns `N`.
#[inline(always)]
fn tile<S: Simd, E: Element, const N: usize>(
    s: S,
    task: &Task<'_, E>,
    first: usize,
    scratch: &mut Vec<Line>,
    lse: Option<&Shared<'_, f32>>,
) -> usize {
    let Task { kv, geometry, queries, out } = *task;
    let n_keys: [usize; N] = std::array::from_fn(|i| queries.n_keys(first + i));
    let starts = n_keys.map(|n| queries.scoring.first_key(n));
    let most = n_keys.iter().fold(0, |hi, &n| hi.max(n));
    // Scores are kept from the line of the first key that any of the queries sees.
    let base = starts.iter().fold(usize::MAX, |lo, &n| lo.min(n)) / LANES;
    let (lines, skipped) = (most.div_ceil(LANES) - base, base * LANES);
    let dim = geometry.head_dim;
    scratch.resize(((lines + dim.div_ceil(LANES)) * N).max(scratch.len()), Line([0.0; LANES]));
    let pages = queries.pages();
    let q: [&[f32]; N] = std::array::from_fn(|i| task.query(first + i));

    scores(s, kv, geometry, queries.head, pages, q, queries.scoring, base, &mut scratch[..lines * N]);
    let mut inverse = [0.0f32; N];
    for i in 0..N {
        let seen = starts[i] - skipped..n_keys[i] - skipped;
        let sink = queries.scoring.sinks.map(|sinks| sinks[queries.index(first + i) % queries.n_heads]);
        let (max, sum) = softmax(s, &mut scratch[i * lines..(i + 1) * lines], seen, sink);
        inverse[i] = 1.0 / sum;
        if let Some(lse) = lse {
            let at = queries.index(first + i);
            // SAFETY: one task owns a query, hence its entry.
            let entry = unsafe { lse.slice(at..at + 1) };
            entry[0] = max + math::ln(f64::from(sum)) as f32;
        }
    }
    let columns = dim.div_ceil(LANES);
    let (scores, sums) = scratch.split_at_mut(lines * N);
    let p: [&[f32]; N] = std::array::from_fn(|i| flat(&scores[i * lines..(i + 1) * lines]));
    let sums = &mut sums[..columns * N];
    sums.fill(Line([0.0; LANES]));
    // A block of values is read for all its columns while it is near.
    let mut from = base * LANES;
    while from < most {
        let keys = from..(from + VALUE_BLOCK).min(most);
        let seen: [Range<usize>; N] = std::array::from_fn(|i| {
            starts[i].clamp(keys.start, keys.end)..n_keys[i].clamp(keys.start, keys.end)
        });
        for (column, sums) in sums.chunks_exact_mut(N).enumerate() {
            weighted(s, kv, geometry, queries.head, pages, p, &seen, skipped, column * LANES, sums);
        }
        from = keys.end;
    }
    for (column, sums) in sums.chunks_exact(N).enumerate() {
        for i in 0..N {
            let start = queries.index(first + i) * dim;
            // SAFETY: one task owns a query, hence its output.
            let row = unsafe { out.slice(start..start + dim) };
            write(s, row, column * LANES, s.mul(s.load(&sums[i].0), s.splat(inverse[i])));
        }
    }
    N
}

simd_kernel! {
    /// Writes the outputs [.., R] of `queries` over latent rows, which no other task may write.
    pub(super) fn attend_latent(
        s;
        kv: &KvPages,
        queries: &Queries<'_>,
        value_width: usize,
        out: &Shared<'_, f32>,
    ) {
        with_pair!(&kv.data, pair => {
            latent_tiles(s, &Task { kv: pair, geometry: kv.geometry, queries, out }, value_width);
        });
    }
}

#[inline(always)]
fn latent_tiles<S: Simd, E: Element>(s: S, task: &Task<'_, E>, value_width: usize) {
    let mut scratch = SCORES.with(|s| std::mem::take(&mut *s.borrow_mut()));
    let (mut first, n) = (0, task.queries.len());
    while first < n {
        first += if n - first >= 4 {
            latent_tile::<S, E, 4>(s, task, first, value_width, &mut scratch)
        } else {
            latent_tile::<S, E, 1>(s, task, first, value_width, &mut scratch)
        };
    }
    SCORES.with(|s| *s.borrow_mut() = scratch);
}

/// `N` queries from `first` on; returns `N`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "several slices are indexed alike")]
fn latent_tile<S: Simd, E: Element, const N: usize>(
    s: S,
    task: &Task<'_, E>,
    first: usize,
    value_width: usize,
    scratch: &mut Vec<Line>,
) -> usize {
    let Task { kv, geometry, queries, out } = *task;
    let n_keys: [usize; N] = std::array::from_fn(|i| queries.n_keys(first + i));
    let (fewest, most) = n_keys.iter().fold((usize::MAX, 0), |(lo, hi), &n| (lo.min(n), hi.max(n)));
    let lines = most.div_ceil(LANES);
    scratch.resize((lines * N).max(scratch.len()), Line([0.0; LANES]));
    let pages = queries.pages();
    let q: [&[f32]; N] = std::array::from_fn(|i| task.query(first + i));
    scores(s, kv, geometry, 0, pages, q, queries.scoring, 0, &mut scratch[..lines * N]);
    let mut inverse = [0.0f32; N];
    for i in 0..N {
        let (_, sum) = softmax(s, &mut scratch[i * lines..(i + 1) * lines], 0..n_keys[i], None);
        inverse[i] = 1.0 / sum;
    }
    let p: [&[Line]; N] = std::array::from_fn(|i| &scratch[i * lines..(i + 1) * lines]);
    let rows: [&mut [f32]; N] = std::array::from_fn(|i| {
        let start = queries.index(first + i) * value_width;
        // SAFETY: one task owns a query, hence its output.
        unsafe { out.slice(start..start + value_width) }
    });
    for d in 0..value_width {
        // Lanes are keys. Lines that all queries see whole are read once for all of them.
        let mut acc = [s.splat(0.0); N];
        for line in 0..fewest / LANES {
            let value = latent_of(s, kv, geometry, pages, d, line);
            for i in 0..N {
                acc[i] = s.fma(s.load(&p[i][line].0), value, acc[i]);
            }
        }
        for i in 0..N {
            for line in fewest / LANES..n_keys[i].div_ceil(LANES) {
                // A key that the query must not see counts as zero, whatever lies there.
                let mut value = [0.0; LANES];
                s.store(latent_of(s, kv, geometry, pages, d, line), &mut value);
                value[(n_keys[i] - line * LANES).min(LANES)..].fill(0.0);
                acc[i] = s.fma(s.load(&p[i][line].0), s.load(&value), acc[i]);
            }
            rows[i][d] = s.sum(acc[i]) * inverse[i];
        }
    }
    N
}

/// Element `d` of the latent rows of a line of keys.
#[inline(always)]
fn latent_of<S: Simd, E: Element>(
    s: S,
    kv: &Pair<E>,
    geometry: Geometry,
    pages: &[u32],
    d: usize,
    line: usize,
) -> S::F {
    let lines_per_page = geometry.page_tokens / LANES;
    let region = kv.keys.region(geometry, pages[line / lines_per_page], 0);
    let line = line % lines_per_page;
    region.key(s, geometry, d, line, region.key_scale(s, geometry, d, line))
}

/// Scores of `N` queries with the keys of `pages` from line `base` on, lines of sixteen keys per query.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "several slices are indexed alike")]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
fn scores<S: Simd, E: Element, const N: usize>(
    s: S,
    kv: &Pair<E>,
    geometry: Geometry,
    head: usize,
    pages: &[u32],
    q: [&[f32]; N],
    scoring: &Scoring<'_>,
    base: usize,
    scores: &mut [Line],
) {
    let lines = scores.len() / N;
    let lines_per_page = geometry.page_tokens / LANES;
    let dim = geometry.head_dim;
    let q: [&[f32]; N] = std::array::from_fn(|i| &q[i][..dim]);
    for line in 0..lines {
        let region = kv.keys.region(geometry, pages[(base + line) / lines_per_page], head);
        let first = (base + line) % lines_per_page;
        let mut acc = [s.splat(0.0); N];
        for span in (0..dim).step_by(E::SPAN) {
            let scale = region.key_scale(s, geometry, span, first);
            let len = E::SPAN.min(dim - span);
            let q: [&[f32]; N] = std::array::from_fn(|i| &q[i][span..][..len]);
            for d in 0..len {
                let key = region.key(s, geometry, span + d, first, scale);
                for i in 0..N {
                    acc[i] = s.fma(s.splat(q[i][d]), key, acc[i]);
                }
            }
        }
        for i in 0..N {
            let mut score = s.mul(acc[i], s.splat(scoring.scale));
            if let Some(cap) = scoring.softcap {
                score = s.mul(s.splat(cap), tanh(s, s.div(score, s.splat(cap))));
            }
            s.store(score, &mut scores[i * lines + line].0);
        }
    }
}

/// Turns the scores that are seen into `e^(score - max)` and the rest into zeros; returns the maximum and the sum, in
/// both of which the sink counts as one more score.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [Line], seen: Range<usize>, sink: Option<f32>) -> (f32, f32) {
    let n = seen.end;
    let used = n.div_ceil(LANES);
    if !n.is_multiple_of(LANES) {
        scores[used - 1].0[n % LANES..].fill(f32::NEG_INFINITY);
    }
    for (line, first) in scores.iter_mut().zip((0..seen.start).step_by(LANES)) {
        line.0[..(seen.start - first).min(LANES)].fill(f32::NEG_INFINITY);
    }
    let mut max = s.splat(f32::NEG_INFINITY);
    for line in &scores[..used] {
        max = s.max(max, s.load(&line.0));
    }
    if let Some(sink) = sink {
        max = s.max(max, s.splat(sink));
    }
    let largest = s.max_lane(max);
    let (shift, mut sum) = (s.splat(largest), s.splat(0.0));
    for line in &mut scores[..used] {
        let p = exp(s, s.sub(s.load(&line.0), shift));
        sum = s.add(sum, p);
        s.store(p, &mut line.0);
    }
    scores[used..].fill(Line([0.0; LANES]));
    let mut sum = s.sum(sum);
    if let Some(sink) = sink {
        sum += s.max_lane(exp(s, s.splat(sink - largest)));
    }
    (largest, sum)
}

/// Adds `p * value` of the keys `seen[i]` to sixteen columns of the sum of each query, where `p` begins at key `skipped`. The
/// keys that all queries see are walked together, the rest by each query alone: a key that a query must not see cannot
/// touch its sum, not even with a NaN.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
fn weighted<S: Simd, E: Element, const N: usize>(
    s: S,
    kv: &Pair<E>,
    geometry: Geometry,
    head: usize,
    pages: &[u32],
    p: [&[f32]; N],
    seen: &[Range<usize>; N],
    skipped: usize,
    column: usize,
    sums: &mut [Line],
) {
    let tokens = geometry.page_tokens;
    let mut acc = [s.splat(0.0); N];
    for i in 0..N {
        acc[i] = s.load(&sums[i].0);
    }
    let from = seen.iter().fold(0, |hi, keys| hi.max(keys.start));
    let to = seen.iter().fold(usize::MAX, |lo, keys| lo.min(keys.end)).max(from);
    for i in 0..N {
        for key in seen[i].start..from.min(seen[i].end) {
            acc[i] = s.fma(
                s.splat(p[i][key - skipped]),
                value_of(s, kv, geometry, head, pages, key, column),
                acc[i],
            );
        }
    }
    let mut key = from;
    while key < to {
        let (region, slot) = (kv.values.region(geometry, pages[key / tokens], head), key % tokens);
        let here = (tokens - slot).min(to - key);
        let rows = region.cells[slot * geometry.padded..].chunks_exact(geometry.padded);
        let p: [&[f32]; N] = std::array::from_fn(|i| &p[i][key - skipped..][..here]);
        for (j, row) in rows.take(here).enumerate() {
            let value = region.value(s, geometry, row, slot + j, column);
            for i in 0..N {
                acc[i] = s.fma(s.splat(p[i][j]), value, acc[i]);
            }
        }
        key += here;
    }
    for i in 0..N {
        for key in to..seen[i].end {
            acc[i] = s.fma(
                s.splat(p[i][key - skipped]),
                value_of(s, kv, geometry, head, pages, key, column),
                acc[i],
            );
        }
        s.store(acc[i], &mut sums[i].0);
    }
}

/// Sixteen columns of the value of one key.
#[inline(always)]
fn value_of<S: Simd, E: Element>(
    s: S,
    kv: &Pair<E>,
    geometry: Geometry,
    head: usize,
    pages: &[u32],
    key: usize,
    column: usize,
) -> S::F {
    let (page, slot) = (pages[key / geometry.page_tokens], key % geometry.page_tokens);
    let region = kv.values.region(geometry, page, head);
    region.value(s, geometry, &region.cells[slot * geometry.padded..], slot, column)
}
