//! Linear layers and matrix products: each output is one chain of fused multiply-adds in the order of the inputs.

use crate::dtype::{BLOCK, WeightKind, quantize_block};

/// `y [T, N] = x [T, K] * W [N, K]^T` in f32. Bit-exact specification of dense products.
pub fn dense(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum));
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

/// `y [T, N] = x [T, K] * W [N, K]^T` with W and x quantised: the bit-exact specification of the block formats.
///
/// Per block: activations to eight bits (scale = largest magnitude / 127, ties to even), an integer dot product, and
/// one fused multiply-add by the product of the scales; Q4_1 adds `min * (activation scale * activation sum)`.
pub fn quantized(kind: WeightKind, x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let (x_blocks, w_blocks) = (x.as_chunks::<BLOCK>().0, w.as_chunks::<BLOCK>().0);
    let per_row = k / BLOCK;
    let mut y = Vec::new();
    for x in x_blocks.chunks_exact(per_row) {
        for w in w_blocks.chunks_exact(per_row) {
            let mut sum = 0.0f32;
            for (x, w) in x.iter().zip(w) {
                let (q, x_scale) = activation_block(x);
                let w = quantize_block(kind, w);
                let offset = if kind == WeightKind::Q4_0 { 8 } else { 0 };
                let dot: i32 = q.iter().zip(w.q).map(|(x, w)| x * (i32::from(w) - offset)).sum();
                let scale = half::f16::from_bits(w.scale).to_f32();
                sum = (dot as f32).mul_add(scale * x_scale, sum);
                if kind == WeightKind::Q4_1 {
                    let min = half::f16::from_bits(w.min).to_f32();
                    sum = min.mul_add(q.iter().sum::<i32>() as f32 * x_scale, sum);
                }
            }
            y.push(sum);
        }
    }
    y
}

fn activation_block(x: &[f32; BLOCK]) -> ([i32; BLOCK], f32) {
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let inverse = if largest > 1e-25 { 127.0 / largest } else { 0.0 };
    (x.map(|v| (v * inverse).round_ties_even() as i32), largest / 127.0)
}
