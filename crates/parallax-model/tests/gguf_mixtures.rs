//! Mixtures of experts out of GGUF files: a stand-in as llama.cpp's converter writes it gives the bits of the safetensors
//! checkpoint that it was made of.

#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]

use std::path::Path;

use parallax_model::{
    Checkpoint, ForwardBatch, LoadOptions, SequenceRows, Stage, StageInput, Want, WeightDtype,
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Values of a tensor: SplitMix64 of the FNV-1a hash of its name plus a counter, multiples of 2^-23 in -1..1.
fn uniform(name: &str, n: u64) -> impl Iterator<Item = f32> {
    let hash = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
    (1..=n).map(move |i| {
        let mut z = hash.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

struct Fixture {
    name: &'static str,
    golden: Value,
    checkpoint: Checkpoint,
    dir: TempDir,
}

fn fixture(name: &'static str) -> Fixture {
    let path = format!("{}/../../tests/golden/arch/{name}.json", env!("CARGO_MANIFEST_DIR"));
    fixture_of(name, serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap())
}

fn fixture_of(name: &'static str, golden: Value) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), golden["config"].to_string()).unwrap();
    write_weights(&golden, &dir.path().join("model.safetensors"));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    Fixture { name, golden, checkpoint, dir }
}

fn write_weights(golden: &Value, path: &Path) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for tensor in golden["tensors"].as_array().unwrap() {
        let name = tensor[0].as_str().unwrap();
        let n = tensor[1].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).product();
        let (offset, scale) = (tensor[2].as_f64().unwrap() as f32, tensor[3].as_f64().unwrap() as f32);
        let start = data.len();
        data.extend(uniform(name, n).flat_map(|v| (offset + scale * v).to_le_bytes()));
        let entry = json!({"dtype": "F32", "shape": tensor[1], "data_offsets": [start, data.len()]});
        header.insert(name.to_owned(), entry);
    }
    let header = Value::Object(header).to_string();
    let size = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [size.as_slice(), header.as_bytes(), &data].concat()).unwrap();
}

/// The name in a GGUF file of a tensor under its Hugging Face name, and the expert whose part of it this is.
fn gguf_name(name: &str) -> (String, Option<usize>) {
    let whole = [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ];
    if let Some((_, gguf)) = whole.iter().find(|(hf, _)| *hf == name) {
        return ((*gguf).to_owned(), None);
    }
    let (layer, module) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let module = module.strip_suffix(".weight").unwrap();
    let modules = [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate", "ffn_gate_inp"),
        ("block_sparse_moe.gate", "ffn_gate_inp"),
    ];
    if let Some((_, gguf)) = modules.iter().find(|(hf, _)| *hf == module) {
        return (format!("blk.{layer}.{gguf}.weight"), None);
    }
    let (_, expert) = module.split_once(".experts.").unwrap();
    let (expert, part) = expert.split_once('.').unwrap();
    let part = match part {
        "w1" | "gate_proj" => "gate",
        "w3" | "up_proj" => "up",
        "w2" | "down_proj" => "down",
        other => panic!("{other}"),
    };
    (format!("blk.{layer}.ffn_{part}_exps.weight"), Some(expert.parse().unwrap()))
}

/// Rows of each head in llama.cpp's order: element i beside element i + D/2.
fn paired(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let (width, half) = (values.len() / (heads * head_dim), head_dim / 2);
    (0..heads * head_dim)
        .flat_map(|row| {
            let (head, i) = (row / head_dim, row % head_dim);
            let from = head * head_dim + i / 2 + i % 2 * half;
            values[from * width..(from + 1) * width].to_vec()
        })
        .collect()
}

/// The fixture as llama.cpp's converter lays it out (the keys and tensor names of its `MODEL_ARCH`), weights in f32.
fn write_gguf(golden: &Value, architecture: &str, path: &Path) {
    let config = &golden["config"];
    let number = |name: &str| config[name].as_u64().unwrap();
    let pairs = architecture == "llama";
    // Tensors by name: dimensions, innermost first, and values; experts one behind the other.
    let mut tensors: Vec<(String, Vec<u64>, Vec<f32>)> = Vec::new();
    for tensor in golden["tensors"].as_array().unwrap() {
        let name = tensor[0].as_str().unwrap();
        let mut dims: Vec<u64> = tensor[1].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
        dims.reverse();
        let (offset, scale) = (tensor[2].as_f64().unwrap() as f32, tensor[3].as_f64().unwrap() as f32);
        let mut values: Vec<f32> = uniform(name, dims.iter().product()).map(|v| offset + scale * v).collect();
        let heads = match () {
            () if pairs && name.ends_with("q_proj.weight") => number("num_attention_heads"),
            () if pairs && name.ends_with("k_proj.weight") => number("num_key_value_heads"),
            () => 0,
        };
        if heads > 0 {
            values = paired(&values, heads as usize, number("head_dim") as usize);
        }
        let (gguf, expert) = gguf_name(name);
        match tensors.iter_mut().find(|(known, _, _)| *known == gguf) {
            Some((_, dims, all)) => {
                assert_eq!(dims[2], expert.unwrap() as u64, "experts come in order");
                dims[2] += 1;
                all.extend(values);
            }
            None => {
                dims.extend(expert.map(|_| 1));
                tensors.push((gguf, dims, values));
            }
        }
    }
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let mut keys: Vec<Vec<u8>> =
        vec![[text("general.architecture"), 8u32.to_le_bytes().into(), text(architecture)].concat()];
    let mut unsigned = |name: &str, value: u64| {
        let key = text(&format!("{architecture}.{name}"));
        keys.push([key, 4u32.to_le_bytes().into(), (value as u32).to_le_bytes().into()].concat());
    };
    for (name, field) in [
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("context_length", "max_position_embeddings"),
        ("vocab_size", "vocab_size"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
    ] {
        unsigned(name, number(field));
    }
    for (name, field) in [
        ("attention.sliding_window", "sliding_window"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
    ] {
        if let Some(value) = config[field].as_u64() {
            unsigned(name, value);
        }
    }
    let theta = config["rope_parameters"]["rope_theta"].as_f64().unwrap();
    for (name, value) in [
        ("attention.layer_norm_rms_epsilon", config["rms_norm_eps"].as_f64().unwrap()),
        ("rope.freq_base", theta),
    ] {
        let key = text(&format!("{architecture}.{name}"));
        keys.push([key, 6u32.to_le_bytes().into(), (value as f32).to_le_bytes().into()].concat());
    }
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((keys.len() as u64).to_le_bytes());
    file.extend(keys.concat());
    let (mut data, padded) =
        (Vec::new(), |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(32), 0));
    for (name, dims, values) in &tensors {
        file.extend(text(name));
        file.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
        file.extend(0u32.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        padded(&mut data);
    }
    padded(&mut file);
    std::fs::write(path, [file, data].concat()).unwrap();
}

/// The fixture with experts in layer 1 too: what GGUF files of Qwen3-MoE have.
fn all_sparse(f: Fixture) -> Fixture {
    let mut golden = f.golden;
    let name = |tensor: &Value| tensor[0].as_str().unwrap().to_owned();
    let (dense, mut kept): (Vec<Value>, Vec<Value>) = golden["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .cloned()
        .partition(|tensor| name(tensor).starts_with("model.layers.1.mlp."));
    assert_eq!(dense.len(), 3);
    let experts: Vec<Value> = kept
        .iter()
        .filter(|tensor| name(tensor).starts_with("model.layers.0.mlp."))
        .map(|tensor| {
            let mut tensor = tensor.clone();
            tensor[0] = json!(name(&tensor).replacen(".0.", ".1.", 1));
            tensor
        })
        .collect();
    kept.extend(experts);
    golden["tensors"] = json!(kept);
    golden["config"]["mlp_only_layers"] = json!([]);
    fixture_of(f.name, golden)
}

/// Bits of the logits after every token.
fn forward(stage: &mut Stage, tokens: &[u32]) -> Vec<u32> {
    let n = u32::try_from(tokens.len()).unwrap();
    let rows =
        SequenceRows { rows: n, pages: (0..16).collect(), want: Want::AllLogits, ..SequenceRows::default() };
    let batch = ForwardBatch { sequences: vec![rows] };
    let logits = stage.forward(&batch, StageInput::Tokens(tokens)).unwrap().logits;
    logits.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn gguf_files_of_mixtures_give_the_bits_of_safetensors() {
    for (name, architecture) in [("mixtral", "llama"), ("qwen3-moe", "qwen3moe")] {
        let f = if name == "mixtral" { fixture(name) } else { all_sparse(fixture(name)) };
        let path = f.dir.path().join("model.gguf");
        write_gguf(&f.golden, architecture, &path);
        let gguf = Checkpoint::open(&path).unwrap();
        assert_eq!(gguf.config().family, f.checkpoint.config().family);
        let tokens = ids(&f.golden["prompts"].as_array().unwrap().last().unwrap()["tokens"]);
        let n_layers = f.checkpoint.config().n_layers;
        let mut logits = Vec::new();
        for checkpoint in [&f.checkpoint, &gguf] {
            let options =
                LoadOptions { dtype: WeightDtype::F32, kv_pages: 64, ..LoadOptions::whole(checkpoint) };
            assert_eq!(options.layers, 0..n_layers);
            let mut stage = Stage::load(checkpoint, &options).unwrap();
            logits.push(forward(&mut stage, &tokens));
        }
        assert!(logits[0] == logits[1], "{name}");
    }
}
