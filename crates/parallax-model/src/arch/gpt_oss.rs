//! GPT-OSS: sinks and biases in the attention, windows in every other layer, clamped SwiGLU experts, YaRN.

use serde_json::{Map, Value};

use super::{Architecture, standard};
use crate::{
    config::{
        Attention, ExpertActivation, ExpertTensors, Experts, Family, Mlp, ModelConfig, Router, RouterScore,
        experts::MLP_EXPERTS, fields::Fields,
    },
    error::ConfigError,
    weights::gguf::GgufFile,
};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    family: Family::GptOss,
    name: "gpt_oss",
    classes: &["GptOssForCausalLM"],
    gguf: Some("gpt-oss"),
    describe,
    gguf_fields,
    gguf_names: &[
        ("post_attention_norm", "post_attention_layernorm"),
        ("attn_sinks.weight", "self_attn.sinks"),
        ("ffn_gate_inp", "mlp.router"),
    ],
    gguf_pairs: false,
};

fn describe(f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    let full = Attention { sinks: Some("self_attn.sinks"), ..standard::attention(f)? };
    let window = f.size_if("sliding_window")?;
    let experts = Experts {
        n_experts: f.n_experts()?,
        ffn: f.size("intermediate_size")?,
        router: Router {
            bias: true,
            score: RouterScore::SoftmaxOfChosen,
            ..f.softmax_router("mlp.router", false)?
        },
        tensors: ExpertTensors { bias: true, alternating: true, ..MLP_EXPERTS },
        activation: ExpertActivation::Clamped { limit: f.float_or("swiglu_limit", 7.0)? },
        shared: None,
        shared_gate: None,
    };
    let kinds = f.texts("layer_types");
    let layers = (0..f.n_layers()?)
        .map(|i| {
            let slides = match &kinds {
                Some(kinds) => kinds.get(i) == Some(&"sliding_attention"),
                None => i % 2 == 0,
            };
            let attention = Attention { window: window.filter(|_| slides), ..full.clone() };
            standard::layer_of(f, attention, Mlp::Experts(experts.clone()))
        })
        .collect::<Result<_, _>>()?;
    f.model(Family::GptOss, layers)
}

fn gguf_fields(file: &GgufFile, map: &mut Map<String, Value>) {
    standard::gguf_expert_fields(file, "gpt-oss", map);
    map.insert("attention_bias".to_owned(), true.into());
    // F of an expert, as config.json calls it.
    if let Some(ffn) = map.get("moe_intermediate_size").cloned() {
        map.insert("intermediate_size".to_owned(), ffn);
    }
    // llama.cpp rounds the ends of the ramp down to nothing; the model does not.
    if let Some(Value::Object(scaling)) = map.get_mut("rope_scaling") {
        scaling.insert("truncate".to_owned(), false.into());
    }
}
