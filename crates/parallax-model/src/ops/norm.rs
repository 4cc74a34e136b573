//! RMS norm of rows, and of the queries and keys inside a fused row: head by head, or all heads together.

use parallax_kernels::norm::{rms_norm, rms_norm_backward};

use super::{BackwardArgs, CpuOp, Output};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// Inputs: x [T, H], weight [H].
#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub(crate) eps: f32,
}

impl CpuOp for RmsNorm {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let mut y = vec![0.0; inputs[0].len()];
        rms_norm(inputs[0], inputs[1], self.eps, &mut y).expect(SHAPES);
        Output::matrix(y, inputs[1].len())
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let mut dx = vec![0.0; args.inputs[0].len()];
        let mut dw = args.wanted[1].then(|| vec![0.0; args.inputs[1].len()]);
        rms_norm_backward(args.inputs[0], args.inputs[1], self.eps, args.grad, &mut dx, dw.as_deref_mut())
            .expect(SHAPES);
        vec![args.wanted[0].then_some(dx), dw]
    }
}

/// Inputs: fused qkv rows [T, (Q + 2K)·D], query norm weight, key norm weight: [D] each, or [Q·D] and [K·D].
/// Values pass through.
#[derive(Debug)]
pub(crate) struct HeadNorms {
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Of the queries' norm and of the keys'.
    pub(crate) eps: [f32; 2],
}

impl HeadNorms {
    fn width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// The two normalised column ranges with the index of their weight.
    fn parts(&self) -> [(std::ops::Range<usize>, usize); 2] {
        let q = self.n_heads * self.head_dim;
        [(0..q, 1), (q..q + self.n_kv_heads * self.head_dim, 2)]
    }
}

/// A column range of all rows as one contiguous buffer.
pub(crate) fn columns(x: &[f32], width: usize, range: &std::ops::Range<usize>) -> Vec<f32> {
    let mut part = vec![0.0; x.len() / width * range.len()];
    columns_into(x, width, range, &mut part);
    part
}

/// The same into a buffer.
pub(super) fn columns_into(x: &[f32], width: usize, range: &std::ops::Range<usize>, part: &mut [f32]) {
    for (row, part) in x.chunks_exact(width).zip(part.chunks_exact_mut(range.len())) {
        part.copy_from_slice(&row[range.clone()]);
    }
}

/// The inverse of [`columns`].
pub(crate) fn put_columns(x: &mut [f32], width: usize, range: &std::ops::Range<usize>, part: &[f32]) {
    for (row, part) in x.chunks_exact_mut(width).zip(part.chunks_exact(range.len())) {
        row[range.clone()].copy_from_slice(part);
    }
}

impl CpuOp for HeadNorms {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let mut out = inputs[0].to_vec();
        for (range, weight) in self.parts() {
            let part = columns(inputs[0], self.width(), &range);
            let mut normed = vec![0.0; part.len()];
            rms_norm(&part, inputs[weight], self.eps[weight - 1], &mut normed).expect(SHAPES);
            put_columns(&mut out, self.width(), &range, &normed);
        }
        Output::matrix(out, self.width())
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let mut dx = args.grad.to_vec();
        let mut weights = Vec::new();
        for (range, weight) in self.parts() {
            let x = columns(args.inputs[0], self.width(), &range);
            let grad = columns(args.grad, self.width(), &range);
            let mut part = vec![0.0; x.len()];
            let (w, eps) = (args.inputs[weight], self.eps[weight - 1]);
            let mut dw = vec![0.0; w.len()];
            rms_norm_backward(&x, w, eps, &grad, &mut part, Some(&mut dw)).expect(SHAPES);
            put_columns(&mut dx, self.width(), &range, &part);
            weights.push(args.wanted[weight].then_some(dw));
        }
        let mut out = vec![args.wanted[0].then_some(dx)];
        out.extend(weights);
        out
    }
}
