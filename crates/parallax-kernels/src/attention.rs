//! Causal grouped-query attention: over a paged key-value store (inference) and over packed sequences (training).
//!
//! Both run the same core, which sees one row's keys in order from position 0 and nothing else, so prefill, decode,
//! chunking, batching and training give a row the same bits.

mod backward;
mod core;
pub mod latent;
mod store;
mod tiles;

use std::cell::RefCell;
use std::ops::Range;

pub use self::backward::causal_attention_backward;
use self::core::{Queries, attend};
pub use self::store::{KvFormat, KvPages, Paging};
use crate::dispatch;
use crate::error::{KernelError, check_len, rows_of};
use crate::parallel::{Shared, share, task_count};
use crate::pool;
use crate::simd::LANES;

/// A row of a batch: which sequence it extends, and how many of that sequence's keys it sees, its own included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRef {
    /// Index into the tables.
    pub seq: usize,
    /// Keys seen; the row's own position is `n_keys - 1`.
    pub n_keys: usize,
}

/// How a query's scores become weights, besides the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring<'a> {
    /// Factor of every score.
    pub scale: f32,
    /// Keys that a row sees, its own included, counted back from it (sliding window); all of them without.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2, arXiv:2408.00118).
    pub softcap: Option<f32>,
    /// One more score per query head in the softmax, which carries no value (attention sinks, Xiao et al. 2023,
    /// arXiv:2309.17453, as GPT-OSS learns them). `[Q]`
    pub sinks: Option<&'a [f32]>,
}

impl Scoring<'_> {
    /// Scaled scores of all keys.
    pub fn scaled(scale: f32) -> Self {
        Self { scale, window: None, softcap: None, sinks: None }
    }

    /// First key that a row of `n_keys` keys sees.
    pub(crate) fn first_key(&self, n_keys: usize) -> usize {
        self.window.map_or(0, |window| n_keys.saturating_sub(window))
    }

    pub(crate) fn check(&self, op: &'static str, n_heads: usize) -> Result<(), KernelError> {
        if self.window == Some(0) {
            return Err(KernelError::BadDimension { op, what: "window", got: 0, rule: "must be positive" });
        }
        self.sinks.map_or(Ok(()), |sinks| check_len(op, "sinks", n_heads, sinks.len()))
    }
}

/// Stores `k` and `v` [T, K, D]: row `t` at position `rows[t].n_keys - 1` of its sequence.
///
/// # Errors
/// When the lengths do not fit together or a row leaves its sequence's pages.
pub fn append_kv(kv: &mut KvPages, paging: &Paging<'_>, k: &[f32], v: &[f32]) -> Result<(), KernelError> {
    kv.append("append_kv", paging, k, Some(v))
}

/// Attention of `q` [T, Q, D] over the pages, into `out` [T, Q, D]. Query head `h` reads key-value head `h / (Q / K)`.
///
/// # Errors
/// When the lengths do not fit together, Q is not a multiple of K, or a row leaves its sequence's pages.
pub fn paged_attention(
    q: &[f32],
    n_heads: usize,
    paging: &Paging<'_>,
    kv: &KvPages,
    scoring: &Scoring<'_>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    attention("paged_attention", q, n_heads, paging, kv, scoring, out, None)
}

/// Attention within packed sequences: sequence `i` is rows `cu_seqlens[i]..cu_seqlens[i + 1]` of `q` [T, Q, D], `k` and
/// `v` [T, K, D]. Writes `out` [T, Q, D] and, for the backward pass, the log-sum-exp of each row's scaled scores to `lse`
/// [T, Q]. Bit-equal to [`paged_attention`] over the same rows.
///
/// # Errors
/// When the lengths do not fit together or `cu_seqlens` does not ascend from 0 to T.
#[expect(clippy::too_many_arguments, reason = "operands, shape, results; a struct would only rename them")]
pub fn causal_attention_forward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    cu_seqlens: &[u32],
    scoring: &Scoring<'_>,
    out: &mut [f32],
    lse: &mut [f32],
) -> Result<(), KernelError> {
    let op = "causal_attention";
    let total = rows_of(op, "k", k.len(), n_kv_heads * head_dim)?;
    check_sequences(op, cu_seqlens, total)?;
    let (mut rows, mut tables, mut n_pages) = (Vec::with_capacity(total), Vec::new(), 0u32);
    for (seq, bounds) in cu_seqlens.windows(2).enumerate() {
        let len = (bounds[1] - bounds[0]) as usize;
        rows.extend((1..=len).map(|n_keys| RowRef { seq, n_keys }));
        let pages = len.div_ceil(LANES) as u32;
        tables.push((n_pages..n_pages + pages).collect::<Vec<u32>>());
        n_pages += pages;
    }
    let old = STORE.with(|s| s.borrow_mut().take());
    let mut store = KvPages::reusing(old, n_pages as usize, LANES, n_kv_heads, head_dim)?;
    let paging = Paging { rows: &rows, tables: &tables };
    let result = store
        .append(op, &paging, k, Some(v))
        .and_then(|()| attention(op, q, n_heads, &paging, &store, scoring, out, Some(lse)));
    STORE.with(|s| *s.borrow_mut() = Some(store));
    result
}

thread_local! {
    /// Keys and values of the sequences of a training batch, in page layout.
    static STORE: RefCell<Option<KvPages>> = const { RefCell::new(None) };
}

fn check_sequences(op: &'static str, cu_seqlens: &[u32], total: usize) -> Result<(), KernelError> {
    let ascending = cu_seqlens.windows(2).all(|w| w[0] <= w[1]);
    if cu_seqlens.first() != Some(&0) || !ascending {
        let rule = "sequence bounds must ascend from 0";
        return Err(KernelError::BadDimension { op, what: "cu_seqlens", got: cu_seqlens.len(), rule });
    }
    check_len(op, "rows of all sequences", cu_seqlens.last().map_or(0, |&n| n as usize), total)
}

/// Query heads per key-value head.
fn group_size(op: &'static str, n_heads: usize, n_kv_heads: usize) -> Result<usize, KernelError> {
    if n_heads == 0 || n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
        let rule = "must be a positive multiple of the key-value heads";
        return Err(KernelError::BadDimension { op, what: "query heads", got: n_heads, rule });
    }
    Ok(n_heads / n_kv_heads)
}

/// Most rows whose keys are read together.
const ROW_BLOCK: usize = 16;
/// Runs of rows and heads per thread from which on threads finish at about the same time.
const ITEMS_PER_THREAD: usize = 3;

#[expect(clippy::too_many_arguments, reason = "operands, shape, results; a struct would only rename them")]
fn attention(
    op: &'static str,
    q: &[f32],
    n_heads: usize,
    paging: &Paging<'_>,
    kv: &KvPages,
    scoring: &Scoring<'_>,
    out: &mut [f32],
    lse: Option<&mut [f32]>,
) -> Result<(), KernelError> {
    kv.check(op, paging)?;
    let (rows, n_kv_heads, head_dim) = (paging.rows, kv.geometry.n_kv_heads, kv.geometry.head_dim);
    let group = group_size(op, n_heads, n_kv_heads)?;
    scoring.check(op, n_heads)?;
    let width = n_heads * head_dim;
    check_len(op, "q", rows.len() * width, q.len())?;
    check_len(op, "out", rows.len() * width, out.len())?;
    if let Some(lse) = &lse {
        check_len(op, "lse", rows.len() * n_heads, lse.len())?;
    }
    // Rows that sequences have in common, such as those of a shared prompt, are read once for all of a run.
    let together = |a: usize, b: usize| {
        rows[a].seq == rows[b].seq || {
            let page = scoring.first_key(rows[b].n_keys) / kv.geometry.page_tokens;
            paging.tables[rows[a].seq].get(page) == paging.tables[rows[b].seq].get(page)
        }
    };
    let mut block = ROW_BLOCK;
    let mut blocks = RUNS.take();
    runs_of_rows(&mut blocks, rows.len(), block, together);
    while block > 1 && blocks.len() * n_kv_heads < ITEMS_PER_THREAD * pool::threads() {
        block /= 2;
        runs_of_rows(&mut blocks, rows.len(), block, together);
    }
    let keys: usize = rows.iter().map(|r| r.n_keys - scoring.first_key(r.n_keys)).sum();
    let items = blocks.len() * n_kv_heads;
    let tasks = task_count(items, keys * group * head_dim * 2 / blocks.len().max(1));
    let (out, lse) = (Shared::new(out), lse.map(Shared::new));
    let isa = dispatch::current();
    pool::run(tasks, |task| {
        for item in share(items, tasks, task) {
            // Later blocks of a long prompt see more keys; alternating their order evens out the shares.
            let (block, head) = (item / n_kv_heads, item % n_kv_heads);
            let range = blocks[block].clone();
            let queries = Queries { q, paging, range, n_heads, head, group, scoring };
            attend(isa, kv, &queries, &out, lse.as_ref());
        }
    });
    RUNS.set(blocks);
    Ok(())
}

thread_local! {
    /// Runs of rows of the last call.
    static RUNS: RefCell<Vec<Range<usize>>> = const { RefCell::new(Vec::new()) };
}

/// Fills `runs` with runs of rows, of at most `most`, in which every row goes `together` with the one before it.
fn runs_of_rows(
    runs: &mut Vec<Range<usize>>,
    n_rows: usize,
    most: usize,
    together: impl Fn(usize, usize) -> bool,
) {
    runs.clear();
    for t in 0..n_rows {
        match runs.last_mut() {
            Some(last) if last.len() < most && together(t - 1, t) => last.end = t + 1,
            _ => runs.push(t..t + 1),
        }
    }
}

#[cfg(test)]
mod tests;
