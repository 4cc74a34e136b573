//! Row-wise kernels in f64: norms, activations, rotation, log-probabilities.

/// RMSNorm of one row.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f64> {
    let squares: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
    let inverse = 1.0 / (squares / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(w).map(|(&x, &w)| f64::from(x) * inverse * f64::from(w)).collect()
}

/// silu(gate) * up.
pub fn silu_mul(gate: f32, up: f32) -> f64 {
    let gate = f64::from(gate);
    gate / (1.0 + (-gate).exp()) * f64::from(up)
}

/// gelu(gate) * up, by the tanh approximation.
pub fn gelu_tanh_mul(gate: f32, up: f32) -> f64 {
    let gate = f64::from(gate);
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
    0.5 * gate * (1.0 + inner.tanh()) * f64::from(up)
}

/// One head of D elements rotated to `position`.
pub fn rope(x: &[f32], position: u32, theta: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut y = vec![0.0; x.len()];
    for i in 0..half {
        let frequency = theta.powf(-2.0 * i as f64 / x.len() as f64) as f32;
        let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
        let (a, b) = (f64::from(x[i]), f64::from(x[i + half]));
        (y[i], y[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
    y
}

/// Log-probabilities of a row of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
    let sum: f64 = logits.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    logits.iter().map(|&v| f64::from(v) - max - sum.ln()).collect()
}
