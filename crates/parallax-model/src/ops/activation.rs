//! activation(gate) · up of a fused row.

use parallax_kernels::activation::{Activation, gated_mul, gated_mul_backward};

use super::{BackwardArgs, CpuOp, Output};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// Input: [T, 2F], gate in the first F columns; result [T, F].
#[derive(Debug)]
pub(crate) struct GatedMul {
    pub(crate) activation: Activation,
    pub(crate) ffn: usize,
}

impl CpuOp for GatedMul {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let mut y = vec![0.0; inputs[0].len() / 2];
        gated_mul(self.activation, inputs[0], self.ffn, &mut y).expect(SHAPES);
        Output::matrix(y, self.ffn)
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let mut dx = vec![0.0; args.inputs[0].len()];
        gated_mul_backward(self.activation, args.inputs[0], self.ffn, args.grad, &mut dx).expect(SHAPES);
        vec![Some(dx)]
    }
}
