//! Mixtral: Mistral's attention, eight experts with a normalised softmax router.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{
        Activation, Attention, ExpertActivation, Experts, Family, Mlp, ModelConfig, experts::SPARSE_EXPERTS,
        fields::Fields,
    },
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Mixtral,
    name: "mixtral",
    classes: &["MixtralForCausalLM"],
    // llama.cpp stores Mixtral as "llama" with experts: see `config/from_gguf.rs`.
    gguf: None,
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[
        ("ffn_gate_inp", "block_sparse_moe.gate"),
        ("ffn_gate_exps", "block_sparse_moe.experts.w1"),
        ("ffn_up_exps", "block_sparse_moe.experts.w3"),
        ("ffn_down_exps", "block_sparse_moe.experts.w2"),
        ("ffn_gate_up_exps", "block_sparse_moe.experts.gate_up_proj"),
    ],
    gguf_pairs: true,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    f.activation("hidden_act", &["silu", "swish"])?;
    let attention = Attention { window: f.size_if("sliding_window")?, ..standard::attention(f)? };
    let experts = Experts {
        n_experts: f.n_experts()?,
        ffn: f.size("intermediate_size")?,
        router: f.softmax_router("block_sparse_moe.gate", true)?,
        tensors: SPARSE_EXPERTS,
        activation: ExpertActivation::Gated(Activation::Silu),
        shared: None,
        shared_gate: None,
    };
    let layer = standard::layer_of(f, attention, Mlp::Experts(experts))?;
    f.model(Family::Mixtral, vec![layer; f.n_layers()?])
}
