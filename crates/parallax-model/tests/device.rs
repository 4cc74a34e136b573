//! Models on a GPU against the same models on the CPU and against transformers, with the device of wgpu: a software driver for
//! Vulkan will do (docs/ARCHITECTURE.md, GPUs). Where there is no adapter these tests say so and pass.

#![cfg(feature = "wgpu")]
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests: their helpers too, and what was skipped is said"
)]

#[path = "arch/fixtures.rs"]
mod fixtures;
#[path = "arch/seeded.rs"]
#[expect(dead_code, reason = "rows are compared by their largest difference only")]
mod seeded;

use std::ops::Range;

use parallax_kernels::{
    WeightKind,
    dtype::{dequantize, quantize},
};
use parallax_model::{
    Adapter, DeviceKind, ForwardBatch, KvFormat, LoadError, LoadOptions, LoraTensors, SequenceRows, Stage,
    StageInput, Want, WeightDtype,
};

use fixtures::{Fixture, fixtures, forward, greedy, one, open, options, prompts, ragged, rounded, rows};
use seeded::{Tensor, bits, ids, longest_prompt, worst, worst_of_largest};

/// Largest difference of a logit to transformers, as on the CPU, and to the CPU.
const TOLERANCE: f32 = 1e-4;

fn on_device(f: &Fixture, layers: Range<usize>, dtype: WeightDtype) -> LoadOptions {
    LoadOptions { device: DeviceKind::Wgpu, ..options(f, layers, dtype) }
}

/// Whether there is a device; says so when there is none.
fn present() -> bool {
    match DeviceKind::Wgpu.describe() {
        Ok(name) => {
            eprintln!("device: {name}");
            true
        }
        Err(e) => {
            eprintln!("skipped: {e}");
            false
        }
    }
}

fn load(f: &Fixture, layers: Range<usize>, dtype: WeightDtype) -> Stage {
    Stage::load(&f.checkpoint, &on_device(f, layers, dtype)).unwrap()
}

fn whole(f: &Fixture, dtype: WeightDtype) -> Stage {
    load(f, 0..f.checkpoint.config().n_layers, dtype)
}

/// The recordings of dense models, some of each test.
const LLAMA: &[&str] = &["llama", "llama-linear-bias", "llama-yarn", "llama3-rope", "mistral"];
const QWEN: &[&str] = &["qwen2", "qwen2-window", "qwen3", "smollm2", "smollm3"];
const GEMMA: &[&str] = &["gemma2", "gemma3", "glm4"];
const PHI: &[&str] = &["phi3", "phi3-longrope", "phi3-longrope-long"];

/// Prompts, ragged batches and greedy continuations, step by step, of whole models.
fn agree_with_transformers(names: &[&str]) {
    if !present() {
        return;
    }
    let mut failures = Vec::new();
    for name in names {
        let f = &open(name);
        let mut stage = whole(f, WeightDtype::F32);
        let (logits, ragged) = (prompts(f, &mut stage), ragged(f, &mut stage).0);
        let same = greedy(f, &mut stage) == ids(&f.golden["greedy"]["tokens"]);
        eprintln!("{name:<24} logits {logits:.1e}  ragged {ragged:.1e}  greedy {same}");
        if !(logits < TOLERANCE && ragged < TOLERANCE && same) {
            failures.push(name);
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn llama_and_mistral_agree_with_transformers() {
    agree_with_transformers(LLAMA);
}

#[test]
fn qwen_and_smollm_agree_with_transformers() {
    agree_with_transformers(QWEN);
}

#[test]
fn gemma_and_glm_agree_with_transformers() {
    agree_with_transformers(GEMMA);
}

#[test]
fn phi_agrees_with_transformers() {
    agree_with_transformers(PHI);
}

#[test]
fn dense_models_load_and_the_rest_is_refused_by_name() {
    if !present() {
        return;
    }
    let dense = [LLAMA, QWEN, GEMMA, PHI].concat();
    for f in &fixtures() {
        match Stage::load(&f.checkpoint, &on_device(f, 0..1, WeightDtype::F32)) {
            Ok(_) => assert!(dense.contains(&f.name.as_str()), "{} is compared with nothing", f.name),
            Err(LoadError::Device { reason, .. }) => {
                assert!(!dense.contains(&f.name.as_str()), "{}: {reason}", f.name);
                assert!(reason.contains("runs on the CPU only"), "{}: {reason}", f.name);
            }
            Err(e) => panic!("{}: {e}", f.name),
        }
    }
}

#[test]
fn stages_on_device_and_cpu_follow_each_other() {
    if !present() {
        return;
    }
    let f = &open("gemma3");
    let n_layers = f.checkpoint.config().n_layers;
    let tokens = longest_prompt(&f.golden);
    let batch = one(0, tokens.len(), Want::AllLogits);
    let mut cpu = Stage::load(&f.checkpoint, &options(f, 0..n_layers, WeightDtype::F32)).unwrap();
    let expected = cpu.forward(&batch, StageInput::Tokens(&tokens)).unwrap();
    let mut first = load(f, 0..2, WeightDtype::F32);
    let x = first.forward(&batch, StageInput::Tokens(&tokens)).unwrap();
    assert!(x.logits.is_empty());
    let mut second = Stage::load(&f.checkpoint, &options(f, 2..3, WeightDtype::F32)).unwrap();
    let x = second.forward(&batch, StageInput::Hidden(&x.hidden)).unwrap();
    let mut third = load(f, 3..n_layers, WeightDtype::F32);
    let x = third.forward(&batch, StageInput::Hidden(&x.hidden)).unwrap();
    assert!(worst_of_largest(&x.hidden, &expected.hidden) < TOLERANCE);
    assert!(worst(&x.logits, &expected.logits) < TOLERANCE);
}

/// A tensor gets the values that it has when it is loaded as `dtype`; rows that are no whole blocks become bf16.
fn round_to(dtype: WeightDtype, t: &mut Tensor) {
    let [_, k] = t.shape[..] else { return };
    let table = t.name.contains("embed_tokens") || t.name.contains("lm_head");
    let kind = if table { dtype.table() } else { dtype }.kind().unwrap();
    let kind = if k.is_multiple_of(kind.block().0) { kind } else { WeightKind::Bf16 };
    t.values = dequantize(kind, &quantize(kind, &t.values).unwrap()).unwrap();
}

#[test]
fn packed_weights_give_the_logits_of_their_values() {
    if !present() {
        return;
    }
    let name = "llama3-rope";
    let f32_bytes = whole(&open(name), WeightDtype::F32).weight_bytes();
    let dtypes =
        [WeightDtype::Bf16, WeightDtype::F16, WeightDtype::Q8_0, WeightDtype::Q4_0, WeightDtype::Q5_1];
    for dtype in dtypes {
        let f = &rounded(name, |t| round_to(dtype, t));
        let tokens = longest_prompt(&f.golden);
        let batch = one(0, tokens.len(), Want::AllLogits);
        let mut device = whole(f, dtype);
        assert!(device.weight_bytes() < f32_bytes, "{dtype}: {} bytes", device.weight_bytes());
        let n_layers = f.checkpoint.config().n_layers;
        let mut cpu = Stage::load(&f.checkpoint, &options(f, 0..n_layers, WeightDtype::F32)).unwrap();
        let (got, expected) = (forward(&mut device, &batch, &tokens), forward(&mut cpu, &batch, &tokens));
        let difference = worst(&got, &expected);
        eprintln!("{dtype}: {difference:.1e}");
        assert!(difference < TOLERANCE, "{dtype}: {difference}");
    }
}

#[test]
fn neighbours_chunks_and_pages_do_not_change_a_bit() {
    if !present() {
        return;
    }
    for name in ["llama", "qwen3", "gemma2"] {
        let f = &open(name);
        let tokens = longest_prompt(&f.golden);
        let n = tokens.len();
        for dtype in [WeightDtype::F32, WeightDtype::Q8_0] {
            let mut stage = whole(f, dtype);
            let what = format!("{name} {dtype}");
            let expected = bits(&forward(&mut stage, &one(0, n, Want::AllLogits), &tokens));
            let width = expected.len() / n;

            // More than four rows at a time: chunks of a prompt, beside another sequence, on other pages.
            let mut chunks = Vec::new();
            for (start, end) in [(0, 5), (5, 70), (70, n)] {
                let other = SequenceRows {
                    pages: (16..32).rev().collect(),
                    ..rows(1, 0, end - start, Want::AllLogits)
                };
                let sequences = vec![other, rows(2, start, end - start, Want::AllLogits)];
                let input = [&tokens[..end - start], &tokens[start..end]].concat();
                let logits = bits(&forward(&mut stage, &ForwardBatch { sequences }, &input));
                assert_eq!(
                    logits[..(end - start) * width],
                    expected[..(end - start) * width],
                    "{what}: anew"
                );
                chunks.extend_from_slice(&logits[(end - start) * width..]);
            }
            assert!(chunks == expected, "{what}: chunks");

            // Up to four: a step of several sequences, each as alone; and close to what more rows give.
            let step = |stage: &mut Stage, ids: &[u32], position: usize| {
                let sequences = ids.iter().map(|id| rows(*id, position, 1, Want::LastLogits)).collect();
                forward(stage, &ForwardBatch { sequences }, &vec![tokens[position]; ids.len()])
            };
            for id in 0..3 {
                let prompt = ForwardBatch { sequences: vec![rows(id, 0, n - 1, Want::Nothing)] };
                forward(&mut stage, &prompt, &tokens[..n - 1]);
            }
            let alone = step(&mut stage, &[0], n - 1);
            for ids in [&[1, 0][..], &[2, 1, 0]] {
                let together = step(&mut stage, ids, n - 1);
                assert!(bits(&together[together.len() - width..]) == bits(&alone), "{what}: {ids:?}");
            }
            let many: Vec<f32> = expected[(n - 1) * width..].iter().map(|b| f32::from_bits(*b)).collect();
            assert!(worst(&alone, &many) < TOLERANCE, "{what}: a step after a prompt");
        }
    }
}

#[test]
fn copied_pages_hold_what_was_copied() {
    if !present() {
        return;
    }
    let f = &open("qwen2");
    let tokens = longest_prompt(&f.golden);
    let n = tokens.len();
    let mut stage = whole(f, WeightDtype::F32);
    forward(&mut stage, &one(0, n - 1, Want::Nothing), &tokens[..n - 1]);
    let expected = forward(&mut stage, &one(n - 1, 1, Want::LastLogits), &tokens[n - 1..]);
    for page in 0..16 {
        stage.copy_page(page, 47 - page).unwrap();
    }
    let copied = SequenceRows { pages: (32..48).rev().collect(), ..rows(0, n - 1, 1, Want::LastLogits) };
    let got = forward(&mut stage, &ForwardBatch { sequences: vec![copied] }, &tokens[n - 1..]);
    assert_eq!(bits(&got), bits(&expected));
    assert!(stage.copy_page(0, 48).is_err());
}

/// Factors of a module in -0.2..0.2.
fn module(rank: usize, inputs: usize, outputs: usize, seed: u32) -> LoraTensors {
    let mut state = seed;
    let mut values = |n: usize| -> Vec<f32> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1u32 << 24) as f32 * 0.4 - 0.2
        };
        (0..n).map(next).collect()
    };
    LoraTensors { a: values(rank * inputs), b: values(outputs * rank), inputs, outputs }
}

#[test]
fn adapters_apply_to_the_rows_that_name_them() {
    if !present() {
        return;
    }
    let f = &open("llama");
    // H 64, Q·D 64, K·D 32, F 112.
    let shapes = [
        ("q_proj", 64, 64),
        ("v_proj", 64, 32),
        ("o_proj", 64, 64),
        ("up_proj", 64, 112),
        ("down_proj", 112, 64),
    ];
    let adapter = |rank: usize| {
        let tensors = shapes.iter().zip(0..).map(|((name, inputs, outputs), i)| {
            (format!("layers.1.{name}"), module(rank, *inputs, *outputs, i + rank as u32))
        });
        Adapter { rank, alpha: 2.0 * rank as f32, tensors: tensors.collect() }
    };
    let tokens = longest_prompt(&f.golden);
    let run = |mut stage: Stage| {
        stage.set_adapter(Some(&adapter(2))).unwrap();
        stage.add_adapter(7, &adapter(3)).unwrap();
        let named = SequenceRows { adapter: Some(7), ..rows(1, 0, 9, Want::AllLogits) };
        let batch = ForwardBatch { sequences: vec![rows(0, 0, 12, Want::AllLogits), named] };
        let with = forward(&mut stage, &batch, &[&tokens[..12], &tokens[..9]].concat());
        stage.set_adapter(None).unwrap();
        (with, forward(&mut stage, &one(0, 12, Want::AllLogits), &tokens[..12]))
    };
    let n_layers = f.checkpoint.config().n_layers;
    let (got, bare) = run(whole(f, WeightDtype::F32));
    let cpu = Stage::load(&f.checkpoint, &options(f, 0..n_layers, WeightDtype::F32)).unwrap();
    let (expected, expected_bare) = run(cpu);
    assert!(worst(&got, &expected) < TOLERANCE, "{}", worst(&got, &expected));
    assert!(worst(&bare, &expected_bare) < TOLERANCE, "{}", worst(&bare, &expected_bare));
    // They do something: both sequences begin alike and differ, and differ from none.
    let width = bare.len() / 12;
    assert!(worst(&got[..9 * width], &got[12 * width..]) > 1e-2);
    assert!(worst(&got[..12 * width], &bare) > 1e-2);
}

#[test]
fn a_rounded_cache_is_refused() {
    if !present() {
        return;
    }
    let f = &open("llama");
    let options = LoadOptions { kv_format: KvFormat::Q8, ..on_device(f, 0..1, WeightDtype::F32) };
    let refused = Stage::load(&f.checkpoint, &options).unwrap_err().to_string();
    assert!(refused.contains("leave it at f32"), "{refused}");
}
