//! Gemma 2 (arXiv:2408.00118): norms before and after each part, GeGLU, capped scores and logits, a window in every
//! other layer, embeddings times sqrt(H).

use serde_json::{Map, Value};

use super::{Architecture, standard};
use crate::{
    config::{
        Activation, Attention, DenseMlp, Family, LayerConfig, Mixer, Mlp, ModelConfig, Norms, fields::Fields,
    },
    error::ConfigError,
    weights::gguf::GgufFile,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::Gemma2,
    name: "gemma2",
    classes: &["Gemma2ForCausalLM"],
    gguf: Some("gemma2"),
    describe,
    gguf_fields: |file, map| gguf_fields(file, map, 46),
    gguf_names: GGUF_NAMES,
    gguf_pairs: false,
};

/// Both generations of norms have these names.
pub(super) const GGUF_NAMES: &[(&str, &str)] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// The converter adds 1 to the norms, and leaves out the divisor of the scores: the largest model of each generation,
/// known by its number of layers, divides by sqrt(H / Q), the others by sqrt(D).
pub(super) fn gguf_fields(_: &GgufFile, map: &mut Map<String, Value>, layers_of_largest: u64) {
    map.insert("parallax_norms_hold_one".to_owned(), true.into());
    let size = |name: &str| map.get(name).and_then(Value::as_u64);
    let scalar = if size("num_hidden_layers") == Some(layers_of_largest) {
        size("hidden_size").zip(size("num_attention_heads")).and_then(|(h, q)| h.checked_div(q))
    } else {
        size("head_dim")
    };
    map.extend(scalar.map(|scalar| ("query_pre_attn_scalar".to_owned(), scalar.into())));
}

/// What both generations share.
pub(super) fn layer(f: &Fields<'_>, attention: Attention) -> Result<LayerConfig, ConfigError> {
    for name in ["hidden_act", "hidden_activation"] {
        f.activation(name, &["gelu_pytorch_tanh"])?;
    }
    let mlp = DenseMlp { activation: Activation::GeluTanh, ..standard::mlp_unchecked(f)? };
    let sandwich = |before, after| -> Result<Norms, ConfigError> {
        Ok(Norms::sandwich(f.rms_plus_one(before)?, f.rms_plus_one(after)?))
    };
    Ok(LayerConfig {
        mixer_norms: sandwich("input_layernorm", "post_attention_layernorm")?,
        mixer: Mixer::Attention(attention),
        mlp_norms: sandwich("pre_feedforward_layernorm", "post_feedforward_layernorm")?,
        mlp: Mlp::Dense(mlp),
        residual_scale: 1.0,
    })
}

/// Attention of both generations, without rotation and window.
pub(super) fn attention(f: &Fields<'_>, softcap: Option<f32>) -> Result<Attention, ConfigError> {
    f.refuse("use_bidirectional_attention")?;
    let scalar = f.float_or("query_pre_attn_scalar", 256.0)?;
    let softcap = f.float_if("attn_logit_softcapping")?.or(softcap);
    Ok(Attention { softcap, scale: scalar.sqrt().recip(), ..standard::attention(f)? })
}

/// The model around the layers.
pub(super) fn model(
    f: &Fields<'_>,
    family: Family,
    layers: Vec<LayerConfig>,
    softcap: Option<f32>,
) -> Result<ModelConfig, ConfigError> {
    Ok(ModelConfig {
        embedding_scale: (f.hidden()? as f32).sqrt(),
        final_norm: f.rms_plus_one("model.norm")?,
        logit_softcap: f.float_if("final_logit_softcapping")?.or(softcap),
        tied_embeddings: f.bool_or("tie_word_embeddings", true),
        ..f.model(family, layers)?
    })
}

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let attention = attention(f, Some(50.0))?;
    let window = f.size_or("sliding_window", 4096)?;
    let one = |i: usize| {
        let window = f.slides(i, i.is_multiple_of(2)).then_some(window);
        layer(f, Attention { window, ..attention.clone() })
    };
    let layers = (0..f.n_layers()?).map(one).collect::<Result<_, _>>()?;
    model(f, Family::Gemma2, layers, Some(30.0))
}
