//! Which tokens stay: top-k, then top-p over what is left, then min-p, then typical-p, the order of Hugging Face's logits
//! warpers. Ties go to the lower id.

use std::cmp::Ordering;

use crate::sampling::SamplingParams;

/// Indices, ascending, that the filters keep of tempered log-probabilities `[V]`; `None` when they keep all.
pub(super) fn kept_tokens(logprobs: &[f32], params: &SamplingParams) -> Option<Vec<usize>> {
    let vocab = logprobs.len();
    let cuts_k = params.top_k > 0 && params.top_k < vocab;
    if !cuts_k && params.top_p >= 1.0 && params.min_p <= 0.0 && params.typical_p >= 1.0 {
        return None;
    }
    let likelier = |a: &usize, b: &usize| logprobs[*b].total_cmp(&logprobs[*a]).then(a.cmp(b));
    let mut order: Vec<usize> = (0..vocab).collect();
    if cuts_k {
        order.select_nth_unstable_by(params.top_k - 1, likelier);
        order.truncate(params.top_k);
    }
    let probability = |i: usize| f64::from(logprobs[i]).exp();
    if params.top_p < 1.0 {
        let total: f64 = order.iter().map(|&i| probability(i)).sum();
        let nucleus = nucleus_len(&mut order, likelier, f64::from(params.top_p) * total, probability);
        order.truncate(nucleus);
    }
    if params.min_p > 0.0 {
        let best = order.iter().map(|&i| logprobs[i]).fold(f32::NEG_INFINITY, f32::max);
        let floor = f64::from(best) + f64::from(params.min_p).ln();
        order.retain(|&i| f64::from(logprobs[i]) >= floor);
    }
    if params.typical_p < 1.0 {
        let typical = typical_len(&mut order, logprobs, f64::from(params.typical_p));
        order.truncate(typical);
    }
    order.sort_unstable();
    Some(order)
}

/// Sorts `order` so that the tokens whose surprise is nearest to the expected one come first, and returns how many of
/// them reach the share `mass` of the probability, at least one.
fn typical_len(order: &mut [usize], logprobs: &[f32], mass: f64) -> usize {
    let probability = |i: usize| f64::from(logprobs[i]).exp();
    let total: f64 = order.iter().map(|&i| probability(i)).sum();
    let log_total = total.ln();
    let surprise = |i: usize| log_total - f64::from(logprobs[i]);
    // A token that cannot come has no share in the expectation: 0 times infinity counts as 0.
    let expected: f64 = order
        .iter()
        .map(|&i| (probability(i) / total, surprise(i)))
        .filter(|(p, _)| *p > 0.0)
        .map(|(p, surprise)| p * surprise)
        .sum();
    let distance = |i: usize| (surprise(i) - expected).abs();
    let nearer = |a: &usize, b: &usize| distance(*a).total_cmp(&distance(*b)).then(a.cmp(b));
    nucleus_len(order, nearer, mass * total, probability)
}

/// Sorts `order` as far as needed and returns how many of its first entries reach `wanted` probability, at least one.
/// The head of a vocabulary is usually enough, so it is sorted in growing pieces.
fn nucleus_len(
    order: &mut [usize],
    likelier: impl Fn(&usize, &usize) -> Ordering + Copy,
    wanted: f64,
    probability: impl Fn(usize) -> f64,
) -> usize {
    let (mut sorted, mut sum) = (0, 0.0);
    let mut piece = 256;
    while sorted < order.len() {
        let rest = &mut order[sorted..];
        let take = piece.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take - 1, likelier);
        }
        rest[..take].sort_unstable_by(likelier);
        for (i, &token) in rest[..take].iter().enumerate() {
            sum += probability(token);
            if sum >= wanted {
                return sorted + i + 1;
            }
        }
        sorted += take;
        piece *= 4;
    }
    order.len()
}
