//! A mixture of experts as data.

pub use parallax_kernels::router::{GroupScore, RouterGroups, RouterScore};

use super::{
    Activation, DenseMlp, MAX_DIM,
    fields::{Fields, invalid},
};
use crate::error::ConfigError;

/// Experts of which each row goes through a few, and at most one dense part that all rows go through.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// E.
    pub n_experts: usize,
    /// F of one expert.
    pub ffn: usize,
    /// What chooses.
    pub router: Router,
    /// Where the weights are.
    pub tensors: ExpertTensors,
    /// What is done between the two linear layers of an expert.
    pub activation: ExpertActivation,
    /// For all rows.
    pub shared: Option<DenseMlp>,
    /// Tensor [1, H] whose product, through a sigmoid, multiplies the shared part.
    pub shared_gate: Option<&'static str>,
}

/// What chooses experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// Tensor [E, H], without `.weight`.
    pub name: &'static str,
    /// Whether it has a `.bias`, which is part of the logits.
    pub bias: bool,
    /// Whole name of a tensor `[E]` that is added to the scores for the choice only.
    pub correction: Option<&'static str>,
    /// Experts per row.
    pub top_k: usize,
    /// From logits to scores.
    pub score: RouterScore,
    /// Limits the choice.
    pub groups: Option<RouterGroups>,
    /// Whether the weights of a row are divided by their sum.
    pub normalize: bool,
    /// Factor of the weights.
    pub scale: f32,
}

/// Names of the experts' tensors within the layer. Three layouts are read, whichever the checkpoint has: one tensor per
/// expert (`PREFIX.3.GATE.weight`), all experts stacked (`PREFIX.GATE.weight`, [E, F, H]; GGUF), and gate and up
/// stacked too (`PREFIX.gate_up_proj`; GGUF with `.weight`, the gate's rows first).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertTensors {
    /// What stands before the expert's number.
    pub prefix: &'static str,
    /// [F, H]
    pub gate: &'static str,
    /// [F, H]
    pub up: &'static str,
    /// [H, F]
    pub down: &'static str,
    /// Whether each linear layer has a bias.
    pub bias: bool,
    /// In `gate_up_proj`: rows of gate and up alternate, and where they are not quantised each expert's matrix is
    /// transposed (GPT-OSS). Otherwise the gate's rows come first.
    pub alternating: bool,
}

/// Between the two linear layers of an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExpertActivation {
    /// activation(gate) · up.
    Gated(Activation),
    /// (up + 1) · gate · sigmoid(1.702 gate), gate at most and up within the limit (GPT-OSS).
    Clamped {
        /// The limit.
        limit: f32,
    },
}

impl Experts {
    /// Weights of the linear layers, given H.
    pub(crate) fn matrix_parameters(&self, hidden: usize) -> u64 {
        let (h, e) = (hidden as u64, self.n_experts as u64);
        let shared = self.shared.as_ref().map_or(0, |m| 3 * h * m.ffn as u64);
        e * 3 * h * self.ffn as u64 + e * h + shared + if self.shared_gate.is_some() { h } else { 0 }
    }

    /// Biases and corrections, given H.
    pub(crate) fn vector_parameters(&self, hidden: usize) -> u64 {
        let rows = usize::from(self.router.bias) + usize::from(self.router.correction.is_some());
        let biases = if self.tensors.bias { 2 * self.ffn + hidden } else { 0 };
        (self.n_experts * (rows + biases)) as u64
    }

    /// The first number that cannot be right.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let within = |name: &str, value: usize, max: usize| {
            if value == 0 || value > max {
                return Err(invalid(name, value, &format!("it must be within 1..={max}")));
            }
            Ok(())
        };
        within("num_experts", self.n_experts, 1 << 14)?;
        within("moe_intermediate_size", self.ffn, MAX_DIM)?;
        let mut open = self.n_experts;
        if let Some(groups) = &self.router.groups {
            within("n_group", groups.n_groups, self.n_experts)?;
            within("topk_group", groups.chosen, groups.n_groups)?;
            if !self.n_experts.is_multiple_of(groups.n_groups) {
                return Err(invalid("n_group", groups.n_groups, "it must divide the number of experts"));
            }
            open = self.n_experts / groups.n_groups * groups.chosen;
        }
        within("num_experts_per_tok", self.router.top_k, open)?;
        if let Some(shared) = &self.shared {
            within("shared expert width", shared.ffn, MAX_DIM)?;
        }
        if !(self.router.scale.is_finite() && self.router.scale > 0.0) {
            return Err(invalid("routed_scaling_factor", self.router.scale, "it must be positive"));
        }
        Ok(())
    }
}

/// `mlp.experts.N.{gate,up,down}_proj`: what most families call them.
pub(crate) const MLP_EXPERTS: ExpertTensors = ExpertTensors {
    prefix: "mlp.experts",
    gate: "gate_proj",
    up: "up_proj",
    down: "down_proj",
    bias: false,
    alternating: false,
};

/// `block_sparse_moe.experts.N.w{1,3,2}`: Mixtral's names.
pub(crate) const SPARSE_EXPERTS: ExpertTensors =
    ExpertTensors { prefix: "block_sparse_moe.experts", gate: "w1", up: "w3", down: "w2", ..MLP_EXPERTS };

impl Fields<'_> {
    /// E, under any of its three names.
    pub(crate) fn n_experts(&self) -> Result<usize, ConfigError> {
        for name in ["num_experts", "n_routed_experts"] {
            if let Some(n) = self.size_if(name)? {
                return Ok(n);
            }
        }
        self.size("num_local_experts")
    }

    /// A softmax router.
    pub(crate) fn softmax_router(&self, name: &'static str, normalize: bool) -> Result<Router, ConfigError> {
        Ok(Router {
            name,
            bias: false,
            correction: None,
            top_k: self.size("num_experts_per_tok")?,
            score: RouterScore::Softmax,
            groups: None,
            normalize,
            scale: 1.0,
        })
    }

    /// `n_group` and `topk_group`, if they limit anything.
    pub(crate) fn router_groups(&self, score: GroupScore) -> Result<Option<RouterGroups>, ConfigError> {
        let (n_groups, chosen) = (self.size_or("n_group", 1)?, self.size_or("topk_group", 1)?);
        Ok((n_groups > 1 && chosen != n_groups).then_some(RouterGroups { n_groups, chosen, score }))
    }
}
