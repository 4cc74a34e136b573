//! Every architecture against transformers: tiny random checkpoints whose numbers are in `tests/golden/arch`.

#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]

#[path = "arch/fixtures.rs"]
mod fixtures;

use std::ops::Range;

use parallax_model::{
    Family, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, StateSave, Want, WeightDtype,
};

use fixtures::{
    Fixture, bits, fixtures, floats, folder, forward, greedy, ids, one, open, options, prompts, ragged, rows,
    worst,
};

/// Largest difference of a logit, and of a hidden value relative to the largest of its layer.
const TOLERANCE: f32 = 1e-4;

fn load(f: &Fixture, layers: Range<usize>, dtype: WeightDtype) -> Stage {
    Stage::load(&f.checkpoint, &options(f, layers, dtype)).unwrap()
}

/// Rows behind each layer, and behind the final norm: one stage per layer.
fn hidden(f: &Fixture) -> f32 {
    let prompts = f.golden["prompts"].as_array().unwrap();
    let case = prompts.iter().find(|case| case.get("hidden").is_some()).unwrap();
    let tokens = ids(&case["tokens"]);
    let mut x: Vec<f32> = Vec::new();
    let mut difference = 0.0f32;
    for (i, expected) in case["hidden"].as_array().unwrap().iter().enumerate() {
        let mut stage = load(f, i..i + 1, WeightDtype::F32);
        let input = if i == 0 { StageInput::Tokens(&tokens) } else { StageInput::Hidden(&x) };
        let output = stage.forward(&one(0, tokens.len(), Want::Nothing), input).unwrap();
        let expected = floats(expected);
        let largest = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
        difference = difference.max(worst(&output.hidden, &expected) / largest);
        x = output.hidden;
    }
    difference
}

#[test]
fn every_architecture_agrees_with_transformers() {
    let mut failures = Vec::new();
    for f in &fixtures() {
        let mut stage = load(f, 0..f.checkpoint.config().n_layers, WeightDtype::F32);
        let (logits, hidden, ragged) = (prompts(f, &mut stage), hidden(f), ragged(f, &mut stage).0);
        let same = greedy(f, &mut stage) == ids(&f.golden["greedy"]["tokens"]);
        println!(
            "{:<24} logits {logits:.1e}  hidden {hidden:.1e}  ragged {ragged:.1e}  greedy {}",
            f.name,
            if same { "equal" } else { "DIFFERENT" }
        );
        if !(logits < TOLERANCE && hidden < TOLERANCE && ragged < TOLERANCE && same) {
            failures.push(f.name.clone());
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn cuts_chunks_and_batches_do_not_change_a_bit() {
    for f in &fixtures() {
        let n_layers = f.checkpoint.config().n_layers;
        let prompts = f.golden["prompts"].as_array().unwrap();
        let tokens = ids(&prompts.last().unwrap()["tokens"]);
        let n = tokens.len();
        for dtype in [WeightDtype::F32, WeightDtype::Q8_0] {
            let mut whole = load(f, 0..n_layers, dtype);
            let expected = bits(&forward(&mut whole, &one(0, n, Want::AllLogits), &tokens));
            let what = format!("{} {dtype}", f.name);

            let mut x = Vec::new();
            for layers in [0..1, 1..n_layers - 1, n_layers - 1..n_layers] {
                let input =
                    if layers.start == 0 { StageInput::Tokens(&tokens) } else { StageInput::Hidden(&x) };
                let output = load(f, layers, dtype).forward(&one(0, n, Want::AllLogits), input).unwrap();
                x = if output.logits.is_empty() { output.hidden } else { output.logits };
            }
            assert_eq!(bits(&x), expected, "{what}: cut into stages");

            // Chunks beside another sequence, which is begun anew each time as after a preemption.
            let mut chunks = Vec::new();
            for (start, end) in [(0, 3), (3, 4), (4, n - 1), (n - 1, n)] {
                let n = end - start;
                let sequences = vec![rows(1, 0, n, Want::AllLogits), rows(2, start, n, Want::AllLogits)];
                let tokens = [&tokens[..n], &tokens[start..end]].concat();
                let logits = forward(&mut whole, &ForwardBatch { sequences }, &tokens);
                let (other, own) = logits.split_at(logits.len() / 2);
                assert_eq!(bits(other), expected[..other.len()], "{what}: begun anew");
                chunks.extend(bits(own));
            }
            assert_eq!(chunks, expected, "{what}: chunks");

            let together = ragged(f, &mut whole).1;
            let prompts = f.golden["ragged"]["tokens"].as_array().unwrap().iter().map(ids);
            let alone: Vec<f32> =
                prompts.flat_map(|p| forward(&mut whole, &one(0, p.len(), Want::LastLogits), &p)).collect();
            assert_eq!(bits(&together), bits(&alone), "{what}: batch");
        }
    }
}

#[test]
fn threads_and_pages_do_not_change_a_bit() {
    let before = parallax_kernels::pool::threads();
    for f in &fixtures() {
        let n_layers = f.checkpoint.config().n_layers;
        let tokens = ids(&f.golden["prompts"].as_array().unwrap().last().unwrap()["tokens"]);
        let n = tokens.len();
        for dtype in [WeightDtype::F32, WeightDtype::Q8_0] {
            let run = |threads: usize, kv_page_tokens: usize| {
                parallax_kernels::pool::set_threads(threads);
                let kv_pages = n.div_ceil(kv_page_tokens);
                let options = LoadOptions {
                    layers: 0..n_layers,
                    dtype,
                    kv_pages,
                    kv_page_tokens,
                    ..LoadOptions::whole(&f.checkpoint)
                };
                let mut stage = Stage::load(&f.checkpoint, &options).unwrap();
                let pages = (0..kv_pages as u32).rev().collect();
                let sequence = SequenceRows { pages, ..rows(0, 0, n, Want::AllLogits) };
                bits(&forward(&mut stage, &ForwardBatch { sequences: vec![sequence] }, &tokens))
            };
            let expected = run(1, 16);
            for (threads, page_tokens) in [(2, 16), (3, 32), (2, 48)] {
                let what = format!("{} {dtype}: {threads} threads, pages of {page_tokens}", f.name);
                assert_eq!(run(threads, page_tokens), expected, "{what}");
            }
        }
    }
    parallax_kernels::pool::set_threads(before);
}

#[test]
fn a_recurrent_state_is_continued_taken_back_and_kept_as_asked() {
    for name in ["qwen3-next", "qwen3.5", "qwen3.5-moe"] {
        let f = &open(&folder().join(format!("{name}.json")));
        let n_layers = f.checkpoint.config().n_layers;
        let tokens = ids(&f.golden["prompts"].as_array().unwrap().last().unwrap()["tokens"]);
        let n = tokens.len();
        let mut stage = load(f, 0..n_layers, WeightDtype::F32);
        assert!(stage.is_recurrent());
        let expected = bits(&forward(&mut stage, &one(0, n, Want::AllLogits), &tokens));
        let vocab = f.checkpoint.config().vocab;
        let expected = |start: usize, end: usize| &expected[start * vocab..end * vocab];

        let refused =
            stage.forward(&one(2, 1, Want::LastLogits), StageInput::Tokens(&tokens[2..3])).unwrap_err();
        assert!(refused.to_string().contains("run it again from 0"), "{refused}");
        assert!(stage.copy_state(0, stage.state_slots() as u32).is_err());

        // Wrong guesses behind position 4, the state before position 2 kept in a slot of its own.
        let saves = vec![StateSave { position: 2, slot: 9 }];
        let guessed = SequenceRows { drafted: 3, saves, ..rows(0, 0, 7, Want::AllLogits) };
        let wrong = [&tokens[..4], &[1, 1, 1]].concat();
        let got = forward(&mut stage, &ForwardBatch { sequences: vec![guessed] }, &wrong);
        assert_eq!(bits(&got[..4 * vocab]), expected(0, 4), "{name}: before the guesses");
        let got = forward(&mut stage, &one(4, n - 4, Want::AllLogits), &tokens[4..]);
        assert_eq!(bits(&got), expected(4, n), "{name}: taken back");
        // Another sequence on pages that it shares goes on from the copy.
        stage.copy_state(9, 5).unwrap();
        let other = SequenceRows { state: 5, ..rows(0, 2, n - 2, Want::AllLogits) };
        let got = forward(&mut stage, &ForwardBatch { sequences: vec![other] }, &tokens[2..]);
        assert_eq!(bits(&got), expected(2, n), "{name}: from the copy");
    }
}

#[test]
fn every_family_has_a_recording() {
    let fixtures = fixtures();
    for family in Family::ALL {
        assert!(fixtures.iter().any(|f| f.checkpoint.config().family == family), "{family:?}");
    }
}
