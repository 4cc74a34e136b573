//! GLM-4-MoE (4.5 to 4.7): half of each head rotated, norms on heads where the file says so, DeepSeek-V3's experts.

use serde_json::{Map, Value};

use super::{Architecture, deepseek, standard};
use crate::{
    config::{Attention, Family, HeadNorms, HeadSpan, ModelConfig, Projection, Rope, fields::Fields},
    error::ConfigError,
    weights::gguf::GgufFile,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Glm4Moe,
    name: "glm4_moe",
    classes: &["Glm4MoeForCausalLM"],
    gguf: Some("glm4moe"),
    describe,
    gguf_fields,
    gguf_names: &[
        ("post_attention_norm", "post_attention_layernorm"),
        ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
    ],
    gguf_pairs: false,
};

fn gguf_fields(file: &GgufFile, map: &mut Map<String, Value>) {
    deepseek::gguf_router_fields(file, "glm4moe", map);
    map.insert("use_qk_norm".to_owned(), file.has_tensor("blk.0.attn_q_norm.weight").into());
    map.entry("partial_rotary_factor").or_insert(1.0.into());
}

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let plain = standard::attention(f)?;
    let head_norms = match f.bool_or("use_qk_norm", false) {
        false => None,
        true => {
            let q = f.rms("self_attn.q_norm")?;
            Some(HeadNorms { q, k: f.rms("self_attn.k_norm")?, span: HeadSpan::Head })
        }
    };
    // Half of a head is rotated where the file does not say.
    let rope = match f.rope_number("partial_rotary_factor")?.or(f.float_if("partial_rotary_factor")?) {
        Some(_) => f.rope(plain.head_dim)?,
        None => Rope { dims: plain.head_dim / 2, ..f.rope(plain.head_dim)? },
    };
    let attention = Attention { head_norms, rope: Some(rope), o: Projection::plain(standard::O), ..plain };
    let mlps = deepseek::mlps(f, deepseek::sigmoid_router(f)?)?;
    let layers = mlps.into_iter().map(|mlp| standard::layer_of(f, attention.clone(), mlp));
    f.model(Family::Glm4Moe, layers.collect::<Result<_, _>>()?)
}
