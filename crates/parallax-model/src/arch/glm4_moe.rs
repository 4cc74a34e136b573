//! GLM-4-MoE (4.5 to 4.7): half of each head rotated, norms on heads where the file says so, DeepSeek-V3's experts.

use super::{Architecture, deepseek, no_more_fields, standard};
use crate::{
    config::{Attention, Family, HeadNorms, HeadSpan, ModelConfig, Projection, Rope, fields::Fields},
    error::ConfigError,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Glm4Moe,
    name: "glm4_moe",
    classes: &["Glm4MoeForCausalLM"],
    // llama.cpp's "glm4moe" carries a prediction layer behind the others; those files are not read.
    gguf: None,
    describe,
    gguf_fields: no_more_fields,
    gguf_names: &[],
    gguf_pairs: false,
};

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
