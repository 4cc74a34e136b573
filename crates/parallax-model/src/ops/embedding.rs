//! Rows of the embedding table.

use std::sync::Arc;

use super::{BackwardArgs, CpuOp, Output};

/// Input: table [V, H]; result: the rows of `tokens`. Ids were checked by the caller.
#[derive(Debug)]
pub(crate) struct Embedding {
    pub(crate) tokens: Arc<Vec<u32>>,
    pub(crate) hidden: usize,
}

impl CpuOp for Embedding {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let h = self.hidden;
        let rows = self.tokens.iter().map(|t| &inputs[0][*t as usize * h..(*t as usize + 1) * h]);
        Output::matrix(rows.flatten().copied().collect(), h)
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let mut table = vec![0.0; args.inputs[0].len()];
        for (token, grad) in self.tokens.iter().zip(args.grad.chunks_exact(self.hidden)) {
            let first = *token as usize * self.hidden;
            for (sum, g) in table[first..first + self.hidden].iter_mut().zip(grad) {
                *sum += g;
            }
        }
        vec![Some(table)]
    }
}
