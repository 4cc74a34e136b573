//! A stage against itself cut, batched and chunked differently, against the composed path, and bad batches.

use super::*;
use crate::{
    config::{Family, Mixer},
    options::WeightDtype,
    testing,
};

fn options(checkpoint: &Checkpoint, layers: Range<usize>) -> LoadOptions {
    LoadOptions { layers, dtype: WeightDtype::F32, kv_pages: 24, ..LoadOptions::whole(checkpoint) }
}

fn sequence(start: u32, rows: u32, pages: &[u32]) -> SequenceRows {
    SequenceRows { start, rows, pages: pages.to_vec(), want: Want::AllLogits, ..SequenceRows::default() }
}

fn one(start: u32, rows: u32, pages: &[u32]) -> ForwardBatch {
    ForwardBatch { sequences: vec![sequence(start, rows, pages)] }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn cuts_batches_and_chunks_do_not_change_a_bit() {
    for family in testing::trainable() {
        for (dtype, kv_format) in [
            (WeightDtype::F32, KvFormat::F32),
            (WeightDtype::Bf16, KvFormat::Bf16),
            (WeightDtype::Q8_0, KvFormat::Q8),
            (WeightDtype::Q4_0, KvFormat::F32),
            (WeightDtype::F32, KvFormat::Q8),
        ] {
            let (_dir, checkpoint) = testing::checkpoint(family);
            let load = |layers| {
                let options = LoadOptions { dtype, kv_format, ..options(&checkpoint, layers) };
                Stage::load(&checkpoint, &options).unwrap()
            };
            let tokens = testing::tokens(37, 0);
            let mut whole = load(0..4);
            let expected = whole.forward(&one(0, 37, &[3, 1, 2]), StageInput::Tokens(&tokens)).unwrap();

            // Three stages.
            let (mut a, mut b, mut c) = (load(0..1), load(1..3), load(3..4));
            let batch = one(0, 37, &[5, 0, 9]);
            let x = a.forward(&batch, StageInput::Tokens(&tokens)).unwrap();
            assert!(x.logits.is_empty());
            let x = b.forward(&batch, StageInput::Hidden(&x.hidden)).unwrap();
            let x = c.forward(&batch, StageInput::Hidden(&x.hidden)).unwrap();
            assert_eq!(bits(&x.logits), bits(&expected.logits), "{family:?} {dtype}: stages");
            assert_eq!(bits(&x.hidden), bits(&expected.hidden));

            // Chunks, beside another sequence, decoding the last token alone.
            let other = testing::tokens(20, 5);
            let mut logits = Vec::new();
            for (start, end) in [(0usize, 5usize), (5, 36), (36, 37)] {
                let mut sequences = vec![sequence(start as u32, (end - start) as u32, &[11, 12, 13])];
                let mut input = tokens[start..end].to_vec();
                if start < 20 {
                    let n = end.min(20) - start;
                    sequences.insert(0, sequence(start as u32, n as u32, &[20, 21]));
                    input = [&other[start..start + n], &tokens[start..end]].concat();
                }
                let skip = input.len() - (end - start);
                let output = whole.forward(&ForwardBatch { sequences }, StageInput::Tokens(&input)).unwrap();
                logits.extend_from_slice(&output.logits[skip * 97..]);
            }
            assert_eq!(bits(&logits), bits(&expected.logits), "{family:?} {dtype}: chunks");
        }
    }
}

#[test]
fn kernels_agree_with_the_composed_path() {
    for family in testing::trainable() {
        let (_dir, checkpoint) = testing::checkpoint(family);
        let adapter = testing::adapter(checkpoint.config(), 3);
        let run = |route| {
            let options = options(&checkpoint, 0..4);
            let mut stage = Stage::load_on(&checkpoint, &options, Device::flex(), route).unwrap();
            stage.set_adapter(Some(&adapter)).unwrap();
            let mut logits = Vec::new();
            // Prefill of two sequences, then one decode step of both.
            let first = [testing::tokens(21, 0), testing::tokens(6, 1)].concat();
            let batch = ForwardBatch { sequences: vec![sequence(0, 21, &[4, 7]), sequence(0, 6, &[2])] };
            logits.extend(stage.forward(&batch, StageInput::Tokens(&first)).unwrap().logits);
            let batch = ForwardBatch { sequences: vec![sequence(21, 1, &[4, 7]), sequence(6, 1, &[2])] };
            logits.extend(stage.forward(&batch, StageInput::Tokens(&[5, 6])).unwrap().logits);
            logits
        };
        let (kernels, composed) = (run(Route::Kernels), run(Route::Composed));
        assert_eq!(kernels.len(), composed.len());
        let largest = composed.iter().map(|v| v.abs()).fold(0.0, f32::max);
        let worst = kernels.iter().zip(&composed).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("{family:?}: {worst:.2e} of {largest:.2}");
        assert!(worst < 1e-4 * largest, "{family:?}: {worst} of {largest}");
    }
}

/// Logits of a prompt and of a decode step on a copied page, and the store's bytes.
fn logits_with(checkpoint: &Checkpoint, kv_format: KvFormat) -> (Vec<f32>, u64) {
    let options = LoadOptions { kv_format, ..options(checkpoint, 0..4) };
    let mut stage = Stage::load(checkpoint, &options).unwrap();
    let mut logits = stage
        .forward(&one(0, 60, &[3, 1, 2, 5]), StageInput::Tokens(&testing::tokens(60, 0)))
        .unwrap()
        .logits;
    stage.copy_page(5, 9).unwrap();
    logits.extend(stage.forward(&one(60, 1, &[3, 1, 2, 9]), StageInput::Tokens(&[7])).unwrap().logits);
    (logits, stage.kv_bytes())
}

#[test]
fn a_rounded_store_stays_near_the_exact_one_and_is_as_small_as_it_says() {
    for family in testing::trainable() {
        let (_dir, checkpoint) = testing::checkpoint(family);
        let (exact, _) = logits_with(&checkpoint, KvFormat::F32);
        let rms = |v: &[f32]| (v.iter().map(|v| v * v).sum::<f32>() / v.len() as f32).sqrt();
        for kv_format in [KvFormat::Bf16, KvFormat::Q8] {
            let (logits, bytes) = logits_with(&checkpoint, kv_format);
            let error: Vec<f32> = logits.iter().zip(&exact).map(|(a, b)| a - b).collect();
            let relative = rms(&error) / rms(&exact);
            println!("{family:?} {kv_format}: {relative:.1e}");
            assert!(relative < 1e-2 && relative > 0.0, "{family:?} {kv_format}: {relative}");
            // 24 pages of 16 tokens; heads are padded to whole lines of sixteen.
            let per_token = |layer: &LayerConfig| match &layer.mixer {
                Mixer::Attention(a) => {
                    2 * a.n_kv_heads * kv_format.row_bytes(a.head_dim.next_multiple_of(16))
                }
                _ => 0,
            };
            let expected = checkpoint.config().layers.iter().map(per_token).sum::<usize>() * 24 * 16;
            assert_eq!(bytes, expected as u64, "{family:?} {kv_format}");
        }
    }
}

#[test]
fn wanted_rows_pick_the_logits() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let mut stage = Stage::load(&checkpoint, &options(&checkpoint, 0..4)).unwrap();
    let tokens = testing::tokens(12, 0);
    let mut batch = ForwardBatch { sequences: vec![sequence(0, 7, &[0]), sequence(0, 5, &[1])] };
    let all = stage.forward(&batch, StageInput::Tokens(&tokens)).unwrap();
    batch.sequences[0].want = Want::LastLogits;
    batch.sequences[1].want = Want::Nothing;
    let last = stage.forward(&batch, StageInput::Tokens(&tokens)).unwrap();
    assert_eq!(bits(&last.logits), bits(&all.logits[6 * 97..7 * 97]));
    assert_eq!((batch.n_rows(), batch.n_wanted()), (12, 1));
}

#[test]
fn bad_batches_are_refused_with_the_reason() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let mut stage = Stage::load(&checkpoint, &options(&checkpoint, 0..2)).unwrap();
    let mut error =
        |batch: &ForwardBatch, input: StageInput<'_>| stage.forward(batch, input).unwrap_err().to_string();
    assert!(error(&one(0, 1, &[0]), StageInput::Tokens(&[97])).contains("97"));
    assert!(error(&one(0, 2, &[0]), StageInput::Tokens(&[1])).contains("expected 2"));
    assert!(error(&one(0, 17, &[0]), StageInput::Tokens(&[1; 17])).contains("pages"));
    assert!(error(&one(0, 1, &[24]), StageInput::Tokens(&[1])).contains("page 24"));
    assert!(error(&one(127, 2, &[0; 9]), StageInput::Tokens(&[1; 2])).contains("128"));
    assert!(error(&one(0, 1, &[0]), StageInput::Hidden(&[0.0; 32])).contains("first stage"));
    assert!(error(&ForwardBatch::default(), StageInput::Tokens(&[])).contains("0 rows"));

    let mut second = Stage::load(&checkpoint, &options(&checkpoint, 2..4)).unwrap();
    let mut hidden = vec![0.5; 3 * 32];
    hidden[2 * 32 + 4] = f32::INFINITY;
    let error = second.forward(&one(5, 3, &[0]), StageInput::Hidden(&hidden)).unwrap_err().to_string();
    assert!(error.contains("2..4") && error.contains("position 7") && error.contains("entering"), "{error}");
}

#[test]
fn bad_load_options_are_refused() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let refuse = |options: LoadOptions| Stage::load(&checkpoint, &options).unwrap_err().to_string();
    assert!(refuse(options(&checkpoint, 2..5)).contains("2..5"));
    assert!(refuse(options(&checkpoint, 2..2)).contains("2..2"));
    assert!(
        refuse(LoadOptions { kv_page_tokens: 20, ..options(&checkpoint, 0..4) }).contains("multiple of 16")
    );
    let rounded = LoadOptions { kv_format: KvFormat::Q8, ..options(&checkpoint, 0..4) };
    let refused = Stage::load_on(&checkpoint, &rounded, Device::flex(), Route::Composed).unwrap_err();
    assert!(refused.to_string().contains("leave it at f32"));
    assert!(refuse(LoadOptions { kv_pages: 0, ..options(&checkpoint, 0..4) }).contains("kv_pages"));
}

#[test]
fn a_pass_has_the_adapter_of_its_time() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let mut stage = Stage::load(&checkpoint, &options(&checkpoint, 0..4)).unwrap();
    let tokens = testing::tokens(7, 0);
    let logits = |stage: &mut Stage, adapter: Option<u32>| {
        let rows = SequenceRows { adapter, ..sequence(0, 7, &[0]) };
        let batch = ForwardBatch { sequences: vec![rows] };
        bits(&stage.forward(&batch, StageInput::Tokens(&tokens)).unwrap().logits)
    };
    let [first, second] = [3, 4].map(|rank| testing::adapter(checkpoint.config(), rank));
    let bare = logits(&mut stage, None);
    stage.set_adapter(Some(&first)).unwrap();
    let adapted = logits(&mut stage, None);
    assert_ne!(adapted, bare);
    stage.set_adapter(None).unwrap();
    assert_eq!(logits(&mut stage, None), bare);
    stage.add_adapter(7, &second).unwrap();
    let other = logits(&mut stage, Some(7));
    assert!(other != bare && other != adapted);
    stage.add_adapter(7, &first).unwrap();
    assert_eq!(logits(&mut stage, Some(7)), adapted, "a replaced one is gone");
}

#[test]
fn resident_adapters_share_a_batch_and_change_no_bit() {
    for (family, route) in
        [(Family::Llama, Route::Kernels), (Family::Qwen3, Route::Kernels), (Family::Llama, Route::Composed)]
    {
        let (_dir, checkpoint) = testing::checkpoint(family);
        let options = options(&checkpoint, 0..4);
        let load = || Stage::load_on(&checkpoint, &options, Device::flex(), route).unwrap();
        // Three sequences: one that names no adapter, and two that name the residents of ranks 3 and 5.
        let ranks = [None, Some(3), Some(5)];
        let adapter = |rank| testing::adapter(checkpoint.config(), rank);
        let lanes: Vec<Vec<u32>> = [(9, 0), (21, 1), (4, 2)].map(|(n, seed)| testing::tokens(n, seed)).into();
        for default in [None, Some(2)] {
            let default = default.map(adapter);
            let mut together = load();
            together.set_adapter(default.as_ref()).unwrap();
            together.add_adapter(30, &adapter(3)).unwrap();
            together.add_adapter(7, &adapter(4)).unwrap();
            together.add_adapter(7, &adapter(5)).unwrap();
            let id = |lane: usize| ranks[lane].map(|rank| if rank == 3 { 30 } else { 7 });
            let pages = |lane: usize| [2 * lane as u32, 2 * lane as u32 + 1];
            let rows = |lane: usize, start, n| SequenceRows {
                adapter: id(lane),
                ..sequence(start, n, &pages(lane))
            };
            let mut got = vec![Vec::new(); 3];
            // Prefill in one ragged batch, out of order; then one step of all.
            for (order, step) in [([1, 0, 2], false), ([2, 1, 0], true)] {
                let part = |lane: usize| {
                    let n = lanes[lane].len();
                    if step { (n - 1, 1) } else { (0, n - 1) }
                };
                let sequences = order.map(|lane| rows(lane, part(lane).0 as u32, part(lane).1 as u32)).into();
                let input: Vec<u32> = order
                    .iter()
                    .flat_map(|lane| lanes[*lane][part(*lane).0..][..part(*lane).1].to_vec())
                    .collect();
                let output =
                    together.forward(&ForwardBatch { sequences }, StageInput::Tokens(&input)).unwrap();
                let mut first = 0;
                for lane in order {
                    let n = part(lane).1;
                    got[lane].extend_from_slice(&output.logits[first * 97..(first + n) * 97]);
                    first += n;
                }
            }
            for (lane, rank) in ranks.into_iter().enumerate() {
                let mut alone = load();
                let own = rank.map(adapter).or_else(|| default.clone());
                alone.set_adapter(own.as_ref()).unwrap();
                let tokens = &lanes[lane];
                let whole = one(0, tokens.len() as u32, &[0, 1]);
                let expected = alone.forward(&whole, StageInput::Tokens(tokens)).unwrap().logits;
                let same = if route == Route::Kernels {
                    bits(&got[lane]) == bits(&expected)
                } else {
                    got[lane].iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs().max(1.0))
                };
                assert!(same, "{family:?} {route:?} lane {lane}, default {}", default.is_some());
            }
            // Gone is gone, and the others stay.
            assert!(together.remove_adapter(30) && !together.remove_adapter(30));
            let batch = ForwardBatch { sequences: vec![rows(1, 0, 4)] };
            let error = together.forward(&batch, StageInput::Tokens(&[1, 2, 3, 4])).unwrap_err().to_string();
            assert!(error.contains("adapter 30") && error.contains("[7]"), "{error}");
            let batch = ForwardBatch { sequences: vec![rows(2, 0, 4)] };
            let output = together.forward(&batch, StageInput::Tokens(&lanes[2])).unwrap().logits;
            if route == Route::Kernels {
                assert_eq!(bits(&output[..3 * 97]), bits(&got[2][..3 * 97]));
            }
        }
    }
}
