//! Training against inference (bit for bit), against the composed path, and against finite differences.

use burn::tensor::TensorData;
use parallax_kernels::dtype::{dequantize, quantize};

use super::*;
use crate::{
    Stage,
    config::Family,
    logprob::log_softmax,
    options::LoadOptions,
    stage::{ForwardBatch, SequenceRows, StageInput, Want},
    testing,
};

const LENGTHS: [usize; 3] = [9, 2, 20];

fn packed() -> (Vec<u32>, Vec<u32>) {
    let mut tokens = Vec::new();
    let mut bounds = vec![0];
    for (i, n) in LENGTHS.into_iter().enumerate() {
        tokens.extend(testing::tokens(n, i as u32));
        bounds.push(tokens.len() as u32);
    }
    (tokens, bounds)
}

fn lora(rank: usize) -> TrainOptions {
    lora_over(BaseDtype::F32, rank)
}

fn lora_over(base_dtype: BaseDtype, rank: usize) -> TrainOptions {
    let lora = LoraConfig { rank, alpha: 8.0, targets: Vec::new(), seed: 3, base_dtype };
    TrainOptions { lora: Some(lora), full: false }
}

const FULL: TrainOptions = TrainOptions { lora: None, full: true };

fn values(t: Tensor<1>) -> Vec<f32> {
    t.into_data().try_to_vec().unwrap()
}

/// The same log-probabilities by the inference path, sequence by sequence.
fn by_stage(stage: &mut Stage, tokens: &[u32], bounds: &[u32]) -> Vec<f32> {
    let mut out = Vec::new();
    for w in bounds.windows(2) {
        let tokens = &tokens[w[0] as usize..w[1] as usize];
        let rows = SequenceRows {
            start: 0,
            rows: tokens.len() as u32,
            pages: (0..8).collect(),
            want: Want::AllLogits,
            ..SequenceRows::default()
        };
        let output =
            stage.forward(&ForwardBatch { sequences: vec![rows] }, StageInput::Tokens(tokens)).unwrap();
        let rows = output.logits.chunks_exact(stage.config().vocab);
        out.extend(tokens[1..].iter().zip(rows).map(|(t, row)| log_softmax(row)[*t as usize]));
    }
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn training_values_equal_inference_bit_for_bit() {
    for family in testing::trainable() {
        let (_dir, checkpoint) = testing::checkpoint(family);
        let (tokens, bounds) = packed();
        let mut stage = Stage::load(&checkpoint, &LoadOptions::whole(&checkpoint)).unwrap();
        let full = TrainModel::from_checkpoint(&checkpoint, &FULL).unwrap();
        let expected = by_stage(&mut stage, &tokens, &bounds);
        assert_eq!(
            bits(&values(full.token_logprobs(&tokens, &bounds).unwrap())),
            bits(&expected),
            "{family:?}"
        );

        // A new adapter changes nothing, a trained one changes both sides alike.
        let mut model = TrainModel::from_checkpoint(&checkpoint, &lora(4)).unwrap();
        assert_eq!(
            bits(&values(model.token_logprobs(&tokens, &bounds).unwrap())),
            bits(&expected),
            "{family:?}"
        );
        let adapter = testing::adapter(checkpoint.config(), 4);
        model.set_adapter(&adapter).unwrap();
        stage.set_adapter(Some(&adapter)).unwrap();
        let adapted = by_stage(&mut stage, &tokens, &bounds);
        assert_ne!(bits(&adapted), bits(&expected));
        assert_eq!(
            bits(&values(model.token_logprobs(&tokens, &bounds).unwrap())),
            bits(&adapted),
            "{family:?}"
        );
        assert_eq!(model.adapter().unwrap(), adapter);
        stage.set_adapter(None).unwrap();
        assert_eq!(bits(&by_stage(&mut stage, &tokens, &bounds)), bits(&expected));
    }
}

#[test]
fn training_over_a_packed_base_equals_inference_with_such_weights_bit_for_bit() {
    for family in testing::trainable() {
        let (_dir, checkpoint) = testing::checkpoint(family);
        let (tokens, bounds) = packed();
        let adapter = testing::adapter(checkpoint.config(), 4);
        let mut of_formats = Vec::new();
        for base_dtype in BaseDtype::ALL {
            let options = LoadOptions { dtype: base_dtype.weights(), ..LoadOptions::whole(&checkpoint) };
            let mut stage = Stage::load(&checkpoint, &options).unwrap();
            let mut model = TrainModel::from_checkpoint(&checkpoint, &lora_over(base_dtype, 4)).unwrap();
            let new = bits(&values(model.token_logprobs(&tokens, &bounds).unwrap()));
            assert_eq!(new, bits(&by_stage(&mut stage, &tokens, &bounds)), "{family:?} {base_dtype}");
            model.set_adapter(&adapter).unwrap();
            stage.set_adapter(Some(&adapter)).unwrap();
            let trained = bits(&values(model.token_logprobs(&tokens, &bounds).unwrap()));
            assert_eq!(trained, bits(&by_stage(&mut stage, &tokens, &bounds)), "{family:?} {base_dtype}");
            let replica = values(model.replica().token_logprobs(&tokens, &bounds).unwrap());
            assert_eq!(trained, bits(&replica), "{family:?} {base_dtype}");
            of_formats.push(trained);
        }
        let different: std::collections::BTreeSet<_> = of_formats.into_iter().collect();
        assert_eq!(different.len(), BaseDtype::ALL.len(), "{family:?}: each format has values of its own");
    }
}

#[test]
fn a_base_in_sixteen_bits_takes_a_quarter_of_the_memory() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let bytes = |options| TrainModel::from_checkpoint(&checkpoint, &options).unwrap().frozen_bytes();
    let layers = 4 * (64 * 32 + 32 * 32 + 128 * 32 + 32 * 64);
    // 97 rows, in panels of sixteen.
    let table = 112 * 32;
    // With the layers' transpose.
    assert_eq!(bytes(lora(4)), 8 * layers + 4 * table);
    for sixteen_bits in [BaseDtype::Bf16, BaseDtype::F16] {
        assert_eq!(bytes(lora_over(sixteen_bits, 4)), 2 * (layers + table));
    }
    assert!(bytes(lora_over(BaseDtype::Q8_0, 4)) < (layers + table) * 11 / 10);
    assert_eq!(bytes(FULL), 0);
}

/// A weighted sum of log-probabilities.
fn weighted(logprobs: Tensor<1>, model: &TrainModel) -> Tensor<1> {
    let n = logprobs.dims()[0];
    let weights: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
    let weights = Tensor::<1>::from_data(TensorData::new(weights, [n]), model.device());
    (logprobs * weights).sum()
}

/// Gradients of a weighted sum of log-probabilities, by parameter.
fn gradients(model: &TrainModel) -> Vec<(String, Vec<f32>)> {
    let (tokens, bounds) = packed();
    let grads = weighted(model.token_logprobs(&tokens, &bounds).unwrap(), model).backward();
    let parameters = model.parameters().iter();
    parameters
        .map(|(name, p)| {
            let grad = p.grad(&grads).unwrap_or_else(|| panic!("{name} has no gradient"));
            (name.clone(), grad.into_data().try_to_vec().unwrap())
        })
        .collect()
}

/// Largest relative RMS difference over all parameters.
fn worst(a: &[(String, Vec<f32>)], b: &[(String, Vec<f32>)]) -> f64 {
    let mut worst = 0.0f64;
    for ((name, a), (_, b)) in a.iter().zip(b) {
        let norm: f64 = b.iter().map(|v| f64::from(*v).powi(2)).sum();
        let difference: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        assert!(norm > 0.0, "{name} has a zero gradient");
        worst = worst.max((difference / norm).sqrt());
    }
    worst
}

#[test]
fn gradients_equal_those_of_the_composed_path() {
    for family in testing::trainable() {
        let (_dir, checkpoint) = testing::checkpoint(family);
        let adapter = testing::adapter(checkpoint.config(), 4);
        for options in [FULL, lora(4)] {
            let model = |route| {
                let mut model = TrainModel::load_on(&checkpoint, &options, route).unwrap();
                if options.lora.is_some() {
                    model.set_adapter(&adapter).unwrap();
                }
                model
            };
            let (kernels, composed) = (model(Route::Kernels), model(Route::Composed));
            let worst = worst(&gradients(&kernels), &gradients(&composed));
            println!("{family:?} full {}: {worst:.2e}", options.full);
            assert!(worst < 1e-4, "{family:?} full {}: {worst:.2e}", options.full);
        }
    }
}

/// A checkpoint of the values that this one's matrices have in a format.
fn widened(checkpoint: &Checkpoint, format: BaseDtype) -> (tempfile::TempDir, Checkpoint) {
    let kind = format.weights().kind().unwrap();
    let mut model = TrainModel::from_checkpoint(checkpoint, &FULL).unwrap();
    let rounded = model.parameters().iter().map(|(_, tensor)| {
        let dims = tensor.dims();
        let stored: Vec<f32> = tensor.clone().inner().into_data().try_to_vec().unwrap();
        // Norms stay f32.
        let kept =
            if dims[0] == 1 { stored } else { dequantize(kind, &quantize(kind, &stored).unwrap()).unwrap() };
        Tensor::<2>::from_data(TensorData::new(kept, dims), model.device())
    });
    let rounded = rounded.collect();
    model.set_parameters(rounded);
    testing::saved(&model)
}

#[test]
fn gradients_over_a_base_in_sixteen_bits_are_those_over_its_values_in_f32() {
    for family in testing::trainable() {
        let (_dir, checkpoint) = testing::checkpoint(family);
        let adapter = testing::adapter(checkpoint.config(), 4);
        let of = |checkpoint: &Checkpoint, base_dtype| {
            let mut model = TrainModel::from_checkpoint(checkpoint, &lora_over(base_dtype, 4)).unwrap();
            model.set_adapter(&adapter).unwrap();
            gradients(&model)
        };
        for format in [BaseDtype::Bf16, BaseDtype::F16] {
            let (_dir, wide) = widened(&checkpoint, format);
            let expected = of(&wide, BaseDtype::F32);
            for ((name, got), (_, wanted)) in of(&checkpoint, format).iter().zip(&expected) {
                assert_eq!(bits(got), bits(wanted), "{family:?} {format} {name}");
            }
            let unrounded = of(&checkpoint, BaseDtype::F32);
            assert_ne!(bits(&unrounded[0].1), bits(&expected[0].1), "rounding shows");
        }
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Qwen3);
    let mut model = TrainModel::from_checkpoint(&checkpoint, &FULL).unwrap();
    let analytic = gradients(&model);
    let (tokens, bounds) = packed();
    let value = |model: &mut TrainModel, index: usize, at: usize, step: f32| -> f64 {
        let before: Vec<Tensor<2>> = model.parameters().iter().map(|(_, t)| t.clone()).collect();
        let mut changed = before.clone();
        let dims = before[index].dims();
        let mut data: Vec<f32> = before[index].clone().into_data().try_to_vec().unwrap();
        data[at] += step;
        changed[index] = Tensor::from_data(TensorData::new(data, dims), model.device());
        model.set_parameters(changed);
        let logprobs = values(model.token_logprobs(&tokens, &bounds).unwrap());
        model.set_parameters(before);
        logprobs.iter().enumerate().map(|(i, v)| f64::from(*v) * (i as f64 * 0.7).sin()).sum()
    };
    let step = 2e-3;
    let mut compared = 0;
    for (index, (name, gradient)) in analytic.iter().enumerate() {
        // The coordinate with the largest gradient shows best above rounding.
        let at =
            (0..gradient.len()).max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs())).unwrap();
        let numeric = (value(&mut model, index, at, step) - value(&mut model, index, at, -step))
            / (2.0 * f64::from(step));
        let error = (numeric - f64::from(gradient[at])).abs() / f64::from(gradient[at]).abs().max(0.1);
        assert!(error < 0.03, "{name}[{at}]: numeric {numeric}, analytic {}", gradient[at]);
        compared += 1;
    }
    assert_eq!(compared, model.parameters().len());
}

#[test]
fn a_saved_checkpoint_computes_the_same() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Qwen3);
    let model = TrainModel::from_checkpoint(&checkpoint, &FULL).unwrap();
    let (dir, again) = testing::saved(&model);
    assert_eq!(again.id().unwrap(), checkpoint.id().unwrap());
    let other = TrainModel::new_random(checkpoint.config(), 8).unwrap();
    other.save_checkpoint(dir.path()).unwrap();
    assert_ne!(Checkpoint::open(dir.path()).unwrap().id().unwrap(), checkpoint.id().unwrap());
    let adapter_model = TrainModel::from_checkpoint(&checkpoint, &lora(2)).unwrap();
    assert!(adapter_model.save_checkpoint(dir.path()).is_err());
}

#[test]
fn activation_checkpointing_changes_no_bit_of_values_and_gradients() {
    for family in testing::trainable() {
        let (_dir, checkpoint) = testing::checkpoint(family);
        for options in [lora(4), lora_over(BaseDtype::Bf16, 4), FULL] {
            let mut model = TrainModel::from_checkpoint(&checkpoint, &options).unwrap();
            if options.lora.is_some() {
                model.set_adapter(&testing::adapter(checkpoint.config(), 4)).unwrap();
            }
            let (tokens, bounds) = packed();
            let whole = model.token_logprobs(&tokens, &bounds).unwrap();
            let (logprobs, pass) = model.checkpointed_logprobs(&tokens, &bounds).unwrap();
            assert_eq!(bits(&values(logprobs.clone())), bits(&values(whole)), "{family:?}");
            let by_parameter = pass.gradients(&weighted(logprobs, &model));
            for ((name, wanted), got) in gradients(&model).iter().zip(by_parameter) {
                let got = got.unwrap_or_else(|| panic!("{name} has no gradient"));
                let got: Vec<f32> = got.into_data().try_to_vec().unwrap();
                assert_eq!(bits(&got), bits(wanted), "{family:?} {name}");
            }
        }
    }
}

#[test]
fn a_step_along_the_gradient_raises_the_likelihood() {
    let history = descent(BaseDtype::F32);
    assert!(history.windows(2).all(|w| w[1] < w[0]), "{history:?}");
    // Values that round to eight bits on the way need not fall at every step.
    let history = descent(BaseDtype::Q8_0);
    assert!(history[7] < history[0], "{history:?}");
}

/// Losses over eight steps along the gradient.
fn descent(base_dtype: BaseDtype) -> Vec<f32> {
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let mut model = TrainModel::from_checkpoint(&checkpoint, &lora_over(base_dtype, 4)).unwrap();
    let (tokens, bounds) = packed();
    let mut history = Vec::new();
    for _ in 0..8 {
        let loss = model.token_logprobs(&tokens, &bounds).unwrap().mean().neg();
        let grads = loss.clone().backward();
        history.push(values(loss)[0]);
        let next = model.parameters().iter().map(|(_, p)| {
            let grad = p.grad(&grads).unwrap();
            p.clone().inner() - grad.mul_scalar(0.05)
        });
        let next = next.collect();
        model.set_parameters(next);
    }
    history
}

#[test]
fn bad_inputs_are_named() {
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let model = TrainModel::from_checkpoint(&checkpoint, &lora(4)).unwrap();
    let error =
        |tokens: &[u32], bounds: &[u32]| model.token_logprobs(tokens, bounds).unwrap_err().to_string();
    assert!(error(&[1, 2, 97], &[0, 3]).contains("97"));
    assert!(error(&[1, 2, 3], &[0, 2, 3]).contains("at least two"));
    assert!(error(&[1, 2, 3], &[0, 4]).contains("3 tokens"));
    assert!(error(&[1; 129], &[0, 129]).contains("128"));
    let mut options = lora(4);
    options.lora.as_mut().unwrap().targets = vec!["qproj".to_owned()];
    let error = TrainModel::from_checkpoint(&checkpoint, &options).unwrap_err().to_string();
    assert!(error.contains("qproj") && error.contains("q_proj"), "{error}");
    assert!(TrainModel::from_checkpoint(&checkpoint, &TrainOptions::default()).is_err());
}
