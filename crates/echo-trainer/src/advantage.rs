//! Group-relative credit: how much better a sample did than the other samples of its own prompt.
//!
//! Two cases surprise. A group whose rewards are all equal teaches nothing and gets exactly zero, not rounding noise
//! divided by epsilon. A group of one has no baseline: by default it gets zero too; [`GroupOfOne::RawReward`] keeps
//! the reward, as some trainers do.

use serde::{Deserialize, Serialize};

/// What the centred reward is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AdvantageScale {
    /// GRPO: the group's sample standard deviation (`n - 1` in the denominator) plus `epsilon`.
    Std {
        /// Keeps the quotient finite; TRL uses 1e-4.
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

/// How advantages are made from the rewards of one group.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdvantageConfig {
    /// Divisor of the centred reward.
    pub scale: AdvantageScale,
    /// The rule for a group of one.
    #[serde(default)]
    pub group_of_one: GroupOfOne,
}

impl AdvantageConfig {
    /// `(r - mean) / (std + 1e-4)`.
    pub fn grpo() -> Self {
        Self { scale: AdvantageScale::Std { epsilon: 1e-4 }, group_of_one: GroupOfOne::Zero }
    }

    /// `r - mean`.
    pub fn dr_grpo() -> Self {
        Self { scale: AdvantageScale::None, group_of_one: GroupOfOne::Zero }
    }
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self::grpo()
    }
}

/// Why a group has no advantages.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AdvantageError {
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

/// One advantage for each reward of a group.
///
/// # Errors
/// When the group is empty or a reward is not finite.
pub fn group_advantages(rewards: &[f64], config: &AdvantageConfig) -> Result<Vec<f64>, AdvantageError> {
    if let Some((index, &reward)) = rewards.iter().enumerate().find(|(_, r)| !r.is_finite()) {
        return Err(AdvantageError::NotFinite { index, reward });
    }
    let Some(&first) = rewards.first() else { return Err(AdvantageError::Empty) };
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
    let divisor = match config.scale {
        AdvantageScale::None => 1.0,
        AdvantageScale::Std { epsilon } => {
            let squares = rewards.iter().map(|r| (r - mean) * (r - mean)).sum::<f64>();
            (squares / (n - 1.0)).sqrt() + epsilon
        }
    };
    Ok(rewards.iter().map(|r| (r - mean) / divisor).collect())
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

    proptest! {
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
