//! The engine against a toy model: nothing is lost, the budget holds, the oldest make progress, and what a request gets
//! does not depend on its neighbours, the chunk size or preemption.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

#[path = "support/toy.rs"]
mod toy;

use std::collections::BTreeMap;

use parallax_engine::{Completion, Engine, EngineConfig, Event, FinishReason, Request, StageRunner};
use proptest::prelude::*;
use swarm_wire::{PolicyVersion, RequestId};
use toy::{ToyModel, sampled, toy_greedy, toy_logits};

fn engine(model: &ToyModel, step_tokens: usize, running_sequences: usize) -> Engine {
    let config = EngineConfig { step_tokens, running_sequences, ..EngineConfig::default() };
    Engine::new(model.shape(), model.log_softmax(), config).unwrap()
}

/// Runs everything to its end, checking the invariants after every step.
fn run(engine: &mut Engine, model: &mut ToyModel) -> BTreeMap<RequestId, Completion> {
    let mut completions: BTreeMap<RequestId, Completion> = BTreeMap::new();
    let mut steps = 0;
    while engine.is_busy() {
        for event in engine.step(model) {
            completions.entry(event.request).or_default().take(event.event);
        }
        engine.check_integrity();
        steps += 1;
        assert!(steps < 100_000, "the engine makes progress");
    }
    assert_eq!(engine.metrics().pages_used, 0, "finished sequences give their pages back");
    completions
}

fn alone(request: &Request) -> Completion {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 256, 1);
    let id = engine.add(request.clone()).unwrap();
    run(&mut engine, &mut model).remove(&id).unwrap()
}

#[test]
fn greedy_tokens_are_those_of_the_model() {
    let prompt = vec![3, 1, 4, 1, 5];
    let completion = alone(&Request::greedy(prompt.clone(), 20));
    assert_eq!(completion.token_ids(), toy_greedy(&prompt, 20, 0));
    assert_eq!(completion.reason, FinishReason::Length);
}

#[test]
fn a_stop_token_ends_the_answer_and_belongs_to_it() {
    let prompt = vec![3, 1, 4, 1, 5];
    let expected = toy_greedy(&prompt, 20, 0);
    let stop = expected[6];
    let first = expected.iter().position(|t| *t == stop).unwrap();
    let mut request = Request::greedy(prompt, 20);
    request.sampling.stop_ids = vec![stop];
    let completion = alone(&request);
    assert_eq!(completion.token_ids(), expected[..=first]);
    assert_eq!(completion.reason, FinishReason::Stop);
}

#[test]
fn hidden_rows_are_those_that_produced_the_tokens() {
    let request = sampled(vec![9, 8, 7], 5, 0);
    let completion = alone(&request);
    let mut prefix = request.prompt.clone();
    for token in &completion.tokens {
        assert_eq!(token.hidden.as_ref().unwrap(), &toy_logits(&prefix, 0).1);
        prefix.push(token.id);
    }
}

#[test]
fn a_context_that_is_full_ends_the_answer() {
    let mut model = ToyModel::new(3, 4);
    let mut engine = engine(&model, 8, 4);
    let id = engine.add(Request::greedy(vec![1; 10], usize::MAX)).unwrap();
    let completions = run(&mut engine, &mut model);
    assert_eq!((completions[&id].tokens.len(), completions[&id].reason), (2, FinishReason::Length));
    assert!(engine.add(Request::greedy(vec![1; 12], 1)).unwrap_err().to_string().contains("12 tokens"));
}

#[test]
fn a_lost_stage_ends_every_request_with_its_text_and_the_engine_goes_on() {
    let mut model = ToyModel::new(16, 4);
    model.fail_at = Some(3);
    let mut engine = engine(&model, 4, 2);
    let ids: Vec<_> = (0..5).map(|i| engine.add(Request::greedy(vec![i; 6], 9)).unwrap()).collect();
    let completions = run(&mut engine, &mut model);
    for id in ids {
        assert_eq!(completions[&id].reason, FinishReason::Error);
        assert!(completions[&id].error.as_ref().unwrap().contains("unplugged"));
    }
    let id = engine.add(Request::greedy(vec![5, 6], 4)).unwrap();
    assert_eq!(run(&mut engine, &mut model)[&id].token_ids(), toy_greedy(&[5, 6], 4, 0));
}

#[test]
fn prompts_do_not_stop_answers_that_are_being_written() {
    let mut model = ToyModel::new(256, 4);
    let mut engine = engine(&model, 8, 8);
    let writing = engine.add(Request::greedy(vec![1, 2], 40)).unwrap();
    engine.step(&mut model);
    engine.add(Request::greedy(vec![3; 200], 1)).unwrap();
    for _ in 0..20 {
        let events = engine.step(&mut model);
        assert!(
            events.iter().any(|e| e.request == writing && e.token_id().is_some()),
            "one token in every step"
        );
    }
}

#[test]
fn the_queue_is_bounded() {
    let model = ToyModel::new(16, 4);
    let config = EngineConfig { queued_requests: 2, ..EngineConfig::default() };
    let mut engine = Engine::new(model.shape(), model.log_softmax(), config).unwrap();
    let ids: Vec<_> = (0..2).map(|_| engine.add(Request::greedy(vec![1], 1)).unwrap()).collect();
    assert!(engine.add(Request::greedy(vec![1], 1)).unwrap_err().to_string().contains("2 requests"));
    assert!(matches!(
        engine.abort(ids[0]).unwrap().event,
        Event::Finished { reason: FinishReason::Aborted, .. }
    ));
    assert!(engine.add(Request::greedy(vec![1], 1)).is_ok());
    assert!(engine.abort(RequestId(99)).is_none());
}

#[test]
fn tokens_after_a_swap_carry_the_version_and_are_those_of_the_new_weights_alone() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 64, 4);
    let prompt = vec![5, 6, 7];
    let id = engine.add(Request::greedy(prompt.clone(), 8)).unwrap();
    let mut completion = Completion::default();
    for step in 0.. {
        if step == 3 {
            model.set_adapter(PolicyVersion(4), Some(b"new")).unwrap();
            engine.set_version(PolicyVersion(4));
        }
        let events = engine.step(&mut model);
        events.into_iter().filter(|e| e.request == id).for_each(|e| completion.take(e.event));
        if !engine.is_busy() {
            break;
        }
    }
    let versions: Vec<u64> = completion.tokens.iter().map(|t| t.version.0).collect();
    assert_eq!(versions, [0, 0, 0, 4, 4, 4, 4, 4]);
    let ids = completion.token_ids();
    assert_eq!(ids[..3], toy_greedy(&prompt, 3, 0));
    let so_far = [&prompt[..], &ids[..3]].concat();
    assert_eq!(ids[3..], toy_greedy(&so_far, 5, model.salt));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever arrives when, under whatever budget and cache: every request ends once, with the tokens it gets alone,
    /// no step exceeds its budget, and nobody is admitted before an older request.
    #[test]
    fn composition_changes_nothing(
        arrivals in proptest::collection::vec((0usize..30, 1usize..40, 1usize..25), 1..12),
        step_tokens in 3usize..40,
        running_sequences in 1usize..8,
        page_tokens in 1usize..9,
        spare_pages in 0usize..24,
        abort_one in proptest::option::of(0usize..12),
    ) {
        let longest = arrivals.iter().map(|(_, prompt, new)| prompt + new).max().unwrap();
        let mut model = ToyModel::new(longest.div_ceil(page_tokens) + spare_pages, page_tokens);
        let mut engine = engine(&model, step_tokens, running_sequences.min(step_tokens));
        let mut requests: Vec<(usize, Request)> = arrivals
            .iter()
            .enumerate()
            .map(|(i, (at, prompt, new))| (*at, sampled(vec![i as u32; *prompt], *new, i as u64)))
            .collect();
        requests.sort_by_key(|(at, _)| *at);
        let mut completions: BTreeMap<RequestId, Completion> = BTreeMap::new();
        let mut first_tokens = Vec::new();
        let (mut ids, mut step) = (Vec::new(), 0);
        let mut aborted = None;
        while ids.len() < requests.len() || engine.is_busy() {
            while ids.len() < requests.len() && requests[ids.len()].0 <= step {
                ids.push(engine.add(requests[ids.len()].1.clone()).unwrap());
            }
            let mut events = engine.step(&mut model);
            if step == 5
                && let Some(id) = abort_one.and_then(|i| ids.get(i))
                && let Some(event) = engine.abort(*id)
            {
                aborted = Some(*id);
                events.push(event);
            }
            for event in events {
                let completion = completions.entry(event.request).or_default();
                if completion.tokens.is_empty() && event.token_id().is_some() {
                    first_tokens.push(event.request);
                }
                completion.take(event.event);
            }
            engine.check_integrity();
            step += 1;
            prop_assert!(step < 10_000, "the engine makes progress");
        }
        prop_assert!(model.rows_per_step.iter().all(|rows| *rows <= step_tokens));
        prop_assert_eq!(engine.metrics().pages_used, 0);
        prop_assert_eq!(completions.len(), requests.len());
        for (id, (_, request)) in ids.iter().zip(&requests) {
            let (got, expected) = (&completions[id], alone(request));
            if aborted == Some(*id) {
                prop_assert_eq!(got.reason, FinishReason::Aborted);
                prop_assert_eq!(&got.tokens[..], &expected.tokens[..got.tokens.len()]);
            } else {
                prop_assert_eq!(got, &expected);
            }
        }
        // Same prompt lengths: first come, first served shows in the order of the first tokens.
        if arrivals.iter().all(|(_, prompt, _)| *prompt == arrivals[0].1) {
            prop_assert!(first_tokens.is_sorted());
        }
    }

    /// With room for everything, requests of one length get their first tokens in the order of arrival.
    #[test]
    fn first_come_first_served(n in 1usize..20, prompt in 1usize..30, step_tokens in 2usize..16) {
        let mut model = ToyModel::new(40, 4);
        let mut engine = engine(&model, step_tokens, 2);
        let ids: Vec<_> = (0..n).map(|i| engine.add(sampled(vec![1; prompt], 3, i as u64)).unwrap()).collect();
        let mut first_tokens = Vec::new();
        while engine.is_busy() {
            for event in engine.step(&mut model) {
                if event.token_id().is_some() && !first_tokens.contains(&event.request) {
                    first_tokens.push(event.request);
                }
            }
        }
        prop_assert_eq!(first_tokens, ids);
    }
}
