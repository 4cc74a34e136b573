//! Dense f32 products with packed strides, as the operations use them.

use parallax_kernels::matmul::{gemm_nn, gemm_nt, gemm_tn};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// A [m, k] · B [n, k]ᵀ.
pub(crate) fn nt(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    gemm_nt(m, n, k, a, k, b, k, &mut c, n, false).expect(SHAPES);
    c
}

/// A [m, k] · B [k, n].
pub(crate) fn nn(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    gemm_nn(m, n, k, a, k, b, n, &mut c, n, false).expect(SHAPES);
    c
}

/// A [k, m]ᵀ · B [k, n].
pub(crate) fn tn(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let mut c = vec![0.0; m * n];
    gemm_tn(m, n, k, a, m, b, n, &mut c, n, false).expect(SHAPES);
    c
}
