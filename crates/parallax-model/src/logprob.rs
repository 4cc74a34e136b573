//! Log-probabilities: the one definition, used by the sampler, the trainer and the verifier.

/// Index of the largest value, the lowest index among equals; 0 for an empty slice.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}

/// `log_softmax` of one row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|v| (v - max).exp()).sum();
    let lse = max + sum.ln();
    logits.iter().map(|v| v - lse).collect()
}
