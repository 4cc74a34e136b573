//! The engine against a toy model: nothing is lost, the budget holds, the oldest make progress, and what a request gets
//! does not depend on its neighbours, the chunk size or preemption.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

#[path = "batching/guesses.rs"]
mod guesses;
#[path = "support/toy.rs"]
mod toy;

use std::collections::BTreeMap;

use guesses::Oracle;
use parallax_engine::batching::LOGITS_BYTES;
use parallax_engine::engine::MAX_LOSSES;
use parallax_engine::{
    AdapterFile, Completion, Constraint, ConstraintState, DraftModel, Engine, EngineConfig, Event,
    FinishReason, PromptLookup, Request, StageError, StageOutput, StageRunner, StageShape, Tensor,
};
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

/// Tokens and ending: what must not depend on anybody else. (What was found in the cache may.)
fn answer(completion: &Completion) -> (&[parallax_engine::Token], FinishReason, &[f32]) {
    (&completion.tokens, completion.reason, &completion.prompt_logprobs)
}

fn alone(request: &Request) -> Completion {
    let mut model = ToyModel::new(64, 4);
    let config = EngineConfig { prefix_cache: false, ..EngineConfig::default() };
    let mut engine = Engine::new(model.shape(), model.log_softmax(), config).unwrap();
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
        assert!(completions[&id].error.as_ref().unwrap().to_string().contains("unplugged"));
    }
    let id = engine.add(Request::greedy(vec![5, 6], 4)).unwrap();
    assert_eq!(run(&mut engine, &mut model)[&id].token_ids(), toy_greedy(&[5, 6], 4, 0));
}

#[test]
fn a_request_that_is_there_whenever_a_stage_dies_ends_and_others_go_on() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 32, 4);
    let asked = Request::greedy(vec![1, 2, 3], 12);
    let (always, mut late) = (engine.add(asked.clone()).unwrap(), None);
    let error = StageError::NotReady { reason: "unplugged".into() };
    for loss in 1..=MAX_LOSSES + 1 {
        engine.step(&mut model);
        let (batch, _) = engine.plan().unwrap();
        let ended = engine.postpone(&batch, &error);
        engine.check_integrity();
        assert_eq!(
            ended.iter().map(|e| e.request).collect::<Vec<_>>(),
            [always][..usize::from(loss > MAX_LOSSES)]
        );
        late = late.or_else(|| Some(engine.add(asked.clone()).unwrap()));
    }
    let completions = run(&mut engine, &mut model);
    assert_eq!(completions[&late.unwrap()].token_ids().last(), toy_greedy(&asked.prompt, 12, 0).last());
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
fn many_first_tokens_behind_a_cached_beginning_come_before_most_tokens_of_the_first_answers() {
    let mut model = ToyModel::new(256, 4);
    let mut engine = engine(&model, 20, 20);
    let shared = vec![7; 80];
    engine.add(Request::greedy(shared.clone(), 1)).unwrap();
    run(&mut engine, &mut model);
    let ids: Vec<_> = (0..16u32)
        .map(|i| engine.add(Request::greedy([&shared[..], &[i + 1; 10]].concat(), 20)).unwrap())
        .collect();
    let (mut first, mut tokens, mut pause, mut longest) = (Vec::new(), 0, 0, 0);
    while first.len() < ids.len() {
        let events: Vec<_> = engine.step(&mut model).into_iter().filter(|e| e.token_id().is_some()).collect();
        pause = if events.iter().any(|e| first.contains(&e.request)) { 0 } else { pause + 1 };
        longest = longest.max(pause);
        tokens += events.len();
        for event in events {
            if !first.contains(&event.request) {
                first.push(event.request);
            }
        }
    }
    assert_eq!(first, ids, "in the order of arrival");
    // Two prompts fill a step. With every answer's row in every step it would be 154 tokens.
    assert!(tokens <= 60, "{tokens} tokens before everybody had one");
    assert!(longest <= 4, "answers pause for {longest} steps at most");
}

#[test]
fn an_abort_frees_the_pages_before_the_next_step() {
    let mut model = ToyModel::new(256, 4);
    let mut engine = engine(&model, 64, 8);
    let ids: Vec<_> = (0..3).map(|i| engine.add(Request::greedy(vec![i; 40], 100)).unwrap()).collect();
    for _ in 0..10 {
        engine.step(&mut model);
    }
    let used = engine.metrics().pages_used;
    assert!(used >= 3 * 40 / 4, "{used}");
    for (left, id) in ids.iter().enumerate().rev() {
        engine.abort(*id).unwrap();
        let now = engine.metrics().pages_used;
        assert!(now <= used * left / 3 + 1, "{now} of {used} pages with {left} requests left");
    }
    assert_eq!(engine.metrics().pages_used, 0);
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
            model.set_adapter(PolicyVersion(4), Some(&AdapterFile::new(*b"new"))).unwrap();
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

#[test]
fn a_version_that_comes_again_is_not_answered_from_pages_of_other_weights() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 64, 4);
    let prompt = vec![7; 11];
    for adapter in [b"one".as_slice(), b"two", b"one"] {
        model.set_adapter(PolicyVersion(1), Some(&AdapterFile::new(adapter))).unwrap();
        engine.set_version(PolicyVersion(1));
        let id = engine.add(Request::greedy(prompt.clone(), 5)).unwrap();
        let completion = run(&mut engine, &mut model).remove(&id).unwrap();
        assert_eq!(completion.token_ids(), toy_greedy(&prompt, 5, model.salt));
        assert_eq!(completion.usage.cached_tokens, 0);
    }
}

#[test]
fn prompt_log_probabilities_are_of_one_version_also_when_a_swap_comes_between() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 4, 4);
    let request = Request { prompt_logprobs: true, ..Request::greedy((0..19).collect(), 2) };
    let id = engine.add(request.clone()).unwrap();
    for _ in 0..2 {
        assert!(engine.step(&mut model).is_empty(), "the prompt is longer than two steps");
    }
    model.set_adapter(PolicyVersion(1), Some(&AdapterFile::new(*b"new"))).unwrap();
    engine.set_version(PolicyVersion(1));
    let swapped = run(&mut engine, &mut model).remove(&id).unwrap();
    let mut fresh = Engine::new(model.shape(), model.log_softmax(), EngineConfig::default()).unwrap();
    let id = fresh.add(request).unwrap();
    assert_eq!(swapped.prompt_logprobs, run(&mut fresh, &mut model)[&id].prompt_logprobs);
}

#[test]
fn the_logits_of_a_step_are_bounded() {
    // As few rows of logits as a step may have, each of them large.
    const VOCAB: usize = LOGITS_BYTES / 4 / 6;
    let model = ToyModel::new(256, 4);
    let shape = StageShape { vocab: VOCAB, ..model.shape() };
    let mut engine = Engine::new(shape, model.log_softmax(), EngineConfig::default()).unwrap();
    engine.set_drafter(Box::new(PromptLookup { longest: 1, shortest: 1 }));
    let scored = Request { prompt_logprobs: true, ..Request::greedy(vec![1; 6], 2) };
    engine.add_group(&scored, 2).unwrap();
    for _ in 0..3 {
        engine.add(Request::greedy(vec![1; 3], 6)).unwrap();
    }
    let mut most = 0;
    while let Some((batch, _)) = engine.plan() {
        assert!(batch.n_wanted() * VOCAB * 4 <= LOGITS_BYTES, "{} rows", batch.n_wanted());
        most = most.max(batch.n_wanted());
        let mut logits = vec![0.0; batch.n_wanted() * VOCAB];
        logits.chunks_exact_mut(VOCAB).for_each(|row| row[1] = 1.0);
        let logits = (batch.n_wanted() > 0).then(|| Tensor::from_f32(&[batch.n_wanted(), VOCAB], logits));
        engine.complete(&batch, Ok(StageOutput { hidden: None, logits }));
        engine.check_integrity();
    }
    assert_eq!(most, 6, "what there is room for is used");
    assert!(engine.metrics().accepted_tokens > 0);
}

#[test]
fn an_answer_tells_what_was_found_for_it_before_its_first_token() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 64, 4);
    let prompt: Vec<u32> = (0..13).collect();
    for (n, expected) in [(2, vec![0, 13]), (1, vec![12])] {
        let ids = engine.add_group(&Request::greedy(prompt.clone(), 2), n).unwrap();
        let mut found = BTreeMap::new();
        while engine.is_busy() {
            for event in engine.step(&mut model) {
                match event.event {
                    Event::Prompt { cached_tokens, logprobs } => {
                        assert_eq!((found.insert(event.request, cached_tokens), logprobs), (None, None));
                    }
                    _ => assert!(found.contains_key(&event.request)),
                }
            }
        }
        assert_eq!(ids.iter().map(|id| found[id]).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn a_common_beginning_is_computed_once_and_named_by_weights_adapter_and_salt() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 64, 4);
    let prompt: Vec<u32> = (0..21).collect();
    let cached = |engine: &mut Engine, model: &mut ToyModel, change: &dyn Fn(&mut Request)| {
        let mut request = Request::greedy(prompt.clone(), 3);
        change(&mut request);
        let id = engine.add(request).unwrap();
        let completion = run(engine, model).remove(&id).unwrap();
        (completion.usage.cached_tokens, completion.token_ids())
    };
    let plain = toy_greedy(&(0..21).collect::<Vec<_>>(), 3, 0);
    assert_eq!(cached(&mut engine, &mut model, &|_| ()), (0, plain.clone()));
    assert_eq!(cached(&mut engine, &mut model, &|_| ()), (20, plain.clone()));
    assert_eq!(
        cached(&mut engine, &mut model, &|r| r.prompt.truncate(20)).0,
        16,
        "the last token always runs"
    );
    assert_eq!(cached(&mut engine, &mut model, &|r| r.cache_salt = "mine".into()), (0, plain.clone()));
    assert_eq!(cached(&mut engine, &mut model, &|r| r.cache_salt = "mine".into()), (20, plain.clone()));
    engine.add_adapter(&mut model, "pirate", AdapterFile::new(*b"arr")).unwrap();
    let pirate = toy_greedy(&(0..21).collect::<Vec<_>>(), 3, u64::from(b'a') + 2 * u64::from(b'r'));
    assert_eq!(cached(&mut engine, &mut model, &|r| r.adapter = Some("pirate".into())), (0, pirate.clone()));
    assert_eq!(cached(&mut engine, &mut model, &|r| r.adapter = Some("pirate".into())), (20, pirate));
    model.set_adapter(PolicyVersion(1), Some(&AdapterFile::new(*b"v1"))).unwrap();
    engine.set_version(PolicyVersion(1));
    assert_eq!(cached(&mut engine, &mut model, &|_| ()).0, 0, "pages of other weights never answer");
    assert_eq!(cached(&mut engine, &mut model, &|_| ()).0, 20);
    model.set_adapter(PolicyVersion(0), None).unwrap();
    engine.set_version(PolicyVersion(0));
    assert_eq!(
        cached(&mut engine, &mut model, &|_| ()),
        (0, plain.clone()),
        "a version may come again with other weights"
    );
    model.generation = 1;
    assert_eq!(cached(&mut engine, &mut model, &|_| ()), (0, plain), "a runner that lost its pages");
    let metrics = engine.metrics();
    assert!(metrics.prefix_cache_hits > 90 && metrics.prefix_cache_hits < metrics.prefix_cache_queries);
}

#[test]
fn several_answers_to_one_prompt_compute_it_once_and_are_those_of_single_requests() {
    let request = sampled((0..22).collect(), 9, 40);
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 16, 5);
    let ids = engine.add_group(&request, 4).unwrap();
    let completions = run(&mut engine, &mut model);
    for (i, id) in ids.iter().enumerate() {
        let single = sampled((0..22).collect(), 9, 40 + i as u64);
        assert_eq!(answer(&completions[id]), answer(&alone(&single)));
    }
    // 22 rows of the prompt, then 8 more tokens of each answer.
    assert_eq!(model.passes().lock().unwrap().iter().sum::<usize>(), 22 + 4 * 8);
    assert_eq!(completions[&ids[3]].usage.cached_tokens, 22);
    assert_eq!(completions[&ids[0]].usage.cached_tokens, 0);
}

#[test]
fn nothing_is_guessed_behind_a_prompt_before_its_last_page_is_shared() {
    // The last piece of the prompt is one row, as if a token were decoded.
    let request = sampled(vec![1; 23], 2, 0);
    for states in [0, 4] {
        let mut model = ToyModel::recurrent(13, 2, states);
        let mut engine = engine(&model, 11, 2);
        engine.set_drafter(Box::new(DraftModel::new(Box::new(ToyModel::new(64, 8)))));
        let ids = engine.add_group(&request, 2).unwrap();
        let completions = run(&mut engine, &mut model);
        for (i, id) in ids.iter().enumerate() {
            assert_eq!(answer(&completions[id]), answer(&alone(&sampled(vec![1; 23], 2, i as u64))));
        }
    }
}

#[test]
fn adapters_are_chosen_per_request_and_go_when_the_last_one_is_done() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 64, 4);
    engine.add_adapter(&mut model, "a", AdapterFile::new(*b"a")).unwrap();
    assert!(engine.add_adapter(&mut model, "b", AdapterFile::new(*b"bad")).is_err());
    let with = |adapter: Option<&str>| Request {
        adapter: adapter.map(str::to_owned),
        ..Request::greedy(vec![1, 2, 3], 6)
    };
    let refused = engine.add(with(Some("b"))).unwrap_err().to_string();
    assert!(refused.contains("\"b\"") && refused.contains("loaded are: a"), "{refused}");
    let (plain, old) = (engine.add(with(None)).unwrap(), engine.add(with(Some("a"))).unwrap());
    let mut completions: BTreeMap<RequestId, Completion> = BTreeMap::new();
    for event in engine.step(&mut model) {
        completions.entry(event.request).or_default().take(event.event);
    }
    engine.add_adapter(&mut model, "a", AdapterFile::new(*b"A")).unwrap();
    let new = engine.add(with(Some("a"))).unwrap();
    assert_eq!(model.adapters.len(), 2, "the old one is still in use");
    while engine.is_busy() {
        for event in engine.step(&mut model) {
            completions.entry(event.request).or_default().take(event.event);
        }
    }
    for (id, salt) in [(plain, 0), (old, u64::from(b'a')), (new, u64::from(b'A'))] {
        assert_eq!(completions[&id].token_ids(), toy_greedy(&[1, 2, 3], 6, salt));
    }
    engine.step(&mut model);
    assert_eq!(model.adapters.len(), 1, "nobody uses the old one any more");
    assert!(engine.remove_adapter("a") && !engine.remove_adapter("a"));
    engine.step(&mut model);
    assert!(model.adapters.is_empty() && engine.add(with(Some("a"))).is_err());
}

/// Allows even ids only, `length` of them; breaks at the id 96.
#[derive(Debug, Clone)]
struct Even {
    length: usize,
    accepted: Vec<u32>,
}

impl Constraint for Even {
    fn start(&self) -> Box<dyn ConstraintState> {
        Box::new(self.clone())
    }
}

impl ConstraintState for Even {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
        if self.accepted.len() > 40 { Err("too long for this grammar".into()) } else { Ok(()) }
    }
    fn accept(&mut self, id: u32) -> Result<(), String> {
        self.accepted.push(id);
        Ok(())
    }
    fn is_complete(&self) -> bool {
        self.accepted.len() == self.length
    }
}

#[test]
fn constraints_hold_through_preemption_and_guesses_and_end_the_answer() {
    let constrained = |length: usize, max: usize, stream: u64| Request {
        constraint: Some(std::sync::Arc::new(Even { length, accepted: Vec::new() })),
        ..sampled(vec![3; 5], max, stream)
    };
    let expected: Vec<Completion> = (0..3).map(|i| alone(&constrained(12, 30, i))).collect();
    let mut model = ToyModel::new(8, 3);
    let mut engine = engine(&model, 12, 3);
    engine.set_drafter(Box::new(DraftModel::new(Box::new(ToyModel::new(64, 8)))));
    let ids: Vec<_> = (0..3).map(|i| engine.add(constrained(12, 30, i)).unwrap()).collect();
    let completions = run(&mut engine, &mut model);
    assert!(engine.metrics().preemptions > 0);
    for (id, expected) in ids.iter().zip(&expected) {
        let completion = &completions[id];
        assert_eq!(answer(completion), answer(expected));
        assert_eq!((completion.tokens.len(), completion.reason), (12, FinishReason::Stop));
        assert!(completion.tokens.iter().all(|t| t.id % 2 == 0));
    }
    // A constraint that fails ends its own request only.
    let mut model = ToyModel::new(8, 30);
    let mut engine = self::engine(&model, 12, 3);
    let broken = engine.add(constrained(99, 60, 1)).unwrap();
    let fine = engine.add(sampled(vec![1], 4, 0)).unwrap();
    let completions = run(&mut engine, &mut model);
    assert!(completions[&broken].error.as_ref().unwrap().to_string().contains("too long for this grammar"));
    assert_eq!((completions[&broken].tokens.len(), completions[&fine].reason), (41, FinishReason::Length));
}

#[test]
fn prompt_log_probabilities_come_first_and_are_those_of_the_model() {
    let mut request = Request::greedy((10..30).collect(), 2);
    request.prompt_logprobs = true;
    let mut model = ToyModel::new(16, 4);
    let mut engine = engine(&model, 7, 2);
    // A cached prefix must not hide the prompt's rows.
    engine.add(Request::greedy((10..30).collect(), 2)).unwrap();
    run(&mut engine, &mut model);
    let id = engine.add(request.clone()).unwrap();
    let completion = run(&mut engine, &mut model).remove(&id).unwrap();
    let expected: Vec<f32> = (1..20)
        .map(|n| toy::toy_log_softmax(&toy_logits(&request.prompt[..n], 0).0)[request.prompt[n] as usize])
        .collect();
    assert_eq!(completion.prompt_logprobs, expected);
    assert_eq!(completion.tokens.len(), 2);
}

#[test]
fn a_user_with_many_requests_does_not_hold_up_another() {
    let mut model = ToyModel::new(64, 4);
    let mut engine = engine(&model, 8, 2);
    let from = |user: &str, priority| Request {
        user: user.into(),
        priority,
        ..Request::greedy(vec![user.len() as u32; 6], 6)
    };
    let many: Vec<_> = (0..20).map(|_| engine.add(from("greedy", 0)).unwrap()).collect();
    for _ in 0..3 {
        engine.step(&mut model);
    }
    let one = engine.add(from("patient one", 0)).unwrap();
    let urgent = engine.add(from("greedy", 5)).unwrap();
    let mut ended = Vec::new();
    while engine.is_busy() {
        ended.extend(
            engine
                .step(&mut model)
                .into_iter()
                .filter(|e| matches!(e.event, Event::Finished { .. }))
                .map(|e| e.request),
        );
    }
    let place = |id| ended.iter().position(|e| *e == id).unwrap();
    assert!(place(urgent) <= 2, "priority goes first: {ended:?}");
    assert!(place(one) <= 4, "then the user who has had the least: {ended:?}");
    assert_eq!(ended.len(), 22);
    assert!(many.iter().map(|id| place(*id)).is_sorted(), "one user's requests keep their order");
}

#[test]
fn a_limit_cuts_prompts_shorter_and_leaves_every_answer_its_row() {
    let mut model = ToyModel::new(256, 4);
    let config = EngineConfig { step_tokens: 128, running_sequences: 40, ..EngineConfig::default() };
    let mut engine = Engine::new(model.shape(), model.log_softmax(), config).unwrap();
    for i in 0..20 {
        engine.add(Request::greedy(vec![i, 1], 30)).unwrap();
    }
    engine.step(&mut model);
    engine.add(Request::greedy(vec![3; 300], 4)).unwrap();
    engine.limit_rows(10);
    assert_eq!(engine.plan().unwrap().0.n_rows(), 20 + 16, "a row for each answer, and some of the prompt");
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
        prefix_cache in any::<bool>(),
        (wrong, states) in (2usize..6, prop_oneof![Just(0usize), 2usize..12]),
        (answers, users, limit) in (1usize..4, 1usize..4, 0usize..40),
        abort_one in proptest::option::of(0usize..12),
    ) {
        let longest = arrivals.iter().map(|(_, prompt, new)| prompt + new).max().unwrap();
        let mut model = ToyModel::recurrent(longest.div_ceil(page_tokens) + spare_pages, page_tokens, states);
        let running_sequences = running_sequences.min(step_tokens);
        let config = EngineConfig { step_tokens, running_sequences, prefix_cache, draft_tokens: 4, ..EngineConfig::default() };
        let mut engine = Engine::new(model.shape(), model.log_softmax(), config).unwrap();
        let mut requests: Vec<(usize, Request)> = arrivals
            .iter()
            .enumerate()
            .map(|(i, (at, prompt, new))| (*at, Request { user: (i % users).to_string(), ..sampled(vec![i as u32 % 2; *prompt], *new, 8 * i as u64) }))
            .collect();
        requests.sort_by_key(|(at, _)| *at);
        // Request i asks for a few answers: the same request on neighbouring streams.
        let expected: Vec<(Request, Completion)> = requests
            .iter()
            .enumerate()
            .flat_map(|(i, (_, request))| (0..1 + i % answers).map(|k| {
                let mut single = request.clone();
                single.sampling.stream += k as u64;
                let completion = alone(&single);
                (single, completion)
            }))
            .collect();
        let truth = expected.iter().map(|(r, c)| [&r.prompt[..], &c.token_ids()].concat()).collect();
        engine.set_drafter(Box::new(Oracle { truth, wrong, asked: 0 }));
        let mut completions: BTreeMap<RequestId, Completion> = BTreeMap::new();
        let mut first_tokens = Vec::new();
        let (mut ids, mut next, mut step) = (Vec::new(), 0, 0);
        let mut aborted = None;
        while next < requests.len() || engine.is_busy() {
            while next < requests.len() && requests[next].0 <= step {
                ids.extend(engine.add_group(&requests[next].1, 1 + next % answers).unwrap());
                next += 1;
            }
            engine.limit_rows(if step % 3 == 0 { limit } else { usize::MAX });
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
        prop_assert!(model.passes().lock().unwrap().iter().all(|rows| *rows <= step_tokens));
        prop_assert_eq!((engine.metrics().pages_used, engine.metrics().states_used), (0, 0));
        prop_assert_eq!(completions.len(), expected.len());
        for (id, (_, expected)) in ids.iter().zip(&expected) {
            let got = &completions[id];
            if aborted == Some(*id) {
                prop_assert_eq!(got.reason, FinishReason::Aborted);
                prop_assert_eq!(&got.tokens[..], &expected.tokens[..got.tokens.len()]);
            } else {
                prop_assert_eq!(answer(got), answer(expected));
            }
        }
        // Same prompt lengths: first come, first served shows in the order of the first tokens.
        if !prefix_cache && answers == 1 && users == 1 && arrivals.iter().all(|(_, prompt, _)| *prompt == arrivals[0].1) {
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
