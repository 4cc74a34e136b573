//! LoRA adapters of every linear module outside of routed experts and routers, what PEFT's `all-linear` finds: an adapter
//! computes what weights do into which it was merged.

use std::collections::BTreeMap;

use parallax_model::{
    Adapter, Checkpoint, ForwardBatch, LoadOptions, LoraTensors, SequenceRows, Stage, StageInput, Want,
    WeightDtype,
};

use super::seeded::{
    Tensor, bits, checkpoint_of, hf_tensors, longest_prompt, names, uniform, worst, worst_of_largest,
};
use super::writer::{Age, convert};
use super::{TOLERANCE, logits, recording, write};

const RANK: usize = 3;
const ALPHA: f32 = 4.5;

/// `layers.3.q_proj` of `model.layers.3.self_attn.q_proj.weight`, where that is a module that adapters change.
fn module(t: &Tensor) -> Option<String> {
    let path = t.name.strip_prefix("model.")?.strip_suffix(".weight")?;
    let routers = ["mlp.gate", "mlp.router", "block_sparse_moe.gate"];
    if t.shape.len() != 2 || path.contains(".experts.") || routers.iter().any(|r| path.ends_with(r)) {
        return None;
    }
    let (layer, rest) = path.strip_prefix("layers.")?.split_once('.')?;
    Some(format!("layers.{layer}.{}", rest.split_once('.')?.1))
}

fn adapter(tensors: &[Tensor]) -> Adapter {
    let values = |name: String, n: usize| uniform(&name, n).map(|v| 0.2 * v).collect();
    let factors = |t: &Tensor| {
        let [outputs, inputs] = t.shape[..] else { panic!("{}", t.name) };
        let a = values(format!("{} A", t.name), RANK * inputs);
        let b = values(format!("{} B", t.name), outputs * RANK);
        Some((module(t)?, LoraTensors { a, b, inputs, outputs }))
    };
    let tensors: BTreeMap<String, LoraTensors> =
        tensors.iter().filter(|t| module(t).is_some()).filter_map(factors).collect();
    Adapter { rank: RANK, alpha: ALPHA, tensors }
}

/// W + alpha / rank · B·A.
fn merged(mut tensors: Vec<Tensor>, adapter: &Adapter) -> Vec<Tensor> {
    for t in &mut tensors {
        let Some(f) = module(t).map(|module| &adapter.tensors[&module]) else { continue };
        for (i, value) in t.values.iter_mut().enumerate() {
            let (row, column) = (i / f.inputs, i % f.inputs);
            let sum: f64 = (0..RANK)
                .map(|r| f64::from(f.b[row * RANK + r]) * f64::from(f.a[r * f.inputs + column]))
                .sum();
            *value += (f64::from(ALPHA) / RANK as f64 * sum) as f32;
        }
    }
    tensors
}

fn load(checkpoint: &Checkpoint) -> Stage {
    let options = LoadOptions { dtype: WeightDtype::F32, kv_pages: 48, ..LoadOptions::whole(checkpoint) };
    Stage::load(checkpoint, &options).unwrap()
}

fn rows(id: u32, n: usize, adapter: Option<u32>) -> SequenceRows {
    SequenceRows {
        state: id,
        rows: n as u32,
        pages: (16 * id..16 * id + 16).collect(),
        want: Want::AllLogits,
        adapter,
        ..SequenceRows::default()
    }
}

fn run(stage: &mut Stage, sequences: Vec<SequenceRows>, tokens: &[u32]) -> Vec<f32> {
    stage.forward(&ForwardBatch { sequences }, StageInput::Tokens(tokens)).unwrap().logits
}

#[test]
fn adapters_compute_what_merged_weights_do() {
    let mut seen = std::collections::BTreeSet::new();
    for name in names() {
        let golden = recording(&name);
        let tensors = hf_tensors(&golden);
        let (_dir, base) = checkpoint_of(&golden, &tensors);
        let adapter = adapter(&tensors);
        seen.extend(adapter.tensors.keys().map(|m| m.splitn(3, '.').nth(2).unwrap().to_owned()));
        assert_eq!(Adapter::from_bytes(&adapter.to_bytes().unwrap()).unwrap(), adapter, "{name}");
        let (_other_dir, other) = checkpoint_of(&golden, &merged(tensors, &adapter));
        let mut tokens = longest_prompt(&golden);
        tokens.truncate(base.config().max_context);
        let expected = logits(&other, &tokens);

        let mut stage = load(&base);
        let n = tokens.len();
        let bare = run(&mut stage, vec![rows(0, n, None)], &tokens);
        stage.set_adapter(Some(&adapter)).unwrap();
        let got = run(&mut stage, vec![rows(0, n, None)], &tokens);
        let difference = worst_of_largest(&got, &expected);
        assert!(difference < TOLERANCE, "{name}: {difference}");
        assert!(worst(&got, &bare) > 100.0 * TOLERANCE, "{name}: the adapter changes something");

        // Beside a sequence without it every row has the bits that it has alone.
        stage.set_adapter(None).unwrap();
        stage.add_adapter(7, &adapter).unwrap();
        let both = vec![rows(1, n, None), rows(2, n, Some(7))];
        let together = run(&mut stage, both, &[tokens.clone(), tokens.clone()].concat());
        assert_eq!(bits(&together), bits(&[bare.clone(), got].concat()), "{name}");
        assert!(stage.remove_adapter(7));
        assert_eq!(bits(&run(&mut stage, vec![rows(0, n, None)], &tokens)), bits(&bare), "{name}");
    }
    for kind in [
        "kv_b_proj",
        "q_a_proj",
        "kv_a_proj_with_mqa",
        "in_proj_qkvz",
        "in_proj_ba",
        "in_proj_qkv",
        "in_proj_a",
        "out_proj",
    ] {
        assert!(seen.contains(kind), "{kind} of {seen:?}");
    }
    for kind in ["shared_experts.up_proj", "shared_expert.down_proj", "shared_expert_gate", "gate_up_proj"] {
        assert!(seen.contains(kind), "{kind} of {seen:?}");
    }
}

#[test]
fn adapters_fit_gguf_files_too() {
    for (name, architecture) in [
        ("smollm2", "llama"),
        ("phi3", "phi3"),
        ("gemma3", "gemma3"),
        ("qwen3.5", "qwen35"),
        ("deepseek-v3", "deepseek2"),
        ("qwen3-next", "qwen3next"),
    ] {
        let golden = recording(name);
        let tensors = hf_tensors(&golden);
        let (dir, hf) = checkpoint_of(&golden, &tensors);
        let gguf = write(&convert(&golden, architecture, Age::New), &dir.path().join("model.gguf"));
        let adapter = adapter(&tensors);
        let tokens = longest_prompt(&golden);
        let [got, expected] = [&gguf, &hf].map(|checkpoint| {
            let mut stage = load(checkpoint);
            stage.set_adapter(Some(&adapter)).unwrap();
            run(&mut stage, vec![rows(0, tokens.len(), None)], &tokens)
        });
        let difference = worst_of_largest(&got, &expected);
        assert!(difference < TOLERANCE, "{name}: {difference}");
    }
}

#[test]
fn adapters_of_routed_experts_and_routers_are_refused_by_name() {
    for tensor in [
        "model.layers.1.mlp.experts.3.gate_proj.lora_A.weight",
        "model.layers.1.mlp.experts.base_layer.lora_B.weight",
        "model.layers.0.block_sparse_moe.experts.1.w2.lora_A.weight",
        "model.layers.2.mlp.gate.lora_A.weight",
        "model.layers.2.mlp.router.lora_B.weight",
    ] {
        let name = format!("base_model.model.{tensor}");
        let view = safetensors::tensor::TensorView::new(safetensors::tensor::Dtype::F32, vec![1, 1], &[0; 4]);
        let bytes = safetensors::tensor::serialize([(name.as_str(), view.unwrap())], None).unwrap();
        let error = Adapter::from_bytes(&bytes).unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains("routed experts"), "{error}");
    }
    // A dense layer has no shared expert.
    let golden = recording("deepseek-v2");
    let tensors = hf_tensors(&golden);
    let (_dir, base) = checkpoint_of(&golden, &tensors);
    let mut adapter = adapter(&tensors);
    let factors = adapter.tensors["layers.1.shared_experts.up_proj"].clone();
    adapter.tensors.insert("layers.0.shared_experts.up_proj".to_owned(), factors);
    let error = load(&base).set_adapter(Some(&adapter)).unwrap_err().to_string();
    assert!(error.contains("layers.0.shared_experts.up_proj"), "{error}");
}
