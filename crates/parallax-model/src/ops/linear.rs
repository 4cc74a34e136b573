//! Linear layers: frozen packed weights, trained dense weights, and the low-rank addition of an adapter.

use std::sync::Arc;

use parallax_kernels::linear::{PackedWeight, linear, linear_backward, linear_multi};
use parallax_kernels::matmul::{gemm_nn, gemm_nt, gemm_tn};

use super::{BackwardArgs, CpuOp, Output, matrix};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// Weights of one linear layer, [N, K], N possibly in several parts (q, k and v of different formats).
#[derive(Debug)]
pub(crate) struct FrozenLinear {
    pub(crate) parts: Vec<PackedWeight>,
    /// The same weights in f32 as [K, N], for the gradient of the input: only when training with f32 weights. Others are widened
    /// in passing, which costs some time and no memory.
    pub(crate) transposed: Option<PackedWeight>,
}

impl FrozenLinear {
    pub(crate) fn n(&self) -> usize {
        self.parts.iter().map(PackedWeight::n).sum()
    }

    pub(crate) fn k(&self) -> usize {
        self.parts[0].k()
    }

    /// Bytes of memory held, the transpose included.
    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().chain(&self.transposed).map(PackedWeight::bytes).sum()
    }

    /// y[T, N] = x[T, K] · Wᵀ.
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / self.k() * self.n()];
        linear_multi(x, &self.parts, &mut y).expect(SHAPES);
        y
    }

    /// Gradient of x [T, K] for the gradient of y [T, N].
    fn input_gradient(&self, grad: &[f32]) -> Vec<f32> {
        let mut dx = vec![0.0; grad.len() / self.n() * self.k()];
        match &self.transposed {
            Some(transposed) => linear(grad, transposed, &mut dx),
            None => linear_backward(grad, &self.parts.iter().collect::<Vec<_>>(), &mut dx),
        }
        .expect(SHAPES);
        dx
    }
}

/// Adds the bias, if there is one, to rows.
pub(super) fn add_bias(y: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(bias.len()) {
            for (y, b) in row.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
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
        let mut y = self.0.apply(inputs[0]);
        add_bias(&mut y, inputs.get(1).copied());
        Output::matrix(y, self.0.n())
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let dx = args.wanted[0].then(|| self.0.input_gradient(args.grad));
        let db = args.wanted.get(1).map(|wanted| wanted.then(|| bias_gradient(args.grad, self.0.n())));
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
        let mut y = matrix::nt(inputs[0], inputs[1], rows, self.n, self.k);
        add_bias(&mut y, inputs.get(2).copied());
        Output::matrix(y, self.n)
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let rows = args.grad.len() / self.n;
        let dx = args.wanted[0].then(|| matrix::nn(args.grad, args.inputs[1], rows, self.k, self.n));
        let dw = args.wanted[1].then(|| matrix::tn(args.grad, args.inputs[0], self.n, self.k, rows));
        let db = args.wanted.get(2).map(|wanted| wanted.then(|| bias_gradient(args.grad, self.n)));
        [Some(dx), Some(dw), db].into_iter().flatten().collect()
    }
}

/// One module of an adapter inside a (possibly fused) linear layer: B·A is added to `outputs` columns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoraModule {
    /// First of its output columns in the layer.
    pub(crate) offset: usize,
    pub(crate) outputs: usize,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    /// Where its rows of the stacked A begin.
    pub(crate) first: usize,
    /// Where its B begins in the joined ones.
    pub(crate) from: usize,
}

/// An adapter's modules in one linear layer. A is [R, K], theirs one below the other; B holds their [outputs, rank] one after
/// the other.
#[derive(Clone, Debug)]
pub(crate) struct Lora {
    /// By output column: the order of addition is part of the value.
    pub(crate) modules: Arc<Vec<LoraModule>>,
    /// The rows to which it is added; `None` is all of them. A row's sum does not depend on the others.
    pub(crate) rows: Option<Arc<Vec<u32>>>,
}

impl Lora {
    /// Adds scale · (x·Aᵀ)·Bᵀ of every module to its columns of all rows of y [T, n]; returns scale · x·Aᵀ, [T, R].
    fn add(&self, y: &mut [f32], n: usize, x: &[f32], a: &[f32], b: &[f32]) -> Vec<f32> {
        let rows = y.len() / n;
        let width = (x.len() / rows.max(1)).max(1);
        let ranks = a.len() / width;
        let mut inner = matrix::nt(x, a, rows, ranks, width);
        for m in self.modules.iter() {
            for row in inner.chunks_exact_mut(ranks) {
                row[m.first..m.first + m.rank].iter_mut().for_each(|v| *v *= m.scale);
            }
            let (inner, y) = (&inner[m.first..], &mut y[m.offset..]);
            gemm_nt(rows, m.outputs, m.rank, inner, ranks, &b[m.from..], m.rank, y, n, true).expect(SHAPES);
        }
        inner
    }

    /// Adds to the chosen rows, or to all.
    pub(super) fn apply(&self, y: &mut [f32], n: usize, x: &[f32], a: &[f32], b: &[f32]) -> Vec<f32> {
        let Some(chosen) = self.rows.as_deref() else { return self.add(y, n, x, a, b) };
        let k = x.len() / (y.len() / n);
        let mut picked = pick(y, n, chosen);
        self.add(&mut picked, n, &pick(x, k, chosen), a, b);
        for (row, from) in chosen.iter().zip(picked.chunks_exact(n)) {
            y[*row as usize * n..][..n].copy_from_slice(from);
        }
        Vec::new()
    }

    /// Gradients of x (added to `dx` where it is wanted), A and B, given [`Self::add`]'s result and the gradient of y.
    fn gradients(
        &self,
        args: &BackwardArgs<'_>,
        n: usize,
        dx: Option<&mut Vec<f32>>,
    ) -> (Option<Vec<f32>>, Option<Vec<f32>>) {
        assert!(self.rows.is_none(), "training has one adapter, for every row");
        let (x, a, b) = (args.inputs[0], args.inputs[1], args.inputs[2]);
        let rows = args.grad.len() / n;
        let k = x.len() / rows;
        let ranks = a.len() / k;
        let mut db = vec![0.0; b.len()];
        let mut inner = vec![0.0; rows * ranks];
        for m in self.modules.iter() {
            let (grad, b) = (&args.grad[m.offset..], &b[m.from..]);
            let to = &mut inner[m.first..];
            gemm_nn(rows, m.rank, m.outputs, grad, n, b, m.rank, to, ranks, false).expect(SHAPES);
            for row in inner.chunks_exact_mut(ranks) {
                row[m.first..m.first + m.rank].iter_mut().for_each(|v| *v *= m.scale);
            }
            // [r, outputs], the shape in which all lanes are full.
            let mut across = vec![0.0; m.rank * m.outputs];
            let kept = &args.saved[m.first..];
            gemm_tn(m.rank, m.outputs, rows, kept, ranks, grad, n, &mut across, m.outputs, false)
                .expect(SHAPES);
            for (output, db) in db[m.from..].chunks_exact_mut(m.rank).take(m.outputs).enumerate() {
                db.iter_mut().enumerate().for_each(|(r, db)| *db = across[r * m.outputs + output]);
            }
        }
        if let Some(dx) = dx {
            gemm_nn(rows, k, ranks, &inner, ranks, a, k, dx, k, true).expect(SHAPES);
        }
        let da = args.wanted[1].then(|| matrix::tn(&inner, x, ranks, k, rows));
        (da, args.wanted[2].then_some(db))
    }
}

/// Chosen rows of a matrix.
pub(crate) fn pick(from: &[f32], width: usize, rows: &[u32]) -> Vec<f32> {
    let mut picked = Vec::with_capacity(rows.len() * width);
    for row in rows {
        picked.extend_from_slice(&from[*row as usize * width..][..width]);
    }
    picked
}

/// A frozen layer with an adapter. Inputs: x [T, K], A [R, K], B, and the bias [N] where there is one.
#[derive(Debug)]
pub(crate) struct Adapted {
    pub(crate) base: Arc<FrozenLinear>,
    pub(crate) lora: Lora,
}

impl CpuOp for Adapted {
    fn forward(&self, inputs: &[&[f32]], keep: bool) -> Output {
        let n = self.base.n();
        let mut y = self.base.apply(inputs[0]);
        add_bias(&mut y, inputs.get(3).copied());
        let inner = self.lora.apply(&mut y, n, inputs[0], inputs[1], inputs[2]);
        Output { saved: if keep { inner } else { Vec::new() }, ..Output::matrix(y, n) }
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let n = self.base.n();
        let mut dx = args.wanted[0].then(|| self.base.input_gradient(args.grad));
        let (da, db) = self.lora.gradients(args, n, dx.as_mut());
        let bias = args.wanted.get(3).map(|wanted| wanted.then(|| bias_gradient(args.grad, n)));
        [Some(dx), Some(da), Some(db), bias].into_iter().flatten().collect()
    }
}

/// One more adapter on a layer, for chosen rows. Inputs: y [T, N], x [T, K], A [R, K], B; result: y with it added.
#[derive(Debug)]
pub(crate) struct AddLora {
    pub(crate) n: usize,
    pub(crate) lora: Lora,
}

impl CpuOp for AddLora {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let [y, x, a, b] = inputs else { unreachable!("four inputs") };
        let mut y = y.to_vec();
        self.lora.apply(&mut y, self.n, x, a, b);
        Output::matrix(y, self.n)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("training has one adapter, part of its layer")
    }
}
