//! Distances between what was claimed and what was recomputed.
//!
//! The relative L2 residual of a row decides; the agreement of exponents among the largest values (the idea of TOPLOC,
//! arXiv 2501.16007) is reported beside it. Per answer the mean is taken: the maximum of honest rows has
//! outliers. Of log-probabilities the largest difference counts too.

use serde::{Deserialize, Serialize};

/// Largest values of a row that [`Distance::top_exponent_mismatch`] looks at.
const TOP_VALUES: usize = 16;

/// What a row counts as that cannot be compared: a number, so that evidence can be written as JSON.
const FAR: f64 = 1e9;

/// How far claimed rows are from recomputed ones.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Distance {
    /// Rows compared.
    pub n_rows: u32,
    /// Rows that are equal bit for bit.
    pub n_exact: u32,
    /// Mean over rows of |claimed - recomputed| / |recomputed|, each at most 1e9.
    pub relative_l2: f64,
    /// Share of the recomputed rows' largest values whose binary exponent differs in the claim.
    pub top_exponent_mismatch: f64,
}

/// Compares pairs (claimed `[H]`, recomputed `[H]`). Rows of different widths, or not finite, count as far.
pub fn rows<'a>(pairs: impl IntoIterator<Item = (&'a [f32], &'a [f32])>) -> Distance {
    let mut distance = Distance::default();
    let (mut residuals, mut mismatches) = (0.0, 0.0);
    for (claimed, recomputed) in pairs {
        distance.n_rows += 1;
        let exact = claimed.len() == recomputed.len()
            && claimed.iter().zip(recomputed).all(|(a, b)| a.to_bits() == b.to_bits());
        if exact {
            distance.n_exact += 1;
            continue;
        }
        residuals += relative_l2(claimed, recomputed);
        mismatches += top_exponent_mismatch(claimed, recomputed);
    }
    let n = f64::from(distance.n_rows.max(1));
    distance.relative_l2 = residuals / n;
    distance.top_exponent_mismatch = mismatches / n;
    distance
}

fn relative_l2(claimed: &[f32], recomputed: &[f32]) -> f64 {
    if claimed.len() != recomputed.len() {
        return FAR;
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&a, &b) in claimed.iter().zip(recomputed) {
        difference += (f64::from(a) - f64::from(b)).powi(2);
        norm += f64::from(b).powi(2);
    }
    let ratio = (difference / norm.max(f64::MIN_POSITIVE)).sqrt();
    if ratio.is_finite() { ratio.min(FAR) } else { FAR }
}

fn top_exponent_mismatch(claimed: &[f32], recomputed: &[f32]) -> f64 {
    let exponent = |v: f32| (v.to_bits() >> 23) & 0xff;
    let mut order: Vec<usize> = (0..recomputed.len().min(claimed.len())).collect();
    order.sort_unstable_by(|&i, &j| recomputed[j].abs().total_cmp(&recomputed[i].abs()).then(i.cmp(&j)));
    order.truncate(TOP_VALUES);
    if order.is_empty() {
        return 1.0;
    }
    let different = order.iter().filter(|&&i| exponent(claimed[i]) != exponent(recomputed[i])).count();
    different as f64 / order.len() as f64
}

/// Absolute differences of two lists of log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogprobDistance {
    /// Mean over the tokens, in nats.
    pub mean_nats: f64,
    /// The largest, in nats.
    pub max_nats: f64,
}

/// Compares log-probabilities; infinitely far when the lists differ in length or hold a value that is not finite.
pub fn logprobs(claimed: &[f32], recomputed: &[f32]) -> LogprobDistance {
    let far = LogprobDistance { mean_nats: f64::INFINITY, max_nats: f64::INFINITY };
    if claimed.len() != recomputed.len() || claimed.is_empty() {
        return far;
    }
    let (mut sum, mut max_nats) = (0.0, 0.0_f64);
    for (&a, &b) in claimed.iter().zip(recomputed) {
        let difference = (f64::from(a) - f64::from(b)).abs();
        sum += difference;
        max_nats = max_nats.max(difference);
    }
    let mean_nats = sum / claimed.len() as f64;
    if mean_nats.is_finite() { LogprobDistance { mean_nats, max_nats } } else { far }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_rows_are_exact_and_scaled_rows_are_as_far_as_the_scale() {
        let row = [1.0_f32, -2.0, 3.0];
        let scaled: Vec<f32> = row.iter().map(|v| v * 1.01).collect();
        let exact = rows([(&row[..], &row[..])]);
        assert_eq!((exact.n_exact, exact.relative_l2), (1, 0.0));
        let far = rows([(&scaled[..], &row[..])]);
        assert!((far.relative_l2 - 0.01).abs() < 1e-6, "{far:?}");
    }

    #[test]
    fn not_finite_and_misshaped_rows_are_far() {
        let row = [1.0_f32, 2.0];
        assert_eq!(rows([(&[1.0_f32][..], &row[..])]).relative_l2, FAR);
        let far = rows([(&[f32::NAN, 1.0][..], &row[..])]);
        assert_eq!(far.relative_l2, FAR);
        let written = serde_json::to_string(&far).unwrap();
        assert_eq!(serde_json::from_str::<Distance>(&written).unwrap(), far);
        assert_eq!(logprobs(&[f32::NAN], &[0.0]).mean_nats, f64::INFINITY);
        assert_eq!(logprobs(&[f32::NAN, 0.0], &[0.0, 0.0]).max_nats, f64::INFINITY);
        assert_eq!(logprobs(&[], &[]).max_nats, f64::INFINITY);
    }

    proptest! {
        /// The null adversary: a row that has nothing to do with the right one must be far, whatever its scale.
        #[test]
        fn unrelated_rows_are_never_near(seed in any::<u64>(), scale in 0.01f32..100.0) {
            let mut stream = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
            let mut draw = |n: usize, scale: f32| -> Vec<f32> {
                (0..n).map(|_| { let mut b = [0; 4]; stream.fill(&mut b);
                    (u32::from_le_bytes(b) as f32 / u32::MAX as f32 - 0.5) * scale }).collect()
            };
            let (claimed, right) = (draw(64, scale), draw(64, 1.0));
            prop_assert!(rows([(&claimed[..], &right[..])]).relative_l2 > 0.5);
        }
    }
}
