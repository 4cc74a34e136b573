//! Real stages over a small random checkpoint that the test writes: n stages equal one, and neighbours change nothing,
//! bit for bit.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "local")]

use std::collections::BTreeMap;
use std::path::Path;

use parallax_engine::local::Pipeline;
use parallax_engine::{Completion, Engine, EngineConfig, Request, SamplingParams, StageRunner, score};
use parallax_model::{Checkpoint, DeviceKind, LoadOptions, WeightDtype};
use proptest::prelude::*;
use tempfile::TempDir;

const LAYERS: usize = 4;
const VOCAB: usize = 128;
const CONTEXT: usize = 256;

/// Writes config.json and model.safetensors: Llama, hidden 64, 4 query and 2 key heads of 16.
fn write_checkpoint(dir: &Path) {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": VOCAB, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
        "hidden_act": "silu"
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, 64]),
        ("model.norm.weight".to_owned(), vec![64]),
        ("lm_head.weight".to_owned(), vec![VOCAB, 64]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![64, 64]),
            ("self_attn.k_proj", vec![32, 64]),
            ("self_attn.v_proj", vec![32, 64]),
            ("self_attn.o_proj", vec![64, 64]),
            ("mlp.gate_proj", vec![96, 64]),
            ("mlp.up_proj", vec![96, 64]),
            ("mlp.down_proj", vec![64, 96]),
            ("input_layernorm", vec![64]),
            ("post_attention_layernorm", vec![64]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            let value = if shape.len() == 1 { 1.0 + 0.2 * random() } else { 0.4 * random() };
            data.extend(f32::to_le_bytes(value));
        }
        header.insert(
            name,
            serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

fn checkpoint() -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn pipeline(checkpoint: &Checkpoint, dtype: WeightDtype, n_stages: usize, kv_pages: usize) -> Pipeline {
    let options =
        LoadOptions { layers: 0..LAYERS, dtype, device: DeviceKind::Cpu, kv_page_tokens: 16, kv_pages };
    Pipeline::load(checkpoint, &options, n_stages, |_| {}).unwrap()
}

fn request(i: usize, prompt_tokens: usize, max_tokens: usize) -> Request {
    let sampling = SamplingParams {
        temperature: 0.9,
        seed: 3,
        stream: i as u64,
        max_tokens,
        ..SamplingParams::default()
    };
    let prompt = (0..prompt_tokens).map(|t| ((t * 31 + i * 17 + 3) % VOCAB) as u32).collect();
    Request { prompt, sampling, capture_hidden: true, ..Request::default() }
}

fn run(runner: &mut Pipeline, config: EngineConfig, requests: &[Request]) -> Vec<Completion> {
    let mut engine = Engine::new(runner.shape(), runner.log_softmax(), config).unwrap();
    let ids: Vec<_> = requests.iter().map(|r| engine.add(r.clone()).unwrap()).collect();
    let mut completions: BTreeMap<_, Completion> = BTreeMap::new();
    while engine.is_busy() {
        for event in engine.step(runner) {
            completions.entry(event.request).or_default().take(event.event);
        }
    }
    ids.iter().map(|id| completions.remove(id).unwrap()).collect()
}

#[test]
fn any_number_of_stages_gives_the_bits_of_one() {
    let (_dir, checkpoint) = checkpoint();
    let requests: Vec<_> = (0..3).map(|i| request(i, 5 + 20 * i, 12)).collect();
    for dtype in [WeightDtype::F32, WeightDtype::Q8_0] {
        let whole = run(&mut pipeline(&checkpoint, dtype, 1, 32), EngineConfig::default(), &requests);
        assert!(whole.iter().all(|c| c.tokens.len() == 12));
        for n_stages in 2..=LAYERS {
            let cut =
                run(&mut pipeline(&checkpoint, dtype, n_stages, 32), EngineConfig::default(), &requests);
            assert_eq!(cut, whole, "{n_stages} stages, {dtype}");
        }
    }
}

#[test]
fn scoring_an_answer_gives_the_log_probabilities_it_was_sampled_with() {
    let (_dir, checkpoint) = checkpoint();
    let mut runner = pipeline(&checkpoint, WeightDtype::F32, 2, 32);
    let mut request = request(1, 9, 30);
    request.sampling.temperature = 1.0;
    let completion = run(&mut runner, EngineConfig::default(), std::slice::from_ref(&request)).remove(0);
    let scored = score(&mut runner, &[request.prompt, completion.token_ids()].concat()).unwrap();
    assert_eq!(scored.logprobs[8..], completion.logprobs());
    assert_eq!(scored.argmax.len(), 39);
    assert!(score(&mut runner, &[]).is_err());
    assert!(score(&mut runner, &[VOCAB as u32]).unwrap_err().to_string().contains("vocabulary"));
    assert!(score(&mut runner, &vec![0; CONTEXT + 1]).is_err());
    assert!(score(&mut runner, &vec![0; CONTEXT]).is_ok());
}

#[test]
fn an_impossible_cut_is_refused_by_name() {
    let (_dir, checkpoint) = checkpoint();
    let options = LoadOptions::whole(&checkpoint);
    let error = Pipeline::load(&checkpoint, &options, LAYERS + 1, |_| {}).unwrap_err();
    assert!(error.to_string().contains("4 layers"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Chunks, neighbours and preemptions (a cache that is too small for all) change no bit.
    #[test]
    fn neighbours_change_no_bit(
        shapes in proptest::collection::vec((1usize..70, 1usize..12), 1..6),
        step_tokens in 6usize..48,
        kv_pages in 6usize..24,
    ) {
        let (_dir, checkpoint) = checkpoint();
        let requests: Vec<_> = shapes.iter().enumerate().map(|(i, (p, n))| request(i, *p, *n)).collect();
        let mut runner = pipeline(&checkpoint, WeightDtype::Q8_0, 1, kv_pages);
        let alone: Vec<_> = requests
            .iter()
            .map(|r| run(&mut runner, EngineConfig::default(), std::slice::from_ref(r)).remove(0))
            .collect();
        let config = EngineConfig { step_tokens, running_sequences: 5, ..EngineConfig::default() };
        prop_assert_eq!(run(&mut runner, config, &requests), alone);
    }
}
