//! Dense f32 products of unpacked operands, for training: activations and gradients that change at every call.
//!
//! The right operand is packed on the fly into the panels of [`crate::linear`], and the same kernel runs over them, so
//! [`gemm_nt`] gives the bits of a linear layer with f32 weights. With `accumulate` the chain of each element starts
//! at what C holds.

use std::cell::RefCell;

use crate::dispatch;
use crate::error::{KernelError, check_len};
use crate::linear::panels::{Panels, Rows, dense_f32};
use crate::linear::{Output, row_blocks};
use crate::parallel::{for_rows, share, task_count};
use crate::pool;
use crate::simd::{LANES, Line};

/// `C [m, n] = A [m, k] * B [n, k]^T`; row strides `lda`, `ldb`, `ldc`. Adds to C with `accumulate`.
///
/// # Errors
/// When an operand is too short for its rows, or a row stride is shorter than a row.
#[expect(clippy::too_many_arguments, reason = "the usual signature of a matrix product")]
pub fn gemm_nt(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) -> Result<(), KernelError> {
    let op = "gemm_nt";
    check_matrix(op, "a", m, k, lda, a.len())?;
    check_matrix(op, "b", n, k, ldb, b.len())?;
    check_matrix(op, "c", m, n, ldc, c.len())?;
    with_panels(
        n,
        k,
        |panel, lines| pack_rows(&b[panel * LANES * ldb..], ldb, n - panel * LANES, lines),
        |lines| {
            multiply(m, n, k, a, lda, lines, c, ldc, accumulate);
        },
    );
    Ok(())
}

/// `C [m, n] = A [m, k] * B [k, n]`; row strides `lda`, `ldb`, `ldc`. Adds to C with `accumulate`.
///
/// # Errors
/// As [`gemm_nt`].
#[expect(clippy::too_many_arguments, reason = "the usual signature of a matrix product")]
pub fn gemm_nn(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) -> Result<(), KernelError> {
    let op = "gemm_nn";
    check_matrix(op, "a", m, k, lda, a.len())?;
    check_matrix(op, "b", k, n, ldb, b.len())?;
    check_matrix(op, "c", m, n, ldc, c.len())?;
    with_panels(
        n,
        k,
        |panel, lines| pack_columns(&b[panel * LANES..], ldb, n - panel * LANES, lines),
        |lines| {
            multiply(m, n, k, a, lda, lines, c, ldc, accumulate);
        },
    );
    Ok(())
}

/// `C [m, n] = A [k, m]^T * B [k, n]`; row strides `lda`, `ldb`, `ldc`. Adds to C with `accumulate`.
///
/// # Errors
/// As [`gemm_nt`].
#[expect(clippy::too_many_arguments, reason = "the usual signature of a matrix product")]
pub fn gemm_tn(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) -> Result<(), KernelError> {
    let op = "gemm_tn";
    check_matrix(op, "a", k, m, lda, a.len())?;
    check_matrix(op, "b", k, n, ldb, b.len())?;
    check_matrix(op, "c", m, n, ldc, c.len())?;
    let mut transposed = TRANSPOSED.with(|t| std::mem::take(&mut *t.borrow_mut()));
    transposed.resize(m * k, 0.0);
    transpose(a, lda, k, m, &mut transposed);
    with_panels(
        n,
        k,
        |panel, lines| pack_columns(&b[panel * LANES..], ldb, n - panel * LANES, lines),
        |lines| {
            multiply(m, n, k, &transposed, k, lines, c, ldc, accumulate);
        },
    );
    TRANSPOSED.with(|t| *t.borrow_mut() = transposed);
    Ok(())
}

/// Inner dimension that is walked before the next rows; a longer one is continued through C, with the same bits.
const INNER_BLOCK: usize = 2048;

thread_local! {
    static PANELS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    static TRANSPOSED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

fn check_matrix(
    op: &'static str,
    what: &'static str,
    rows: usize,
    columns: usize,
    stride: usize,
    len: usize,
) -> Result<(), KernelError> {
    if stride < columns {
        let rule = "must not be shorter than a row";
        return Err(KernelError::BadDimension { op, what: "row stride", got: stride, rule });
    }
    let needed = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
    if len < needed { check_len(op, what, needed, len) } else { Ok(()) }
}

/// Packs B with `pack(panel, its k lines)`, in parallel, and calls `f` with all lines.
fn with_panels(n: usize, k: usize, pack: impl Fn(usize, &mut [Line]) + Sync, f: impl FnOnce(&[Line])) {
    // Taken out, not borrowed: a nested product on this thread then simply allocates its own.
    let mut lines = PANELS.with(|p| std::mem::take(&mut *p.borrow_mut()));
    lines.resize(n.div_ceil(LANES) * k, Line([0.0; LANES]));
    for_rows(&mut lines, k, k * LANES * 2, |panels, lines| {
        for (panel, lines) in panels.zip(lines.chunks_exact_mut(k)) {
            pack(panel, lines);
        }
    });
    f(&lines);
    PANELS.with(|p| *p.borrow_mut() = lines);
}

/// Up to sixteen rows of `b` become the lanes; missing rows are zero.
fn pack_rows(b: &[f32], stride: usize, rows: usize, lines: &mut [Line]) {
    let k = lines.len();
    if rows >= LANES {
        let rows: [&[f32]; LANES] = std::array::from_fn(|lane| &b[lane * stride..][..k]);
        for (i, line) in lines.iter_mut().enumerate() {
            *line = Line(std::array::from_fn(|lane| rows[lane][i]));
        }
        return;
    }
    lines.fill(Line([0.0; LANES]));
    for lane in 0..rows {
        for (line, &v) in lines.iter_mut().zip(&b[lane * stride..]) {
            line.0[lane] = v;
        }
    }
}

/// Up to sixteen columns of `b` become the lanes; missing columns are zero.
fn pack_columns(b: &[f32], stride: usize, columns: usize, lines: &mut [Line]) {
    if columns >= LANES {
        for (line, row) in lines.iter_mut().zip(b.chunks(stride)) {
            line.0.copy_from_slice(&row[..LANES]);
        }
        return;
    }
    for (i, line) in lines.iter_mut().enumerate() {
        line.0[..columns].copy_from_slice(&b[i * stride..][..columns]);
        line.0[columns..].fill(0.0);
    }
}

/// `to [columns, rows] = from [rows, columns]^T`.
fn transpose(from: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [f32]) {
    for_rows(to, rows, rows * 4, |mine, to| {
        let (first, mine) = (mine.start, mine.len());
        // Blocks of sixteen rows, so that each cache line of the result is written in one go.
        for block in (0..rows).step_by(LANES) {
            let height = LANES.min(rows - block);
            for column in 0..mine {
                let out = &mut to[column * rows + block..][..height];
                for (i, out) in out.iter_mut().enumerate() {
                    *out = from[(block + i) * stride + first + column];
                }
            }
        }
    });
    debug_assert_eq!(to.len(), rows * columns);
}

/// The product over packed panels, shared out by columns and, when those are few, by rows too.
#[expect(clippy::too_many_arguments, reason = "the usual signature of a matrix product")]
fn multiply(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    lines: &[Line],
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
) {
    if k == 0 && !accumulate {
        c.chunks_mut(ldc.max(1)).take(m).for_each(|row| row[..n].fill(0.0));
    }
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let isa = dispatch::current();
    let panels = n.div_ceil(LANES);
    let tasks = task_count(panels * m.div_ceil(LANES), k * LANES * LANES);
    let by_column = panels.min(tasks);
    let by_row = (tasks / by_column).clamp(1, m.div_ceil(LANES));
    let out = Output::new(c, ldc, 0, 0..n);
    pool::run(by_column * by_row, |task| {
        let panels = share(panels, by_column, task / by_row);
        for rows in row_blocks(share(m, by_row, task % by_row), k) {
            for from in (0..k).step_by(INNER_BLOCK) {
                let inner = INNER_BLOCK.min(k - from);
                let x = Rows { x: &a[from..], stride: lda, continued: accumulate || from > 0 };
                let w = Panels { lines, stride: k, first: from, inner };
                dense_f32(isa, x, w, rows.clone(), panels.clone(), &out);
            }
        }
    });
}

#[cfg(test)]
mod tests;
