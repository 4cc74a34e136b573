//! What each row weighs: normaliser, importance weight and filters in one number, without gradient.
//!
//! A plan is made once for a whole batch, so that micro-batches of it add up to exactly the whole batch's loss whatever
//! the normaliser counts.

use std::ops::Range;

use super::config::{Anchor, Bounds, Filters, LossConfig, Normaliser, Outside, WeightLevel};
use super::{LossError, PolicyTargets};

/// Each row's weight in the loss; 0 outside of the mask.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowPlan {
    /// On the token loss.
    pub policy: Vec<f64>,
    /// On the divergence term.
    pub divergence: Vec<f64>,
    /// What corrections did.
    pub figures: CorrectionFigures,
}

/// What importance weights and filters did to a batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct CorrectionFigures {
    /// Share of trainable tokens that filters left out.
    pub filtered_fraction: f64,
    /// Mean importance weight over the trainable tokens, after its bounds.
    pub weight_mean: f64,
    /// Largest importance weight, after its bounds.
    pub weight_max: f64,
    /// Effective sample size over trainable tokens: `(sum w)^2 / (n sum w^2)`; 1 when all weights are equal.
    pub effective_sample_share: f64,
}

/// Whether a plan for `targets` depends on the current log-probabilities.
pub fn needs_current(targets: &PolicyTargets, config: &LossConfig) -> bool {
    if config.correction.is_none() {
        return false;
    }
    match config.anchor {
        Anchor::Sampled => true,
        Anchor::Proximal => targets.proximal.is_none(),
    }
}

impl RowPlan {
    /// The plan of a batch; `current` are the current log-probabilities, read only when [`needs_current`] says so.
    ///
    /// # Errors
    /// When lists do not fit each other, a setting is out of range, or a needed log-probability is not finite.
    pub fn new(current: &[f64], targets: &PolicyTargets, config: &LossConfig) -> Result<Self, LossError> {
        targets.validate(targets.rows(), config)?;
        let rows = targets.rows();
        let mut weights = vec![1.0; rows];
        let mut kept = targets.mask.clone();
        if !config.correction.is_none() {
            let log_ratios = anchor_log_ratios(current, targets, config)?;
            importance_weights(&mut weights, &log_ratios, targets, config);
            apply_filters(&mut kept, &log_ratios, targets, &config.correction.filters);
        }
        let figures = figures(&weights, &kept, targets);
        let counted = if config.correction.count_filtered { &targets.mask } else { &kept };
        let share = shares(counted, targets, config);
        let row = |r: usize, alive: bool, weight: f64| if alive { share[r] * weight } else { 0.0 };
        let in_divergence = if config.correction.filter_kl { &kept } else { &targets.mask };
        Ok(Self {
            policy: (0..rows).map(|r| row(r, kept[r], weights[r])).collect(),
            divergence: (0..rows).map(|r| row(r, in_divergence[r], 1.0)).collect(),
            figures,
        })
    }

    /// The part of the plan over `rows`.
    #[must_use]
    pub fn slice(&self, rows: Range<usize>) -> Self {
        Self {
            policy: self.policy[rows.clone()].to_vec(),
            divergence: self.divergence[rows].to_vec(),
            figures: self.figures,
        }
    }
}

/// `clamp(o - q)` for trainable rows, 0 elsewhere.
fn anchor_log_ratios(
    current: &[f64],
    targets: &PolicyTargets,
    config: &LossConfig,
) -> Result<Vec<f64>, LossError> {
    let rows = targets.rows();
    let anchor = match (&targets.proximal, config.anchor) {
        (Some(proximal), Anchor::Proximal) => proximal,
        _ if current.len() == rows => current,
        _ => {
            let (what, got) = ("current log-probabilities", current.len());
            return Err(LossError::Shape { what, got, needed: rows });
        }
    };
    let sampled = targets.sampled.as_deref().unwrap_or(current);
    let limit = config.correction.log_limit;
    let mut out = vec![0.0; rows];
    for row in (0..rows).filter(|r| targets.mask[*r]) {
        let x = anchor[row] - sampled[row];
        if x.is_nan() {
            return Err(LossError::NotFinite { row, value: anchor[row] });
        }
        // Sums over a sequence are clamped after summing.
        out[row] = match config.correction.weight.map(|w| w.level) {
            Some(WeightLevel::Sequence) => x,
            _ => x.clamp(-limit, limit),
        };
    }
    Ok(out)
}

fn importance_weights(weights: &mut [f64], log_ratios: &[f64], targets: &PolicyTargets, config: &LossConfig) {
    let Some(rule) = config.correction.weight else { return };
    let limit = config.correction.log_limit;
    let bounded = |log_ratio: f64| {
        let weight = log_ratio.clamp(-limit, limit).exp();
        let lower = rule.lower.unwrap_or(0.0);
        match rule.outside {
            Outside::Truncate => weight.clamp(lower, rule.upper),
            Outside::Zero if (lower..=rule.upper).contains(&weight) => weight,
            Outside::Zero => 0.0,
        }
    };
    let (mut sum, mut n) = (0.0, 0.0);
    for i in 0..targets.sequences() {
        let rows: Vec<usize> = targets.range(i).filter(|r| targets.mask[*r]).collect();
        let total = rows.iter().map(|r| log_ratios[*r]).sum::<f64>();
        for &r in &rows {
            weights[r] = match rule.level {
                WeightLevel::Token => bounded(log_ratios[r]),
                WeightLevel::Sequence => bounded(total),
            };
        }
        match (rule.level, rows.first()) {
            (WeightLevel::Token, _) => {
                sum += rows.iter().map(|r| weights[*r]).sum::<f64>();
                n += rows.len() as f64;
            }
            (WeightLevel::Sequence, Some(first)) => {
                sum += weights[*first];
                n += 1.0;
            }
            (WeightLevel::Sequence, None) => {}
        }
    }
    if rule.batch_normalise && n > 0.0 && sum / n > 1e-8 {
        weights.iter_mut().for_each(|w| *w *= n / sum);
    }
}

fn apply_filters(kept: &mut [bool], log_ratios: &[f64], targets: &PolicyTargets, filters: &Filters) {
    let k2 = |x: f64| 0.5 * x * x;
    let k3 = |x: f64| x.exp() - 1.0 - x;
    let inside = |bounds: &Bounds, x: f64, k2: f64, k3: f64| {
        let ratio = bounds.ratio.is_none_or(|band| x >= band.low.ln() && x <= band.high.ln());
        ratio && bounds.k2.is_none_or(|b| k2 <= b) && bounds.k3.is_none_or(|b| k3 <= b)
    };
    for i in 0..targets.sequences() {
        let rows: Vec<usize> = targets.range(i).filter(|r| targets.mask[*r]).collect();
        let n = rows.len().max(1) as f64;
        let sum = |f: &dyn Fn(f64) -> f64| rows.iter().map(|r| f(log_ratios[*r])).sum::<f64>();
        let (x, a, b) = (sum(&|x| x), sum(&k2), sum(&k3));
        let each = |bounds: &Bounds, r: usize| {
            let x = log_ratios[r];
            inside(bounds, x, k2(x), k3(x))
        };
        let whole = inside(&filters.sequence_sum, x, a, b)
            && inside(&filters.sequence_mean, x / n, a / n, b / n)
            && rows.iter().all(|r| each(&filters.sequence_worst, *r));
        for &r in &rows {
            kept[r] = whole && each(&filters.token, r);
        }
    }
}

/// One over the normaliser for every row of `counted`'s sequences.
fn shares(counted: &[bool], targets: &PolicyTargets, config: &LossConfig) -> Vec<f64> {
    let tokens = |i: usize| counted[targets.range(i)].iter().filter(|m| **m).count();
    let all: Vec<usize> = (0..targets.sequences()).map(tokens).collect();
    let total = all.iter().sum::<usize>().max(1) as f64;
    let sequences =
        if config.count_empty { all.len() } else { all.iter().filter(|n| **n > 0).count() }.max(1) as f64;
    let mut out = vec![0.0; targets.rows()];
    for (i, &n) in all.iter().enumerate() {
        out[targets.range(i)].fill(match config.normaliser {
            Normaliser::SequenceMeanTokenMean { epsilon } => 1.0 / (sequences * (n.max(1) as f64 + epsilon)),
            Normaliser::TokenMean => 1.0 / total,
            Normaliser::TokenSum => 1.0,
            Normaliser::SequenceMeanTokenSum => 1.0 / sequences,
            Normaliser::SequenceMeanTokenSumNorm { length } => 1.0 / (sequences * f64::from(length)),
        });
    }
    out
}

fn figures(weights: &[f64], kept: &[bool], targets: &PolicyTargets) -> CorrectionFigures {
    let trainable = targets.mask.iter().filter(|m| **m).count().max(1) as f64;
    let rows = || (0..weights.len()).filter(|r| targets.mask[*r]);
    let (mut sum, mut squares, mut most, mut lost) = (0.0, 0.0, 0.0_f64, 0_usize);
    for r in rows() {
        let w = weights[r];
        (sum, squares, most) = (sum + w, squares + w * w, most.max(w));
        lost += usize::from(!kept[r]);
    }
    CorrectionFigures {
        filtered_fraction: lost as f64 / trainable,
        weight_mean: sum / trainable,
        weight_max: most,
        effective_sample_share: if squares > 0.0 { sum * sum / (trainable * squares) } else { 0.0 },
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{Band, Correction};
    use super::*;

    fn targets(log_ratios: &[&[f64]]) -> PolicyTargets {
        let mut offsets = vec![0];
        log_ratios.iter().for_each(|s| offsets.push(offsets[offsets.len() - 1] + s.len()));
        let rows = offsets[offsets.len() - 1];
        PolicyTargets {
            offsets,
            mask: vec![true; rows],
            sampled: Some(vec![-1.0; rows]),
            proximal: Some(log_ratios.concat().iter().map(|x| x - 1.0).collect()),
            reference: None,
            advantages: vec![1.0; rows],
        }
    }

    #[test]
    fn truncated_and_masked_weights_differ_outside_the_bounds_only() {
        let t = targets(&[&[0.0, 2.0_f64.ln(), 4.0_f64.ln(), 0.1_f64.ln()]]);
        let base = LossConfig { normaliser: Normaliser::TokenSum, ..LossConfig::ppo() };
        let of = |c: Correction| RowPlan::new(&[], &t, &base.decoupled(c)).unwrap().policy;
        let near = |got: Vec<f64>, want: [f64; 4]| {
            got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-12, "{got:?}"));
        };
        near(of(Correction::tis(3.0)), [1.0, 2.0, 3.0, 0.1]);
        near(of(Correction::mis(0.5, 3.0)), [1.0, 2.0, 0.0, 0.0]);
    }

    #[test]
    fn sequence_filters_take_the_whole_sequence_and_the_denominator_is_a_choice() {
        let t = targets(&[&[0.0, 0.0], &[1.0, 1.0]]);
        let mut correction = Correction::default();
        correction.filters.sequence_mean.ratio = Some(Band { low: 0.5, high: 2.0 });
        let plan = |count_filtered| {
            let config = LossConfig { normaliser: Normaliser::TokenMean, ..LossConfig::ppo() };
            let correction = Correction { count_filtered, ..correction };
            RowPlan::new(&[], &t, &config.decoupled(correction)).unwrap()
        };
        assert_eq!(plan(true).policy, [0.25, 0.25, 0.0, 0.0]);
        assert_eq!(plan(false).policy, [0.5, 0.5, 0.0, 0.0]);
        assert_eq!(plan(true).figures.filtered_fraction, 0.5);
    }

    #[test]
    fn the_current_values_are_asked_for_when_they_are_the_anchor() {
        let t = PolicyTargets { proximal: None, ..targets(&[&[0.0]]) };
        let config = LossConfig::decoupled_ppo();
        assert!(needs_current(&t, &config) && !needs_current(&t, &LossConfig::ppo()));
        assert!(matches!(RowPlan::new(&[], &t, &config), Err(LossError::Shape { got: 0, needed: 1, .. })));
    }
}
