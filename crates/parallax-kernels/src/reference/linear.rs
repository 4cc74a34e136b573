//! Linear layers and matrix products: each output is one chain of fused multiply-adds in the order of the inputs.

use crate::dtype::{BLOCK, MXFP4_OFFSET, MXFP4_VALUES, SUPER, WeightKind, read_block, read_super_block};

/// `y [T, N] = x [T, K] * W [N, K]^T` in f32. Bit-exact specification of dense products.
pub fn dense(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum));
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

/// `y [T, N] = x [T, K] * W [N, K]^T` with x quantised and W in the stored blocks `raw` of `kind`: the bit-exact
/// specification of the block formats.
///
/// Per 32 inputs: activations to eight bits (scale = largest magnitude / 127, ties to even), an integer dot product, and
/// one fused multiply-add by the product of the scales. Formats with minima add `min * (activation scale * activation
/// sum)` by another; in the k-quants the integer scales multiply the integer dot products, exactly.
pub fn blocks(kind: WeightKind, x: &[f32], raw: &[u8], k: usize) -> Vec<f32> {
    let (values, bytes) = kind.block();
    let mut y = Vec::new();
    for x in x.as_chunks::<BLOCK>().0.chunks_exact(k / BLOCK) {
        for row in raw.chunks_exact(k / values * bytes) {
            let mut sum = 0.0f32;
            for (x, raw) in x.chunks_exact(values / BLOCK).zip(row.chunks_exact(bytes)) {
                sum = if values == SUPER {
                    super_block(kind, x, raw, sum)
                } else {
                    block(kind, &x[0], raw, sum)
                };
            }
            y.push(sum);
        }
    }
    y
}

fn block(kind: WeightKind, x: &[f32; BLOCK], raw: &[u8], sum: f32) -> f32 {
    let (q, x_scale) = activation_block(x);
    let w = read_block(kind, raw);
    let half = |bits| half::f16::from_bits(bits).to_f32();
    let (offset, scale) = match kind {
        WeightKind::Q4_0 => (8, half(w.scale)),
        WeightKind::Q5_0 => (16, half(w.scale)),
        WeightKind::Int4 => (i32::from(w.extra), half(w.scale)),
        WeightKind::Mxfp4 => (0, half::bf16::from_bits(w.scale).to_f32()),
        _ => (0, half(w.scale)),
    };
    let code = |w: i8| match kind {
        WeightKind::Mxfp4 => i32::from(MXFP4_VALUES[w as usize]) - MXFP4_OFFSET,
        _ => i32::from(w) - offset,
    };
    let dot: i32 = q.iter().zip(w.q).map(|(x, w)| x * code(w)).sum();
    let sum = (dot as f32).mul_add(scale * x_scale, sum);
    if matches!(kind, WeightKind::Q4_1 | WeightKind::Q5_1) {
        return half(w.extra).mul_add(q.iter().sum::<i32>() as f32 * x_scale, sum);
    }
    sum
}

fn super_block(kind: WeightKind, x: &[[f32; BLOCK]], raw: &[u8], mut sum: f32) -> f32 {
    let w = read_super_block(kind, raw);
    let (d, dmin) = (half::f16::from_bits(w.d).to_f32(), half::f16::from_bits(w.dmin).to_f32());
    let has_mins = matches!(kind, WeightKind::Q2K | WeightKind::Q4K | WeightKind::Q5K);
    for (b, x) in x.iter().enumerate() {
        let (q, x_scale) = activation_block(x);
        let (mut dot, mut lowered) = (0, 0);
        for (i, q) in q.into_iter().enumerate() {
            let at = b * BLOCK + i;
            dot += i32::from(w.scales[at / 16]) * (i32::from(w.q[at]) - w.offset) * q;
            lowered += i32::from(w.mins[at / 16]) * q;
        }
        sum = (dot as f32).mul_add(d * x_scale, sum);
        if has_mins {
            sum = (lowered as f32).mul_add(-dmin * x_scale, sum);
        }
    }
    sum
}

fn activation_block(x: &[f32; BLOCK]) -> ([i32; BLOCK], f32) {
    let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let inverse = if largest > 1e-25 { 127.0 / largest } else { 0.0 };
    (x.map(|v| (v * inverse).round_ties_even() as i32), largest / 127.0)
}
