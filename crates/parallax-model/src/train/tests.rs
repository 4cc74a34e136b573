//! Training against inference (bit for bit), against the composed path, and against finite differences.

use burn::tensor::TensorData;

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
    let lora = LoraConfig { rank, alpha: 8.0, targets: Vec::new(), seed: 3 };
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
    let dir = tempfile::tempdir().unwrap();
    model.save_checkpoint(dir.path()).unwrap();
    let again = Checkpoint::open(dir.path()).unwrap();
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
        for options in [lora(4), FULL] {
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
    let (_dir, checkpoint) = testing::checkpoint(Family::Llama);
    let mut model = TrainModel::from_checkpoint(&checkpoint, &lora(4)).unwrap();
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
    assert!(history.windows(2).all(|w| w[1] < w[0]), "{history:?}");
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
    let unknown = LoraConfig { rank: 4, alpha: 1.0, targets: vec!["qproj".to_owned()], seed: 0 };
    let options = TrainOptions { lora: Some(unknown), full: false };
    let error = TrainModel::from_checkpoint(&checkpoint, &options).unwrap_err().to_string();
    assert!(error.contains("qproj") && error.contains("q_proj"), "{error}");
    assert!(TrainModel::from_checkpoint(&checkpoint, &TrainOptions::default()).is_err());
}
