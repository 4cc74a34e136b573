//! The kernels as plain loops: the specification. Nothing here is fast, shared out or vectorised.
//!
//! "Equal" in the tests means: bit for bit where the order of a sum is part of the specification (linear layers, matrix
//! products), within a bound that grows with the length of the sums elsewhere.

pub mod attention;
pub mod linear;
pub mod rows;

/// Numbers in -1..1 to try kernels on, the same for the same seed.
pub fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32) / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}
