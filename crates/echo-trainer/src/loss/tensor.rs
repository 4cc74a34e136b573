//! Policy losses on Burn tensors: differentiable, and the version that trains.
//!
//! Everything but the current log-probabilities is constant, so only elementwise operations and, for sequence-level
//! ratios, one segment sum are recorded. The f64 version in [`super::reference`] says what the result must be.

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use super::{LossConfig, LossError, LossKind, PolicyTargets, RatioLevel};

/// The policy loss of `logprobs` `[rows]` as a scalar tensor `[1]` on the same device and, if they carry one, on the same
/// gradient tape.
///
/// # Errors
/// When lists do not fit each other or a setting is out of range.
pub fn policy_loss(
    logprobs: &Tensor<1>,
    targets: &PolicyTargets,
    config: &LossConfig,
) -> Result<Tensor<1>, LossError> {
    let rows = logprobs.dims()[0];
    targets.validate(rows, config)?;
    let device = logprobs.device();
    let constant = |values: Vec<f32>| Tensor::<1>::from_data(TensorData::new(values, [rows]), &device);
    let narrow = |values: &[f64]| constant(values.iter().map(|v| *v as f32).collect());

    let of = targets.sequence_of_rows();
    let weights = narrow(&targets.row_weights(config));
    let advantages = constant(of.iter().map(|i| targets.advantages[*i] as f32).collect());
    let sampled = match &targets.sampled {
        Some(sampled) => narrow(sampled),
        None => logprobs.clone().detach(),
    };
    let mut log_ratio = logprobs.clone() - sampled;
    if config.level == RatioLevel::Sequence {
        log_ratio = sequence_mean(log_ratio, targets, &of);
    }
    let ratio = log_ratio.exp();
    let mut token_loss = token_loss(ratio, logprobs, advantages, targets, &of, config);
    if let (true, Some(reference)) = (config.beta > 0.0, &targets.reference) {
        let d = narrow(reference) - logprobs.clone();
        token_loss = token_loss + (d.clone().exp() - d - 1.0) * config.beta;
    }
    // Rows outside the mask may hold anything; a product with zero would let NaN through, so they are replaced.
    let outside: Vec<bool> = targets.mask.iter().map(|m| !m).collect();
    let outside = Tensor::<1, burn::tensor::Bool>::from_data(TensorData::new(outside, [rows]), &device);
    Ok((token_loss.mask_fill(outside, 0.0) * weights).sum())
}

fn token_loss(
    ratio: Tensor<1>,
    logprobs: &Tensor<1>,
    advantages: Tensor<1>,
    targets: &PolicyTargets,
    of: &[usize],
    config: &LossConfig,
) -> Tensor<1> {
    match config.kind {
        LossKind::Grpo | LossKind::Bnpo | LossKind::Dapo | LossKind::DrGrpo => {
            let clipped = ratio.clone().clamp(1.0 - config.clip_low, 1.0 + config.clip_high);
            let bounded = match config.delta {
                Some(delta) => ratio.clamp_max(delta),
                None => ratio,
            };
            let (free, clipped) = (bounded * advantages.clone(), clipped * advantages);
            // min(free, clipped) by choice, so that at a tie (every on-policy token) the whole gradient flows once.
            let choose_clipped = clipped.clone().lower(free.clone());
            free.mask_where(choose_clipped, clipped).neg()
        }
        LossKind::Cispo => (ratio.clamp_max(config.clip_high).detach() * advantages * logprobs.clone()).neg(),
        LossKind::Sapo => {
            let temperature = |i: &usize| {
                if targets.advantages[*i] > 0.0 {
                    config.sapo_temperature_positive as f32
                } else {
                    config.sapo_temperature_negative as f32
                }
            };
            let t: Vec<f32> = of.iter().map(temperature).collect();
            let t = Tensor::<1>::from_data(TensorData::new(t, [of.len()]), &logprobs.device());
            let gate = burn::tensor::activation::sigmoid((ratio - 1.0) * t.clone());
            (gate * t.recip() * 4.0 * advantages).neg()
        }
    }
}

/// Replaces each row by the mean over the trainable rows of its sequence.
fn sequence_mean(log_ratio: Tensor<1>, targets: &PolicyTargets, of: &[usize]) -> Tensor<1> {
    let (rows, n, device) = (of.len(), targets.sequences(), log_ratio.device());
    let share: Vec<f32> = (0..rows)
        .map(|r| if targets.mask[r] { 1.0 / targets.trainable(of[r]).max(1) as f32 } else { 0.0 })
        .collect();
    let outside: Vec<bool> = targets.mask.iter().map(|m| !m).collect();
    let outside = Tensor::<1, burn::tensor::Bool>::from_data(TensorData::new(outside, [rows]), &device);
    let share = Tensor::<1>::from_data(TensorData::new(share, [rows]), &device);
    let index: Vec<i64> = of.iter().map(|i| *i as i64).collect();
    let index = Tensor::<1, Int>::from_data(TensorData::new(index, [rows]), &device);
    let shares = log_ratio.mask_fill(outside, 0.0) * share;
    Tensor::<1>::zeros([n], &device)
        .select_assign(0, index.clone(), shares, IndexingUpdateOp::Add)
        .select(0, index)
}
