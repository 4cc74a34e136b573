//! SiLU(gate) · up of a fused row.

use parallax_kernels::activation::{silu_mul, silu_mul_backward};

use super::{BackwardArgs, CpuOp, Output};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// Input: [T, 2F], gate in the first F columns; result [T, F].
#[derive(Debug)]
pub(crate) struct SiluMul {
    pub(crate) ffn: usize,
}

impl CpuOp for SiluMul {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let mut y = vec![0.0; inputs[0].len() / 2];
        silu_mul(inputs[0], self.ffn, &mut y).expect(SHAPES);
        Output::matrix(y, self.ffn)
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let mut dx = vec![0.0; args.inputs[0].len()];
        silu_mul_backward(args.inputs[0], self.ffn, args.grad, &mut dx).expect(SHAPES);
        vec![Some(dx)]
    }
}
