//! Every architecture against transformers: tiny random checkpoints whose numbers are in `tests/golden/arch`.

#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]

#[path = "arch/fixtures.rs"]
mod fixtures;
#[path = "arch/seeded.rs"]
mod seeded;

use std::ops::Range;

use parallax_model::{
    Family, ForwardBatch, KvFormat, LoadOptions, SequenceRows, Stage, StageInput, StateSave, Want,
    WeightDtype, config::Mlp,
};

use fixtures::{Fixture, fixtures, floats, forward, greedy, one, open, options, prompts, ragged, rows};
use seeded::{bits, ids, largest, longest_prompt, relative, worst_of_largest};

/// Largest difference of a logit, and of a hidden value relative to the largest of its layer.
const TOLERANCE: f32 = 1e-4;

/// Formats of weights and of the cache that must not change a bit by how the work is cut.
const FORMATS: [(WeightDtype, KvFormat); 5] = [
    (WeightDtype::F32, KvFormat::F32),
    (WeightDtype::Q8_0, KvFormat::F32),
    (WeightDtype::F32, KvFormat::Bf16),
    (WeightDtype::F32, KvFormat::Q8),
    (WeightDtype::Q8_0, KvFormat::Q8),
];

fn load(f: &Fixture, layers: Range<usize>, dtype: WeightDtype) -> Stage {
    load_with(f, layers, dtype, KvFormat::F32)
}

fn load_with(f: &Fixture, layers: Range<usize>, dtype: WeightDtype, kv_format: KvFormat) -> Stage {
    let options = LoadOptions { kv_format, ..options(f, layers, dtype) };
    Stage::load(&f.checkpoint, &options).unwrap()
}

/// Rows behind each layer, and behind the final norm: one stage per layer.
fn hidden(f: &Fixture) -> f32 {
    let prompts = f.golden["prompts"].as_array().unwrap();
    let case = prompts.iter().find(|case| case.get("hidden").is_some()).unwrap();
    let tokens = ids(&case["tokens"]);
    let mut x: Vec<f32> = Vec::new();
    let mut differences = Vec::new();
    for (i, expected) in case["hidden"].as_array().unwrap().iter().enumerate() {
        let mut stage = load(f, i..i + 1, WeightDtype::F32);
        let input = if i == 0 { StageInput::Tokens(&tokens) } else { StageInput::Hidden(&x) };
        let output = stage.forward(&one(0, tokens.len(), Want::Nothing), input).unwrap();
        differences.push(worst_of_largest(&output.hidden, &floats(expected)));
        x = output.hidden;
    }
    largest(differences)
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
        let tokens = longest_prompt(&f.golden);
        let n = tokens.len();
        for (dtype, kv_format) in FORMATS {
            let load = |layers| load_with(f, layers, dtype, kv_format);
            let mut whole = load(0..n_layers);
            let expected = bits(&forward(&mut whole, &one(0, n, Want::AllLogits), &tokens));
            let what = format!("{} {dtype}, cache {kv_format}", f.name);

            let mut x = Vec::new();
            for layers in [0..1, 1..n_layers - 1, n_layers - 1..n_layers] {
                let input =
                    if layers.start == 0 { StageInput::Tokens(&tokens) } else { StageInput::Hidden(&x) };
                let output = load(layers).forward(&one(0, n, Want::AllLogits), input).unwrap();
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
        let tokens = longest_prompt(&f.golden);
        let n = tokens.len();
        for (dtype, kv_format) in FORMATS {
            let run = |threads: usize, kv_page_tokens: usize| {
                parallax_kernels::pool::set_threads(threads);
                let kv_pages = n.div_ceil(kv_page_tokens);
                let options = LoadOptions {
                    layers: 0..n_layers,
                    dtype,
                    kv_pages,
                    kv_page_tokens,
                    kv_format,
                    ..LoadOptions::whole(&f.checkpoint)
                };
                let mut stage = Stage::load(&f.checkpoint, &options).unwrap();
                let pages = (0..kv_pages as u32).rev().collect();
                let sequence = SequenceRows { pages, ..rows(0, 0, n, Want::AllLogits) };
                bits(&forward(&mut stage, &ForwardBatch { sequences: vec![sequence] }, &tokens))
            };
            let expected = run(1, 16);
            for (threads, page_tokens) in [(2, 16), (3, 32), (2, 48)] {
                let what = format!(
                    "{} {dtype}, cache {kv_format}: {threads} threads, pages of {page_tokens}",
                    f.name
                );
                assert_eq!(run(threads, page_tokens), expected, "{what}");
            }
        }
    }
    parallax_kernels::pool::set_threads(before);
}

/// Largest change of a layer's output by a cache in bf16 and in q8, in the middle one of its rows: measured were 0.45 % and
/// 1.3 % (`phi3-longrope-long`, whose scores are the sharpest). Not of every row: some get other experts.
const OF_A_LAYER: [f64; 2] = [6e-3, 2e-2];
/// The same of all logits together, where no layer has experts: measured were 4.4 % and 9 % (`phi3-longrope-long`), and 1.2 %
/// and 2.9 % without it.
const OF_LOGITS: [f64; 2] = [6e-2, 0.12];
/// The same with experts: measured were 12 % (`deepseek-v3`) and 21 % (`kimi-k2`).
const OF_LOGITS_OF_EXPERTS: [f64; 2] = [0.18, 0.3];

/// Change of every layer's output in its middle row, the largest of all layers, each layer beginning with the exact rows.
fn of_a_layer(f: &Fixture, tokens: &[u32]) -> [f64; 2] {
    let (n, hidden) = (tokens.len(), f.checkpoint.config().hidden);
    let (mut x, mut most) = (Vec::new(), [0f64; 2]);
    for i in 0..f.checkpoint.config().n_layers {
        let input = if i == 0 { StageInput::Tokens(tokens) } else { StageInput::Hidden(&x) };
        let [exact, rounded @ ..] = KvFormat::ALL.map(|kv_format| {
            let mut stage = load_with(f, i..i + 1, WeightDtype::F32, kv_format);
            stage.forward(&one(0, n, Want::Nothing), input).unwrap().hidden
        });
        for (most, rounded) in most.iter_mut().zip(rounded) {
            *most = most.max(relative(&rounded, &exact, hidden)[0]);
        }
        x = exact;
    }
    most
}

#[test]
fn a_rounded_cache_stays_near_the_exact_one_in_every_architecture() {
    let mut failures = Vec::new();
    for f in &fixtures() {
        let config = f.checkpoint.config();
        let tokens = longest_prompt(&f.golden);
        let [(exact, mut bytes), rounded @ ..] = KvFormat::ALL.map(|kv_format| {
            let mut stage = load_with(f, 0..config.n_layers, WeightDtype::F32, kv_format);
            let logits = forward(&mut stage, &one(0, tokens.len(), Want::AllLogits), &tokens);
            (logits, stage.kv_bytes())
        });
        let experts = config.layers.iter().any(|layer| matches!(layer.mlp, Mlp::Experts(_)));
        let of_logits = if experts { OF_LOGITS_OF_EXPERTS } else { OF_LOGITS };
        let layer = of_a_layer(f, &tokens);
        for (i, (logits, smaller)) in rounded.into_iter().enumerate() {
            let format = KvFormat::ALL[i + 1].to_string();
            let [logits, _] = relative(&logits, &exact, exact.len());
            println!("{:<24} {format:>4}: logits {logits:.1e}  a layer {:.1e}", f.name, layer[i]);
            // Nothing at all would mean that the format is not used.
            let near = 0.0 < logits && logits < of_logits[i] && 0.0 < layer[i] && layer[i] < OF_A_LAYER[i];
            if !near || smaller >= bytes {
                failures.push(format!("{} {format}", f.name));
            }
            bytes = smaller;
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn a_recurrent_state_is_continued_taken_back_and_kept_as_asked() {
    for name in ["qwen3-next", "qwen3.5", "qwen3.5-moe"] {
        let f = &open(name);
        let n_layers = f.checkpoint.config().n_layers;
        let tokens = longest_prompt(&f.golden);
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
