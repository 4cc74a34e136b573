//! A mixture of experts: every row goes through the few experts that its router chooses.
//!
//! Rows are grouped by expert, so that each expert's weights are read once per call. What a row gets does not depend
//! on its group: a linear layer computes a row from that row alone, and a row's experts are added in ascending order.

use parallax_kernels::{
    activation::gated_mul,
    gates::clamped_swiglu,
    pool,
    router::{Choice, RouterGroups, RouterRule, RouterScore, route},
};

use super::{
    BackwardArgs, CpuOp, Output,
    linear::{FrozenLinear, add_bias},
    share,
};
use crate::config::ExpertActivation;

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// Router and experts of one layer.
#[derive(Debug)]
pub(crate) struct ExpertWeights {
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) router: RouterWeights,
    pub(crate) experts: Vec<Expert>,
    pub(crate) activation: ExpertActivation,
}

/// What chooses.
#[derive(Debug)]
pub(crate) struct RouterWeights {
    /// [E, H] in f32: a choice must not hang on a rounding.
    pub(crate) weight: FrozenLinear,
    /// Added to the logits. [E]
    pub(crate) bias: Option<Vec<f32>>,
    /// Added to the scores for the choice. [E]
    pub(crate) correction: Option<Vec<f32>>,
    pub(crate) top_k: usize,
    pub(crate) score: RouterScore,
    pub(crate) groups: Option<RouterGroups>,
    pub(crate) normalize: bool,
    pub(crate) scale: f32,
}

/// One expert.
#[derive(Debug)]
pub(crate) struct Expert {
    /// [2F, H], the gate first.
    pub(crate) gate_up: FrozenLinear,
    /// [2F]
    pub(crate) gate_up_bias: Option<Vec<f32>>,
    /// [H, F]
    pub(crate) down: FrozenLinear,
    /// [H]
    pub(crate) down_bias: Option<Vec<f32>>,
}

impl RouterWeights {
    fn choose(&self, x: &[f32]) -> Vec<Choice> {
        let mut logits = self.weight.apply(x);
        add_bias(&mut logits, self.bias.as_deref());
        let rule = RouterRule {
            top_k: self.top_k,
            score: self.score,
            bias: self.correction.as_deref(),
            groups: self.groups,
            normalize: self.normalize,
            scale: self.scale,
        };
        route(&logits, self.weight.n(), &rule).expect(SHAPES)
    }
}

impl ExpertWeights {
    /// One expert's output [n, H] for the rows `x` [n, H].
    fn expert(&self, expert: usize, x: &[f32]) -> Vec<f32> {
        let Expert { gate_up, gate_up_bias, down, down_bias } = &self.experts[expert];
        let mut inner = gate_up.apply(x);
        add_bias(&mut inner, gate_up_bias.as_deref());
        let mut active = vec![0.0; inner.len() / 2];
        match self.activation {
            ExpertActivation::Gated(activation) => gated_mul(activation, &inner, self.ffn, &mut active),
            ExpertActivation::Clamped { limit } => clamped_swiglu(&inner, self.ffn, limit, &mut active),
        }
        .expect(SHAPES);
        let mut y = down.apply(&active);
        add_bias(&mut y, down_bias.as_deref());
        y
    }

    /// y [T, H] of x [T, H].
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let (hidden, top_k) = (self.hidden, self.router.top_k);
        let choices = self.router.choose(x);
        // Rows of each expert, as (row, weight), ascending.
        let mut groups: Vec<Vec<(usize, f32)>> = vec![Vec::new(); self.experts.len()];
        for (i, choice) in choices.iter().enumerate() {
            groups[choice.expert as usize].push((i / top_k, choice.weight));
        }
        let busy: Vec<usize> = (0..groups.len()).filter(|e| !groups[*e].is_empty()).collect();
        let run = |e: usize| {
            let rows = groups[e].iter().flat_map(|(row, _)| &x[row * hidden..(row + 1) * hidden]);
            self.expert(e, &rows.copied().collect::<Vec<f32>>())
        };
        // Many experts keep all threads busy, one each; few are cut up themselves.
        let outputs: Vec<Vec<f32>> = if busy.len() >= 2 * pool::threads() {
            share::map(busy.len(), |i| run(busy[i]))
        } else {
            busy.iter().map(|e| run(*e)).collect()
        };
        let mut y = vec![0.0; x.len()];
        for (e, output) in busy.iter().zip(&outputs) {
            for ((row, weight), output) in groups[*e].iter().zip(output.chunks_exact(hidden)) {
                for (y, o) in y[row * hidden..(row + 1) * hidden].iter_mut().zip(output) {
                    *y += weight * o;
                }
            }
        }
        y
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.router.weight.bytes()
            + self.experts.iter().map(|e| e.gate_up.bytes() + e.down.bytes()).sum::<usize>()
    }
}

/// Input: x [T, H]; result [T, H].
#[derive(Debug)]
pub(crate) struct MixExperts(pub(crate) std::sync::Arc<ExpertWeights>);

impl CpuOp for MixExperts {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        Output::matrix(self.0.apply(inputs[0]), self.0.hidden)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("models with experts are refused where gradients are asked for")
    }
}

#[cfg(test)]
mod tests {
    use parallax_kernels::{PackedWeight, WeightKind};

    use super::*;
    use crate::config::Activation;
    use parallax_kernels::reference::noise;

    const HIDDEN: usize = 32;
    const FFN: usize = 64;
    const EXPERTS: usize = 6;

    fn frozen(kind: WeightKind, values: &[f32], n: usize, k: usize) -> FrozenLinear {
        FrozenLinear { parts: vec![PackedWeight::pack_f32(kind, values, n, k).unwrap()], transposed: None }
    }

    /// The layer and its dense weights, expert by expert: gate_up and down.
    fn layer(kind: WeightKind, clamped: bool) -> (ExpertWeights, Vec<[Vec<f32>; 2]>) {
        let scaled = |n: usize, seed| noise(n, seed).iter().map(|v| v * 0.3).collect::<Vec<f32>>();
        let dense: Vec<[Vec<f32>; 2]> = (0..EXPERTS as u64)
            .map(|e| [scaled(2 * FFN * HIDDEN, 10 + e), scaled(HIDDEN * FFN, 20 + e)])
            .collect();
        let experts = dense.iter().enumerate().map(|(e, [gate_up, down])| Expert {
            gate_up: frozen(kind, gate_up, 2 * FFN, HIDDEN),
            gate_up_bias: clamped.then(|| noise(2 * FFN, 30 + e as u64)),
            down: frozen(kind, down, HIDDEN, FFN),
            down_bias: clamped.then(|| noise(HIDDEN, 40 + e as u64)),
        });
        let router = RouterWeights {
            weight: frozen(WeightKind::F32, &noise(EXPERTS * HIDDEN, 1), EXPERTS, HIDDEN),
            bias: clamped.then(|| noise(EXPERTS, 2)),
            correction: None,
            top_k: 2,
            score: RouterScore::SoftmaxOfChosen,
            groups: None,
            normalize: false,
            scale: 1.0,
        };
        let activation = if clamped {
            ExpertActivation::Clamped { limit: 7.0 }
        } else {
            ExpertActivation::Gated(Activation::Silu)
        };
        (ExpertWeights { hidden: HIDDEN, ffn: FFN, router, experts: experts.collect(), activation }, dense)
    }

    /// The formula in f64.
    fn reference(w: &ExpertWeights, dense: &[[Vec<f32>; 2]], x: &[f32]) -> Vec<f64> {
        let product = |m: &[f32], x: &[f64], bias: Option<&Vec<f32>>| -> Vec<f64> {
            let rows = m.chunks_exact(x.len()).enumerate();
            rows.map(|(i, row)| {
                let bias = bias.map_or(0.0, |b| f64::from(b[i]));
                bias + row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>()
            })
            .collect()
        };
        let router: Vec<f32> = noise(EXPERTS * HIDDEN, 1);
        let mut out = Vec::new();
        for row in x.chunks_exact(HIDDEN) {
            let row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
            let logits = product(&router, &row, w.router.bias.as_ref());
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            let chosen = &order[..2];
            let total: f64 = chosen.iter().map(|e| logits[*e].exp()).sum();
            let mut sum = vec![0.0; HIDDEN];
            for e in chosen {
                let inner = product(&dense[*e][0], &row, w.experts[*e].gate_up_bias.as_ref());
                let active: Vec<f64> = (0..FFN)
                    .map(|i| match w.activation {
                        ExpertActivation::Clamped { limit } => {
                            let limit = f64::from(limit);
                            let (gate, up) = (inner[i].min(limit), inner[FFN + i].clamp(-limit, limit));
                            (up + 1.0) * gate / (1.0 + (-1.702 * gate).exp())
                        }
                        ExpertActivation::Gated(_) => inner[i] / (1.0 + (-inner[i]).exp()) * inner[FFN + i],
                    })
                    .collect();
                let y = product(&dense[*e][1], &active, w.experts[*e].down_bias.as_ref());
                sum.iter_mut().zip(y).for_each(|(s, y)| *s += logits[*e].exp() / total * y);
            }
            out.extend(sum);
        }
        out
    }

    #[test]
    fn experts_agree_with_the_formula() {
        let x = noise(9 * HIDDEN, 3);
        for clamped in [false, true] {
            let (w, dense) = layer(WeightKind::F32, clamped);
            for (got, expected) in w.apply(&x).iter().zip(reference(&w, &dense, &x)) {
                assert!((f64::from(*got) - expected).abs() < 1e-5 * expected.abs().max(1.0));
            }
        }
    }

    #[test]
    fn a_row_does_not_notice_who_shares_its_experts() {
        let x = noise(40 * HIDDEN, 4);
        for kind in [WeightKind::F32, WeightKind::Bf16, WeightKind::Q8_0, WeightKind::Q4_0] {
            let (w, _) = layer(kind, true);
            let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let alone: Vec<u32> = x.chunks_exact(HIDDEN).flat_map(|row| bits(w.apply(row))).collect();
            assert_eq!(bits(w.apply(&x)), alone, "{kind:?}");
        }
    }
}
