//! Gradients of causal attention, from the log-sum-exps that the forward pass kept (as in FlashAttention, Dao et al.
//! 2022, arXiv:2205.14135): no [T, T] matrix outlives a block of rows.

use super::{Scoring, check_sequences, group_size};
use crate::dispatch::{self, Isa, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::matmul::{gemm_nn, gemm_nt, gemm_tn};
use crate::parallel::Shared;
use crate::pool;
use crate::simd::{LANES, exp, read, tanh, write};

/// Rows of the score matrix that are held at a time.
const ROW_BLOCK: usize = 64;

/// Gradients of [`super::causal_attention_forward`]: overwrites `dq` [T, Q, D], `dk` and `dv` [T, K, D], given the forward
/// pass's `out` [T, Q, D] and `lse` [T, Q] and the gradient `dout` [T, Q, D]. Sinks are constants: they have no gradient.
///
/// # Errors
/// When the lengths do not fit together or `cu_seqlens` does not ascend from 0 to T.
#[expect(clippy::too_many_arguments, reason = "operands, shape, results; a struct would only rename them")]
pub fn causal_attention_backward(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    cu_seqlens: &[u32],
    scoring: &Scoring<'_>,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) -> Result<(), KernelError> {
    let op = "causal_attention_backward";
    let total = rows_of(op, "k", k.len(), n_kv_heads * head_dim)?;
    check_sequences(op, cu_seqlens, total)?;
    let group = group_size(op, n_heads, n_kv_heads)?;
    scoring.check(op, n_heads)?;
    check_len(op, "lse", total * n_heads, lse.len())?;
    let (wide, narrow) = (total * n_heads * head_dim, k.len());
    for (what, expected, got) in [
        ("q", wide, q.len()),
        ("out", wide, out.len()),
        ("dout", wide, dout.len()),
        ("dq", wide, dq.len()),
        ("v", narrow, v.len()),
        ("dk", narrow, dk.len()),
        ("dv", narrow, dv.len()),
    ] {
        check_len(op, what, expected, got)?;
    }
    let isa = dispatch::current();
    let sequences = cu_seqlens.len() - 1;
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    pool::run(sequences * n_kv_heads, |task| {
        let (seq, kv_head) = (task / n_kv_heads, task % n_kv_heads);
        let rows = cu_seqlens[seq] as usize..cu_seqlens[seq + 1] as usize;
        let kv = Plane {
            first: rows.start,
            len: rows.len(),
            stride: n_kv_heads * head_dim,
            head: kv_head,
            dim: head_dim,
        };
        let (k, v) = (kv.gather(k), kv.gather(v));
        let (mut dk_sum, mut dv_sum) = (vec![0.0; k.len()], vec![0.0; v.len()]);
        for head in kv_head * group..(kv_head + 1) * group {
            let plane = Plane { stride: n_heads * head_dim, head, ..kv };
            let lse: Vec<f32> = rows.clone().map(|t| lse[t * n_heads + head]).collect();
            let work = Head { isa, plane, k: &k, v: &v, lse: &lse, scoring };
            let dq_head =
                work.run(&plane.gather(q), &plane.gather(out), &plane.gather(dout), &mut dk_sum, &mut dv_sum);
            // SAFETY: one task owns a sequence's rows of a head.
            unsafe { plane.scatter(&dq_head, &dq) };
        }
        // SAFETY: one task owns a sequence's rows of a key-value head.
        unsafe { kv.scatter(&dk_sum, &dk) };
        // SAFETY: as above.
        unsafe { kv.scatter(&dv_sum, &dv) };
    });
    Ok(())
}

/// One head of one sequence within [T, heads, D].
#[derive(Clone, Copy)]
struct Plane {
    first: usize,
    len: usize,
    stride: usize,
    head: usize,
    dim: usize,
}

impl Plane {
    fn start(&self, row: usize) -> usize {
        (self.first + row) * self.stride + self.head * self.dim
    }

    /// The plane as [len, D].
    fn gather(&self, from: &[f32]) -> Vec<f32> {
        let mut plane = Vec::with_capacity(self.len * self.dim);
        (0..self.len).for_each(|row| plane.extend_from_slice(&from[self.start(row)..][..self.dim]));
        plane
    }

    /// Writes [len, D] back.
    ///
    /// # Safety
    /// No other thread may touch this plane of `to`.
    unsafe fn scatter(&self, from: &[f32], to: &Shared<'_, f32>) {
        for (row, from) in from.chunks_exact(self.dim).enumerate() {
            let start = self.start(row);
            // SAFETY: the row lies in this plane, which is the caller's alone.
            unsafe { to.slice(start..start + self.dim) }.copy_from_slice(from);
        }
    }
}

/// One query head of one sequence.
struct Head<'a> {
    isa: Isa,
    plane: Plane,
    k: &'a [f32],
    v: &'a [f32],
    lse: &'a [f32],
    scoring: &'a Scoring<'a>,
}

impl Head<'_> {
    /// Returns dq [len, D] and adds to `dk` and `dv` [len, D].
    fn run(&self, q: &[f32], out: &[f32], dout: &[f32], dk: &mut [f32], dv: &mut [f32]) -> Vec<f32> {
        let (len, dim) = (self.plane.len, self.plane.dim);
        let mut dq = vec![0.0; len * dim];
        let (mut p, mut dp) = (vec![0.0; ROW_BLOCK * len], vec![0.0; ROW_BLOCK * len]);
        for from in (0..len).step_by(ROW_BLOCK) {
            let to = (from + ROW_BLOCK).min(len);
            // Rows of this block see `to` keys at most.
            let (m, keys, span) = (to - from, to, from * dim..to * dim);
            let (p, dp) = (&mut p[..m * keys], &mut dp[..m * keys]);
            let (q, dout) = (&q[span.clone()], &dout[span.clone()]);
            let fits = "planes and scratch are sized above";
            gemm_nt(m, keys, dim, q, dim, self.k, dim, p, keys, false).expect(fits);
            gemm_nt(m, keys, dim, dout, dim, self.v, dim, dp, keys, false).expect(fits);
            probabilities(self.isa, p, dp, from, &self.lse[from..to], &out[span.clone()], dout, self.scoring);
            gemm_tn(keys, dim, m, p, keys, dout, dim, dv, dim, true).expect(fits);
            gemm_nn(m, dim, keys, dp, keys, self.k, dim, &mut dq[span], dim, false).expect(fits);
            gemm_tn(keys, dim, m, dp, keys, q, dim, dk, dim, true).expect(fits);
        }
        dq
    }
}

simd_kernel! {
    /// Turns raw scores `p` into probabilities and `dp` = dout * v^T into the gradient of the raw scores, both [rows, keys];
    /// row `r` sees `from + r + 1` keys, or as many of the last of them as the window holds.
    fn probabilities(
        s;
        p: &mut [f32],
        dp: &mut [f32],
        from: usize,
        lse: &[f32],
        out: &[f32],
        dout: &[f32],
        scoring: &Scoring<'_>,
    ) {
        let keys = p.len() / lse.len();
        let dim = out.len() / lse.len();
        let rows = p.chunks_exact_mut(keys).zip(dp.chunks_exact_mut(keys));
        let gradients = out.chunks_exact(dim).zip(dout.chunks_exact(dim));
        for (r, (((p, dp), (out, dout)), &lse)) in rows.zip(gradients).zip(lse).enumerate() {
            let seen = from + r + 1;
            let start = scoring.first_key(seen);
            for hidden in [0..start, seen..keys] {
                p[hidden.clone()].fill(0.0);
                dp[hidden].fill(0.0);
            }
            // mean of dp under p equals dout . out
            let mut delta = s.splat(0.0);
            for i in (0..dim).step_by(LANES) {
                delta = s.fma(read(s, out, i, 0.0), read(s, dout, i, 0.0), delta);
            }
            let (delta, scale, lse) = (s.splat(s.sum(delta)), s.splat(scoring.scale), s.splat(lse));
            let (p, dp) = (&mut p[start..seen], &mut dp[start..seen]);
            for i in (0..seen - start).step_by(LANES) {
                let (mut score, mut slope) = (s.mul(read(s, p, i, 0.0), scale), scale);
                if let Some(cap) = scoring.softcap {
                    let (cap, one) = (s.splat(cap), s.splat(1.0));
                    let bent = tanh(s, s.div(score, cap));
                    // d tanh(x) / dx = 1 - tanh(x)^2
                    (score, slope) = (s.mul(cap, bent), s.mul(slope, s.sub(one, s.mul(bent, bent))));
                }
                let probability = exp(s, s.sub(score, lse));
                let gradient = s.mul(s.mul(probability, s.sub(read(s, dp, i, 0.0), delta)), slope);
                write(s, p, i, probability);
                write(s, dp, i, gradient);
            }
        }
    }
}
