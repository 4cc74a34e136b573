//! Random tiny checkpoints for tests.

use tempfile::TempDir;

use crate::{
    adapter::{
        Adapter, LoraTensors,
        modules::{self, module_shape},
    },
    checkpoint::Checkpoint,
    config::{Family, ModelConfig},
    train::TrainModel,
};

/// Four layers, grouped heads, odd sizes where they are allowed; every field that some architecture reads.
pub(crate) fn config(family: Family) -> ModelConfig {
    let scaling = serde_json::json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    let json = serde_json::json!({
        "architectures": [family.hf_class()], "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": if family == Family::Llama { 8 } else { 16 }, "sliding_window": 9,
        "use_sliding_window": true, "max_window_layers": 2, "attention_bias": family == Family::Glm4,
        "vocab_size": 97, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
        "rope_scaling": if family == Family::Llama { scaling } else { serde_json::Value::Null },
        "tie_word_embeddings": family == Family::Llama, "bos_token_id": 1, "eos_token_id": 2,
    });
    ModelConfig::from_hf_json(&json.to_string()).unwrap()
}

/// Families that can be trained: those that random checkpoints are made of.
pub(crate) fn trainable() -> impl Iterator<Item = Family> {
    [Family::Llama, Family::Qwen3].into_iter()
}

/// A random model on disk. Its weights are larger than a new model's, so that differences show.
pub(crate) fn checkpoint(family: Family) -> (TempDir, Checkpoint) {
    let mut model = TrainModel::new_random(&config(family), 7).unwrap();
    let louder = model.parameters().iter().map(|(name, tensor)| {
        let tensor = tensor.clone().inner();
        if name.contains("norm") {
            tensor.clone() * 0.5 + tensor.cumsum(1) * 0.02
        } else {
            tensor.mul_scalar(8.0)
        }
    });
    let louder = louder.collect();
    model.set_parameters(louder);
    saved(&model)
}

/// A fully trained model, saved and opened again.
pub(crate) fn saved(model: &TrainModel) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    model.save_checkpoint(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// An adapter with both factors away from zero.
pub(crate) fn adapter(config: &ModelConfig, rank: usize) -> Adapter {
    let mut counter = 0u32;
    let mut values = |n: usize| -> Vec<f32> {
        (0..n)
            .map(|_| {
                counter = counter.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (counter >> 8) as f32 / (1u32 << 24) as f32 * 0.4 - 0.2
            })
            .collect()
    };
    let mut tensors = std::collections::BTreeMap::new();
    for layer in 0..config.n_layers {
        let shaped = |m| module_shape(config, layer, m).map(|shape| (m, shape));
        for (module, (inputs, outputs)) in modules::names().filter_map(shaped) {
            let t = LoraTensors { a: values(rank * inputs), b: values(outputs * rank), inputs, outputs };
            tensors.insert(format!("layers.{layer}.{module}"), t);
        }
    }
    Adapter { rank, alpha: 2.0 * rank as f32, tensors }
}

/// Tokens of a fixed pattern.
pub(crate) fn tokens(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 31 + seed * 17 + i * i) % 97).collect()
}
