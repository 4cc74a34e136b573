//! What most architectures share, under Llama's names: norm, attention, norm, SwiGLU.

use serde_json::{Map, Value};

use crate::{
    config::{Activation, Attention, DenseMlp, LayerConfig, Mixer, Mlp, Norms, Projection, fields::Fields},
    error::ConfigError,
    weights::gguf::GgufFile,
};

/// Queries, keys and values as three tensors.
pub(super) const QKV: &[&str] = &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
/// The same in one.
pub(super) const FUSED_QKV: &[&str] = &["self_attn.qkv_proj"];
/// The way out of attention.
pub(super) const O: &[&str] = &["self_attn.o_proj"];
/// Gate and up as two tensors.
pub(super) const GATE_UP: &[&str] = &["mlp.gate_proj", "mlp.up_proj"];
/// The same in one.
pub(super) const FUSED_GATE_UP: &[&str] = &["mlp.gate_up_proj"];
/// The way out of the feed-forward part.
pub(super) const DOWN: &[&str] = &["mlp.down_proj"];

/// Attention to all earlier rows, rotated, scores divided by sqrt(D); a bias on every projection where
/// `attention_bias` says so.
pub(super) fn attention(f: &Fields<'_>) -> Result<Attention, ConfigError> {
    let [n_heads, n_kv_heads, head_dim] = f.heads()?;
    let bias = f.bool_or("attention_bias", false);
    Ok(Attention {
        n_heads,
        n_kv_heads,
        head_dim,
        qkv: Projection::biased(QKV, bias),
        o: Projection::biased(O, bias),
        head_norms: None,
        rope: Some(f.rope(head_dim)?),
        window: None,
        softcap: None,
        sinks: None,
        gated: false,
        scale: (head_dim as f32).sqrt().recip(),
    })
}

/// SwiGLU; a bias on every projection where `mlp_bias` says so.
pub(super) fn mlp(f: &Fields<'_>) -> Result<DenseMlp, ConfigError> {
    f.activation("hidden_act", &["silu", "swish"])?;
    mlp_unchecked(f)
}

/// The same for architectures that name their activation themselves.
pub(super) fn mlp_unchecked(f: &Fields<'_>) -> Result<DenseMlp, ConfigError> {
    let bias = f.bool_or("mlp_bias", false);
    Ok(DenseMlp {
        ffn: f.size("intermediate_size")?,
        gate_up: Projection::biased(GATE_UP, bias),
        down: Projection::biased(DOWN, bias),
        activation: Activation::Silu,
    })
}

/// A layer with an RMS norm before each part.
pub(super) fn layer(f: &Fields<'_>, attention: Attention, mlp: DenseMlp) -> Result<LayerConfig, ConfigError> {
    layer_of(f, attention, Mlp::Dense(mlp))
}

/// The same with any feed-forward part.
pub(super) fn layer_of(f: &Fields<'_>, attention: Attention, mlp: Mlp) -> Result<LayerConfig, ConfigError> {
    Ok(LayerConfig {
        mixer_norms: Norms::before(f.rms("input_layernorm")?),
        mixer: Mixer::Attention(attention),
        mlp_norms: Norms::before(f.rms("post_attention_layernorm")?),
        mlp,
        residual_scale: 1.0,
    })
}

/// Layers of which Qwen's later ones see a window, where `use_sliding_window` says so.
pub(super) fn windowed(
    f: &Fields<'_>,
    attention: &Attention,
    mlp: &DenseMlp,
) -> Result<Vec<LayerConfig>, ConfigError> {
    let window = f.size_if("sliding_window")?.filter(|_| f.bool_or("use_sliding_window", false));
    let from = f.size_or("max_window_layers", 28)?;
    let one = |i: usize| {
        let window = window.filter(|_| f.slides(i, i >= from));
        layer(f, Attention { window, ..attention.clone() }, mlp.clone())
    };
    (0..f.n_layers()?).map(one).collect()
}

/// F of an expert, from GGUF metadata.
pub(super) fn gguf_expert_fields(file: &GgufFile, name: &str, map: &mut Map<String, Value>) {
    if let Some(ffn) = file.unsigned(&format!("{name}.expert_feed_forward_length")) {
        map.insert("moe_intermediate_size".to_owned(), ffn.into());
        // Files without dense layers leave it out or write zero.
        let dense = map.get("intermediate_size").and_then(Value::as_u64).filter(|n| *n > 0);
        map.insert("intermediate_size".to_owned(), dense.unwrap_or(ffn).into());
    }
}
