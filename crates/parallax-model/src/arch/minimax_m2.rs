//! MiniMax-M2: one norm over all query heads and one over all key heads, part of each head rotated, sigmoid router.

use serde_json::{Map, Value};

use super::{Architecture, standard};
use crate::{
    config::{
        Activation, Attention, ExpertActivation, Experts, Family, HeadNorms, HeadSpan, Mlp, ModelConfig,
        Rope, Router, RouterScore, experts::SPARSE_EXPERTS, fields::Fields,
    },
    error::ConfigError,
    weights::gguf::GgufFile,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::MiniMaxM2,
    name: "minimax_m2",
    classes: &["MiniMaxM2ForCausalLM"],
    gguf: Some("minimax-m2"),
    describe,
    gguf_fields,
    gguf_names: &[
        ("ffn_gate_inp", "block_sparse_moe.gate"),
        ("exp_probs_b.bias", "block_sparse_moe.e_score_correction_bias"),
        ("ffn_gate_exps", "block_sparse_moe.experts.w1"),
        ("ffn_up_exps", "block_sparse_moe.experts.w3"),
        ("ffn_down_exps", "block_sparse_moe.experts.w2"),
        ("ffn_gate_up_exps", "block_sparse_moe.experts.gate_up_proj"),
    ],
    gguf_pairs: false,
};

fn gguf_fields(file: &GgufFile, map: &mut Map<String, Value>) {
    let size = |key: &str| file.unsigned(&format!("minimax-m2.{key}"));
    // F of an expert, as config.json calls it.
    map.extend(size("expert_feed_forward_length").map(|n| ("intermediate_size".to_owned(), n.into())));
    map.extend(size("rope.dimension_count").map(|n| ("rotary_dim".to_owned(), n.into())));
    map.remove("partial_rotary_factor");
}

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
