//! Which experts of a mixture-of-experts layer a row goes to, and with which weights.
//!
//! One rule covers the routers of the model families: scores by softmax or sigmoid over all experts, or softmax over the
//! chosen ones; a correction bias that takes part in the choice alone (DeepSeek-V3, arXiv:2412.19437, section 2.1.2);
//! choice limited to the best groups of experts (DeepSeek-V2, arXiv:2405.04434, section 2.2.2). Ties go to the lower
//! index, and a row's experts come out in ascending order, so that what is summed over them has one order.

use crate::error::{KernelError, check_len, rows_of};
use crate::math;
use crate::parallel::for_rows;

/// How the logits of a row become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScore {
    /// Softmax over all experts.
    Softmax,
    /// The logits choose; the weights are the softmax over the chosen ones.
    SoftmaxOfChosen,
    /// Sigmoid of each.
    Sigmoid,
}

/// What a group of experts is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best score.
    Best,
    /// The sum of its two best scores.
    BestTwo,
}

/// Choice limited to some groups of neighbouring experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterGroups {
    /// Groups of equal size.
    pub n_groups: usize,
    /// Groups whose experts can be chosen.
    pub chosen: usize,
    /// What is compared.
    pub score: GroupScore,
}

/// The rule of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterRule<'a> {
    /// Experts per row (k).
    pub top_k: usize,
    /// Scores.
    pub score: RouterScore,
    /// Added to the scores for the choice only. `[E]`
    pub bias: Option<&'a [f32]>,
    /// Limits the choice.
    pub groups: Option<RouterGroups>,
    /// Divides the weights of a row by their sum.
    pub normalize: bool,
    /// Multiplies the weights.
    pub scale: f32,
}

/// An expert and its weight.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Choice {
    /// Index of the expert.
    pub expert: u32,
    /// Factor of its output.
    pub weight: f32,
}

impl RouterRule<'_> {
    fn check(&self, n_experts: usize) -> Result<(), KernelError> {
        let op = "router";
        let bad = |what, got, rule| Err(KernelError::BadDimension { op, what, got, rule });
        if n_experts == 0 || n_experts > u32::MAX as usize {
            return bad("experts", n_experts, "must be positive and fit 32 bits");
        }
        if let Some(bias) = self.bias {
            check_len(op, "bias", n_experts, bias.len())?;
        }
        let mut open = n_experts;
        if let Some(groups) = self.groups {
            if groups.n_groups == 0 || !n_experts.is_multiple_of(groups.n_groups) {
                return bad("groups", groups.n_groups, "must divide the number of experts");
            }
            if groups.chosen == 0 || groups.chosen > groups.n_groups {
                return bad("chosen groups", groups.chosen, "must be positive, at most the number of groups");
            }
            open = n_experts / groups.n_groups * groups.chosen;
        }
        if self.top_k == 0 || self.top_k > open {
            return bad(
                "experts per row",
                self.top_k,
                "must be positive, at most the experts to choose from",
            );
        }
        Ok(())
    }
}

/// The choices of every row, [T, k], ascending by expert, for `logits` [T, E].
///
/// # Errors
/// When the lengths do not fit together, or the rule asks for more experts or groups than there are.
pub fn route(logits: &[f32], n_experts: usize, rule: &RouterRule<'_>) -> Result<Vec<Choice>, KernelError> {
    rule.check(n_experts)?;
    let rows = rows_of("router", "logits", logits.len(), n_experts)?;
    let mut out = vec![Choice::default(); rows * rule.top_k];
    for_rows(&mut out, rule.top_k, n_experts * 32, |rows, out| {
        let mut scratch = Scratch::default();
        let logits = logits[rows.start * n_experts..rows.end * n_experts].chunks_exact(n_experts);
        for (logits, out) in logits.zip(out.chunks_exact_mut(rule.top_k)) {
            scratch.row(logits, rule, out);
        }
    });
    Ok(out)
}

#[derive(Default)]
struct Scratch {
    /// Scores, as they become weights. `[E]`
    scores: Vec<f32>,
    /// What the choice compares. `[E]`
    keys: Vec<f32>,
    /// Indices to be sorted.
    order: Vec<usize>,
}

impl Scratch {
    fn row(&mut self, logits: &[f32], rule: &RouterRule<'_>, out: &mut [Choice]) {
        self.scores.clear();
        match rule.score {
            RouterScore::Softmax => softmax(logits.iter().copied(), &mut self.scores),
            RouterScore::SoftmaxOfChosen => self.scores.extend_from_slice(logits),
            RouterScore::Sigmoid => {
                self.scores.extend(logits.iter().map(|&x| (1.0 / (1.0 + math::exp(-f64::from(x)))) as f32));
            }
        }
        self.keys.clear();
        match rule.bias {
            Some(bias) => self.keys.extend(self.scores.iter().zip(bias).map(|(s, b)| s + b)),
            None => self.keys.extend_from_slice(&self.scores),
        }
        if let Some(groups) = rule.groups {
            self.close_groups(groups);
        }
        best(&self.keys, out.len(), &mut self.order);
        self.order.sort_unstable();
        for (choice, &expert) in out.iter_mut().zip(&self.order) {
            *choice = Choice { expert: expert as u32, weight: self.scores[expert] };
        }
        if rule.score == RouterScore::SoftmaxOfChosen {
            let mut weights = Vec::with_capacity(out.len());
            softmax(out.iter().map(|c| c.weight), &mut weights);
            out.iter_mut().zip(weights).for_each(|(c, w)| c.weight = w);
        }
        let sum: f64 = if rule.normalize { out.iter().map(|c| f64::from(c.weight)).sum() } else { 1.0 };
        for choice in out {
            choice.weight = (f64::from(choice.weight) / sum * f64::from(rule.scale)) as f32;
        }
    }

    /// Takes the experts of all but the best groups out of the choice.
    fn close_groups(&mut self, groups: RouterGroups) {
        let size = self.keys.len() / groups.n_groups;
        let worth: Vec<f32> = self
            .keys
            .chunks_exact(size)
            .map(|group| {
                let n = if groups.score == GroupScore::Best { 1 } else { 2 };
                best(group, n.min(size), &mut self.order);
                self.order.iter().map(|&i| group[i]).sum()
            })
            .collect();
        best(&worth, groups.chosen, &mut self.order);
        for (index, group) in self.keys.chunks_exact_mut(size).enumerate() {
            if !self.order.contains(&index) {
                group.fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Indices of the `n` largest keys, largest first; a NaN counts as larger than every number.
fn best(keys: &[f32], n: usize, order: &mut Vec<usize>) {
    order.clear();
    order.extend(0..keys.len());
    order.sort_unstable_by(|&a, &b| keys[b].total_cmp(&keys[a]).then(a.cmp(&b)));
    order.truncate(n);
}

fn softmax(logits: impl Iterator<Item = f32> + Clone, out: &mut Vec<f32>) {
    let max = logits.clone().map(f64::from).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.clone().map(|x| math::exp(f64::from(x) - max)).sum();
    out.extend(logits.map(|x| (math::exp(f64::from(x) - max) / sum) as f32));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{noise, with_threads};

    const PLAIN: RouterRule<'static> = RouterRule {
        top_k: 2,
        score: RouterScore::Softmax,
        bias: None,
        groups: None,
        normalize: false,
        scale: 1.0,
    };

    fn experts(choices: &[Choice]) -> Vec<u32> {
        choices.iter().map(|c| c.expert).collect()
    }

    fn close(choices: &[Choice], weights: &[f64]) {
        for (c, w) in choices.iter().zip(weights) {
            assert!((f64::from(c.weight) - w).abs() < 1e-6, "{choices:?} against {weights:?}");
        }
    }

    #[test]
    fn softmax_keeps_normalises_or_comes_after_the_choice() {
        let logits = [0.0, 2.0, -1.0, 1.0];
        let e: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
        let all: f64 = e.iter().sum();
        let kept = route(&logits, 4, &PLAIN).unwrap();
        assert_eq!(experts(&kept), [1, 3]);
        close(&kept, &[e[1] / all, e[3] / all]);
        let normal = [e[1] / (e[1] + e[3]), e[3] / (e[1] + e[3])];
        close(&route(&logits, 4, &RouterRule { normalize: true, ..PLAIN }).unwrap(), &normal);
        let after = RouterRule { score: RouterScore::SoftmaxOfChosen, ..PLAIN };
        close(&route(&logits, 4, &after).unwrap(), &normal);
        close(&route(&logits, 4, &RouterRule { scale: 2.5, ..after }).unwrap(), &normal.map(|w| 2.5 * w));
    }

    #[test]
    fn the_bias_chooses_and_does_not_weigh() {
        let bias = [0.0, -9.0, 9.0, 0.0];
        let score = RouterScore::Sigmoid;
        let chosen =
            route(&[0.0, 2.0, -1.0, 1.0], 4, &RouterRule { bias: Some(&bias), score, ..PLAIN }).unwrap();
        assert_eq!(experts(&chosen), [2, 3]);
        close(&chosen, &[1.0 / (1.0 + 1f64.exp()), 1.0 / (1.0 + (-1f64).exp())]);
    }

    #[test]
    fn groups_close_by_their_best_or_their_two_best() {
        // The best expert stands in the second group, the best pair in the first.
        let logits = [2.0, 1.9, 3.0, -3.0, 0.0, 0.0];
        let groups = |score| Some(RouterGroups { n_groups: 3, chosen: 1, score });
        let by = |score| {
            let rule = RouterRule { score: RouterScore::Sigmoid, groups: groups(score), ..PLAIN };
            experts(&route(&logits, 6, &rule).unwrap())
        };
        assert_eq!(by(GroupScore::Best), [2, 3]);
        assert_eq!(by(GroupScore::BestTwo), [0, 1]);
    }

    #[test]
    fn ties_go_to_the_lower_index_and_a_nan_does_not_panic() {
        assert_eq!(experts(&route(&[1.0; 5], 5, &PLAIN).unwrap()), [0, 1]);
        let poisoned = route(&[1.0, f32::NAN, 0.0, 2.0], 4, &PLAIN).unwrap();
        assert!(poisoned.iter().all(|c| c.weight.is_nan()));
    }

    #[test]
    fn a_row_does_not_notice_its_neighbours_or_threads() {
        let (n, rows) = (64, 40);
        let logits: Vec<f32> = noise(n * rows, 5).iter().map(|v| v * 4.0).collect();
        let bias = noise(n, 6);
        let rule = RouterRule {
            top_k: 6,
            score: RouterScore::Sigmoid,
            bias: Some(&bias),
            groups: Some(RouterGroups { n_groups: 8, chosen: 3, score: GroupScore::BestTwo }),
            normalize: true,
            scale: 2.5,
        };
        let whole = with_threads(3, || route(&logits, n, &rule).unwrap());
        let alone: Vec<Choice> =
            logits.chunks_exact(n).flat_map(|row| route(row, n, &rule).unwrap()).collect();
        assert_eq!(whole, alone);
        for row in whole.chunks_exact(6) {
            assert!(row.windows(2).all(|w| w[0].expert < w[1].expert));
            assert!((row.iter().map(|c| c.weight).sum::<f32>() - 2.5).abs() < 1e-5);
        }
    }

    #[test]
    fn impossible_rules_are_refused() {
        assert!(route(&[0.0; 4], 4, &RouterRule { top_k: 5, ..PLAIN }).is_err());
        assert!(route(&[0.0; 5], 4, &PLAIN).is_err());
        let groups = |n_groups, chosen| {
            let groups = Some(RouterGroups { n_groups, chosen, score: GroupScore::Best });
            route(&[0.0; 4], 4, &RouterRule { groups, ..PLAIN })
        };
        assert!(groups(3, 1).is_err() && groups(2, 3).is_err() && groups(4, 1).is_err());
        assert!(groups(2, 1).is_ok());
    }
}
