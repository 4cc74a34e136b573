//! Log-probabilities: the one definition, used by the sampler, the trainer and the verifier.

/// Index of the largest value, the lowest index among equals; 0 for an empty slice.
pub fn argmax(values: &[f32]) -> usize {
    parallax_kernels::logprob::argmax(values)
}

/// `log_softmax` of one row of logits. `[V]`
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; logits.len()];
    parallax_kernels::logprob::log_softmax_row(logits, &mut out).expect("both have the row's length");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_masked_entries_stay_out() {
        let lp = log_softmax(&[1.0, 3.0, f32::NEG_INFINITY, 2.0]);
        let sum: f32 = lp.iter().map(|v| v.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(lp[2], f32::NEG_INFINITY);
        assert_eq!(argmax(&lp), 1);
    }
}
