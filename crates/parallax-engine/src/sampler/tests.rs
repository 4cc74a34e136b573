//! The sampler against a naive one in f64, and a golden sequence.

use proptest::prelude::*;

use super::*;

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|v| (v - max).exp()).sum();
    logits.iter().map(|v| v - max - sum.ln()).collect()
}

const SAMPLER: Sampler = Sampler { log_softmax };

fn params(temperature: f32, top_k: usize, top_p: f32, min_p: f32) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, min_p, seed: 42, ..SamplingParams::default() }
}

/// The distribution after all filters, in plain f64: sort everything, cut, renormalise. Also says whether some cut is so
/// close that rounding may decide it.
fn naive(logits: &[f32], params: &SamplingParams) -> (Vec<f64>, bool) {
    let scaled: Vec<f64> = logits.iter().map(|l| f64::from(*l) / f64::from(params.temperature)).collect();
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = scaled.iter().map(|l| (l - max).exp()).collect();
    let total: f64 = exp.iter().sum();
    let mut order: Vec<(usize, f64)> = exp.iter().map(|e| e / total).enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut close = false;
    if params.top_k > 0 && params.top_k < order.len() {
        close |= (order[params.top_k - 1].1 - order[params.top_k].1).abs() < 1e-6;
        order.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        let total: f64 = order.iter().map(|(_, p)| p).sum();
        let mut sum = 0.0;
        let mut kept = 0;
        for (_, p) in &order {
            sum += p / total;
            kept += 1;
            close |= (sum - f64::from(params.top_p)).abs() < 1e-5;
            if sum >= f64::from(params.top_p) {
                break;
            }
        }
        order.truncate(kept);
    }
    let floor = order[0].1 * f64::from(params.min_p);
    close |= order.iter().any(|(_, p)| (p / floor - 1.0).abs() < 1e-5);
    order.retain(|(_, p)| *p >= floor);
    let total: f64 = order.iter().map(|(_, p)| p).sum();
    let mut distribution = vec![0.0; logits.len()];
    for (i, p) in order {
        distribution[i] = p / total;
    }
    (distribution, close)
}

#[test]
fn a_golden_sequence_is_kept() {
    // Made by an independent ChaCha8 and f64 sampler written for this test in Python on 2026-11-21. A change here
    // breaks the replay of recorded rollouts.
    let logits: Vec<f32> = (0..16).map(|i| ((i * 7) % 16) as f32 * 0.3).collect();
    let draws = |p: &SamplingParams| (0..12).map(|t| SAMPLER.sample(&logits, p, t).id).collect::<Vec<u32>>();
    assert_eq!(draws(&params(1.0, 0, 1.0, 0.0)), GOLDEN_PLAIN);
    assert_eq!(draws(&params(0.7, 6, 0.9, 0.05)), GOLDEN_FILTERED);
    assert_eq!(uniform(1, 2, 3).to_bits(), GOLDEN_UNIFORM);
}

const GOLDEN_PLAIN: [u32; 12] = [6, 11, 3, 9, 11, 9, 11, 2, 9, 6, 11, 11];
const GOLDEN_FILTERED: [u32; 12] = [4, 11, 2, 9, 11, 9, 11, 2, 9, 4, 9, 9];
const GOLDEN_UNIFORM: u64 = 0x3fce4d6d2655b614;

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let sampled = SAMPLER.sample(&[1.0, 3.0, 3.0, 2.0], &params(0.0, 0, 1.0, 0.0), 0);
    assert_eq!((sampled.id, sampled.sampled_logprob), (1, 0.0));
    assert!((sampled.logprob - log_softmax(&[1.0, 3.0, 3.0, 2.0])[1]).abs() < 1e-7);
}

#[test]
fn at_temperature_one_both_log_probabilities_are_the_same_bits() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin() * 5.0).collect();
    for position in 0..200 {
        let sampled = SAMPLER.sample(&logits, &params(1.0, 0, 1.0, 0.0), position);
        assert_eq!(sampled.logprob.to_bits(), sampled.sampled_logprob.to_bits());
    }
}

#[test]
fn positions_and_streams_draw_independently() {
    let mean: f64 = (0..4000).map(|p| uniform(5, 0, p)).sum::<f64>() / 4000.0;
    assert!((mean - 0.5).abs() < 0.02, "{mean}");
    assert_ne!(uniform(5, 0, 1).to_bits(), uniform(5, 1, 0).to_bits());
    assert_ne!(uniform(5, 0, 1).to_bits(), uniform(6, 0, 1).to_bits());
}

#[test]
fn frequencies_are_the_probabilities() {
    let logits = [0.0, 1.0, 2.0, -1.0, 0.5];
    let p = params(0.8, 4, 0.95, 0.0);
    let (distribution, _) = naive(&logits, &p);
    let mut counts = [0u32; 5];
    let n = 20_000;
    for position in 0..n {
        counts[SAMPLER.sample(&logits, &p, position).id as usize] += 1;
    }
    for (count, expected) in counts.iter().zip(&distribution) {
        let frequency = f64::from(*count) / n as f64;
        // Four standard deviations.
        assert!((frequency - expected).abs() < 4.0 * (0.25 / n as f64).sqrt(), "{counts:?} {distribution:?}");
    }
}

proptest! {
    #[test]
    fn choice_and_log_probability_are_those_of_the_naive_sampler(
        logits in proptest::collection::vec(-8.0f32..8.0, 1..700),
        temperature in 0.2f32..2.0,
        top_k in 0usize..50,
        top_p in 0.3f32..1.3,
        min_p in 0.0f32..0.3,
        position in any::<u64>(),
    ) {
        let p = params(temperature, top_k, top_p.min(1.0), min_p);
        let (distribution, close) = naive(&logits, &p);
        prop_assume!(!close);
        let sampled = SAMPLER.sample(&logits, &p, position);
        let probability = distribution[sampled.id as usize];
        prop_assert!(probability > 0.0, "token {} was cut off", sampled.id);
        prop_assert!((f64::from(sampled.sampled_logprob) - probability.ln()).abs() < 1e-4);
        // The choice: the first token at which the cumulative sum passes the random number.
        let random = uniform(p.seed, p.stream, position);
        let before: f64 = distribution[..sampled.id as usize].iter().sum();
        prop_assert!(before <= random + 1e-5 && random <= before + probability + 1e-5);
    }
}
