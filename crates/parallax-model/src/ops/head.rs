//! Log-probability of given tokens under the output head, without ever holding [T, V].

use std::sync::Arc;

use parallax_kernels::{
    PackedWeight, WeightKind, activation,
    logprob::{head_logprob, head_logprob_backward, head_logprob_gradient, log_softmax_row, token_logprobs},
};

use super::{
    BackwardArgs, CpuOp, Output,
    linear::{FrozenLinear, pick},
};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// Which rows predict which tokens.
#[derive(Debug)]
pub(crate) struct Targets {
    /// Row of each prediction. [P]
    pub(crate) rows: Vec<u32>,
    /// Token of each prediction. [P]
    pub(crate) tokens: Vec<u32>,
}

impl Targets {
    fn gather(&self, x: &[f32], width: usize) -> Vec<f32> {
        pick(x, width, &self.rows)
    }

    fn scatter(&self, picked: &[f32], width: usize, n_rows: usize) -> Vec<f32> {
        let mut out = vec![0.0; n_rows * width];
        for (row, values) in self.rows.iter().zip(picked.chunks_exact(width)) {
            out[*row as usize * width..(*row as usize + 1) * width].copy_from_slice(values);
        }
        out
    }
}

impl Targets {
    fn logprobs(&self, x: &[f32], head: &PackedWeight, keep: bool) -> Output {
        let x = self.gather(x, head.k());
        let mut values = vec![0.0; self.rows.len()];
        let mut lse = vec![0.0; values.len()];
        head_logprob(&x, head, &self.tokens, &mut values, &mut lse).expect(SHAPES);
        Output { shape: vec![values.len()], values, saved: if keep { lse } else { Vec::new() } }
    }

    fn gradients(&self, args: &BackwardArgs<'_>, head: &PackedWeight, dw: Option<&mut [f32]>) -> Vec<f32> {
        let width = head.k();
        let x = self.gather(args.inputs[0], width);
        let mut dx = vec![0.0; x.len()];
        head_logprob_backward(&x, head, &self.tokens, args.saved, args.grad, &mut dx, dw).expect(SHAPES);
        self.scatter(&dx, width, args.inputs[0].len() / width)
    }
}

/// Input: x [T, H] after the final norm; result [P].
#[derive(Debug)]
pub(crate) struct FrozenHead {
    pub(crate) weight: Arc<FrozenLinear>,
    pub(crate) targets: Arc<Targets>,
}

impl CpuOp for FrozenHead {
    fn forward(&self, inputs: &[&[f32]], keep: bool) -> Output {
        let head = &self.weight.parts[0];
        if !keep {
            return self.targets.logprobs(inputs[0], head, false);
        }
        let x = self.targets.gather(inputs[0], head.k());
        let mut values = vec![0.0; self.targets.rows.len()];
        let mut saved = vec![0.0; x.len()];
        head_logprob_gradient(&x, head, &self.targets.tokens, &mut values, &mut saved).expect(SHAPES);
        Output { shape: vec![values.len()], values, saved }
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let width = self.weight.k();
        let mut dx = args.saved.to_vec();
        for (dx, grad) in dx.chunks_exact_mut(width).zip(args.grad) {
            dx.iter_mut().for_each(|v| *v *= grad);
        }
        vec![Some(self.targets.scatter(&dx, width, args.inputs[0].len() / width))]
    }
}

/// Inputs: x [T, H] after the final norm, head weights [V, H]; result [P].
#[derive(Debug)]
pub(crate) struct DenseHead {
    pub(crate) vocab: usize,
    pub(crate) hidden: usize,
    pub(crate) targets: Arc<Targets>,
}

impl DenseHead {
    /// Packing costs one pass over the weights; the product reads them once per block of rows.
    fn pack(&self, weight: &[f32]) -> PackedWeight {
        PackedWeight::pack_f32(WeightKind::F32, weight, self.vocab, self.hidden).expect(SHAPES)
    }
}

impl CpuOp for DenseHead {
    fn forward(&self, inputs: &[&[f32]], keep: bool) -> Output {
        self.targets.logprobs(inputs[0], &self.pack(inputs[1]), keep)
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let head = self.pack(args.inputs[1]);
        let mut dw = args.wanted[1].then(|| vec![0.0; args.inputs[1].len()]);
        let dx = self.targets.gradients(args, &head, dw.as_deref_mut());
        vec![Some(dx), dw]
    }
}

/// Scales and caps logits as the configuration says.
pub(crate) fn bend(logits: &mut [f32], scale: f32, softcap: Option<f32>) {
    if scale.to_bits() != 1.0f32.to_bits() {
        logits.iter_mut().for_each(|v| *v *= scale);
    }
    if let Some(cap) = softcap {
        activation::softcap(logits, cap);
    }
}

/// Input: logits [P, V] of the rows that predict, before they are scaled and capped; result [P].
#[derive(Debug)]
pub(crate) struct BentLogProbs {
    pub(crate) vocab: usize,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) targets: Arc<Targets>,
}

impl CpuOp for BentLogProbs {
    fn forward(&self, inputs: &[&[f32]], keep: bool) -> Output {
        let mut logits = inputs[0].to_vec();
        bend(&mut logits, self.scale, self.softcap);
        let mut values = vec![0.0; self.targets.tokens.len()];
        token_logprobs(&logits, self.vocab, &self.targets.tokens, &mut values).expect(SHAPES);
        Output { shape: vec![values.len()], values, saved: if keep { logits } else { Vec::new() } }
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let mut dx = vec![0.0; args.saved.len()];
        let rows = args.saved.chunks_exact(self.vocab).zip(dx.chunks_exact_mut(self.vocab));
        for ((bent, dx), (token, grad)) in rows.zip(self.targets.tokens.iter().zip(args.grad)) {
            log_softmax_row(bent, dx).expect(SHAPES);
            // d log p(token) / d bent = [is the token] - p, and d bent / d logit = scale · (1 - (bent / cap)²).
            for (i, (d, bent)) in dx.iter_mut().zip(bent).enumerate() {
                let slope = self.softcap.map_or(1.0, |cap| 1.0 - (bent / cap) * (bent / cap));
                let hit = if i == *token as usize { 1.0 } else { 0.0 };
                *d = grad * (hit - d.exp()) * slope * self.scale;
            }
        }
        vec![Some(dx)]
    }
}
