//! Losses over pairs of a chosen and a rejected answer: direct preference optimisation, and pairwise reward models.
//!
//! As with policy losses, f64 with the derivative written out is the specification and the Burn version trains. Sources:
//! DPO (arXiv 2305.18290), label smoothing (cDPO), IPO (arXiv 2310.12036), hinge (SLiC, arXiv 2305.10425); the reward
//! model is Bradley-Terry's with Llama 2's margin (arXiv 2307.09288) and TRL's centring term.

mod train;

use burn::tensor::activation::log_sigmoid;
use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

pub use train::{Pair, PairObjective, PairReport, PairTrainer, judged};

/// What is done with a pair's margin `h`: how much more the policy prefers the chosen answer than the reference does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PreferenceKind {
    /// `-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)`.
    Sigmoid {
        /// The share `s` of labels that are taken to be wrong; 0 is plain DPO.
        label_smoothing: f64,
    },
    /// `max(0, 1 - beta h)`.
    Hinge,
    /// `(h - 1 / (2 beta))^2`; log-probabilities are averaged over the answer, as TRL does.
    Ipo,
}

/// Settings of a preference loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreferenceConfig {
    /// The loss.
    pub kind: PreferenceKind,
    /// How much the policy is held to the reference. Usual: 0.1.
    pub beta: f64,
}

impl PreferenceConfig {
    /// Plain DPO.
    pub fn dpo(beta: f64) -> Self {
        Self { kind: PreferenceKind::Sigmoid { label_smoothing: 0.0 }, beta }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), PreferenceError> {
        let fault = |setting, value| Err(PreferenceError::Setting { setting, value });
        match self.kind {
            _ if !(self.beta > 0.0 && self.beta.is_finite()) => fault("beta", self.beta),
            PreferenceKind::Sigmoid { label_smoothing } if !(0.0..0.5).contains(&label_smoothing) => {
                fault("label_smoothing", label_smoothing)
            }
            _ => Ok(()),
        }
    }

    /// Whether answers count by their mean log-probability instead of their sum.
    pub fn averages(&self) -> bool {
        matches!(self.kind, PreferenceKind::Ipo)
    }

    /// Loss and derivative by the margin `h`.
    fn of_margin(&self, h: f64) -> (f64, f64) {
        let beta = self.beta;
        match self.kind {
            PreferenceKind::Sigmoid { label_smoothing: s } => {
                let (up, down) = (log_sigmoid_f64(beta * h), log_sigmoid_f64(-beta * h));
                // d log sigmoid(x) = sigmoid(-x)
                let slope = -(1.0 - s) * beta * down.exp() + s * beta * up.exp();
                (-(1.0 - s) * up - s * down, slope)
            }
            PreferenceKind::Hinge => {
                let gap = 1.0 - beta * h;
                if gap > 0.0 { (gap, -beta) } else { (0.0, 0.0) }
            }
            PreferenceKind::Ipo => {
                let off = h - 0.5 / beta;
                (off * off, 2.0 * off)
            }
        }
    }
}

fn log_sigmoid_f64(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// Settings of a pairwise reward model's loss: `-log sigmoid(chosen - rejected - margin)`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardModelConfig {
    /// How far the chosen reward must be ahead.
    pub margin: f64,
    /// Weight of `(chosen + rejected)^2`, which keeps rewards around 0. TRL: `center_rewards_coefficient`.
    pub centre: f64,
}

impl RewardModelConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), PreferenceError> {
        let fault = |setting, value| Err(PreferenceError::Setting { setting, value });
        if !self.margin.is_finite() {
            return fault("margin", self.margin);
        }
        if self.centre >= 0.0 && self.centre.is_finite() { Ok(()) } else { fault("centre", self.centre) }
    }
}

/// Why a pairwise loss could not be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PreferenceError {
    /// A setting out of range.
    #[error("preference setting {setting} = {value} is out of range")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Its value.
        value: f64,
    },
    /// Lists of different lengths, or none at all.
    #[error("{got} {what} for {needed} pairs; every pair needs one, and there must be a pair")]
    Shape {
        /// Which list.
        what: &'static str,
        /// Its length.
        got: usize,
        /// Number of pairs.
        needed: usize,
    },
    /// NaN or infinity.
    #[error("{what} of pair {pair} is not finite")]
    NotFinite {
        /// Which list.
        what: &'static str,
        /// Which pair.
        pair: usize,
    },
}

/// A mean loss over pairs with its derivatives.
#[derive(Debug, Clone, PartialEq)]
pub struct PairLoss {
    /// The mean.
    pub loss: f64,
    /// By each chosen answer's number.
    pub by_chosen: Vec<f64>,
    /// By each rejected answer's number.
    pub by_rejected: Vec<f64>,
    /// Share of pairs whose chosen answer is ahead.
    pub accuracy: f64,
}

fn check(lists: &[(&'static str, &[f64])]) -> Result<(), PreferenceError> {
    let needed = lists[0].1.len();
    for (what, list) in lists {
        if list.len() != needed || needed == 0 {
            return Err(PreferenceError::Shape { what, got: list.len(), needed });
        }
        if let Some(pair) = list.iter().position(|v| !v.is_finite()) {
            return Err(PreferenceError::NotFinite { what, pair });
        }
    }
    Ok(())
}

/// The preference loss from each answer's log-probability under the policy and, if there is one, the reference
/// (`[pairs]` chosen and rejected). Without a reference it counts as 0.
///
/// # Errors
/// When lists do not fit, a number is not finite or a setting is out of range.
pub fn preference_loss(
    chosen: &[f64],
    rejected: &[f64],
    reference: Option<(&[f64], &[f64])>,
    config: &PreferenceConfig,
) -> Result<PairLoss, PreferenceError> {
    config.validate()?;
    check(&[("chosen log-probabilities", chosen), ("rejected log-probabilities", rejected)])?;
    if let Some((c, r)) = reference {
        let (c, r) = (("chosen reference log-probabilities", c), ("rejected reference log-probabilities", r));
        check(&[("chosen log-probabilities", chosen), c, r])?;
    }
    let offset = |i: usize| reference.map_or(0.0, |(c, r)| c[i] - r[i]);
    Ok(mean_of(chosen.len(), |i| {
        let h = chosen[i] - rejected[i] - offset(i);
        let (loss, slope) = config.of_margin(h);
        (loss, slope, -slope, h > 0.0)
    }))
}

/// The reward model's loss from its scores (`[pairs]` chosen and rejected).
///
/// # Errors
/// When lists do not fit or a number is not finite.
pub fn reward_model_loss(
    chosen: &[f64],
    rejected: &[f64],
    config: &RewardModelConfig,
) -> Result<PairLoss, PreferenceError> {
    check(&[("chosen rewards", chosen), ("rejected rewards", rejected)])?;
    Ok(mean_of(chosen.len(), |i| {
        let (c, r) = (chosen[i], rejected[i]);
        let ahead = c - r - config.margin;
        let slope = -log_sigmoid_f64(-ahead).exp();
        let centre = 2.0 * config.centre * (c + r);
        let loss = -log_sigmoid_f64(ahead) + config.centre * (c + r) * (c + r);
        (loss, slope + centre, -slope + centre, c > r)
    }))
}

fn mean_of(n: usize, pair: impl Fn(usize) -> (f64, f64, f64, bool)) -> PairLoss {
    let share = 1.0 / n as f64;
    let mut out = PairLoss { loss: 0.0, by_chosen: Vec::new(), by_rejected: Vec::new(), accuracy: 0.0 };
    for (loss, by_chosen, by_rejected, ahead) in (0..n).map(pair) {
        out.loss += share * loss;
        out.by_chosen.push(share * by_chosen);
        out.by_rejected.push(share * by_rejected);
        out.accuracy += share * f64::from(u8::from(ahead));
    }
    out
}

/// [`preference_loss`] on tensors `[pairs]`; `offset` is the reference's chosen minus rejected log-probability.
///
/// # Errors
/// When a setting is out of range or the lists do not fit.
pub fn preference_loss_tensor(
    chosen: &Tensor<1>,
    rejected: &Tensor<1>,
    offset: &[f64],
    config: &PreferenceConfig,
) -> Result<Tensor<1>, PreferenceError> {
    config.validate()?;
    let n = chosen.dims()[0];
    if n == 0 || rejected.dims()[0] != n || offset.len() != n {
        let got = rejected.dims()[0].min(offset.len());
        return Err(PreferenceError::Shape { what: "numbers", got, needed: n });
    }
    let offset: Vec<f32> = offset.iter().map(|v| *v as f32).collect();
    let offset = Tensor::<1>::from_data(TensorData::new(offset, [n]), &chosen.device());
    let h = chosen.clone() - rejected.clone() - offset;
    let beta = config.beta;
    let each = match config.kind {
        PreferenceKind::Sigmoid { label_smoothing: s } => {
            let up = log_sigmoid(h.clone() * beta) * (s - 1.0);
            if s > 0.0 { up - log_sigmoid(h * -beta) * s } else { up }
        }
        PreferenceKind::Hinge => (h * -beta + 1.0).clamp_min(0.0),
        PreferenceKind::Ipo => {
            let off = h - 0.5 / beta;
            off.clone() * off
        }
    };
    Ok(each.mean())
}

/// [`reward_model_loss`] on tensors `[pairs]`.
pub fn reward_model_loss_tensor(
    chosen: &Tensor<1>,
    rejected: &Tensor<1>,
    config: &RewardModelConfig,
) -> Tensor<1> {
    let each = log_sigmoid(chosen.clone() - rejected.clone() - config.margin).neg();
    let sum = chosen.clone() + rejected.clone();
    (each + sum.clone() * sum * config.centre).mean()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use proptest::prelude::*;

    use super::*;

    const CHOSEN: [f64; 4] = [-12.5, -3.25, -40.0, -7.0];
    const REJECTED: [f64; 4] = [-14.0, -2.0, -39.0, -30.0];
    const REFERENCE: ([f64; 4], [f64; 4]) = ([-13.0, -3.0, -38.5, -9.0], [-13.5, -2.5, -41.0, -28.0]);

    fn offset() -> Vec<f64> {
        (0..4).map(|i| REFERENCE.0[i] - REFERENCE.1[i]).collect()
    }

    fn configs() -> [PreferenceConfig; 4] {
        let with = |kind| PreferenceConfig { kind, beta: 0.1 };
        let smooth = PreferenceKind::Sigmoid { label_smoothing: 0.1 };
        [PreferenceConfig::dpo(0.1), with(smooth), with(PreferenceKind::Hinge), with(PreferenceKind::Ipo)]
    }

    /// Made by torch 2.15, float64: `logsigmoid`, `relu` and squares of the published formulas, differentiated by
    /// autograd; derivatives by the chosen answers.
    const TORCH: [(f64, [f64; 4]); 4] = [
        (0.6930360522, [-0.0118755203, -0.0129685304, -0.0146654395, -0.0100328085]),
        (0.6949110522, [-0.0093755203, -0.0104685304, -0.0121654395, -0.0075328085]),
        (0.9812500000, [-0.0250000000, -0.0250000000, -0.0250000000, -0.0250000000]),
        (30.5781250000, [-2.0000000000, -2.8750000000, -4.2500000000, -0.5000000000]),
    ];

    #[test]
    fn losses_and_gradients_are_torchs() {
        for (config, (loss, by_chosen)) in configs().iter().zip(TORCH) {
            let reference = Some((&REFERENCE.0[..], &REFERENCE.1[..]));
            let got = preference_loss(&CHOSEN, &REJECTED, reference, config).unwrap();
            assert!((got.loss - loss).abs() < 1e-6 * loss.max(1.0), "{config:?}: {} {loss}", got.loss);
            for (g, w) in got.by_chosen.iter().zip(by_chosen) {
                assert!((g - w).abs() < 1e-6, "{config:?}: {g} {w}");
            }
        }
    }

    #[test]
    fn tensors_agree_with_the_specification() {
        let device = Device::flex().autodiff();
        let leaf = |values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
            let n = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [n]), &device).require_grad()
        };
        let compare = |want: &PairLoss, loss: Tensor<1>, chosen: &Tensor<1>, rejected: &Tensor<1>| {
            let tape = loss.backward();
            let got = loss.into_data().iter::<f64>().next().unwrap();
            assert!((got - want.loss).abs() < 1e-5 * want.loss.abs().max(1.0), "{got} {want:?}");
            for (leaf, want) in [(chosen, &want.by_chosen), (rejected, &want.by_rejected)] {
                for (g, w) in leaf.grad(&tape).unwrap().into_data().iter::<f64>().zip(want) {
                    assert!((g - w).abs() < 1e-5, "{g} {w}");
                }
            }
        };
        for config in configs() {
            let reference = Some((&REFERENCE.0[..], &REFERENCE.1[..]));
            let want = preference_loss(&CHOSEN, &REJECTED, reference, &config).unwrap();
            let (c, r) = (leaf(&CHOSEN), leaf(&REJECTED));
            let loss = preference_loss_tensor(&c, &r, &offset(), &config).unwrap();
            compare(&want, loss, &c, &r);
        }
        let config = RewardModelConfig { margin: 0.5, centre: 0.01 };
        let (scores, others) = ([1.5, -0.25, 0.0, 3.0], [0.5, 0.25, 0.0, -2.0]);
        let want = reward_model_loss(&scores, &others, &config).unwrap();
        assert_eq!(want.accuracy, 0.5);
        let (c, r) = (leaf(&scores), leaf(&others));
        compare(&want, reward_model_loss_tensor(&c, &r, &config), &c, &r);
    }

    #[test]
    fn nonsense_is_named() {
        let far = PreferenceConfig { beta: 0.0, ..PreferenceConfig::dpo(0.1) };
        assert!(preference_loss(&CHOSEN, &REJECTED, None, &far).unwrap_err().to_string().contains("beta"));
        let short = preference_loss(&CHOSEN, &REJECTED[..3], None, &PreferenceConfig::dpo(0.1));
        assert!(matches!(short, Err(PreferenceError::Shape { got: 3, needed: 4, .. })));
        let nan = reward_model_loss(&[f64::NAN], &[0.0], &RewardModelConfig::default());
        assert!(matches!(nan, Err(PreferenceError::NotFinite { pair: 0, .. })));
        assert!(preference_loss(&[], &[], None, &PreferenceConfig::dpo(0.1)).is_err());
    }

    proptest! {
        #[test]
        fn derivatives_are_those_of_finite_differences(
            c in proptest::collection::vec(-20.0..0.0f64, 3), r in proptest::collection::vec(-20.0..0.0f64, 3),
        ) {
            let h = 1e-6;
            for config in configs() {
                let at = |c: &[f64], r: &[f64]| preference_loss(c, r, None, &config).unwrap();
                let here = at(&c, &r);
                for i in 0..3 {
                    let shifted = |by: f64| {
                        let mut moved = c.clone();
                        moved[i] += by;
                        at(&moved, &r).loss
                    };
                    let (up, down) = ((shifted(h) - here.loss) / h, (here.loss - shifted(-h)) / h);
                    let tolerance = 1e-4 + (up - down).abs();
                    prop_assert!((here.by_chosen[i] - up).abs() < tolerance, "{config:?}");
                    prop_assert!((here.by_chosen[i] + here.by_rejected[i]).abs() < 1e-12);
                }
            }
        }
    }
}
