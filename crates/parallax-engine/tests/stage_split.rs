//! Real stages over small random checkpoints that the test writes, a Llama and a Qwen3-Next, which is recurrent: n stages
//! equal one, and neighbours change nothing, bit for bit.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "local")]

use std::collections::BTreeMap;
use std::path::Path;

use parallax_engine::local::Pipeline;
use parallax_engine::{
    Completion, DraftModel, Engine, EngineConfig, PromptLookup, Request, SamplingParams, StageRunner, score,
};
use parallax_model::{Checkpoint, KvFormat, LoadOptions, WeightDtype};
use proptest::prelude::*;
use tempfile::TempDir;

const LAYERS: usize = 4;
const VOCAB: usize = 128;
/// Tokens of prompts, which both vocabularies have.
const PROMPT_IDS: usize = 101;
const CONTEXT: usize = 256;

/// A tensor to make up: name, shape, middle and spread of its values.
type Spec = (String, Vec<usize>, f32, f32);

/// Hidden 64, 4 query and 2 key heads of 16.
fn llama() -> (serde_json::Value, Vec<Spec>) {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": VOCAB, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
        "hidden_act": "silu"
    });
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
    let specs = tensors.into_iter().map(|(name, shape)| {
        let (offset, scale) = if shape.len() == 1 { (1.0, 0.1) } else { (0.0, 0.2) };
        (name, shape, offset, scale)
    });
    (config, specs.collect())
}

/// The shapes of the recorded Qwen3-Next: three gated delta nets and an attention, with experts.
fn qwen3_next() -> (serde_json::Value, Vec<Spec>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/arch/qwen3-next.json");
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let spec = |entry: &serde_json::Value| {
        let shape = entry[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        let number = |i: usize| entry[i].as_f64().unwrap() as f32;
        (entry[0].as_str().unwrap().to_owned(), shape, number(2), number(3))
    };
    let specs = golden["tensors"].as_array().unwrap().iter().map(spec).collect();
    (golden["config"].clone(), specs)
}

/// Writes config.json and model.safetensors.
fn write_checkpoint(dir: &Path, (config, tensors): (serde_json::Value, Vec<Spec>)) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, offset, scale) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            data.extend(f32::to_le_bytes(offset + scale * random()));
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
    written(llama())
}

fn written(parts: (serde_json::Value, Vec<Spec>)) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), parts);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint)
}

fn pipeline(checkpoint: &Checkpoint, dtype: WeightDtype, n_stages: usize, kv_pages: usize) -> Pipeline {
    let options = LoadOptions { dtype, kv_pages, ..LoadOptions::whole(checkpoint) };
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
    let prompt = (0..prompt_tokens).map(|t| ((t * 31 + i * 17 + 3) % PROMPT_IDS) as u32).collect();
    Request { prompt, sampling, capture_hidden: true, ..Request::default() }
}

fn run(runner: &mut Pipeline, config: EngineConfig, requests: &[Request]) -> Vec<Completion> {
    let mut engine = Engine::new(runner.shape(), runner.log_softmax(), config).unwrap();
    run_on(&mut engine, runner, requests)
}

fn run_on(engine: &mut Engine, runner: &mut Pipeline, requests: &[Request]) -> Vec<Completion> {
    let ids: Vec<_> = requests.iter().map(|r| engine.add(r.clone()).unwrap()).collect();
    let mut completions: BTreeMap<_, Completion> = BTreeMap::new();
    while engine.is_busy() {
        for event in engine.step(runner) {
            completions.entry(event.request).or_default().take(event.event);
        }
    }
    let mut completions: Vec<_> = ids.iter().map(|id| completions.remove(id).unwrap()).collect();
    // What was found in the cache is the one thing that may depend on others.
    completions.iter_mut().for_each(|completion| completion.usage.cached_tokens = 0);
    completions
}

#[test]
fn any_number_of_stages_gives_the_bits_of_one() {
    let requests: Vec<_> = (0..3).map(|i| request(i, 5 + 20 * i, 12)).collect();
    let models = [llama(), qwen3_next()].map(written);
    for (checkpoint, dtype) in
        models.iter().flat_map(|(_, model)| [(model, WeightDtype::F32), (model, WeightDtype::Q8_0)])
    {
        let whole = run(&mut pipeline(checkpoint, dtype, 1, 32), EngineConfig::default(), &requests);
        assert!(whole.iter().all(|c| c.tokens.len() == 12));
        for n_stages in 2..=LAYERS {
            let cut = run(&mut pipeline(checkpoint, dtype, n_stages, 32), EngineConfig::default(), &requests);
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

    /// Whatever the cache's format, chunks, page size, neighbours, preemptions (a cache that is too small for all), cache hits, guesses and
    /// the cut into stages change no bit.
    #[test]
    fn neighbours_change_no_bit(
        shapes in proptest::collection::vec((1usize..70, 1usize..12), 1..6),
        step_tokens in 6usize..48,
        kv_pages in 6usize..24,
        page_tokens in prop_oneof![Just(16usize), Just(32), Just(48)],
        n_stages in 1usize..4,
        (speculation, recurrent) in (0usize..3, any::<bool>()),
        kv_format in prop_oneof![Just(KvFormat::F32), Just(KvFormat::Bf16), Just(KvFormat::Q8)],
    ) {
        let (_dir, checkpoint) = written(if recurrent { qwen3_next() } else { llama() });
        // Prompts begin alike, so that later ones find pages of earlier ones.
        let requests: Vec<_> = shapes
            .iter()
            .enumerate()
            .map(|(i, (p, n))| Request { prompt: request(0, *p, *n).prompt, ..request(i, *p, *n) })
            .collect();
        let options = LoadOptions {
            dtype: WeightDtype::Q8_0,
            kv_pages: 24,
            kv_format,
            ..LoadOptions::whole(&checkpoint)
        };
        let mut whole = Pipeline::load(&checkpoint, &options, 1, |_| {}).unwrap();
        let uncached = EngineConfig { prefix_cache: false, ..EngineConfig::default() };
        let alone: Vec<_> = requests
            .iter()
            .map(|r| run(&mut whole, uncached.clone(), std::slice::from_ref(r)).remove(0))
            .collect();
        let options = LoadOptions {
            kv_page_tokens: page_tokens,
            // Room for the longest alone.
            kv_pages: kv_pages.max(81usize.div_ceil(page_tokens)),
            ..options
        };
        let mut runner = Pipeline::load(&checkpoint, &options, n_stages, |_| {}).unwrap();
        let config = EngineConfig { step_tokens, running_sequences: 5, ..EngineConfig::default() };
        let mut engine = Engine::new(runner.shape(), runner.log_softmax(), config).unwrap();
        match speculation {
            1 => engine.set_drafter(Box::new(PromptLookup { longest: 3, shortest: 1 })),
            2 => {
                let draft = pipeline(&checkpoint, WeightDtype::Q4_0, 1, 24);
                engine.set_drafter(Box::new(DraftModel::new(Box::new(draft))));
            }
            _ => {}
        }
        // The second round meets the pages of the first.
        for round in 0..2 {
            prop_assert_eq!(&run_on(&mut engine, &mut runner, &requests), &alone, "round {}", round);
        }
        engine.check_integrity();
        // A recurrent model cannot use what is left of a beginning whose end had to make room.
        if !recurrent && requests.iter().any(|r| r.prompt.len() > page_tokens) {
            prop_assert!(engine.metrics().prefix_cache_hits > 0);
        }
    }

    /// Several answers to one prompt, forked inside a page, are those of single requests.
    #[test]
    fn forks_change_no_bit(
        prompt in 1usize..60,
        new in 1usize..20,
        n in 2usize..5,
        n_stages in 1usize..3,
        recurrent in any::<bool>(),
    ) {
        let (_dir, checkpoint) = written(if recurrent { qwen3_next() } else { llama() });
        let mut runner = pipeline(&checkpoint, WeightDtype::F32, n_stages, 40);
        let one = request(0, prompt, new);
        let singles: Vec<_> = (0..n as u64)
            .map(|i| {
                let mut single = one.clone();
                single.sampling.stream += i;
                run(&mut runner, EngineConfig::default(), &[single]).remove(0)
            })
            .collect();
        let mut engine = Engine::new(runner.shape(), runner.log_softmax(), EngineConfig::default()).unwrap();
        let ids = engine.add_group(&one, n).unwrap();
        let mut completions: BTreeMap<_, Completion> = BTreeMap::new();
        while engine.is_busy() {
            for event in engine.step(&mut runner) {
                completions.entry(event.request).or_default().take(event.event);
            }
        }
        for (id, single) in ids.iter().zip(&singles) {
            prop_assert_eq!(&completions[id].tokens, &single.tokens);
        }
        prop_assert_eq!(engine.metrics().rows as usize, prompt + n * (new - 1));
    }
}
