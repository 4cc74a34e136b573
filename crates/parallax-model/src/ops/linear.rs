//! Linear layers: frozen packed weights, trained dense weights, and the low-rank addition of an adapter.

use std::sync::Arc;

use parallax_kernels::linear::{PackedWeight, linear, linear_multi};

use super::{BackwardArgs, CpuOp, Output, matrix};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// Weights of one linear layer, [N, K], N possibly in several parts (q, k and v of different formats).
#[derive(Debug)]
pub(crate) struct FrozenLinear {
    pub(crate) parts: Vec<PackedWeight>,
    /// The same weights unpacked, row-major [N, K], for the gradient of the input; only when training.
    pub(crate) dense: Option<Vec<f32>>,
}

impl FrozenLinear {
    pub(crate) fn n(&self) -> usize {
        self.parts.iter().map(PackedWeight::n).sum()
    }

    pub(crate) fn k(&self) -> usize {
        self.parts[0].k()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(PackedWeight::bytes).sum()
    }

    /// y[T, N] = x[T, K] · Wᵀ.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (n, rows) = (self.n(), x.len() / self.k());
        let mut y = vec![0.0; rows * n];
        if let [only] = self.parts.as_slice() {
            linear(x, only, &mut y).expect(SHAPES);
            return y;
        }
        let mut outputs: Vec<Vec<f32>> = self.parts.iter().map(|p| vec![0.0; rows * p.n()]).collect();
        let weights: Vec<&PackedWeight> = self.parts.iter().collect();
        let mut slices: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
        linear_multi(x, &weights, &mut slices).expect(SHAPES);
        let mut first = 0;
        for part in &outputs {
            let width = part.len() / rows.max(1);
            for (to, from) in y.chunks_exact_mut(n).zip(part.chunks_exact(width)) {
                to[first..first + width].copy_from_slice(from);
            }
            first += width;
        }
        y
    }
}

/// Adds the bias, if there is one, to rows.
fn add_bias(mut y: Vec<f32>, bias: Option<&&[f32]>) -> Vec<f32> {
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, b) in row.iter_mut().zip(*bias) {
                *y += b;
            }
        }
    }
    y
}

/// Gradient of a bias: the sum over rows.
fn bias_gradient(grad: &[f32], n: usize) -> Vec<f32> {
    let mut sum = vec![0.0; n];
    for row in grad.chunks_exact(n) {
        for (s, g) in sum.iter_mut().zip(row) {
            *s += g;
        }
    }
    sum
}

/// Inputs: x, and the bias [N] where there is one. The weights have no gradient.
#[derive(Debug)]
pub(crate) struct Frozen(pub(crate) Arc<FrozenLinear>);

impl CpuOp for Frozen {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        Output::matrix(add_bias(self.0.apply(inputs[0]), inputs.get(1)), self.0.n())
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let dense = self.0.dense.as_ref().expect("training loads keep the dense weights");
        let (n, k) = (self.0.n(), self.0.k());
        let dx = args.wanted[0].then(|| matrix::nn(args.grad, dense, args.grad.len() / n, k, n));
        let db = args.wanted.get(1).map(|wanted| wanted.then(|| bias_gradient(args.grad, n)));
        [Some(dx), db].into_iter().flatten().collect()
    }
}

/// Inputs: x [T, K], W [N, K], and the bias [N] where there is one.
#[derive(Debug)]
pub(crate) struct Dense {
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl CpuOp for Dense {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let rows = inputs[0].len() / self.k;
        let y = matrix::nt(inputs[0], inputs[1], rows, self.n, self.k);
        Output::matrix(add_bias(y, inputs.get(2)), self.n)
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let rows = args.grad.len() / self.n;
        let dx = args.wanted[0].then(|| matrix::nn(args.grad, args.inputs[1], rows, self.k, self.n));
        let dw = args.wanted[1].then(|| matrix::tn(args.grad, args.inputs[0], self.n, self.k, rows));
        let db = args.wanted.get(2).map(|wanted| wanted.then(|| bias_gradient(args.grad, self.n)));
        [Some(dx), Some(dw), db].into_iter().flatten().collect()
    }
}

/// Inputs: y [T, N], x [T, K], A [r, K], B [n, r]; result: y with `scale · (x·Aᵀ)·Bᵀ` added to its columns
/// `offset..offset + n`.
#[derive(Debug)]
pub(crate) struct LoraAdd {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) rank: usize,
    pub(crate) outputs: usize,
    pub(crate) offset: usize,
    pub(crate) scale: f32,
    /// The rows to which it is added; `None` is all of them. A row's sum does not depend on the others.
    pub(crate) rows: Option<Arc<Vec<u32>>>,
}

impl LoraAdd {
    /// Adds to chosen rows only: gathers them, computes, and scatters.
    fn forward_rows(&self, y: &[f32], x: &[f32], a: &[f32], b: &[f32], rows: &[u32]) -> Vec<f32> {
        let picked: Vec<f32> =
            rows.iter().flat_map(|row| &x[*row as usize * self.k..][..self.k]).copied().collect();
        let inner = matrix::nt(&picked, a, rows.len(), self.rank, self.k);
        let delta = matrix::nt(&inner, b, rows.len(), self.outputs, self.rank);
        let mut out = y.to_vec();
        for (row, delta) in rows.iter().zip(delta.chunks_exact(self.outputs)) {
            let to = &mut out[*row as usize * self.n + self.offset..][..self.outputs];
            to.iter_mut().zip(delta).for_each(|(o, d)| *o += self.scale * d);
        }
        out
    }
}

impl CpuOp for LoraAdd {
    fn forward(&self, inputs: &[&[f32]], keep: bool) -> Output {
        let [y, x, a, b] = inputs else { unreachable!("four inputs") };
        if let Some(rows) = &self.rows {
            return Output::matrix(self.forward_rows(y, x, a, b, rows), self.n);
        }
        let rows = x.len() / self.k;
        let inner = matrix::nt(x, a, rows, self.rank, self.k);
        let delta = matrix::nt(&inner, b, rows, self.outputs, self.rank);
        let mut out = y.to_vec();
        for (row, delta) in out.chunks_exact_mut(self.n).zip(delta.chunks_exact(self.outputs)) {
            for (o, d) in row[self.offset..self.offset + self.outputs].iter_mut().zip(delta) {
                *o += self.scale * d;
            }
        }
        let saved = if keep { inner } else { Vec::new() };
        Output { values: out, shape: vec![rows, self.n], saved }
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        assert!(self.rows.is_none(), "training has one adapter, for every row");
        let [_, x, a, b] = args.inputs else { unreachable!("four inputs") };
        let rows = x.len() / self.k;
        // Gradient of the low-rank product, [T, n].
        let delta: Vec<f32> = args
            .grad
            .chunks_exact(self.n)
            .flat_map(|row| row[self.offset..self.offset + self.outputs].iter().map(|g| g * self.scale))
            .collect();
        let dy = args.wanted[0].then(|| args.grad.to_vec());
        let db = args.wanted[3].then(|| matrix::tn(&delta, args.saved, self.outputs, self.rank, rows));
        if !(args.wanted[1] || args.wanted[2]) {
            return vec![dy, None, None, db];
        }
        let inner = matrix::nn(&delta, b, rows, self.rank, self.outputs);
        let dx = args.wanted[1].then(|| matrix::nn(&inner, a, rows, self.k, self.rank));
        let da = args.wanted[2].then(|| matrix::tn(&inner, x, self.rank, self.k, rows));
        vec![dy, dx, da, db]
    }
}
