//! MiniMax-M2: one norm over all query heads and one over all key heads, part of each head rotated, sigmoid router.

use super::{Architecture, no_more_fields, standard};
use crate::{
    config::{
        Activation, Attention, ExpertActivation, Experts, Family, HeadNorms, HeadSpan, Mlp, ModelConfig,
        Rope, Router, RouterScore, experts::SPARSE_EXPERTS, fields::Fields,
    },
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::MiniMaxM2,
    name: "minimax_m2",
    classes: &["MiniMaxM2ForCausalLM"],
    // llama.cpp's "minimax-m2" is not read yet.
    gguf: None,
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    f.activation("hidden_act", &["silu", "swish"])?;
    let plain = standard::attention(f)?;
    let rope = f.rope(plain.head_dim)?;
    let dims = f.size_or("rotary_dim", rope.dims)?;
    let q = f.rms("self_attn.q_norm")?;
    let attention = Attention {
        head_norms: Some(HeadNorms { q, k: f.rms("self_attn.k_norm")?, span: HeadSpan::All }),
        rope: Some(Rope { dims, ..rope }),
        ..plain
    };
    let experts = Experts {
        n_experts: f.n_experts()?,
        ffn: f.size("intermediate_size")?,
        router: Router {
            correction: Some("block_sparse_moe.e_score_correction_bias"),
            score: RouterScore::Sigmoid,
            ..f.softmax_router("block_sparse_moe.gate", true)?
        },
        tensors: SPARSE_EXPERTS,
        activation: ExpertActivation::Gated(Activation::Silu),
        shared: None,
        shared_gate: None,
    };
    let layer = standard::layer_of(f, attention, Mlp::Experts(experts))?;
    f.model(Family::MiniMaxM2, vec![layer; f.n_layers()?])
}
