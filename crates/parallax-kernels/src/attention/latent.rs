//! Attention over compressed keys and values: multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)
//! in its absorbed form.
//!
//! A token's cache is one latent row: R compressed values, which serve all heads as key and as value, and then P
//! rotated key elements. The heads' own key matrices are multiplied into the queries, their value matrices into the
//! result, both by the caller. The store is the key half of the ordinary one with a single head of R + P elements:
//! nothing is kept twice.

use std::cell::RefCell;

use super::core::Queries;
use super::store::{Element, Geometry, Pair, with_pair};
use super::tiles::{Columns, dots, score, weigh};
use super::{KvFormat, KvPages, Paging, ROW_BLOCK, RUNS, Scoring, runs_of_rows};
use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len};
use crate::parallel::{Shared, share, task_count};
use crate::pool;
use crate::simd::{LANES, Line, Simd};

/// One layer's latent rows, a whole number of pages.
#[derive(Debug, Clone)]
pub struct LatentPages(KvPages);

impl LatentPages {
    /// Zeroed pages of `page_tokens` tokens (a multiple of 16) with rows of `width` (R + P) elements.
    ///
    /// # Errors
    /// Sizes that no store has.
    pub fn new(
        format: KvFormat,
        n_pages: usize,
        page_tokens: usize,
        width: usize,
    ) -> Result<Self, KernelError> {
        KvPages::keys(format, n_pages, page_tokens, width).map(Self)
    }

    /// Bytes in memory when all pages are written.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// Copies page `from` over page `to`.
    ///
    /// # Errors
    /// A page that the store does not have.
    pub fn copy_page(&mut self, from: usize, to: usize) -> Result<(), KernelError> {
        self.0.copy_page(from, to)
    }
}

/// Stores `new` [T, R + P]: row `t` at position `rows[t].n_keys - 1` of its sequence.
///
/// # Errors
/// When the lengths do not fit together or a row leaves its sequence's pages.
pub fn append_latent(latents: &mut LatentPages, paging: &Paging<'_>, new: &[f32]) -> Result<(), KernelError> {
    latents.0.append("append_latent", paging, new, None)
}

/// Attention of `q` [T, Q, R + P] over the latent rows, into `out` [T, Q, R]: the weighted sum of the first
/// `value_width` (R) elements. A row's result depends on nothing but its query and the rows before it.
///
/// # Errors
/// When the lengths do not fit together, `value_width` is 0 or above the width, or a row leaves its pages.
pub fn latent_attention(
    q: &[f32],
    n_heads: usize,
    value_width: usize,
    paging: &Paging<'_>,
    latents: &LatentPages,
    scale: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let op = "latent_attention";
    let (kv, rows, width) = (&latents.0, paging.rows, latents.0.geometry.head_dim);
    kv.check(op, paging)?;
    if n_heads == 0 || value_width == 0 || value_width > width {
        let rule = "must be positive and at most the width of a latent row";
        return Err(KernelError::BadDimension { op, what: "heads or value width", got: value_width, rule });
    }
    check_len(op, "q", rows.len() * n_heads * width, q.len())?;
    check_len(op, "out", rows.len() * n_heads * value_width, out.len())?;
    // All heads read the same rows; they are cut into groups so that one row alone keeps several threads busy.
    let group = (1..=GROUP.min(n_heads)).rev().find(|g| n_heads.is_multiple_of(*g)).unwrap_or(1);
    let mut blocks = RUNS.take();
    runs_of_rows(&mut blocks, rows.len(), ROW_BLOCK, |a, b| rows[a].seq == rows[b].seq);
    let keys: usize = rows.iter().map(|r| r.n_keys).sum();
    let items = blocks.len() * (n_heads / group);
    let tasks = task_count(items, keys * group * width * 2 / blocks.len().max(1));
    let out = Shared::new(out);
    let (isa, scoring) = (dispatch::current(), Scoring::scaled(scale));
    pool::run(tasks, |task| {
        for item in share(items, tasks, task) {
            let (block, head) = (item / (n_heads / group), item % (n_heads / group));
            let (range, scoring) = (blocks[block].clone(), &scoring);
            let queries = Queries { q, paging, range, n_heads, head, group, scoring };
            attend_latent(isa, kv, &queries, value_width, &out);
        }
    });
    RUNS.set(blocks);
    Ok(())
}

/// Query heads that one task takes together.
const GROUP: usize = 8;

simd_kernel! {
    /// Writes the outputs [.., R] of `queries`, all of one sequence, which no other task may write.
    fn attend_latent(
        s;
        kv: &KvPages,
        queries: &Queries<'_>,
        value_width: usize,
        out: &Shared<'_, f32>,
    ) {
        with_pair!(&kv.data, pair => tiles(s, pair, kv.geometry, queries, value_width, out));
    }
}

/// What a thread keeps between runs.
#[derive(Default)]
struct Scratch {
    /// The queries of a tile side by side.
    queries: Vec<f32>,
    /// Their scores, then weights.
    scores: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

#[inline(always)]
fn tiles<S: Simd, E: Element>(
    s: S,
    kv: &Pair<E>,
    geometry: Geometry,
    queries: &Queries<'_>,
    value_width: usize,
    out: &Shared<'_, f32>,
) {
    let mut scratch = SCRATCH.with(|s| std::mem::take(&mut *s.borrow_mut()));
    let mut first = 0;
    while first < queries.len() {
        first += if queries.len() - first >= 4 {
            tile::<S, E, 4>(s, kv, geometry, queries, first, value_width, out, &mut scratch)
        } else {
            tile::<S, E, 1>(s, kv, geometry, queries, first, value_width, out, &mut scratch)
        };
    }
    SCRATCH.with(|s| *s.borrow_mut() = scratch);
}

/// `N` queries from `first` on; returns `N`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "several slices are indexed alike")]
#[expect(clippy::too_many_arguments, reason = "the pieces of one kernel")]
fn tile<S: Simd, E: Element, const N: usize>(
    s: S,
    kv: &Pair<E>,
    geometry: Geometry,
    queries: &Queries<'_>,
    first: usize,
    value_width: usize,
    out: &Shared<'_, f32>,
    scratch: &mut Scratch,
) -> usize {
    let n_keys: [usize; N] = std::array::from_fn(|i| queries.n_keys(first + i));
    let (fewest, most) = n_keys.iter().fold((usize::MAX, 0), |(lo, hi), &n| (lo.min(n), hi.max(n)));
    let lines = most.div_ceil(LANES);
    let (pages, per_page) = (queries.pages(queries.range.start), geometry.page_tokens / LANES);
    let region = |line: usize| (kv.keys.region(geometry, pages[line / per_page], 0), line % per_page);
    queries.columns(first..first + N, geometry.head_dim, &mut scratch.queries);
    let (q, scratch) = (Columns { elements: &scratch.queries, n: N }, &mut scratch.scores);
    scratch.resize((lines * N).max(scratch.len()), Line([0.0; LANES]));
    for line in 0..lines {
        let (region, at) = region(line);
        let mut sums = [s.splat(0.0); N];
        dots(s, geometry, region, at, q, 0, &mut sums);
        for i in 0..N {
            s.store(score(s, sums[i], queries.scoring), &mut scratch[i * lines + line].0);
        }
    }
    let mut inverse = [0.0f32; N];
    for i in 0..N {
        let (_, sum) = weigh(s, &mut scratch[i * lines..(i + 1) * lines], 0..n_keys[i]);
        inverse[i] = 1.0 / s.sum(sum);
    }
    let p: [&[Line]; N] = std::array::from_fn(|i| &scratch[i * lines..(i + 1) * lines]);
    let rows: [&mut [f32]; N] = std::array::from_fn(|i| {
        let start = queries.index(first + i) * value_width;
        // SAFETY: one task owns a query, hence its output.
        unsafe { out.slice(start..start + value_width) }
    });
    let latent = |d: usize, line: usize| {
        let (region, at) = region(line);
        region.key(s, geometry, d, at, region.key_scale(s, geometry, d, at))
    };
    for d in 0..value_width {
        // Lanes are keys. Lines that all queries see whole are read once for all of them.
        let mut acc = [s.splat(0.0); N];
        for line in 0..fewest / LANES {
            let value = latent(d, line);
            for i in 0..N {
                acc[i] = s.fma(s.load(&p[i][line].0), value, acc[i]);
            }
        }
        for i in 0..N {
            for line in fewest / LANES..n_keys[i].div_ceil(LANES) {
                // A key that the query must not see counts as zero, whatever lies there.
                let mut value = [0.0; LANES];
                s.store(latent(d, line), &mut value);
                value[(n_keys[i] - line * LANES).min(LANES)..].fill(0.0);
                acc[i] = s.fma(s.load(&p[i][line].0), s.load(&value), acc[i]);
            }
            rows[i][d] = s.sum(acc[i]) * inverse[i];
        }
    }
    N
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::RowRef;
    use crate::reference::attention::{Shape, causal};
    use crate::testing::{assert_close, bits, noise, same_at_every_level, with_threads};

    /// (Q, R, P): whole lines, and none.
    const SHAPES: [(usize, usize, usize); 3] = [(4, 32, 16), (9, 24, 8), (3, 7, 2)];

    /// Two sequences of 37 and 5 rows in steps of `chunk`; their pages lie scattered and hold NaN at first.
    fn run(
        format: KvFormat,
        (heads, r, p): (usize, usize, usize),
        chunk: usize,
        page_tokens: usize,
    ) -> Vec<f32> {
        let width = r + p;
        let lengths = [37usize, 5];
        let (q, c) = inputs((heads, r, p));
        let mut tables = vec![Vec::new(), Vec::new()];
        let n_pages: usize = lengths.iter().map(|n| n.div_ceil(page_tokens)).sum();
        let mut free = (0..n_pages as u32).rev();
        for (table, len) in tables.iter_mut().zip(lengths) {
            table.extend(free.by_ref().take(len.div_ceil(page_tokens)));
        }
        let mut latents = LatentPages::new(format, n_pages, page_tokens, width).unwrap();
        latents.0.poison();
        let mut out = vec![0.0; 42 * heads * r];
        for from in (0..37).step_by(chunk) {
            let picked: Vec<(usize, usize)> = lengths
                .iter()
                .enumerate()
                .flat_map(|(seq, len)| (from..(from + chunk).min(*len)).map(move |at| (seq, at)))
                .collect();
            let rows: Vec<RowRef> =
                picked.iter().map(|(seq, at)| RowRef { seq: *seq, n_keys: at + 1 }).collect();
            let take = |v: &[f32], width: usize| -> Vec<f32> {
                picked.iter().flat_map(|(s, at)| v[(s * 37 + at) * width..][..width].to_vec()).collect()
            };
            let paging = Paging { rows: &rows, tables: &tables };
            append_latent(&mut latents, &paging, &take(&c, width)).unwrap();
            let mut part = vec![0.0; rows.len() * heads * r];
            latent_attention(&take(&q, heads * width), heads, r, &paging, &latents, 0.3, &mut part).unwrap();
            for ((s, at), part) in picked.iter().zip(part.chunks_exact(heads * r)) {
                out[(s * 37 + at) * heads * r..][..heads * r].copy_from_slice(part);
            }
        }
        out
    }

    fn inputs((heads, r, p): (usize, usize, usize)) -> (Vec<f32>, Vec<f32>) {
        (noise(42 * heads * (r + p), 1), noise(42 * (r + p), 2))
    }

    #[test]
    fn latents_serve_as_keys_and_as_values() {
        for shape @ (heads, r, p) in SHAPES {
            let got = same_at_every_level(|| run(KvFormat::F32, shape, 37, 16));
            let (q, c) = inputs(shape);
            let one = Shape { n_heads: heads, n_kv_heads: 1, head_dim: r + p };
            let all = causal(&q, &c, &c, one, &[0, 37, 42], &Scoring::scaled(0.3));
            let expected: Vec<f64> = all.chunks_exact(r + p).flat_map(|head| head[..r].to_vec()).collect();
            assert_close(&got, &expected, 2e-6);
        }
    }

    #[test]
    fn chunks_pages_and_threads_do_not_change_a_bit() {
        for (shape, format) in SHAPES.into_iter().flat_map(|shape| KvFormat::ALL.map(|f| (shape, f))) {
            let expected = bits(&same_at_every_level(|| run(format, shape, 37, 16)));
            for (chunk, page_tokens) in [(1, 16), (5, 32), (17, 48)] {
                let got = bits(&run(format, shape, chunk, page_tokens));
                assert_eq!(got, expected, "{format} {chunk} {page_tokens}");
            }
            assert_eq!(with_threads(3, || bits(&run(format, shape, 37, 16))), expected);
        }
    }

    #[test]
    fn a_rounded_store_is_an_exact_store_of_rounded_rows() {
        for shape @ (heads, r, p) in SHAPES {
            let (q, c) = inputs(shape);
            for format in [KvFormat::Bf16, KvFormat::Q8] {
                let one = Shape { n_heads: heads, n_kv_heads: 1, head_dim: r + p };
                let rounded = crate::testing::rounded(format, &c, r + p);
                let all = causal(&q, &rounded, &rounded, one, &[0, 37, 42], &Scoring::scaled(0.3));
                let expected: Vec<f64> =
                    all.chunks_exact(r + p).flat_map(|head| head[..r].to_vec()).collect();
                assert_close(&run(format, shape, 37, 16), &expected, 2e-6);
            }
        }
    }

    #[test]
    fn misfits_are_refused() {
        let mut latents = LatentPages::new(KvFormat::F32, 1, 16, 4).unwrap();
        let tables = [vec![0u32]];
        let beyond = Paging { rows: &[RowRef { seq: 0, n_keys: 17 }], tables: &tables };
        assert!(append_latent(&mut latents, &beyond, &[0.0; 4]).is_err());
        let paging = Paging { rows: &[RowRef { seq: 0, n_keys: 1 }], tables: &tables };
        assert!(append_latent(&mut latents, &paging, &[0.0; 3]).is_err());
        let mut out = [0.0; 5];
        assert!(latent_attention(&[0.0; 4], 1, 5, &paging, &latents, 1.0, &mut out).is_err());
        assert!(latent_attention(&[0.0; 4], 1, 3, &paging, &latents, 1.0, &mut out[..3]).is_ok());
        assert!(LatentPages::new(KvFormat::Q8, 1, 20, 4).is_err());
    }
}
