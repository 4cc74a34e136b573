//! Credit: how much better a sample did than the other samples of its own prompt, token by token.
//!
//! An estimator is put together from a baseline, a scale, a discount and a whitening ([`AdvantageConfig`]);
//! [`advantages`] computes a batch's, [`group_advantages`] one group's numbers. Two cases surprise. A group whose rewards
//! are all equal teaches nothing and gets exactly zero, not rounding noise divided by epsilon. A group of one has no
//! baseline: by default it gets zero too; [`GroupOfOne::RawReward`] keeps the reward, as verl does.

mod shaping;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use shaping::{OverlongPenalty, RewardShaping};

/// What is taken off a reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Baseline {
    /// The group's mean (GRPO, arXiv 2402.03300).
    #[default]
    GroupMean,
    /// The mean of the group's other samples (RLOO, arXiv 2402.14740).
    LeaveOneOut,
    /// Nothing; whitening over the batch stands in for it (REINFORCE++, arXiv 2501.03262).
    None,
}

/// What the centred reward is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AdvantageScale {
    /// GRPO: the group's sample standard deviation (`n - 1` in the denominator) plus `epsilon`.
    Std {
        /// Keeps the quotient finite. TRL: 1e-4; verl: 1e-6.
        epsilon: f64,
    },
    /// The sample standard deviation of all rewards of the batch plus `epsilon` (TRL's `scale_rewards = "batch"`).
    BatchStd {
        /// Keeps the quotient finite. TRL: 1e-4.
        epsilon: f64,
    },
    /// Dr. GRPO: nothing, so that easy and hard prompts weigh alike.
    None,
}

/// What a group with a single sample gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum GroupOfOne {
    /// No baseline, no credit.
    #[default]
    Zero,
    /// The reward itself.
    RawReward,
}

/// How advantages are made from rewards.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdvantageConfig {
    /// What is taken off.
    #[serde(default)]
    pub baseline: Baseline,
    /// Divisor of the centred reward; [`AdvantageScale::None`] with [`Baseline::None`], where nothing is centred.
    pub scale: AdvantageScale,
    /// The rule for a group of one.
    #[serde(default)]
    pub group_of_one: GroupOfOne,
    /// How much less a reward counts for each trainable token before it. Anything but 1 needs [`Baseline::None`].
    #[serde(default = "one")]
    pub discount: f64,
    /// Brings all trainable tokens of the batch to mean 0 and variance 1; the number is added to the variance. verl:
    /// 1e-8.
    #[serde(default)]
    pub whiten: Option<f64>,
}

fn one() -> f64 {
    1.0
}

impl AdvantageConfig {
    fn with(baseline: Baseline, scale: AdvantageScale) -> Self {
        Self { baseline, scale, group_of_one: GroupOfOne::Zero, discount: 1.0, whiten: None }
    }

    /// `(r - mean) / (std + 1e-4)`, as TRL.
    pub fn grpo() -> Self {
        Self::with(Baseline::GroupMean, AdvantageScale::Std { epsilon: 1e-4 })
    }

    /// `(r - mean) / (std + 1e-6)`, a group of one keeps its reward, as verl.
    pub fn verl_grpo() -> Self {
        let scale = AdvantageScale::Std { epsilon: 1e-6 };
        Self { group_of_one: GroupOfOne::RawReward, ..Self::with(Baseline::GroupMean, scale) }
    }

    /// `r - mean`.
    pub fn dr_grpo() -> Self {
        Self::with(Baseline::GroupMean, AdvantageScale::None)
    }

    /// `r -` the mean of the others.
    pub fn rloo() -> Self {
        Self::with(Baseline::LeaveOneOut, AdvantageScale::None)
    }

    /// Returns with `discount`, whitened over the batch.
    pub fn reinforce_plus_plus(discount: f64) -> Self {
        Self { discount, whiten: Some(1e-8), ..Self::with(Baseline::None, AdvantageScale::None) }
    }

    /// `r - mean`, whitened over the batch.
    pub fn reinforce_plus_plus_baseline() -> Self {
        Self { whiten: Some(1e-8), ..Self::dr_grpo() }
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<(), AdvantageError> {
        let fault = |setting, value| Err(AdvantageError::Setting { setting, value });
        match self.scale {
            AdvantageScale::Std { epsilon } | AdvantageScale::BatchStd { epsilon }
                if !(epsilon >= 0.0 && epsilon.is_finite()) =>
            {
                fault("epsilon", epsilon)
            }
            _ if !(0.0..=1.0).contains(&self.discount) => fault("discount", self.discount),
            scale if self.baseline == Baseline::None && scale != AdvantageScale::None => {
                Err(AdvantageError::Scale)
            }
            _ if self.baseline != Baseline::None && self.discount != 1.0 => {
                Err(AdvantageError::Discount { discount: self.discount })
            }
            _ => match self.whiten {
                Some(epsilon) if !(epsilon >= 0.0 && epsilon.is_finite()) => fault("whiten", epsilon),
                _ => Ok(()),
            },
        }
    }
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self::grpo()
    }
}

/// One sample of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Episode<'a> {
    /// Its group.
    pub group: u64,
    /// What the environment gave, counted at the last trainable token.
    pub reward: f64,
    /// Which tokens of the completion are trained on.
    pub trainable: &'a [bool],
    /// What each token costs, for a divergence in the reward; empty for nothing.
    pub costs: &'a [f64],
}

/// Why a group has no advantages.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AdvantageError {
    /// A scale for rewards that are not centred.
    #[error(
        "without a baseline nothing is centred that could be scaled: set scale to none, or choose a baseline"
    )]
    Scale,
    /// A discount with a baseline, which is one number for the whole answer.
    #[error("discount {discount} needs baseline = \"none\"; with a baseline it must be 1")]
    Discount {
        /// The discount.
        discount: f64,
    },
    /// A setting out of range.
    #[error("advantage setting {setting} = {value} is out of range")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// Its value.
        value: f64,
    },
    /// Costs that do not fit the completion.
    #[error("episode {index} has {got} token costs for {needed} tokens")]
    Costs {
        /// Which sample.
        index: usize,
        /// How many came.
        got: usize,
        /// How many fit.
        needed: usize,
    },
    /// A group without samples.
    #[error("a group needs at least one reward")]
    Empty,
    /// NaN or infinity: the environment's verifier is broken, and zero would hide that.
    #[error(
        "reward {index} of the group is {reward}; rewards must be finite, check the environment's verifier"
    )]
    NotFinite {
        /// Which sample.
        index: usize,
        /// Its reward.
        reward: f64,
    },
}

/// One number for each reward of a group; [`AdvantageScale::BatchStd`] takes the group for the batch.
///
/// # Errors
/// When a setting is out of range, the group is empty or a reward is not finite.
pub fn group_advantages(rewards: &[f64], config: &AdvantageConfig) -> Result<Vec<f64>, AdvantageError> {
    config.validate()?;
    let batch = match config.scale {
        AdvantageScale::BatchStd { .. } => deviation(rewards),
        _ => 0.0,
    };
    centred(rewards, batch, config)
}

fn centred(rewards: &[f64], batch_std: f64, config: &AdvantageConfig) -> Result<Vec<f64>, AdvantageError> {
    if let Some((index, &reward)) = rewards.iter().enumerate().find(|(_, r)| !r.is_finite()) {
        return Err(AdvantageError::NotFinite { index, reward });
    }
    let Some(&first) = rewards.first() else { return Err(AdvantageError::Empty) };
    if config.baseline == Baseline::None {
        return Ok(rewards.to_vec());
    }
    let scale = match config.scale {
        AdvantageScale::None => 1.0,
        AdvantageScale::Std { epsilon } => deviation(rewards) + epsilon,
        AdvantageScale::BatchStd { epsilon } => batch_std + epsilon,
    };
    if rewards.len() == 1 {
        return Ok(vec![match config.group_of_one {
            GroupOfOne::Zero => 0.0,
            GroupOfOne::RawReward => first,
        }]);
    }
    if is_degenerate(rewards) {
        return Ok(vec![0.0; rewards.len()]);
    }
    let n = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    // Leaving oneself out of the mean stretches the distance to it by n / (n - 1).
    let stretch = if config.baseline == Baseline::LeaveOneOut { n / (n - 1.0) } else { 1.0 };
    Ok(rewards.iter().map(|r| (r - mean) * stretch / scale).collect())
}

/// Sample standard deviation; 0 for fewer than two.
fn deviation(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if n < 2.0 {
        return 0.0;
    }
    let mean = values.iter().sum::<f64>() / n;
    (values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / (n - 1.0)).sqrt()
}

/// One advantage for each completion token of each episode; 0 where it is not trainable.
///
/// # Errors
/// When a setting is out of range, a reward is not finite, or costs do not fit.
pub fn advantages(
    episodes: &[Episode<'_>],
    config: &AdvantageConfig,
) -> Result<Vec<Vec<f64>>, AdvantageError> {
    config.validate()?;
    let mut scores = Vec::with_capacity(episodes.len());
    for (index, e) in episodes.iter().enumerate() {
        let (got, needed) = (e.costs.len(), e.trainable.len());
        if got != 0 && got != needed {
            return Err(AdvantageError::Costs { index, got, needed });
        }
        let cost: f64 = e.costs.iter().zip(e.trainable).filter(|(_, t)| **t).map(|(c, _)| c).sum();
        scores.push(e.reward - cost);
    }
    if let Some((index, &reward)) = scores.iter().enumerate().find(|(_, r)| !r.is_finite()) {
        return Err(AdvantageError::NotFinite { index, reward });
    }
    let mut out: Vec<Vec<f64>> = if config.baseline == Baseline::None {
        episodes.iter().map(|e| discounted(e, config.discount)).collect()
    } else {
        let by_sample = by_group(episodes, &scores, config)?;
        let spread = |(e, a): (&Episode<'_>, f64)| {
            e.trainable.iter().map(|t| if *t { a } else { 0.0 }).collect::<Vec<f64>>()
        };
        episodes.iter().zip(by_sample).map(spread).collect()
    };
    if let Some(epsilon) = config.whiten {
        whiten(&mut out, episodes, epsilon);
    }
    Ok(out)
}

fn by_group(
    episodes: &[Episode<'_>],
    scores: &[f64],
    config: &AdvantageConfig,
) -> Result<Vec<f64>, AdvantageError> {
    let mut groups: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (i, e) in episodes.iter().enumerate() {
        groups.entry(e.group).or_default().push(i);
    }
    let batch_std = deviation(scores);
    let mut out = vec![0.0; scores.len()];
    for members in groups.values() {
        let rewards: Vec<f64> = members.iter().map(|i| scores[*i]).collect();
        for (i, advantage) in members.iter().zip(centred(&rewards, batch_std, config)?) {
            out[*i] = advantage;
        }
    }
    Ok(out)
}

/// What is still to come from each trainable token on.
fn discounted(e: &Episode<'_>, discount: f64) -> Vec<f64> {
    let mut out = vec![0.0; e.trainable.len()];
    let (mut to_come, mut reward) = (0.0, e.reward);
    for t in (0..out.len()).rev().filter(|t| e.trainable[*t]) {
        let cost = e.costs.get(t).copied().unwrap_or(0.0);
        to_come = reward - cost + discount * to_come;
        reward = 0.0;
        out[t] = to_come;
    }
    out
}

fn whiten(out: &mut [Vec<f64>], episodes: &[Episode<'_>], epsilon: f64) {
    let marked = |out: &[Vec<f64>]| -> Vec<f64> {
        let pairs = out.iter().zip(episodes).flat_map(|(row, e)| row.iter().zip(e.trainable));
        pairs.filter(|(_, t)| **t).map(|(v, _)| *v).collect()
    };
    let values = marked(out);
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let std = deviation(&values);
    let scale = if is_degenerate(&values) { 0.0 } else { (std * std + epsilon).sqrt().recip() };
    for (row, e) in out.iter_mut().zip(episodes) {
        for (value, _) in row.iter_mut().zip(e.trainable).filter(|(_, t)| **t) {
            *value = (*value - mean) * scale;
        }
    }
}

/// Whether all rewards of the group are equal, so that it carries no gradient.
pub fn is_degenerate(rewards: &[f64]) -> bool {
    rewards.windows(2).all(|pair| pair[0].to_bits() == pair[1].to_bits())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn grpo_divides_by_the_sample_deviation() {
        let a = group_advantages(&[1.0, 0.0, 0.5, 0.25], &AdvantageConfig::grpo()).unwrap();
        // TRL's figures for the same group, rounded to five decimals.
        for (got, want) in a.iter().zip([1.31716, -1.02446, 0.14635, -0.43905]) {
            assert!((got - want).abs() < 5e-6, "{got} {want}");
        }
        let a = group_advantages(&[1.0, 0.0, 0.5, 0.25], &AdvantageConfig::dr_grpo()).unwrap();
        assert_eq!(a, [0.5625, -0.4375, 0.0625, -0.1875]);
    }

    #[test]
    fn equal_rewards_and_single_samples_follow_their_rules() {
        let c = AdvantageConfig::grpo();
        assert_eq!(group_advantages(&[0.1; 7], &c).unwrap(), [0.0; 7]);
        assert_eq!(group_advantages(&[0.7], &c).unwrap(), [0.0]);
        let raw = AdvantageConfig { group_of_one: GroupOfOne::RawReward, ..c };
        assert_eq!(group_advantages(&[0.7], &raw).unwrap(), [0.7]);
        assert_eq!(group_advantages(&[], &c), Err(AdvantageError::Empty));
        assert!(matches!(
            group_advantages(&[0.0, f64::NAN], &c),
            Err(AdvantageError::NotFinite { index: 1, .. })
        ));
    }

    #[test]
    fn every_estimator_of_verl_is_reproduced() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/golden/golden-rl-verl.json")).unwrap();
        let list = |v: &serde_json::Value| -> Vec<f64> {
            v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        let rows = |v: &serde_json::Value| v.as_array().unwrap().iter().map(list).collect::<Vec<_>>();
        let rewards = list(&golden["rewards"]);
        let (old, reference) = (rows(&golden["old_logprobs"]), rows(&golden["ref_logprobs"]));
        let mask: Vec<Vec<bool>> =
            rows(&golden["mask"]).iter().map(|r| r.iter().map(|m| *m > 0.5).collect()).collect();
        let costs: Vec<Vec<f64>> = old
            .iter()
            .zip(&reference)
            .map(|(o, p)| o.iter().zip(p).map(|(o, p)| 0.05 * (o - p)).collect())
            .collect();
        let close = |got: f64, want: f64, name: &str| {
            assert!((got - want).abs() < 1e-5, "{name}: {got} {want}");
        };
        for (name, config) in [
            ("grpo", AdvantageConfig::verl_grpo()),
            ("dr_grpo", AdvantageConfig::dr_grpo()),
            ("rloo", AdvantageConfig::rloo()),
        ] {
            for (group, want) in rewards.chunks(4).zip(list(&golden["advantages"][name]).chunks(4)) {
                let got = group_advantages(group, &config).unwrap();
                got.iter().zip(want).for_each(|(g, w)| close(*g, *w, name));
            }
        }
        for (name, config, with_costs) in [
            ("reinforce_plus_plus_1.0", AdvantageConfig::reinforce_plus_plus(1.0), false),
            ("reinforce_plus_plus_0.9", AdvantageConfig::reinforce_plus_plus(0.9), false),
            ("reinforce_plus_plus_kl", AdvantageConfig::reinforce_plus_plus(1.0), true),
            ("reinforce_plus_plus_baseline", AdvantageConfig::reinforce_plus_plus_baseline(), false),
        ] {
            let episode = |i: usize| Episode {
                group: i as u64 / 4,
                reward: rewards[i],
                trainable: &mask[i],
                costs: if with_costs { &costs[i] } else { &[] },
            };
            let episodes: Vec<Episode<'_>> = (0..8).map(episode).collect();
            let got = advantages(&episodes, &config).unwrap();
            for (g, w) in got.iter().flatten().zip(rows(&golden["token_estimators"][name]).concat()) {
                close(*g, w, name);
            }
        }
    }

    #[test]
    fn the_batch_deviation_spans_groups_and_settings_are_checked() {
        let scale = AdvantageScale::BatchStd { epsilon: 0.0 };
        let config = AdvantageConfig { scale, ..AdvantageConfig::grpo() };
        let episode = |group, reward| Episode { group, reward, trainable: &[true, false], costs: &[] };
        let batch = [episode(0, 1.0), episode(0, 0.0), episode(1, 3.0), episode(1, 0.0)];
        let got = advantages(&batch, &config).unwrap();
        let std = deviation(&[1.0, 0.0, 3.0, 0.0]);
        assert_eq!(got[0], [0.5 / std, 0.0]);
        assert_eq!(got[2], [1.5 / std, 0.0]);
        let wrong = AdvantageConfig { discount: 1.5, ..config };
        assert!(advantages(&batch, &wrong).unwrap_err().to_string().contains("discount"));
        let short = Episode { costs: &[0.1], ..batch[0] };
        assert_eq!(advantages(&[short], &config), Err(AdvantageError::Costs { index: 0, got: 1, needed: 2 }));
    }

    #[test]
    fn settings_without_an_effect_are_refused() {
        let scaled = AdvantageConfig {
            scale: AdvantageConfig::grpo().scale,
            ..AdvantageConfig::reinforce_plus_plus(1.0)
        };
        assert_eq!(scaled.validate(), Err(AdvantageError::Scale));
        assert_eq!(group_advantages(&[1.0, 0.0], &scaled), Err(AdvantageError::Scale));
        let discounted = AdvantageConfig { discount: 0.9, ..AdvantageConfig::grpo() };
        assert_eq!(discounted.validate(), Err(AdvantageError::Discount { discount: 0.9 }));
        let plain = AdvantageConfig::reinforce_plus_plus(0.9);
        assert_eq!(group_advantages(&[1.0, 0.0], &plain).unwrap(), [1.0, 0.0]);
    }

    proptest! {
        #[test]
        fn leaving_oneself_out_is_what_it_says(rewards in proptest::collection::vec(-1.0..1.0f64, 2..20)) {
            let a = group_advantages(&rewards, &AdvantageConfig::rloo()).unwrap();
            for (i, got) in a.iter().enumerate() {
                let others = rewards.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, r)| r);
                let want = rewards[i] - others.sum::<f64>() / (rewards.len() - 1) as f64;
                prop_assert!((got - want).abs() < 1e-9);
            }
        }

        #[test]
        fn advantages_sum_to_zero_and_keep_the_order(rewards in proptest::collection::vec(-1.0..1.0f64, 2..20)) {
            let a = group_advantages(&rewards, &AdvantageConfig::grpo()).unwrap();
            prop_assert!(a.iter().sum::<f64>().abs() < 1e-9);
            for i in 0..a.len() {
                for j in 0..a.len() {
                    prop_assert!(rewards[i] >= rewards[j] || a[i] <= a[j]);
                }
            }
        }
    }
}
