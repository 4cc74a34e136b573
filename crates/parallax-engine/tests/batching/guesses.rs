//! Guessed tokens and kept recurrent states: fewer passes, the same answers.

use parallax_engine::speculate::DraftQuery;
use parallax_engine::{DraftModel, Drafter, Engine, Request, StageRunner};
use swarm_wire::RequestId;

use super::toy::{ToyModel, sampled, toy_greedy};
use super::{alone, answer, engine, run};

/// Guesses the true continuation, with every `wrong`-th guess spoiled.
#[derive(Debug)]
pub(super) struct Oracle {
    pub(super) truth: Vec<Vec<u32>>,
    pub(super) wrong: usize,
    pub(super) asked: usize,
}

impl Drafter for Oracle {
    fn propose(&mut self, queries: &[DraftQuery<'_>]) -> Vec<Vec<u32>> {
        let guess = |query: &DraftQuery<'_>| {
            let whole = self.truth.iter().find(|whole| whole.starts_with(query.tokens));
            let rest = whole.map_or(&[][..], |whole| &whole[query.tokens.len()..]);
            let spoiled = rest.iter().take(query.most + 1).map(|token| {
                self.asked += 1;
                if self.asked.is_multiple_of(self.wrong) { token + 1 } else { *token }
            });
            spoiled.collect()
        };
        queries.iter().map(guess).collect()
    }
}

#[test]
fn guesses_save_passes_and_change_nothing() {
    let request = sampled(vec![5, 4, 3], 30, 1);
    let expected = alone(&request);
    let whole = [&request.prompt[..], &expected.token_ids()].concat();
    for (wrong, most_steps) in [(usize::MAX, 8), (3, 25), (1, 31)] {
        let mut model = ToyModel::new(64, 4);
        let mut engine = engine(&model, 64, 4);
        engine.set_drafter(Box::new(Oracle { truth: vec![whole.clone()], wrong, asked: 0 }));
        let id = engine.add(request.clone()).unwrap();
        let completion = run(&mut engine, &mut model).remove(&id).unwrap();
        assert_eq!(answer(&completion), answer(&expected));
        let metrics = engine.metrics();
        assert!(metrics.steps <= most_steps, "{} passes, every {wrong}-th guess wrong", metrics.steps);
        assert!(metrics.accepted_tokens <= metrics.speculated_tokens && metrics.speculated_tokens > 0);
        assert_eq!(
            metrics.steps + metrics.accepted_tokens,
            30,
            "each pass gives one token and what was guessed"
        );
        assert_eq!(metrics.accepted_tokens == 0, wrong == 1);
    }
}

#[test]
fn a_draft_model_guesses_with_the_random_numbers_of_the_request() {
    let request = sampled(vec![5, 4, 3], 30, 1);
    let expected = alone(&request);
    for states in [0, 2] {
        let mut model = ToyModel::recurrent(64, 4, states);
        let mut engine = engine(&model, 64, 4);
        engine.set_drafter(Box::new(DraftModel::new(Box::new(ToyModel::recurrent(64, 8, states)))));
        let id = engine.add(request.clone()).unwrap();
        let completion = run(&mut engine, &mut model).remove(&id).unwrap();
        assert_eq!(answer(&completion), answer(&expected));
        let metrics = engine.metrics();
        assert_eq!(metrics.accepted_tokens, metrics.speculated_tokens, "the same model is right every time");
        assert!(metrics.steps < 8, "{} passes for 30 tokens", metrics.steps);
        // The last pass needs no guess when one token is left.
        assert!(
            (metrics.steps - 1..=metrics.steps).contains(&metrics.speculations),
            "{}",
            metrics.speculations
        );
    }
}

#[test]
fn a_recurrent_draft_model_that_is_asked_again_begins_again() {
    let mut drafter = DraftModel::new(Box::new(ToyModel::recurrent(64, 4, 2)));
    let tokens: Vec<u32> = (0..20).collect();
    let sampling = parallax_engine::SamplingParams::default();
    let mut guess = |n: usize, most| {
        let query = DraftQuery { request: RequestId(0), tokens: &tokens[..n], sampling: &sampling, most };
        drafter.propose(&[query]).remove(0)
    };
    // The same once more, as after a lost step; then further on, where the guesses were wrong.
    for (n, most) in [(10, 4), (10, 4), (11, 3), (16, 2)] {
        assert_eq!(guess(n, most), toy_greedy(&tokens[..n], most, 0));
    }
}

#[test]
fn a_recurrent_model_begins_where_states_were_kept() {
    let mut model = ToyModel::recurrent(1000, 4, 12);
    let mut engine = engine(&model, 64, 4);
    let mut cached = |engine: &mut Engine, prompt: &[u32], new: usize| {
        let id = engine.add(Request::greedy(prompt.to_vec(), new)).unwrap();
        let completion = run(engine, &mut model).remove(&id).unwrap();
        assert_eq!(completion.token_ids(), toy_greedy(prompt, new, 0));
        (completion.usage.cached_tokens, completion.token_ids())
    };
    let prompt: Vec<u32> = (0..90).collect();
    let (found, answer) = cached(&mut engine, &prompt, 21);
    assert_eq!(found, 0);
    assert_eq!(cached(&mut engine, &prompt, 1).0, 88, "the same again: the prompt's last full page");
    // A chat goes on: the last page that was full when the last token but one ran.
    let next = [&prompt[..], &answer, &[1, 2, 3]].concat();
    assert_eq!(cached(&mut engine, &next, 1).0, 108);
    // The first that parts from the prompt in its middle finds no state there, and leaves one to the next.
    for (tail, expected) in [(91, 0), (92, 40), (93, 40)] {
        let other = [&prompt[..42], &[tail; 30]].concat();
        assert_eq!(cached(&mut engine, &other, 1).0, expected, "{tail}");
    }
    // A long prompt leaves states on its way.
    let long: Vec<u32> = (0..2600).map(|i| i * 7 % 89).collect();
    assert_eq!(cached(&mut engine, &long, 1).0, 0);
    assert_eq!(cached(&mut engine, &[&long[..2300], &[90; 20]].concat(), 1).0, 2048);
    let metrics = engine.metrics();
    assert_eq!((metrics.states, metrics.states_used, metrics.states_kept), (12, 0, 11));
}

#[test]
fn guesses_leave_no_fewer_states_than_plain_decoding() {
    let prompt: Vec<u32> = (0..10).collect();
    let truth = [&prompt[..], &toy_greedy(&prompt, 40, 0)].concat();
    // Tokens that the next turn finds behind an answer that stops with its n-th token.
    let found = |n: usize, wrong: Option<usize>| {
        let mut model = ToyModel::recurrent(64, 4, 8);
        let mut engine = engine(&model, 64, 4);
        if let Some(wrong) = wrong {
            engine.set_drafter(Box::new(Oracle { truth: vec![truth.clone()], wrong, asked: 0 }));
        }
        let mut request = Request::greedy(prompt.clone(), 40);
        request.sampling.stop_ids = vec![truth[prompt.len() + n - 1]];
        let id = engine.add(request).unwrap();
        let answer = run(&mut engine, &mut model)[&id].token_ids();
        let next = engine.add(Request::greedy([&prompt[..], &answer, &[1, 2, 3]].concat(), 1)).unwrap();
        run(&mut engine, &mut model)[&next].usage.cached_tokens
    };
    for n in 1..=40 {
        let plain = found(n, None);
        for wrong in [1, 2, 3, 5, usize::MAX] {
            let guessed = found(n, Some(wrong));
            assert!(
                guessed >= plain,
                "{guessed} of {plain} tokens, {n} tokens, every {wrong}-th guess wrong"
            );
        }
    }
}

#[test]
fn of_two_equal_answers_the_longer_takes_no_state_from_the_shorter() {
    let mut model = ToyModel::recurrent(64, 4, 8);
    let mut engine = engine(&model, 64, 4);
    let prompt: Vec<u32> = (0..10).collect();
    let short = engine.add(Request::greedy(prompt.clone(), 8)).unwrap();
    engine.add(Request::greedy(prompt.clone(), 20)).unwrap();
    let answer = run(&mut engine, &mut model)[&short].token_ids();
    let next = engine.add(Request::greedy([&prompt[..], &answer, &[1, 2, 3]].concat(), 1)).unwrap();
    assert_eq!(run(&mut engine, &mut model)[&next].usage.cached_tokens, 16);
}

#[test]
fn a_request_that_waits_for_pages_has_no_state_copied() {
    let mut model = ToyModel::recurrent(20, 4, 8);
    let mut engine = engine(&model, 64, 4);
    let prompt: Vec<u32> = (0..20).collect();
    engine.add(Request::greedy(prompt.clone(), 1)).unwrap();
    run(&mut engine, &mut model);
    // The second of these begins as the one before and does not fit beside the first.
    engine.add(Request::greedy((20..60).collect(), 8)).unwrap();
    engine.add(Request::greedy([&prompt[..], &[60; 50]].concat(), 1)).unwrap();
    let mut copies = Vec::new();
    while let Some((batch, input)) = engine.plan() {
        copies.push(batch.state_copies.len());
        let result = model.forward(&batch, input);
        engine.complete(&batch, result);
        engine.check_integrity();
    }
    assert_eq!(copies, [0, 0, 0, 0, 0, 0, 0, 0, 1]);
}

#[test]
fn a_state_is_kept_also_where_the_last_piece_of_a_prompt_begins_behind_its_last_full_page() {
    let mut model = ToyModel::recurrent(64, 4, 4);
    let mut engine = engine(&model, 30, 4);
    for expected in [0, 28] {
        let id = engine.add(Request::greedy((0..32).collect(), 1)).unwrap();
        assert_eq!(run(&mut engine, &mut model)[&id].usage.cached_tokens, expected);
    }
}

#[test]
fn where_slots_run_out_the_state_that_was_unused_for_longest_goes() {
    let mut model = ToyModel::recurrent(400, 4, 3);
    let mut engine = engine(&model, 64, 8);
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| vec![i; 30]).collect();
    let mut found = |engine: &mut Engine, prompts: &[Vec<u32>]| {
        let ids: Vec<_> =
            prompts.iter().map(|p| engine.add(Request::greedy(p.clone(), 2)).unwrap()).collect();
        let completions = run(engine, &mut model);
        ids.iter().map(|id| completions[id].usage.cached_tokens).collect::<Vec<_>>()
    };
    // Two run at once, which leaves a slot for one of them; the last runs alone.
    assert_eq!(found(&mut engine, &prompts), [0; 5]);
    assert_eq!(engine.metrics().states_kept, 2);
    for (i, expected) in [(4, 28), (2, 28), (0, 0), (2, 28), (0, 28), (4, 0)] {
        assert_eq!(found(&mut engine, &prompts[i..=i]), [expected], "prompt {i}");
    }
}

#[test]
fn a_draft_model_reads_a_long_prompt_one_pass_at_a_time() {
    let guesser = ToyModel::new(512, 4);
    let passes = guesser.passes();
    let mut drafter = DraftModel::new(Box::new(guesser));
    let (long, short): (Vec<u32>, Vec<u32>) = ((0..1300).map(|i| i % 90).collect(), vec![1, 2, 3]);
    let sampling = parallax_engine::SamplingParams::default();
    let query =
        |request, tokens| DraftQuery { request: RequestId(request), tokens, sampling: &sampling, most: 2 };
    for round in 0..5 {
        let before = passes.lock().unwrap().len();
        let guesses = drafter.propose(&[query(0, &long), query(1, &short)]);
        assert_eq!(guesses[1], toy_greedy(&short, 2, 0));
        let lags = round < 3;
        assert_eq!(guesses[0], if lags { vec![] } else { toy_greedy(&long, 2, 0) });
        let rows = passes.lock().unwrap()[before..].to_vec();
        assert!(rows.len() == 2 && rows.iter().sum::<usize>() <= 512 + 4, "round {round}: {rows:?}");
    }
}

#[test]
fn requests_that_nobody_asks_for_make_room_in_a_draft_model() {
    let guesser = ToyModel::recurrent(64, 4, 2);
    let passes = guesser.passes();
    let mut drafter = DraftModel::new(Box::new(guesser));
    let sampling = parallax_engine::SamplingParams::default();
    let answers: Vec<Vec<u32>> = (0..3).map(|i| [vec![i; 20], toy_greedy(&[i; 20], 9, 0)].concat()).collect();
    // Asks for two tokens behind the first `n` of these requests; who gets them, and rows of the first pass.
    let mut ask = |asked: &[usize], n: usize| {
        let before = passes.lock().unwrap().len();
        let query = |&i: &usize| DraftQuery {
            request: RequestId(i as u64),
            tokens: &answers[i][..n],
            sampling: &sampling,
            most: 2,
        };
        let guesses = drafter.propose(&asked.iter().map(query).collect::<Vec<_>>());
        let got: Vec<usize> = (0..asked.len()).filter(|at| !guesses[*at].is_empty()).collect();
        for at in &got {
            assert_eq!(guesses[*at], answers[asked[*at]][n..n + 2]);
        }
        (got.into_iter().map(|at| asked[at]).collect::<Vec<_>>(), passes.lock().unwrap()[before])
    };
    assert_eq!(ask(&[0, 1], 20), (vec![0, 1], 40));
    assert_eq!(ask(&[2], 20), (vec![2], 20), "the others wait");
    assert_eq!(ask(&[1, 2], 21), (vec![1, 2], 2), "only the one that had to go would have to begin again");
    assert_eq!(ask(&[0, 1, 2], 22), (vec![1, 2], 2), "nobody goes whose tokens are wanted");
}
