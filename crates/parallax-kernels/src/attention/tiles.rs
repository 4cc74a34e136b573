//! The inner loops of attention: a few queries against sixteen keys, or against sixteen columns of a block's values.

use std::ops::Range;

use super::Scoring;
use super::core::{BLOCK_LINES, KEY_BLOCK};
use super::store::{Element, Geometry, Pair, Region};
use crate::simd::{LANES, Line, Simd, exp_below, tanh};

/// One head's keys and values as some rows see them.
pub(super) struct View<'a, E> {
    pub kv: &'a Pair<E>,
    pub geometry: Geometry,
    pub head: usize,
    /// Pages from key `origin` on.
    pub pages: &'a [u32],
    pub origin: usize,
}

/// Sixteen keys or values: the region that holds them, and which sixteen of it they are.
#[derive(Clone, Copy)]
pub(super) struct Sixteen<'a, E> {
    region: Region<'a, E>,
    line: usize,
}

/// The keys and the values of a line.
pub(super) type Both<'a, E> = [Sixteen<'a, E>; 2];

impl<'a, E: Element> View<'a, E> {
    /// Keys and values of line `line`, when there are pages for them.
    #[inline(always)]
    pub(super) fn line(&self, line: usize) -> Option<Both<'a, E>> {
        let (line, per_page) = (line - self.origin / LANES, self.geometry.page_tokens / LANES);
        let (page, line) = (*self.pages.get(line / per_page)?, line % per_page);
        let keys = self.kv.keys.region(self.geometry, page, self.head);
        let values = self.kv.values.region(self.geometry, page, self.head);
        Some([Sixteen { region: keys, line }, Sixteen { region: values, line }])
    }
}

impl<E: Element> Sixteen<'_, E> {
    /// Sixteen columns from `16 * column` on of value `j`.
    #[inline(always)]
    fn value<S: Simd>(&self, s: S, geometry: Geometry, j: usize, column: usize) -> Option<S::F> {
        self.region.value(s, geometry, self.line * LANES + j, column)
    }
}

/// Asks for cells that are wanted soon.
#[inline(always)]
fn fetch<S: Simd, E>(s: S, cells: &[[E; LANES]]) {
    for line in cells.chunks((64 / size_of::<[E; LANES]>()).max(1)) {
        s.prefetch(&line[0][0]);
    }
}

/// Queries of the next tile, of `left`. The sums of a tile fit the registers and leave none of their units idle.
#[inline(always)]
fn height<S: Simd>(left: usize) -> usize {
    match left {
        12.. if S::TILE >= 24 => 12,
        0..=4 => left,
        5 => 3,
        7 | 8 => 4,
        _ => 6,
    }
}

/// Runs `$tile!(n)` of the height for so many queries that are left, and gives n.
macro_rules! by_height {
    ($tile:ident, $left:expr) => {
        match height::<S>($left) {
            12 => $tile!(12),
            6 => $tile!(6),
            4 => $tile!(4),
            3 => $tile!(3),
            2 => $tile!(2),
            _ => $tile!(1),
        }
    };
}

/// Scores of the queries `mine` of `queries` [D, n] with the sixteen keys of a line, into line `to` of each query's block.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
pub(super) fn score_line<S: Simd, E: Element>(
    s: S,
    geometry: Geometry,
    [keys, values]: Both<'_, E>,
    queries: Columns<'_>,
    mine: Range<usize>,
    scoring: &Scoring<'_>,
    to: usize,
    scores: &mut [Line],
) {
    // The values of these keys are wanted next.
    let wanted = values.line * geometry.padded..(values.line + 1) * geometry.padded;
    fetch(s, values.region.cells.as_chunks().0.get(wanted).unwrap_or_default());
    let mut first = mine.start;
    while first < mine.end {
        let scores = &mut scores[first * BLOCK_LINES..];
        macro_rules! tile {
            ($n:literal) => {{
                let mut sums = [s.splat(0.0); $n];
                dots(s, geometry, keys.region, keys.line, queries, first, &mut sums);
                for i in 0..$n {
                    s.store(score(s, sums[i], scoring), &mut scores[i * BLOCK_LINES + to].0);
                }
                $n
            }};
        }
        first += by_height!(tile, mine.end - first);
    }
}

/// A product as a score.
#[inline(always)]
pub(super) fn score<S: Simd>(s: S, product: S::F, scoring: &Scoring<'_>) -> S::F {
    let score = s.mul(product, s.splat(scoring.scale));
    match scoring.softcap {
        Some(cap) => s.mul(s.splat(cap), tanh(s, s.div(score, s.splat(cap)))),
        None => score,
    }
}

/// Queries side by side, [D, n].
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    pub elements: &'a [f32],
    pub n: usize,
}

/// Adds the products of `N` queries from `first` on with the sixteen keys of line `line` of a region.
#[inline(always)]
pub(super) fn dots<S: Simd, E: Element, const N: usize>(
    s: S,
    geometry: Geometry,
    region: Region<'_, E>,
    line: usize,
    queries: Columns<'_>,
    first: usize,
    acc: &mut [S::F; N],
) {
    let (dim, per_page) = (geometry.head_dim, geometry.page_tokens / LANES);
    let lines = region.cells.as_chunks::<LANES>().0;
    let mut sums = *acc;
    for span in (0..dim).step_by(E::SPAN) {
        let scale = region.key_scale(s, geometry, span, line);
        let len = E::SPAN.min(dim - span);
        let rows = queries.elements[span * queries.n..].chunks_exact(queries.n).take(len);
        for (q, cells) in rows.zip(lines[span * per_page..].chunks_exact(per_page)) {
            let key = region.scaled(s, &cells[line], scale);
            let q: &[f32; N] = q[first..].first_chunk().expect("a tile lies within the queries");
            for i in 0..N {
                sums[i] = s.fma(s.splat(q[i]), key, sums[i]);
            }
        }
    }
    *acc = sums;
}

/// Turns the scores of a block that are `seen` into `e^(score - max)`; those beside them in their lines become zeros.
/// Returns the maximum and the sums in sixteen lanes.
#[inline(always)]
pub(super) fn weigh<S: Simd>(s: S, scores: &mut [Line], seen: Range<usize>) -> (f32, S::F) {
    let scores = &mut scores[..seen.end.div_ceil(LANES)];
    if let (Some(last), 1..) = (scores.last_mut(), seen.end % LANES) {
        last.0[seen.end % LANES..].fill(f32::NEG_INFINITY);
    }
    let scores = &mut scores[seen.start / LANES..];
    scores[0].0[..seen.start % LANES].fill(f32::NEG_INFINITY);
    let mut max = s.splat(f32::NEG_INFINITY);
    for line in scores.iter() {
        max = s.max(max, s.load(&line.0));
    }
    let largest = s.max_lane(max);
    let (shift, mut sum) = (s.splat(largest), s.splat(0.0));
    for line in scores {
        let p = exp_below(s, s.sub(s.load(&line.0), shift));
        sum = s.add(sum, p);
        s.store(p, &mut line.0);
    }
    (largest, sum)
}

/// A block's values, line by line, and the keys of the next block, which are wanted next.
pub(super) struct Values<'a, E> {
    pub lines: [Option<Sixteen<'a, E>>; BLOCK_LINES],
    pub next: [Option<Sixteen<'a, E>>; BLOCK_LINES],
}

/// Merges sixteen columns of the values of a block: what each query has so far and what it gains by its `weights` of the
/// keys that it has `seen`, by its `factors`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
pub(super) fn weighted_column<S: Simd, E: Element>(
    s: S,
    geometry: Geometry,
    block: &Values<'_, E>,
    seen: &[Range<usize>],
    weights: &[f32],
    factors: &[[f32; 2]],
    column: usize,
    values: &mut [Line],
) {
    let columns = geometry.head_dim.div_ceil(LANES);
    let mut first = 0;
    while first < seen.len() {
        let (weights, seen) = (&weights[first * KEY_BLOCK..], &seen[first..]);
        macro_rules! tile {
            ($n:literal) => {{
                let mut sums = [s.splat(0.0); $n];
                weighted(s, geometry, block, &seen[..$n], weights, column, first == 0, &mut sums);
                for i in 0..$n {
                    let to = &mut values[(first + i) * columns + column].0;
                    let [kept, added] = factors[first + i];
                    let kept = s.mul(s.load(to), s.splat(kept));
                    s.store(s.fma(sums[i], s.splat(added), kept), to);
                }
                $n
            }};
        }
        first += by_height!(tile, seen.len());
    }
}

/// Adds `weight * value` over the keys `seen[i]` of a block. The lines that all queries see whole are walked together, the
/// rest by each query alone: a key that a query must not see cannot touch its sum, not even with a NaN.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "several slices are indexed alike")]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
fn weighted<S: Simd, E: Element, const N: usize>(
    s: S,
    geometry: Geometry,
    block: &Values<'_, E>,
    seen: &[Range<usize>],
    weights: &[f32],
    column: usize,
    ahead: bool,
    acc: &mut [S::F; N],
) {
    let (mut from, mut to) = (0, KEY_BLOCK);
    for keys in seen {
        (from, to) = (from.max(keys.start.next_multiple_of(LANES)), to.min(keys.end / LANES * LANES));
    }
    let mut p: [&[[f32; LANES]]; N] = [&[]; N];
    for i in 0..N {
        p[i] = weights[i * KEY_BLOCK..][..KEY_BLOCK].as_chunks().0;
    }
    let mut sums = *acc;
    for i in 0..N {
        for key in seen[i].start..from.min(seen[i].end) {
            sums[i] = alone(s, geometry, block, key, column, p[i], sums[i]);
        }
    }
    for line in from / LANES..to / LANES {
        let Some(values) = block.lines[line] else { break };
        let next = if ahead { block.next[line] } else { None };
        let mut q: [&[f32; LANES]; N] = [&[0.0; LANES]; N];
        for i in 0..N {
            q[i] = &p[i][line];
        }
        if let Some(keys) = next {
            // Of a page of several lines this asks for the neighbours' keys, which come at their turn.
            let per_page = geometry.page_tokens / LANES;
            let at = (column * per_page + keys.line) * LANES;
            fetch(s, keys.region.cells.as_chunks().0.get(at..at + LANES).unwrap_or_default());
        }
        for j in 0..LANES {
            let Some(value) = values.value(s, geometry, j, column) else { break };
            for i in 0..N {
                sums[i] = s.fma(s.splat(q[i][j]), value, sums[i]);
            }
        }
    }
    for i in 0..N {
        for key in to.max(from)..seen[i].end {
            sums[i] = alone(s, geometry, block, key, column, p[i], sums[i]);
        }
    }
    *acc = sums;
}

/// Adds one key's value to one query's sum.
#[inline(always)]
fn alone<S: Simd, E: Element>(
    s: S,
    geometry: Geometry,
    block: &Values<'_, E>,
    key: usize,
    column: usize,
    p: &[[f32; LANES]],
    sum: S::F,
) -> S::F {
    let (line, j) = (key / LANES, key % LANES);
    match block.lines[line].and_then(|values| values.value(s, geometry, j, column)) {
        Some(value) => s.fma(s.splat(p[line][j]), value, sum),
        None => sum,
    }
}

/// Writes the lines `lines` of a view to `to`, a store of one head whose pages are lines, the first of which is line
/// `start`.
#[inline(always)]
pub(super) fn widen<S: Simd, E: Element>(
    s: S,
    view: &View<'_, E>,
    lines: Range<usize>,
    start: usize,
    geometry: Geometry,
    to: &mut Pair<f32>,
) {
    let (dim, columns) = (geometry.head_dim, geometry.padded / LANES);
    for line in lines {
        let Some([keys, values]) = view.line(line) else { break };
        if let Some([keys, values]) = view.line(line + BLOCK_LINES) {
            for next in [keys, values] {
                let wanted = next.line * geometry.padded..(next.line + 1) * geometry.padded;
                fetch(s, next.region.cells.as_chunks().0.get(wanted).unwrap_or_default());
            }
        }
        let (new_keys, new_values) = to.page_mut(geometry, line - start);
        for span in (0..dim).step_by(E::SPAN) {
            let scale = keys.region.key_scale(s, view.geometry, span, keys.line);
            let end = span.saturating_add(E::SPAN).min(dim);
            for (d, new) in (span..end).zip(&mut new_keys[span..end]) {
                let key = keys.region.key(s, view.geometry, d, keys.line, scale);
                s.store(key, new);
            }
        }
        for (at, new) in new_values.iter_mut().enumerate() {
            if let Some(value) = values.value(s, view.geometry, at / columns, at % columns) {
                s.store(value, new);
            }
        }
    }
}
