//! The delta rule and the convolution against plain f64 loops, and against themselves under other cuts.

use super::*;
use crate::testing::{assert_close, bits, noise, same_at_every_level, with_threads};

const SHAPES: [DeltaShape; 4] = [
    DeltaShape { n_key_heads: 2, n_heads: 4, key_dim: 16, value_dim: 32, tiled: false },
    DeltaShape { n_key_heads: 3, n_heads: 3, key_dim: 7, value_dim: 5, tiled: false },
    DeltaShape { n_key_heads: 1, n_heads: 2, key_dim: 24, value_dim: 40, tiled: false },
    DeltaShape { n_key_heads: 2, n_heads: 6, key_dim: 8, value_dim: 12, tiled: true },
];

/// Inputs of two sequences of 23 and 6 rows.
struct Batch {
    shape: DeltaShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    decay: Vec<f32>,
    beta: Vec<f32>,
}

const LENGTHS: [usize; 2] = [23, 6];
const ROWS: usize = 29;

impl Batch {
    fn new(shape: DeltaShape) -> Self {
        let unit = |n: usize, seed| -> Vec<f32> {
            noise(n, seed)
                .chunks_exact(shape.key_dim)
                .flat_map(|head| {
                    let norm = head.iter().map(|v| v * v).sum::<f32>().sqrt();
                    head.iter().map(move |v| v / norm).collect::<Vec<_>>()
                })
                .collect()
        };
        let keys = ROWS * shape.n_key_heads * shape.key_dim;
        let to_unit = |v: &f32| 0.5 + 0.49 * v;
        Self {
            shape,
            q: unit(keys, 1),
            k: unit(keys, 2),
            v: noise(ROWS * shape.n_heads * shape.value_dim, 3),
            decay: noise(ROWS * shape.n_heads, 4).iter().map(to_unit).collect(),
            beta: noise(ROWS * shape.n_heads, 5).iter().map(to_unit).collect(),
        }
    }

    /// Results and final states when at most `chunk` rows of each sequence are fed at a time.
    fn run(&self, chunk: usize) -> Vec<f32> {
        let shape = self.shape;
        let mut states = [vec![0.0; shape.state_len()], vec![0.0; shape.state_len()]];
        let width = shape.n_heads * shape.value_dim;
        let mut out = vec![0.0; ROWS * width];
        for from in (0..LENGTHS[0]).step_by(chunk) {
            let parts: Vec<Range<usize>> = LENGTHS
                .iter()
                .zip([0, LENGTHS[0]])
                .map(|(len, first)| first + from.min(*len)..first + (from + chunk).min(*len))
                .collect();
            let take = |v: &[f32], width: usize| -> Vec<f32> {
                parts.iter().flat_map(|p| v[p.start * width..p.end * width].to_vec()).collect()
            };
            let split = parts[0].len();
            let sequences = [0..split, split..split + parts[1].len()];
            let keys = shape.n_key_heads * shape.key_dim;
            let rows = DeltaRows {
                q: &take(&self.q, keys),
                k: &take(&self.k, keys),
                v: &take(&self.v, width),
                decay: &take(&self.decay, shape.n_heads),
                beta: &take(&self.beta, shape.n_heads),
                sequences: &sequences,
            };
            let mut part = vec![0.0; rows.v.len()];
            let [a, b] = &mut states;
            gated_delta_rule(shape, &rows, &mut [a, b], &mut part).unwrap();
            let mut part = part.chunks_exact(width);
            for t in parts.iter().cloned().flatten() {
                out[t * width..(t + 1) * width].copy_from_slice(part.next().unwrap());
            }
        }
        [out, states.concat()].concat()
    }

    /// The results in f64, straight from the formula.
    fn reference(&self) -> Vec<f64> {
        let DeltaShape { n_key_heads, n_heads, key_dim, value_dim, tiled } = self.shape;
        let mut out = vec![0.0; ROWS * n_heads * value_dim];
        for (first, len) in [0, LENGTHS[0]].into_iter().zip(LENGTHS) {
            for head in 0..n_heads {
                let key_head = if tiled { head % n_key_heads } else { head / (n_heads / n_key_heads) };
                let mut s = vec![vec![0.0f64; value_dim]; key_dim];
                for t in first..first + len {
                    let at = (t * n_key_heads + key_head) * key_dim;
                    let (q, k) = (&self.q[at..], &self.k[at..]);
                    let gate = t * n_heads + head;
                    let cell = (t * n_heads + head) * value_dim;
                    for j in 0..value_dim {
                        s.iter_mut().for_each(|row| row[j] *= f64::from(self.decay[gate]));
                        let known: f64 = (0..key_dim).map(|d| f64::from(k[d]) * s[d][j]).sum();
                        let delta = f64::from(self.beta[gate]) * (f64::from(self.v[cell + j]) - known);
                        (0..key_dim).for_each(|d| s[d][j] += f64::from(k[d]) * delta);
                        out[cell + j] = (0..key_dim).map(|d| f64::from(q[d]) * s[d][j]).sum();
                    }
                }
            }
        }
        out
    }
}

#[test]
fn the_rule_agrees_with_its_formula() {
    for shape in SHAPES {
        let batch = Batch::new(shape);
        let got = same_at_every_level(|| batch.run(LENGTHS[0]));
        let expected = batch.reference();
        assert_close(&got[..expected.len()], &expected, 2e-6);
    }
}

#[test]
fn no_cut_of_the_rows_and_no_thread_changes_a_bit() {
    for shape in SHAPES {
        let batch = Batch::new(shape);
        let expected = bits(&batch.run(LENGTHS[0]));
        for chunk in [1, 5, 8] {
            assert_eq!(bits(&batch.run(chunk)), expected, "chunks of {chunk}");
        }
        assert_eq!(with_threads(3, || bits(&batch.run(LENGTHS[0]))), expected);
    }
}

#[test]
fn gates_agree_with_their_formulas() {
    let (a, b) = ([-30.0, 0.5, 25.0, -2.0], [0.0, 3.0, -3.0, 9.0]);
    let (a_log, dt_bias) = ([0.3, -1.0], [1.0, 0.1]);
    let rates = decay_rates(&a_log);
    let [decay, beta] = delta_gates(&a, &b, &rates, &dt_bias).unwrap();
    let sides = |i: usize| (f64::from(a_log[i % 2]), f64::from(a[i] + dt_bias[i % 2]));
    let expected: Vec<f64> = (0..4).map(|i| (-sides(i).0.exp() * sides(i).1.exp().ln_1p()).exp()).collect();
    assert_close(&decay, &expected, 1e-6);
    let expected: Vec<f64> = b.iter().map(|&b| 1.0 / (1.0 + (-f64::from(b)).exp())).collect();
    assert_close(&beta, &expected, 1e-6);
    assert!(delta_gates(&a, &b[..3], &rates, &dt_bias).is_err());
    assert!(delta_gates(&a[..3], &b[..3], &rates, &dt_bias).is_err());
}

/// Convolution of two sequences of 9 and 3 rows, at most `chunk` rows of each at a time.
fn convolution(taps: usize, channels: usize, chunk: usize) -> Vec<f32> {
    let lengths = [9, 3];
    let (x, weight) = (noise(12 * channels, 7), noise(taps * channels, 8));
    let mut states = [vec![0.0; (taps - 1) * channels], vec![0.0; (taps - 1) * channels]];
    let mut out = vec![0.0; x.len()];
    for from in (0..9).step_by(chunk) {
        let parts: Vec<Range<usize>> = lengths
            .iter()
            .zip([0, 9])
            .map(|(len, first): (&usize, usize)| first + from.min(*len)..first + (from + chunk).min(*len))
            .collect();
        let input: Vec<f32> =
            parts.iter().flat_map(|p| x[p.start * channels..p.end * channels].to_vec()).collect();
        let sequences = [0..parts[0].len(), parts[0].len()..parts[0].len() + parts[1].len()];
        let mut part = vec![0.0; input.len()];
        let [a, b] = &mut states;
        causal_conv_silu(&input, &weight, channels, &sequences, &mut [a, b], &mut part).unwrap();
        let mut rows = part.chunks_exact(channels);
        for t in parts.into_iter().flatten() {
            out[t * channels..(t + 1) * channels].copy_from_slice(rows.next().unwrap());
        }
    }
    out
}

#[test]
fn the_convolution_agrees_with_its_formula_under_any_cut() {
    for (taps, channels) in [(4, 20), (2, 3), (1, 16)] {
        let got = same_at_every_level(|| convolution(taps, channels, 9));
        let (x, weight) = (noise(12 * channels, 7), noise(taps * channels, 8));
        let mut expected = Vec::new();
        for (t, c) in (0..12).flat_map(|t| (0..channels).map(move |c| (t, c))) {
            let first = if t < 9 { 0 } else { 9 };
            let sum: f64 = (0..taps)
                .filter(|i| t + i + 1 >= first + taps)
                .map(|i| {
                    f64::from(weight[i * channels + c]) * f64::from(x[(t + i + 1 - taps) * channels + c])
                })
                .sum();
            expected.push(sum / (1.0 + (-sum).exp()));
        }
        assert_close(&got, &expected, 1e-6);
        for chunk in [1, 2, 5] {
            assert_eq!(bits(&convolution(taps, channels, chunk)), bits(&got), "chunks of {chunk}");
        }
    }
}

#[test]
fn misfits_are_refused() {
    let (shape, all) = (SHAPES[1], 0..ROWS);
    let batch = Batch::new(shape);
    let mut state = vec![0.0; shape.state_len()];
    let mut out = vec![0.0; batch.v.len()];
    let rows = DeltaRows {
        q: &batch.q,
        k: &batch.k,
        v: &batch.v,
        decay: &batch.decay,
        beta: &batch.beta,
        sequences: std::slice::from_ref(&all),
    };
    assert!(gated_delta_rule(shape, &rows, &mut [&mut state], &mut out).is_ok());
    assert!(gated_delta_rule(shape, &rows, &mut [], &mut out).is_err());
    assert!(gated_delta_rule(shape, &rows, &mut [&mut state[1..]], &mut out).is_err());
    let late = 1..ROWS;
    let gap = DeltaRows { sequences: std::slice::from_ref(&late), ..rows };
    assert!(gated_delta_rule(shape, &gap, &mut [&mut state], &mut out).is_err());
    let odd = DeltaShape { n_key_heads: 2, ..shape };
    assert!(gated_delta_rule(odd, &rows, &mut [&mut state], &mut out).is_err());
}
