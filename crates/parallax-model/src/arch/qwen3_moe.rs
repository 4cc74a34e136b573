//! Qwen3-MoE: Qwen3's attention; experts in all layers but those that the file names.

use super::{Architecture, no_more_fields, qwen3, standard};
use crate::{
    config::{
        Activation, ExpertActivation, Experts, Family, Mlp, ModelConfig, experts::MLP_EXPERTS, fields::Fields,
    },
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Qwen3Moe,
    name: "qwen3_moe",
    classes: &["Qwen3MoeForCausalLM"],
    gguf: Some("qwen3moe"),
    describe,
    gguf_fields,
    gguf_names: &[],
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let attention = qwen3::attention(f)?;
    let experts = Mlp::Experts(experts(f, f.bool_or("norm_topk_prob", false))?);
    let layers = (0..f.n_layers()?)
        .map(|i| {
            let mlp = if is_sparse(f, i)? { experts.clone() } else { Mlp::Dense(standard::mlp(f)?) };
            standard::layer_of(f, attention.clone(), mlp)
        })
        .collect::<Result<_, _>>()?;
    f.model(Family::Qwen3Moe, layers)
}

/// The experts of Qwen's models.
pub(super) fn experts(f: &Fields<'_>, normalize: bool) -> Result<Experts, ConfigError> {
    f.activation("hidden_act", &["silu", "swish"])?;
    Ok(Experts {
        n_experts: f.n_experts()?,
        ffn: f.size("moe_intermediate_size")?,
        router: f.softmax_router("mlp.gate", normalize)?,
        tensors: MLP_EXPERTS,
        activation: ExpertActivation::Gated(Activation::Silu),
        shared: None,
        shared_gate: None,
    })
}

/// Whether layer `i` has experts.
pub(super) fn is_sparse(f: &Fields<'_>, i: usize) -> Result<bool, ConfigError> {
    let step = f.size_or("decoder_sparse_step", 1)?.max(1);
    let dense = f.get("mlp_only_layers").and_then(|v| v.as_array());
    let named = dense.is_some_and(|list| list.iter().any(|v| v.as_u64() == Some(i as u64)));
    Ok(!named && (i + 1).is_multiple_of(step))
}

fn gguf_fields(file: &crate::weights::gguf::GgufFile, map: &mut serde_json::Map<String, serde_json::Value>) {
    no_more_fields(file, map);
    standard::gguf_expert_fields(file, "qwen3moe", map);
    // The converter writes no flag: every released checkpoint has it.
    map.insert("norm_topk_prob".to_owned(), true.into());
}
