//! The three products against the reference chain, with strides and accumulation.

use super::*;
use crate::reference;
use crate::testing::{bits, noise, same_at_every_level, with_threads};
use crate::{PackedWeight, WeightKind};

type Gemm =
    fn(usize, usize, usize, &[f32], usize, &[f32], usize, &mut [f32], usize, bool) -> Result<(), KernelError>;

/// `v` [rows, columns] transposed.
fn transposed(v: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| v.iter().skip(c).step_by(columns).copied()).collect()
}

/// `v` [rows, columns] with `gap` unused elements after each row.
fn strided(v: &[f32], columns: usize, gap: usize) -> Vec<f32> {
    v.chunks_exact(columns).flat_map(|row| row.iter().copied().chain(vec![f32::NAN; gap])).collect()
}

fn has_the_bits_of_the_reference(m: usize, n: usize, k: usize, seed: u64) {
    let (a, b) = (noise(m * k, seed), noise(n * k, seed + 1));
    let expected = reference::linear::dense(&a, &b, k);
    let (at, bt) = (transposed(&a, k), transposed(&b, k));
    #[expect(clippy::type_complexity, reason = "a table of cases")]
    let cases: [(Gemm, &[f32], usize, &[f32], usize); 3] =
        [(gemm_nt, &a, k, &b, k), (gemm_nn, &a, k, &bt, n), (gemm_tn, &at, m, &bt, n)];
    for (i, (gemm, a, lda, b, ldb)) in cases.into_iter().enumerate() {
        let (a, b) = (strided(a, lda, 3), strided(b, ldb, 2));
        let c = same_at_every_level(|| {
            let mut c = vec![f32::NAN; m * (n + 1)];
            gemm(m, n, k, &a, lda + 3, &b, ldb + 2, &mut c, n + 1, false).unwrap();
            c.chunks_exact(n + 1).flat_map(|row| row[..n].to_vec()).collect()
        });
        assert_eq!(bits(&c), bits(&expected), "product {i} of {m} {n} {k}");
    }
}

#[test]
fn long_products_have_the_bits_of_the_reference() {
    for (m, n, k) in [(1, 1, 1), (40, 33, 70), (7, 16, 600), (65, 130, 33), (2, 5, 4100)] {
        has_the_bits_of_the_reference(m, n, k, 1);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn products_of_random_shapes_have_the_bits_of_the_reference(
        m in 1usize..40, n in 1usize..40, k in 1usize..90, seed in 0u64..1000,
    ) {
        has_the_bits_of_the_reference(m, n, k, seed);
    }
}

#[test]
fn accumulation_continues_the_chain() {
    let (m, n, k) = (5, 19, 24);
    let (a, b) = (noise(m * 2 * k, 3), noise(n * 2 * k, 4));
    let mut whole = vec![0.0; m * n];
    gemm_nt(m, n, 2 * k, &a, 2 * k, &b, 2 * k, &mut whole, n, false).unwrap();
    let mut parts = vec![0.0; m * n];
    gemm_nt(m, n, k, &a, 2 * k, &b, 2 * k, &mut parts, n, false).unwrap();
    gemm_nt(m, n, k, &a[k..], 2 * k, &b[k..], 2 * k, &mut parts, n, true).unwrap();
    assert_eq!(bits(&whole), bits(&parts));
}

#[test]
fn nt_equals_the_linear_layer_on_any_number_of_threads() {
    let (m, n, k) = (50, 100, 130);
    let (a, b) = (noise(m * k, 5), noise(n * k, 6));
    let packed = PackedWeight::pack_f32(WeightKind::F32, &b, n, k).unwrap();
    let mut y = vec![0.0; m * n];
    crate::linear::linear(&a, &packed, &mut y).unwrap();
    for threads in [1, 2, 3] {
        let mut c = vec![0.0; m * n];
        with_threads(threads, || gemm_nt(m, n, k, &a, k, &b, k, &mut c, n, false)).unwrap();
        assert_eq!(bits(&c), bits(&y));
    }
}

#[test]
fn an_empty_inner_dimension_gives_zeros() {
    let mut c = vec![1.0; 6];
    gemm_nt(2, 3, 0, &[], 0, &[], 0, &mut c, 3, true).unwrap();
    assert_eq!(c, [1.0; 6]);
    gemm_nt(2, 3, 0, &[], 0, &[], 0, &mut c, 3, false).unwrap();
    assert_eq!(c, [0.0; 6]);
}

#[test]
fn short_operands_are_refused() {
    let mut c = vec![0.0; 4];
    assert!(gemm_nt(2, 2, 3, &[0.0; 5], 3, &[0.0; 6], 3, &mut c, 2, false).is_err());
    assert!(gemm_nt(2, 2, 3, &[0.0; 6], 2, &[0.0; 6], 3, &mut c, 2, false).is_err());
    assert!(gemm_nn(2, 2, 3, &[0.0; 6], 3, &[0.0; 5], 2, &mut c, 2, false).is_err());
    assert!(gemm_tn(2, 2, 3, &[0.0; 6], 2, &[0.0; 6], 2, &mut c[..3], 2, false).is_err());
}
