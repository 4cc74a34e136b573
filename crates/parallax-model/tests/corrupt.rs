//! Broken checkpoints: every one a clear error or a model that computes, never a panic.
#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]
#![cfg(feature = "train")]

use std::path::Path;

use parallax_model::{Checkpoint, LoadOptions, ModelConfig, Stage, TokenizerError, TrainModel, TrainOptions};
use proptest::prelude::*;
use safetensors::{SafeTensors, serialize, tensor::TensorView};
use serde_json::json;

fn tiny_config(hidden: usize) -> ModelConfig {
    let json = serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1, "hidden_size": hidden,
        "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
        "vocab_size": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "max_position_embeddings": 32,
        "eos_token_id": 0,
    });
    ModelConfig::from_hf_json(&json.to_string()).unwrap()
}

fn saved(dir: &Path) {
    TrainModel::new_random(&tiny_config(8), 1).unwrap().save_checkpoint(dir).unwrap();
}

/// Opens and loads; the error's text, if any.
fn try_load(dir: &Path) -> Result<(), String> {
    let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
    Stage::load(&checkpoint, &LoadOptions::whole(&checkpoint)).map_err(|e| e.to_string())?;
    Ok(())
}

#[test]
fn errors_name_the_file_and_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Checkpoint::resolve(dir.path().join("nothing").to_str().unwrap()).unwrap_err().to_string();
    assert!(missing.contains("nothing"), "{missing}");
    assert!(try_load(dir.path()).unwrap_err().contains("config.json"));

    saved(dir.path());
    try_load(dir.path()).unwrap();
    let weights = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 7]).unwrap();
    let error = try_load(dir.path()).unwrap_err();
    assert!(error.contains("model.safetensors") && error.contains("fetch it again"), "{error}");

    // Another width than the tensors have.
    std::fs::write(&weights, &bytes).unwrap();
    let wider = tiny_config(16);
    std::fs::write(dir.path().join("config.json"), wider.to_hf_json().to_string()).unwrap();
    let error = try_load(dir.path()).unwrap_err();
    assert!(error.contains("shape") && error.contains("16"), "{error}");

    let other = r#"{"architectures":["GPT2LMHeadModel"],"model_type":"gpt2"}"#;
    std::fs::write(dir.path().join("config.json"), other).unwrap();
    let error = try_load(dir.path()).unwrap_err();
    assert!(error.contains("GPT2LMHeadModel") && error.contains("qwen3"), "{error}");
    assert!(error.contains(dir.path().join("config.json").to_str().unwrap()), "{error}");

    let gguf = dir.path().join("model.gguf");
    std::fs::write(&gguf, b"GGUF\x03\0\0\0").unwrap();
    let error = Checkpoint::open(&gguf).unwrap_err().to_string();
    assert!(error.contains("model.gguf") && error.contains("truncated"), "{error}");
}

#[test]
fn a_matrix_of_another_shape_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path());
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    for (shape, is_fine) in [([1, 8, 16], true), ([8, 16, 1], false), ([16, 8, 1], false)] {
        let views: Vec<_> = (file.tensors().into_iter())
            .map(|(n, view)| {
                let shape = if n == name { shape.to_vec() } else { view.shape().to_vec() };
                (n, TensorView::new(view.dtype(), shape, view.data()).unwrap())
            })
            .collect();
        std::fs::write(&path, serialize(views, None).unwrap()).unwrap();
        match try_load(dir.path()) {
            Ok(()) => assert!(is_fine, "{shape:?}"),
            Err(error) => assert!(!is_fine && error.contains("shape") && error.contains(name), "{error}"),
        }
    }
}

/// The configuration with one field replaced, or left out.
fn write_config(dir: &Path, field: &str, value: Option<serde_json::Value>) {
    let mut config = tiny_config(8).to_hf_json();
    match value {
        Some(value) => config[field] = value,
        None => drop(config.as_object_mut().unwrap().remove(field)),
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_configuration_that_cannot_be_is_refused_with_its_file() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path());
    let path = dir.path().join("config.json");
    let sizes =
        ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    for field in sizes {
        let nonsense =
            [json!(0), json!(-1), json!(1u64 << 31), json!(1e300), json!("x"), json!([1]), json!(1.5)];
        for value in nonsense.into_iter().map(Some).chain([None]) {
            write_config(dir.path(), field, value.clone());
            let error = try_load(dir.path()).unwrap_err();
            assert!(error.contains(dir.path().to_str().unwrap()), "{field} = {value:?}: {error}");
        }
    }
    for content in [&b""[..], b"null", b"{}", b"\xff\xfe\x00", b"[[[[[[[["] {
        std::fs::write(&path, content).unwrap();
        let error = try_load(dir.path()).unwrap_err();
        assert!(error.contains(path.to_str().unwrap()), "{content:?}: {error}");
    }
}

#[test]
fn a_configuration_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut deep = tiny_config(8).to_hf_json();
    deep["num_hidden_layers"] = json!(3);
    let deep = ModelConfig::from_hf_json(&deep.to_string()).unwrap();
    TrainModel::new_random(&deep, 1).unwrap().save_checkpoint(dir.path()).unwrap();
    try_load(dir.path()).unwrap();
    // Fewer layers than there are: it would compute, but not this model.
    write_config(dir.path(), "num_hidden_layers", Some(json!(2)));
    let error = try_load(dir.path()).unwrap_err();
    assert!(error.contains("layer 2") && error.contains("config.json"), "{error}");
    write_config(dir.path(), "num_hidden_layers", Some(json!(4)));
    let error = try_load(dir.path()).unwrap_err();
    assert!(error.contains("layers.3") && error.contains(dir.path().to_str().unwrap()), "{error}");
}

/// The errors of reading the tokenizer, and of copying it beside trained weights.
fn tokenizer_errors(dir: &Path) -> [String; 2] {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let trained = TrainModel::from_checkpoint(&checkpoint, &TrainOptions { lora: None, full: true });
    [checkpoint.tokenizer().unwrap_err().to_string(), trained.map(|_| ()).unwrap_err().to_string()]
}

#[test]
fn a_broken_tokenizer_is_named_and_a_missing_one_is_none() {
    let dir = tempfile::tempdir().unwrap();
    saved(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(matches!(checkpoint.tokenizer(), Err(TokenizerError::Missing(_))));
    let model = TrainModel::from_checkpoint(&checkpoint, &TrainOptions { lora: None, full: true }).unwrap();
    let copy = tempfile::tempdir().unwrap();
    model.save_checkpoint(copy.path()).unwrap();
    assert!(!copy.path().join("tokenizer.json").exists());

    // Before tokenizer.json, which comes first.
    let path = dir.path().join("tiktoken.model");
    std::fs::write(&path, "AA==").unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"tokenizer_class": "TikTokenTokenizer"}"#)
        .unwrap();
    for error in tokenizer_errors(dir.path()) {
        assert!(error.contains(path.to_str().unwrap()) && error.contains("line 1"), "{error}");
    }
    let path = dir.path().join("tokenizer.json");
    for content in [&b""[..], b"null", b"{}", b"{\"version\": \"1.0\"", b"\xff\xfe\x00"] {
        std::fs::write(&path, content).unwrap();
        for error in tokenizer_errors(dir.path()) {
            assert!(error.contains(path.to_str().unwrap()), "{content:?}: {error}");
            assert!(!error.contains("no tokenizer"), "{content:?}: {error}");
        }
    }
    // What is there and cannot be read is not missing.
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
}

#[test]
fn settings_beside_the_weights_that_are_no_json_are_named() {
    for name in ["tokenizer_config.json", "generation_config.json"] {
        let dir = tempfile::tempdir().unwrap();
        saved(dir.path());
        let path = dir.path().join(name);
        let _ = std::fs::remove_file(&path);
        try_load(dir.path()).unwrap();
        for content in [&b""[..], b"{\"chat_template\": \"{{", b"\xff\xfe\x00"] {
            std::fs::write(&path, content).unwrap();
            let error = try_load(dir.path()).unwrap_err();
            assert!(error.contains(path.to_str().unwrap()) && error.contains("JSON"), "{error}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn mutated_files_never_panic(in_config: bool, at in 0.0f64..1.0, value: u8) {
        let dir = tempfile::tempdir().unwrap();
        saved(dir.path());
        let path = dir.path().join(if in_config { "config.json" } else { "model.safetensors" });
        let mut bytes = std::fs::read(&path).unwrap();
        // Mostly the header: that is where a byte can lie about sizes.
        let n = if in_config { bytes.len() } else { 1500.min(bytes.len()) };
        bytes[(at * n as f64) as usize] = value;
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = try_load(dir.path()) {
            prop_assert!(!error.is_empty());
        }
    }
}
