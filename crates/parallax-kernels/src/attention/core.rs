//! The attention of a run of rows to the pages of their sequences, for one key-value head.
//!
//! Keys are taken in blocks that begin at multiples of [`KEY_BLOCK`], in order, with a running maximum (FlashAttention,
//! Dao et al. 2022, arXiv:2205.14135): a block's scores, their exponentials below the block's own maximum and the weighted
//! values are computed alone and then merged into the row's sums. All queries that read the same pages of a block, of
//! one sequence or of several, take it together, while it is in the cache. Every sum runs over keys (or head elements)
//! in order and blocks do not move, so a row does not notice its neighbours.

use std::cell::RefCell;
use std::ops::Range;

use super::store::{Element, Geometry, Pair, with_pair};
use super::tiles::{Columns, Values, View, score_line, weigh, weighted_column, widen};
use super::{KvPages, Paging, Scoring};
use crate::dispatch::simd_kernel;
use crate::math;
use crate::parallel::Shared;
use crate::simd::{LANES, Line, Simd, exp_below, flat, write};

/// Keys that are scored, weighted and merged at a time.
pub(super) const KEY_BLOCK: usize = 128;
/// Scores of one query in a block.
pub(super) const BLOCK_LINES: usize = KEY_BLOCK / LANES;
/// Queries from which on a block of a rounded store is widened once for all of them.
const WIDEN: usize = 12;

/// The queries of one run of rows that read one key-value head.
pub(super) struct Queries<'a> {
    /// [T, Q, D]
    pub q: &'a [f32],
    pub paging: &'a Paging<'a>,
    /// The run.
    pub range: Range<usize>,
    pub n_heads: usize,
    /// The key-value head.
    pub head: usize,
    /// Query heads per key-value head.
    pub group: usize,
    pub scoring: &'a Scoring<'a>,
}

impl Queries<'_> {
    pub(super) fn len(&self) -> usize {
        self.range.len() * self.group
    }

    /// Keys seen by query `i`.
    pub(super) fn n_keys(&self, i: usize) -> usize {
        self.paging.rows[self.range.start + i / self.group].n_keys
    }

    /// Pages of row `t`'s sequence.
    pub(super) fn pages(&self, t: usize) -> &[u32] {
        &self.paging.tables[self.paging.rows[t].seq]
    }

    /// Index of query `i` in [T, Q].
    pub(super) fn index(&self, i: usize) -> usize {
        (self.range.start + i / self.group) * self.n_heads + self.head * self.group + i % self.group
    }

    /// Writes the queries `which` side by side, [D, n].
    pub(super) fn columns(&self, which: Range<usize>, dim: usize, to: &mut Vec<f32>) {
        let n = which.len();
        to.clear();
        to.resize(n * dim, 0.0);
        for (at, i) in which.enumerate() {
            let query = &self.q[self.index(i) * dim..][..dim];
            to[at..].iter_mut().step_by(n).zip(query).for_each(|(to, v)| *to = *v);
        }
    }

    /// Keys that row `t` sees.
    fn seen(&self, t: usize) -> Range<usize> {
        let n_keys = self.paging.rows[t].n_keys;
        self.scoring.first_key(n_keys)..n_keys
    }

    /// Keys of `block` that row `t` sees.
    fn seen_of(&self, t: usize, block: &Range<usize>) -> Range<usize> {
        let seen = self.seen(t);
        seen.start.max(block.start)..seen.end.min(block.end)
    }

    /// End of the rows from `row` on that see keys of `block` and find them in the same pages; `row` when it sees none.
    fn alike(&self, row: usize, block: &Range<usize>, page_tokens: usize) -> usize {
        let pages = |t: usize, keys: usize| {
            self.pages(t).get(block.start / page_tokens..keys.min(block.end).div_ceil(page_tokens))
        };
        let keys = self.paging.rows[row].n_keys;
        let others = (row..self.range.end).take_while(|&t| {
            let most = keys.max(self.paging.rows[t].n_keys);
            !self.seen_of(t, block).is_empty()
                && (self.paging.rows[t].seq == self.paging.rows[row].seq
                    || pages(t, most).is_some() && pages(t, most) == pages(row, most))
        });
        row + others.count()
    }
}

/// What a thread keeps between runs.
struct Scratch {
    /// All queries side by side, [D, n].
    queries: Vec<f32>,
    /// Keys of the block that every query sees, counted from its first.
    seen: Vec<Range<usize>>,
    /// Scores, then weights, of every query in a block.
    scores: Vec<Line>,
    /// Weighted values so far of every query, [columns] lines each.
    values: Vec<Line>,
    /// Sum so far of the exponentials of every query.
    sums: Vec<Line>,
    /// Largest score so far of every query.
    max: Vec<f32>,
    /// Factors of what every query has so far and of what the block adds.
    factors: Vec<[f32; 2]>,
    /// A block of a rounded store, widened.
    wide: Option<(Geometry, Pair<f32>)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::NEW) };
}

impl Scratch {
    const NEW: Self = Self {
        queries: Vec::new(),
        seen: Vec::new(),
        scores: Vec::new(),
        values: Vec::new(),
        sums: Vec::new(),
        max: Vec::new(),
        factors: Vec::new(),
        wide: None,
    };

    /// Nothing seen yet but the sinks.
    fn start(&mut self, queries: &Queries<'_>, dim: usize) {
        let (n, columns, zero) = (queries.len(), dim.div_ceil(LANES), Line([0.0; LANES]));
        queries.columns(0..n, dim, &mut self.queries);
        self.seen.clear();
        self.seen.resize(n, 0..0);
        self.scores.resize((n * BLOCK_LINES).max(self.scores.len()), zero);
        for (lines, len) in [(&mut self.values, n * columns), (&mut self.sums, n)] {
            lines.clear();
            lines.resize(len, zero);
        }
        self.max.clear();
        self.max.resize(n, f32::NEG_INFINITY);
        self.factors.resize(n, [0.0; 2]);
        if let Some(sinks) = queries.scoring.sinks {
            for i in 0..n {
                self.max[i] = sinks[queries.index(i) % queries.n_heads];
                self.sums[i].0[0] = 1.0;
            }
        }
    }
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
        let mut scratch = SCRATCH.with(|s| s.replace(Scratch::NEW));
        let dim = kv.geometry.head_dim;
        scratch.start(queries, dim);
        with_pair!(&kv.data, pair => blocks(s, pair, kv.geometry, queries, &mut scratch));
        finish(s, queries, dim, &scratch, out, lse);
        SCRATCH.with(|s| *s.borrow_mut() = scratch);
    }
}

/// Merges all keys of all queries, block by block.
#[inline(always)]
fn blocks<S: Simd, E: Element>(
    s: S,
    kv: &Pair<E>,
    geometry: Geometry,
    queries: &Queries<'_>,
    scratch: &mut Scratch,
) {
    let rows = queries.range.clone();
    let first = rows.clone().fold(usize::MAX, |lo, t| lo.min(queries.seen(t).start)) / KEY_BLOCK;
    let last = rows.clone().fold(0, |hi, t| hi.max(queries.seen(t).end)).div_ceil(KEY_BLOCK);
    for start in (first..last).map(|block| block * KEY_BLOCK) {
        let block = start..start + KEY_BLOCK;
        let mut row = rows.start;
        while row < rows.end {
            let end = queries.alike(row, &block, geometry.page_tokens);
            if end == row {
                row += 1;
                continue;
            }
            let keys = (row..end).map(|t| queries.seen_of(t, &block));
            let keys = keys.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).expect("a row or more");
            let view = View { kv, geometry, head: queries.head, pages: queries.pages(row), origin: 0 };
            let lines = keys.start / LANES..keys.end.div_ceil(LANES);
            if E::ROUNDED && (end - row) * queries.group >= WIDEN {
                let mut wide = scratch.wide.take().filter(|(g, _)| g.head_dim == geometry.head_dim);
                let (geometry, pair) =
                    wide.get_or_insert_with(|| Pair::block(geometry.head_dim, BLOCK_LINES));
                widen(s, &view, lines.clone(), start / LANES, *geometry, pair);
                let pages: [u32; BLOCK_LINES] = std::array::from_fn(|i| i as u32);
                let view = View { kv: &*pair, geometry: *geometry, head: 0, pages: &pages, origin: start };
                merge(s, &view, queries, row..end, &block, lines, scratch);
                scratch.wide = wide;
            } else {
                merge(s, &view, queries, row..end, &block, lines, scratch);
            }
            row = end;
        }
    }
}

/// Merges the keys of one block, `lines` being those of which any of the `rows` sees a key; all rows see some.
#[inline(always)]
fn merge<S: Simd, E: Element>(
    s: S,
    view: &View<'_, E>,
    queries: &Queries<'_>,
    rows: Range<usize>,
    block: &Range<usize>,
    lines: Range<usize>,
    scratch: &mut Scratch,
) {
    let Scratch { queries: q, seen, scores, values, sums, max, factors, .. } = scratch;
    let (geometry, group, first) = (view.geometry, queries.group, block.start / LANES);
    let mine = (rows.start - queries.range.start) * group..(rows.end - queries.range.start) * group;
    let q = Columns { elements: q, n: queries.len() };
    let (mut here, mut next) = ([None; BLOCK_LINES], [None; BLOCK_LINES]);
    for line in lines {
        let both = view.line(line).expect("rows were checked against their pages");
        score_line(s, geometry, both, q, mine.clone(), queries.scoring, line - first, scores);
        here[line - first] = Some(both[1]);
        if let Some([keys, _]) = view.line(line + BLOCK_LINES) {
            next[line - first] = Some(keys);
        }
    }
    let scores = &mut scores[mine.start * BLOCK_LINES..mine.end * BLOCK_LINES];
    let (seen, sums) = (&mut seen[mine.clone()], &mut sums[mine.clone()]);
    let (max, factors) = (&mut max[mine.clone()], &mut factors[mine.clone()]);
    for (row, t) in rows.enumerate() {
        let keys = queries.seen_of(t, block);
        let keys = keys.start - block.start..keys.end - block.start;
        for i in row * group..(row + 1) * group {
            let (largest, sum) = weigh(s, &mut scores[i * BLOCK_LINES..][..BLOCK_LINES], keys.clone());
            // One of both is the maximum of both and keeps its sums as they are.
            let below = f32::min(max[i] - largest, largest - max[i]);
            let below = s.max_lane(exp_below(s, s.splat(below)));
            factors[i] = if largest > max[i] { [below, 1.0] } else { [1.0, below] };
            max[i] = max[i].max(largest);
            let kept = s.mul(s.load(&sums[i].0), s.splat(factors[i][0]));
            s.store(s.fma(sum, s.splat(factors[i][1]), kept), &mut sums[i].0);
            seen[i] = keys.clone();
        }
    }
    let columns = geometry.head_dim.div_ceil(LANES);
    let values = &mut values[mine.start * columns..mine.end * columns];
    let block = Values { lines: here, next };
    for column in 0..columns {
        weighted_column(s, geometry, &block, seen, flat(scores), factors, column, values);
    }
}

/// Divides by the sums.
#[inline(always)]
fn finish<S: Simd>(
    s: S,
    queries: &Queries<'_>,
    dim: usize,
    scratch: &Scratch,
    out: &Shared<'_, f32>,
    lse: Option<&Shared<'_, f32>>,
) {
    for (i, values) in scratch.values.chunks_exact(dim.div_ceil(LANES)).enumerate() {
        let (at, sum) = (queries.index(i), s.sum(s.load(&scratch.sums[i].0)));
        // SAFETY: one task owns a query, hence its output.
        let row = unsafe { out.slice(at * dim..(at + 1) * dim) };
        for (column, line) in values.iter().enumerate() {
            write(s, row, column * LANES, s.mul(s.load(&line.0), s.splat(1.0 / sum)));
        }
        if let Some(lse) = lse {
            // SAFETY: one task owns a query, hence its entry.
            let entry = unsafe { lse.slice(at..at + 1) };
            entry[0] = scratch.max[i] + math::ln(f64::from(sum)) as f32;
        }
    }
}
