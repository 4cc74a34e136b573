//! The sampler against a naive one in f64, golden draws, and golden numbers of transformers' logits processors.

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

fn at(position: u64) -> Place<'static> {
    Place { position, generated: 0, history: None }
}

fn sample(logits: &[f32], params: &SamplingParams, position: u64) -> Sampled {
    SAMPLER.sample(logits, params, at(position), None).unwrap()
}

/// The distribution after all rules and filters, in plain f64: sort everything, cut, renormalise. Also says whether some
/// cut is so close that rounding may decide it.
fn naive(logits: &[f32], params: &SamplingParams, prompt: &[u32], answer: &[u32]) -> (Vec<f64>, bool) {
    let mut ruled: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
    for (id, bias) in &params.logit_bias {
        ruled[*id as usize] += f64::from(*bias);
    }
    for (id, logit) in ruled.iter_mut().enumerate() {
        let count = |tokens: &[u32]| tokens.iter().filter(|t| **t as usize == id).count() as f64;
        let times = count(answer);
        if count(prompt) + times > 0.0 {
            let penalty = f64::from(params.repetition_penalty);
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        if times > 0.0 {
            *logit -= times * f64::from(params.frequency_penalty) + f64::from(params.presence_penalty);
        }
    }
    let scaled: Vec<f64> = ruled.iter().map(|l| l / f64::from(params.temperature)).collect();
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = scaled.iter().map(|l| (l - max).exp()).collect();
    let total: f64 = exp.iter().sum();
    let mut order: Vec<(usize, f64)> = exp.iter().map(|e| e / total).enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut close = false;
    if params.top_k > 0 && params.top_k < order.len() {
        close |= (order[params.top_k - 1].1 / order[params.top_k].1 - 1.0).abs() < 1e-4;
        order.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        close |= reach(&mut order, f64::from(params.top_p));
    }
    let floor = order[0].1 * f64::from(params.min_p);
    close |= order.iter().any(|(_, p)| (p / floor - 1.0).abs() < 1e-4);
    order.retain(|(_, p)| *p >= floor);
    if params.typical_p < 1.0 {
        let total: f64 = order.iter().map(|(_, p)| p).sum();
        let entropy: f64 = order.iter().map(|(_, p)| -(p / total) * (p / total).ln()).sum();
        let distance = |p: f64| (-(p / total).ln() - entropy).abs();
        order.sort_by(|a, b| distance(a.1).total_cmp(&distance(b.1)).then(a.0.cmp(&b.0)));
        close |= order.windows(2).any(|w| (distance(w[0].1) - distance(w[1].1)).abs() < 1e-4);
        close |= reach(&mut order, f64::from(params.typical_p));
    }
    let total: f64 = order.iter().map(|(_, p)| p).sum();
    let mut distribution = vec![0.0; logits.len()];
    for (i, p) in order {
        distribution[i] = p / total;
    }
    (distribution, close)
}

/// Keeps the shortest beginning with a share of `mass`. Says whether that was a close call.
fn reach(order: &mut Vec<(usize, f64)>, mass: f64) -> bool {
    let total: f64 = order.iter().map(|(_, p)| p).sum();
    let (mut sum, mut kept, mut close) = (0.0, 0, false);
    for (_, p) in order.iter() {
        sum += p / total;
        kept += 1;
        close |= (sum - mass).abs() < 1e-5;
        if sum >= mass {
            break;
        }
    }
    order.truncate(kept);
    close
}

#[test]
fn a_golden_sequence_is_kept() {
    // Made by an independent ChaCha8 and f64 sampler written for this test in Python on 2026-11-21. A change here
    // breaks the replay of recorded rollouts.
    let logits: Vec<f32> = (0..16).map(|i| ((i * 7) % 16) as f32 * 0.3).collect();
    let draws = |p: &SamplingParams| (0..12).map(|t| sample(&logits, p, t).id).collect::<Vec<u32>>();
    assert_eq!(draws(&params(1.0, 0, 1.0, 0.0)), GOLDEN_PLAIN);
    assert_eq!(draws(&params(0.7, 6, 0.9, 0.05)), GOLDEN_FILTERED);
    assert_eq!(uniform(1, 2, 3).to_bits(), GOLDEN_UNIFORM);
}

const GOLDEN_PLAIN: [u32; 12] = [6, 11, 3, 9, 11, 9, 11, 2, 9, 6, 11, 11];
const GOLDEN_FILTERED: [u32; 12] = [4, 11, 2, 9, 11, 9, 11, 2, 9, 4, 9, 9];
const GOLDEN_UNIFORM: u64 = 0x3fce4d6d2655b614;

/// One case of `tests/golden/sampling.json`.
#[derive(serde::Deserialize)]
struct Golden {
    name: String,
    params: SamplingParams,
    prompt: Vec<u32>,
    /// Log-probabilities after the processors; null where they cut.
    logprobs: Vec<Option<f64>>,
}

#[test]
fn distributions_are_those_of_transformers() {
    #[derive(serde::Deserialize)]
    struct File {
        logits: Vec<f32>,
        cases: Vec<Golden>,
    }
    let file: File = serde_json::from_str(include_str!("../../tests/golden/sampling.json")).unwrap();
    assert!(file.cases.len() >= 12);
    for case in file.cases {
        let history = History::new(&case.prompt);
        let place = Place { position: 0, generated: 0, history: Some(&history) };
        let ours = SAMPLER.distribution(&file.logits, &case.params, place, None).unwrap();
        for (id, (ours, theirs)) in ours.iter().zip(&case.logprobs).enumerate() {
            match theirs {
                Some(theirs) => assert!((f64::from(*ours) - theirs).abs() < 2e-5, "{} {id}", case.name),
                None => assert_eq!(*ours, f32::NEG_INFINITY, "{}: token {id} is cut off", case.name),
            }
        }
    }
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let sampled = sample(&[1.0, 3.0, 3.0, 2.0], &params(0.0, 0, 1.0, 0.0), 0);
    assert_eq!((sampled.id, sampled.sampled_logprob), (1, 0.0));
    assert!((sampled.logprob - log_softmax(&[1.0, 3.0, 3.0, 2.0])[1]).abs() < 1e-7);
}

#[test]
fn at_temperature_one_both_log_probabilities_are_the_same_bits() {
    let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin() * 5.0).collect();
    for position in 0..200 {
        let sampled = sample(&logits, &params(1.0, 0, 1.0, 0.0), position);
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
    let (distribution, _) = naive(&logits, &p, &[], &[]);
    let mut counts = [0u32; 5];
    let n = 20_000;
    for position in 0..n {
        counts[sample(&logits, &p, position).id as usize] += 1;
    }
    for (count, expected) in counts.iter().zip(&distribution) {
        let frequency = f64::from(*count) / n as f64;
        // Four standard deviations.
        assert!((frequency - expected).abs() < 4.0 * (0.25 / n as f64).sqrt(), "{counts:?} {distribution:?}");
    }
}

#[test]
fn alternatives_are_the_likeliest_under_the_model_whatever_is_sampled() {
    let logits = [0.5, 2.0, 2.0, -1.0];
    let p = SamplingParams { top_logprobs: 3, logit_bias: [(3, 100.0)].into(), ..params(1.0, 0, 1.0, 0.0) };
    let sampled = sample(&logits, &p, 0);
    let logprobs = log_softmax(&logits);
    assert_eq!(sampled.id, 3);
    assert_eq!(sampled.top_logprobs, [(1, logprobs[1]), (2, logprobs[2]), (0, logprobs[0])]);
    assert_eq!(sampled.logprob, logprobs[3]);
    assert!(sampled.sampled_logprob > -1e-6);
}

/// Rules nothing.
#[derive(Debug)]
struct Free;

impl ConstraintState for Free {
    fn mask(&mut self, _: &mut [f32]) -> Result<(), String> {
        Err("nobody need ask".into())
    }
    fn is_free(&self) -> bool {
        true
    }
    fn accept(&mut self, _: u32) -> Result<(), String> {
        Ok(())
    }
}

#[test]
fn a_constraint_that_rules_nothing_is_not_asked() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 1.7).sin() * 9.0).collect();
    for p in [params(0.0, 0, 1.0, 0.0), params(0.7, 5, 0.9, 0.1)] {
        let free = SAMPLER.sample(&logits, &p, at(3), Some(&mut Free)).unwrap();
        assert_eq!(free, SAMPLER.sample(&logits, &p, at(3), None).unwrap());
    }
}

/// Allows only some tokens.
#[derive(Debug)]
struct Only(Vec<u32>);

impl ConstraintState for Only {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        for (id, logit) in logits.iter_mut().enumerate() {
            if !self.0.contains(&(id as u32)) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if self.0.contains(&99) { Err("broken".into()) } else { Ok(()) }
    }
    fn accept(&mut self, _: u32) -> Result<(), String> {
        Ok(())
    }
}

#[test]
fn a_constraint_holds_under_every_filter_and_impossible_rules_are_an_error() {
    let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 1.7).sin() * 9.0).collect();
    for p in [params(0.0, 0, 1.0, 0.0), params(1.0, 0, 1.0, 0.0), params(0.7, 5, 0.9, 0.1)] {
        for position in 0..50 {
            let mut only = Only(vec![3, 17, 40]);
            let sampled = SAMPLER.sample(&logits, &p, at(position), Some(&mut only)).unwrap();
            assert!([3, 17, 40].contains(&sampled.id));
            assert!(sampled.sampled_logprob.is_finite());
        }
    }
    let nothing = SAMPLER.sample(&logits, &params(1.0, 0, 1.0, 0.0), at(7), Some(&mut Only(vec![])));
    assert_eq!(nothing, Err(SampleError::NothingAllowed { position: 7 }));
    let broken = SAMPLER.sample(&logits, &params(1.0, 0, 1.0, 0.0), at(7), Some(&mut Only(vec![99])));
    assert!(broken.unwrap_err().to_string().contains("broken"));
}

#[test]
fn stop_tokens_wait_for_the_least_number_of_tokens() {
    let logits = [0.0, 5.0, 1.0];
    let p = SamplingParams { stop_ids: vec![1], min_tokens: 2, ..SamplingParams::default() };
    let id = |generated| {
        let place = Place { position: 9, generated, history: None };
        SAMPLER.sample(&logits, &p, place, None).unwrap().id
    };
    assert_eq!([id(0), id(1), id(2)], [2, 2, 1]);
}

proptest! {
    #[test]
    fn choice_and_log_probability_are_those_of_the_naive_sampler(
        logits in proptest::collection::vec(-8.0f32..8.0, 1..700),
        temperature in 0.2f32..2.0,
        top_k in 0usize..50,
        top_p in 0.3f32..1.3,
        min_p in 0.0f32..0.3,
        typical_p in 0.3f32..1.6,
        penalties in proptest::option::of((0.6f32..1.8, -2.0f32..2.0, -2.0f32..2.0)),
        seen in proptest::collection::vec(0u32..700, 0..40),
        n_prompt in 0usize..40,
        bias in proptest::collection::btree_map(0u32..700, -4.0f32..4.0, 0..4),
        position in any::<u64>(),
    ) {
        let vocab = logits.len() as u32;
        let seen: Vec<u32> = seen.into_iter().map(|id| id % vocab).collect();
        let (prompt, answer) = seen.split_at(n_prompt.min(seen.len()));
        let mut p = params(temperature, top_k, top_p.min(1.0), min_p);
        p.typical_p = typical_p.min(1.0);
        p.logit_bias = bias.into_iter().map(|(id, bias)| (id % vocab, bias)).collect();
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) = penalties.unwrap_or((1.0, 0.0, 0.0));
        let (distribution, close) = naive(&logits, &p, prompt, answer);
        prop_assume!(!close);
        let mut history = History::new(prompt);
        answer.iter().for_each(|id| history.push(*id));
        let place = Place { position, generated: answer.len(), history: Some(&history) };
        let sampled = SAMPLER.sample(&logits, &p, place, None).unwrap();
        let probability = distribution[sampled.id as usize];
        prop_assert!(probability > 0.0, "token {} was cut off", sampled.id);
        prop_assert!((f64::from(sampled.sampled_logprob) - probability.ln()).abs() < 1e-4);
        let ours = SAMPLER.distribution(&logits, &p, place, None).unwrap();
        prop_assert_eq!(ours[sampled.id as usize].to_bits(), sampled.sampled_logprob.to_bits());
        for (ours, naive) in ours.iter().zip(&distribution) {
            prop_assert_eq!(*ours == f32::NEG_INFINITY, *naive == 0.0);
        }
        // The choice: the first token at which the cumulative sum passes the random number.
        let random = uniform(p.seed, p.stream, position);
        let before: f64 = distribution[..sampled.id as usize].iter().sum();
        prop_assert!(before <= random + 1e-5 && random <= before + probability + 1e-5);
    }
}
