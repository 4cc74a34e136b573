//! Attention over compressed keys and values: multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)
//! in its absorbed form.
//!
//! A token's cache is one latent row: R compressed values, which serve all heads as key and as value, and then P
//! rotated key elements. The heads' own key matrices are multiplied into the queries, their value matrices into the
//! result, both by the caller. The store is the key half of the ordinary one with a single head of R + P elements:
//! nothing is kept twice.

use super::core::{Geometry, Queries, attend_latent};
use super::{KvPages, RowRef, Scoring, blocks_of_rows, page_len};
use crate::dispatch;
use crate::error::{KernelError, check_len};
use crate::parallel::{Shared, share, task_count};
use crate::pool;

/// One layer's pages of latent rows.
#[derive(Debug, Clone, Copy)]
pub struct LatentPages<'a> {
    /// A whole number of pages, see [`latent_page_len`].
    pub latents: &'a [f32],
    /// Tokens per page; a multiple of 16.
    pub page_tokens: usize,
    /// Pages of each sequence, in order of position.
    pub tables: &'a [Vec<u32>],
    /// Elements of a latent row (R + P).
    pub width: usize,
}

impl LatentPages<'_> {
    fn as_keys(&self) -> KvPages<'_> {
        KvPages {
            k: self.latents,
            v: self.latents,
            page_tokens: self.page_tokens,
            tables: self.tables,
            n_kv_heads: 1,
            head_dim: self.width,
        }
    }
}

/// Elements that one page takes in the store.
pub fn latent_page_len(page_tokens: usize, width: usize) -> usize {
    page_len(page_tokens, 1, width)
}

/// Stores `new` [T, R + P] in `latents`: row `t` at position `rows[t].n_keys - 1` of its sequence.
///
/// # Errors
/// When the lengths do not fit together or a row leaves its sequence's pages.
pub fn append_latent(
    latents: &mut [f32],
    page_tokens: usize,
    tables: &[Vec<u32>],
    rows: &[RowRef],
    width: usize,
    new: &[f32],
) -> Result<(), KernelError> {
    let op = "append_latent";
    let pages = LatentPages { latents, page_tokens, tables, width };
    let geometry = Geometry::check(op, &pages.as_keys(), rows)?;
    check_len(op, "new rows", rows.len() * width, new.len())?;
    for (row, new) in rows.iter().zip(new.chunks_exact(width)) {
        let position = row.n_keys - 1;
        let page = tables[row.seq][position / page_tokens] as usize;
        let region = geometry.head_region(page, 0);
        let slot = position % page_tokens;
        for (column, value) in latents[region].chunks_exact_mut(page_tokens).zip(new) {
            column[slot] = *value;
        }
    }
    Ok(())
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
    rows: &[RowRef],
    pages: &LatentPages<'_>,
    scale: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let op = "latent_attention";
    let kv = pages.as_keys();
    let geometry = Geometry::check(op, &kv, rows)?;
    if n_heads == 0 || value_width == 0 || value_width > pages.width {
        let rule = "must be positive and at most the width of a latent row";
        return Err(KernelError::BadDimension { op, what: "heads or value width", got: value_width, rule });
    }
    check_len(op, "q", rows.len() * n_heads * pages.width, q.len())?;
    check_len(op, "out", rows.len() * n_heads * value_width, out.len())?;
    // All heads read the same rows; they are cut into groups so that one row alone keeps several threads busy.
    let group = (1..=GROUP.min(n_heads)).rev().find(|g| n_heads.is_multiple_of(*g)).unwrap_or(1);
    let blocks = blocks_of_rows(rows);
    let keys: usize = rows.iter().map(|r| r.n_keys).sum();
    let items = blocks.len() * (n_heads / group);
    let tasks = task_count(items, keys * group * pages.width * 2 / blocks.len().max(1));
    let out = Shared::new(out);
    let (isa, scoring) = (dispatch::current(), Scoring::scaled(scale));
    pool::run(tasks, |task| {
        for item in share(items, tasks, task) {
            let (block, head) = (item / (n_heads / group), item % (n_heads / group));
            let (range, scoring) = (blocks[block].clone(), &scoring);
            let queries = Queries { q, rows, range, n_heads, head, group, scoring };
            attend_latent(isa, &kv, geometry, &queries, value_width, &out);
        }
    });
    Ok(())
}

/// Query heads that one task takes together.
const GROUP: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::attention::{Shape, causal};
    use crate::testing::{assert_close, bits, noise, same_at_every_level, with_threads};

    /// (Q, R, P): whole lines, and none.
    const SHAPES: [(usize, usize, usize); 3] = [(4, 32, 16), (9, 24, 8), (3, 7, 2)];

    /// Two sequences of 37 and 5 rows in steps of `chunk`; their pages lie scattered and hold NaN at first.
    fn run((heads, r, p): (usize, usize, usize), chunk: usize, page_tokens: usize) -> Vec<f32> {
        let width = r + p;
        let lengths = [37usize, 5];
        let (q, c) = inputs((heads, r, p));
        let mut tables = vec![Vec::new(), Vec::new()];
        let n_pages: usize = lengths.iter().map(|n| n.div_ceil(page_tokens)).sum();
        let mut free = (0..n_pages as u32).rev();
        for (table, len) in tables.iter_mut().zip(lengths) {
            table.extend(free.by_ref().take(len.div_ceil(page_tokens)));
        }
        let mut latents = vec![f32::NAN; n_pages * latent_page_len(page_tokens, width)];
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
            append_latent(&mut latents, page_tokens, &tables, &rows, width, &take(&c, width)).unwrap();
            let pages = LatentPages { latents: &latents, page_tokens, tables: &tables, width };
            let mut part = vec![0.0; rows.len() * heads * r];
            latent_attention(&take(&q, heads * width), heads, r, &rows, &pages, 0.3, &mut part).unwrap();
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
            let got = same_at_every_level(|| run(shape, 37, 16));
            let (q, c) = inputs(shape);
            let one = Shape { n_heads: heads, n_kv_heads: 1, head_dim: r + p };
            let all = causal(&q, &c, &c, one, &[0, 37, 42], &Scoring::scaled(0.3));
            let expected: Vec<f64> = all.chunks_exact(r + p).flat_map(|head| head[..r].to_vec()).collect();
            assert_close(&got, &expected, 2e-6);
        }
    }

    #[test]
    fn chunks_pages_and_threads_do_not_change_a_bit() {
        for shape in SHAPES {
            let expected = bits(&run(shape, 37, 16));
            for (chunk, page_tokens) in [(1, 16), (5, 32), (17, 48)] {
                assert_eq!(bits(&run(shape, chunk, page_tokens)), expected, "{chunk} {page_tokens}");
            }
            assert_eq!(with_threads(3, || bits(&run(shape, 37, 16))), expected);
        }
    }

    #[test]
    fn misfits_are_refused() {
        let mut latents = vec![0.0; latent_page_len(16, 4)];
        let tables = [vec![0u32]];
        let row = [RowRef { seq: 0, n_keys: 17 }];
        assert!(append_latent(&mut latents, 16, &tables, &row, 4, &[0.0; 4]).is_err());
        let row = [RowRef { seq: 0, n_keys: 1 }];
        assert!(append_latent(&mut latents, 16, &tables, &row, 4, &[0.0; 3]).is_err());
        let pages = LatentPages { latents: &latents, page_tokens: 16, tables: &tables, width: 4 };
        let mut out = [0.0; 5];
        assert!(latent_attention(&[0.0; 4], 1, 5, &row, &pages, 1.0, &mut out).is_err());
        assert!(latent_attention(&[0.0; 4], 1, 3, &row, &pages, 1.0, &mut out[..3]).is_ok());
    }
}
