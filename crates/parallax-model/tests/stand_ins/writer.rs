//! The seeded stand-ins of `tests/golden/arch` as GGUF files by the rules of llama.cpp's converter (its `conversion/` folder and
//! the gguf package 0.19, `constants.py` and `tensor_mapping.py`; the rules, no code), and larger ones than are recorded.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::seeded::{Tensor, hf_tensors};

impl Tensor {
    fn new(name: String, shape: &[usize], values: Vec<f32>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        Self { name, shape: shape.to_vec(), values }
    }

    fn renamed(&self, from: &str, to: &str) -> Self {
        Self { name: self.name.replace(from, to), ..self.clone() }
    }

    /// Rows `order[i]` become row `i`.
    fn rows(&self, order: impl IntoIterator<Item = usize>) -> Self {
        let width = self.values.len() / self.shape[0];
        let values: Vec<f32> =
            order.into_iter().flat_map(|r| &self.values[r * width..(r + 1) * width]).copied().collect();
        let mut shape = self.shape.clone();
        shape[0] = values.len() / width;
        Self { name: self.name.clone(), shape, values }
    }

    /// Each of the `n` matrices [a, b] transposed.
    fn transposed(&self, n: usize, [a, b]: [usize; 2]) -> Vec<f32> {
        let at = |i: usize| self.values[i / (a * b) * a * b + i % a * b + i % (a * b) / a];
        assert_eq!(self.values.len(), n * a * b);
        (0..n * a * b).map(at).collect()
    }
}

/// A recording of larger matrices: every size but those of the vocabulary, of heads and of experts times a factor; and the
/// width inside of the feed-forward parts what is given. The numbers of the recording no longer hold.
pub(crate) fn grown(mut golden: Value, factor: u64, ffn: Option<u64>) -> Value {
    let config = &golden["config"];
    let kept = ["vocab_size", "num_attention_heads", "num_local_experts", "n_routed_experts"];
    let kept: Vec<u64> = kept.iter().filter_map(|name| config[name].as_u64()).collect();
    let old = config["intermediate_size"].as_u64().unwrap();
    let ffn = ffn.unwrap_or(factor * old);
    let size = |n: u64| match n {
        n if kept.contains(&n) => n,
        n if n == old => ffn,
        n if n == 2 * old => 2 * ffn,
        n => factor * n,
    };
    for tensor in golden["tensors"].as_array_mut().unwrap() {
        let shape: Vec<u64> = tensor[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        if shape.len() > 1 {
            let last = shape[shape.len() - 1];
            tensor[3] = json!(tensor[3].as_f64().unwrap() * (last as f64 / size(last) as f64).sqrt());
        }
        tensor[1] = shape.into_iter().map(size).collect();
    }
    for field in [
        "hidden_size",
        "moe_intermediate_size",
        "head_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ] {
        if let Some(n) = golden["config"][field].as_u64() {
            golden["config"][field] = json!(factor * n);
        }
    }
    golden["config"]["intermediate_size"] = json!(ffn);
    golden
}

/// A metadata value.
#[derive(Clone)]
pub(crate) enum Key {
    Count(u64),
    Number(f64),
    Flag(bool),
    Text(String),
    /// As the keys of parts are written.
    Short(u16),
}

/// What a GGUF file holds.
#[derive(Clone, Default)]
pub(crate) struct Gguf {
    pub(crate) keys: BTreeMap<String, Key>,
    pub(crate) tensors: Vec<Tensor>,
    /// Tensors of these names are stored as this type of ggml's and these bytes, the others in f32.
    pub(crate) stored: BTreeMap<String, (u32, Vec<u8>)>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Gguf {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            file.extend(text(name));
            let (kind, bytes): (u32, Vec<u8>) = match value {
                Key::Short(v) => (2, v.to_le_bytes().into()),
                Key::Count(v) => (4, (*v as u32).to_le_bytes().into()),
                Key::Number(v) => (6, (*v as f32).to_le_bytes().into()),
                Key::Flag(v) => (7, vec![u8::from(*v)]),
                Key::Text(v) => (8, text(v)),
            };
            file.extend(kind.to_le_bytes());
            file.extend(bytes);
        }
        let mut data: Vec<u8> = Vec::new();
        for t in &self.tensors {
            file.extend(text(&t.name));
            file.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().rev().for_each(|dim| file.extend((*dim as u64).to_le_bytes()));
            let plain = || (0, t.values.iter().flat_map(|v| v.to_le_bytes()).collect());
            let (kind, bytes): (u32, Vec<u8>) = self.stored.get(&t.name).cloned().unwrap_or_else(plain);
            file.extend(kind.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        [file, data].concat()
    }

    /// As so many files, the first with the metadata, as `gguf-split` makes them.
    pub(crate) fn parts(&self, n: usize) -> Vec<Self> {
        let share = self.tensors.len().div_ceil(n);
        let part = |i: usize| {
            let mut keys = if i == 0 { self.keys.clone() } else { BTreeMap::new() };
            keys.insert("split.no".to_owned(), Key::Short(i as u16));
            keys.insert("split.count".to_owned(), Key::Short(n as u16));
            keys.insert("split.tensors.count".to_owned(), Key::Count(self.tensors.len() as u64));
            let own = i * share..((i + 1) * share).min(self.tensors.len());
            Self { keys, tensors: self.tensors[own].to_vec(), stored: self.stored.clone() }
        };
        (0..n).map(part).collect()
    }
}

/// How files of older converters differ.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Age {
    New,
    Old,
}

/// The recording as the converter lays it out, weights in f32.
pub(crate) fn convert(golden: &Value, architecture: &str, age: Age) -> Gguf {
    let config = &golden["config"];
    let mut tensors = stacked_experts(hf_tensors(golden));
    tensors = tensors.into_iter().flat_map(|t| changed(t, config, architecture, age)).collect();
    for t in &mut tensors {
        t.name = gguf_name(architecture, &t.name);
    }
    tensors.extend(rope_factors(config));
    Gguf { keys: keys(config, architecture, age), tensors, stored: BTreeMap::new() }
}

/// D, which not every config.json says.
fn head_dim(config: &Value) -> u64 {
    let size = |name: &str| config[name].as_u64();
    size("head_dim").unwrap_or_else(|| size("hidden_size").unwrap() / size("num_attention_heads").unwrap())
}

/// Divisors of the rotary frequencies: Llama 3's are computed, those of LongRoPE are listed in config.json.
fn rope_factors(config: &Value) -> Vec<Tensor> {
    let rope = &config["rope_parameters"];
    let number = |name: &str| rope[name].as_f64().unwrap();
    let factors = |name: &str, values: Vec<f64>| {
        let values: Vec<f32> = values.into_iter().map(|v| v as f32).collect();
        Tensor::new(name.to_owned(), &[values.len()], values)
    };
    match rope["rope_type"].as_str() {
        Some("llama3") => {
            let (factor, context) = (number("factor"), number("original_max_position_embeddings"));
            let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
            let dim = head_dim(config);
            let of_pair = |i: u64| {
                let wave = std::f64::consts::TAU * number("rope_theta").powf((2 * i) as f64 / dim as f64);
                let smooth = (context / wave - low) / (high - low);
                if wave < context / high {
                    1.0
                } else if wave > context / low {
                    factor
                } else {
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            };
            vec![factors("rope_freqs.weight", (0..dim / 2).map(of_pair).collect())]
        }
        Some("longrope") => [("long_factor", "long"), ("short_factor", "short")]
            .map(|(field, name)| {
                let listed = rope[field].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
                factors(&format!("rope_factors_{name}.weight"), listed)
            })
            .into(),
        _ => Vec::new(),
    }
}

/// The experts of a layer as one tensor each of gate, up and down.
fn stacked_experts(mut tensors: Vec<Tensor>) -> Vec<Tensor> {
    let number =
        |t: &Tensor| -> Option<usize> { t.name.split_once(".experts.")?.1.split('.').next()?.parse().ok() };
    tensors.sort_by_key(number);
    let mut out: Vec<Tensor> = Vec::new();
    for t in tensors {
        let Some((before, rest)) = t.name.split_once(".experts.") else {
            out.push(t);
            continue;
        };
        let Some((_, part)) = rest.split_once('.').filter(|(expert, _)| expert.parse::<usize>().is_ok())
        else {
            out.push(t);
            continue;
        };
        let name = format!("{before}.experts.{part}");
        match out.iter_mut().find(|known| known.name == name) {
            Some(all) => {
                all.shape[0] += 1;
                all.values.extend(t.values);
            }
            None => out.push(Tensor { name, shape: [vec![1], t.shape].concat(), values: t.values }),
        }
    }
    out
}

/// What the converter makes of a tensor.
fn changed(t: Tensor, config: &Value, architecture: &str, age: Age) -> Vec<Tensor> {
    let size = |name: &str| config[name].as_u64().unwrap_or(0) as usize;
    let delta = matches!(architecture, "qwen3next" | "qwen35" | "qwen35moe");
    let inside = |part: &str| t.name.rsplit_once(part).map(|(_, last)| last);
    match inside("self_attn.").or_else(|| inside("mlp.")).unwrap_or_default() {
        // Each head's elements i and i + D/2 side by side.
        "q_proj.weight" | "k_proj.weight" | "q_proj.bias" | "k_proj.bias"
            if matches!(architecture, "llama" | "smollm3") =>
        {
            let (d, n) = (head_dim(config) as usize, t.shape[0]);
            vec![t.rows((0..n).map(|row| row / d * d + row % d / 2 + row % 2 * (d / 2)))]
        }
        "kv_b_proj.weight" if age == Age::New => {
            let (nope, value) = (size("qk_nope_head_dim"), size("v_head_dim"));
            let (heads, rank, head) = (size("num_attention_heads"), size("kv_lora_rank"), nope + value);
            let all = 0..heads * head;
            let keys = t.rows(all.clone().filter(|r| r % head < nope)).transposed(heads, [nope, rank]);
            let values = t.rows(all.filter(|r| r % head >= nope)).values;
            vec![
                Tensor::new(t.name.replace("kv_b_proj", "k_b_proj"), &[heads, rank, nope], keys),
                Tensor::new(t.name.replace("kv_b_proj", "v_b_proj"), &[heads, value, rank], values),
            ]
        }
        "experts.gate_up_proj" | "experts.gate_up_proj_bias" => {
            let (e, f, h) = (size("num_local_experts"), size("intermediate_size"), size("hidden_size"));
            let bias = t.name.ends_with("_bias");
            let rows = if bias { t.values.clone() } else { t.transposed(e, [h, 2 * f]) };
            let rows = Tensor::new(t.name.clone(), &[e * 2 * f, if bias { 1 } else { h }], rows);
            let (suffix, kind) =
                if bias { ("gate_up_proj_bias", "bias") } else { ("gate_up_proj", "weight") };
            let part = |name: &str, first: usize| {
                let half = rows.rows((first..e * 2 * f).step_by(2));
                let shape = if bias { vec![e, f] } else { vec![e, f, h] };
                Tensor::new(t.name.replace(suffix, &format!("{name}.{kind}")), &shape, half.values)
            };
            vec![part("gate_proj", 0), part("up_proj", 1)]
        }
        "experts.down_proj" => {
            let (e, f, h) = (size("num_local_experts"), size("intermediate_size"), size("hidden_size"));
            vec![Tensor::new(t.name.clone() + ".weight", &[e, h, f], t.transposed(e, [f, h]))]
        }
        "experts.down_proj_bias" => vec![t.renamed("_bias", ".bias")],
        _ if delta => delta_net(t, config, architecture, age),
        // With their one.
        _ if matches!(architecture, "gemma2" | "gemma3") && t.name.ends_with("norm.weight") => {
            vec![Tensor { values: t.values.iter().map(|v| v + 1.0).collect(), ..t }]
        }
        _ => vec![t],
    }
}

/// Qwen3-Next and Qwen3.5: norms with their one, decays as they are used, rows by kind, value heads in turn.
fn delta_net(mut t: Tensor, config: &Value, architecture: &str, age: Age) -> Vec<Tensor> {
    let size = |name: &str| config[name].as_u64().unwrap() as usize;
    let (n_keys, n_values) = (size("linear_num_key_heads"), size("linear_num_value_heads"));
    let (key, value) = (size("linear_key_head_dim"), size("linear_value_head_dim"));
    let share = n_values / n_keys;
    let last = t.name.rsplit_once("linear_attn.").map_or("", |(_, last)| last).to_owned();
    if t.name.ends_with("norm.weight") && last != "norm.weight" {
        t.values.iter_mut().for_each(|v| *v += 1.0);
    }
    // Element `at` of a list of value heads of `dim` elements, of which `before` others stand first.
    let dealt = move |at: usize, before: usize, dim: usize| match at.checked_sub(before) {
        Some(at) if architecture != "qwen3next" => {
            let head = at / dim;
            before + (head % n_keys * share + head / n_keys) * dim + at % dim
        }
        _ => at,
    };
    let (rows, keys) = (t.shape[0], 2 * n_keys * key);
    match last.as_str() {
        "A_log" => {
            t.values.iter_mut().for_each(|v| *v = -v.exp());
            vec![t.rows((0..rows).map(|r| dealt(r, 0, 1)))]
        }
        "dt_bias" | "in_proj_a.weight" | "in_proj_b.weight" => {
            vec![t.rows((0..rows).map(|r| dealt(r, 0, 1)))]
        }
        "in_proj_qkv.weight" => vec![t.rows((0..rows).map(|r| dealt(r, keys, value)))],
        "in_proj_z.weight" => vec![t.rows((0..rows).map(|r| dealt(r, 0, value)))],
        "conv1d.weight" => {
            let taps = t.shape[2];
            let t = t.rows((0..rows).map(|r| dealt(r, keys, value)));
            vec![Tensor::new(t.name.clone(), &[rows, taps], t.values)]
        }
        "out_proj.weight" => {
            let [n, k] = [t.shape[0], t.shape[1]];
            let columns = (0..n * k).map(|i| t.values[i / k * k + dealt(i % k, 0, value)]).collect();
            vec![Tensor::new(t.name.clone(), &[n, k], columns)]
        }
        "in_proj_qkvz.weight" if age == Age::New => {
            let stride = 2 * key + 2 * share * value;
            let part = |first: usize, n: usize| {
                (0..n_keys).flat_map(move |head| head * stride + first..head * stride + first + n)
            };
            let width = share * value;
            let qkv = part(0, key).chain(part(key, key)).chain(part(2 * key, width));
            vec![
                t.rows(qkv).renamed("in_proj_qkvz", "in_proj_qkv"),
                t.rows(part(2 * key + width, width)).renamed("in_proj_qkvz", "in_proj_z"),
            ]
        }
        "" if t.name.ends_with("shared_expert_gate.weight") => {
            let n = t.values.len();
            vec![Tensor::new(t.name.clone(), &[n], t.values)]
        }
        _ => vec![t],
    }
}

/// The name in a GGUF file.
fn gguf_name(architecture: &str, name: &str) -> String {
    let whole = [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ];
    if let Some((_, gguf)) = whole.iter().find(|(hf, _)| *hf == name) {
        return (*gguf).to_owned();
    }
    let (layer, tensor) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let without_suffix = match tensor {
        "self_attn.sinks" => "attn_sinks.weight",
        "linear_attn.A_log" => "ssm_a",
        "linear_attn.dt_bias" => "ssm_dt.bias",
        "mlp.gate.e_score_correction_bias" | "block_sparse_moe.e_score_correction_bias" => "exp_probs_b.bias",
        _ => "",
    };
    if !without_suffix.is_empty() {
        return format!("blk.{layer}.{without_suffix}");
    }
    let (module, kind) = tensor.rsplit_once('.').unwrap();
    let module = match module {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => match architecture {
            "gpt-oss" | "glm4moe" | "qwen3next" | "qwen35" | "qwen35moe" | "gemma2" | "gemma3" => {
                "post_attention_norm"
            }
            _ => "ffn_norm",
        },
        "pre_feedforward_layernorm" => "ffn_norm",
        "post_self_attn_layernorm" => "post_attention_norm",
        "post_feedforward_layernorm" | "post_mlp_layernorm" => "post_ffw_norm",
        "self_attn.qkv_proj" => "attn_qkv",
        "mlp.gate_up_proj" => "ffn_up",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "self_attn.q_a_proj" => "attn_q_a",
        "self_attn.q_a_layernorm" => "attn_q_a_norm",
        "self_attn.q_b_proj" => "attn_q_b",
        "self_attn.kv_a_proj_with_mqa" => "attn_kv_a_mqa",
        "self_attn.kv_a_layernorm" => "attn_kv_a_norm",
        "self_attn.kv_b_proj" => "attn_kv_b",
        "self_attn.k_b_proj" => "attn_k_b",
        "self_attn.v_b_proj" => "attn_v_b",
        "linear_attn.in_proj_qkvz" => "ssm_in",
        "linear_attn.in_proj_ba" => "ssm_ba",
        "linear_attn.in_proj_qkv" => "attn_qkv",
        "linear_attn.in_proj_z" => "attn_gate",
        "linear_attn.in_proj_b" => "ssm_beta",
        "linear_attn.in_proj_a" => "ssm_alpha",
        "linear_attn.conv1d" => "ssm_conv1d",
        "linear_attn.norm" => "ssm_norm",
        "linear_attn.out_proj" => "ssm_out",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.gate" | "mlp.router" | "block_sparse_moe.gate" => "ffn_gate_inp",
        "mlp.experts.gate_proj" | "block_sparse_moe.experts.w1" => "ffn_gate_exps",
        "mlp.experts.up_proj" | "block_sparse_moe.experts.w3" => "ffn_up_exps",
        "mlp.experts.down_proj" | "block_sparse_moe.experts.w2" => "ffn_down_exps",
        "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
        "mlp.shared_experts.gate_proj" | "mlp.shared_expert.gate_proj" => "ffn_gate_shexp",
        "mlp.shared_experts.up_proj" | "mlp.shared_expert.up_proj" => "ffn_up_shexp",
        "mlp.shared_experts.down_proj" | "mlp.shared_expert.down_proj" => "ffn_down_shexp",
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{module}.{kind}")
}

/// The metadata.
fn keys(config: &Value, architecture: &str, age: Age) -> BTreeMap<String, Key> {
    let mut keys = BTreeMap::from([("general.architecture".to_owned(), Key::Text(architecture.to_owned()))]);
    let mut put = |name: &str, value: Option<Key>| {
        keys.extend(value.map(|value| (format!("{architecture}.{name}"), value)));
    };
    let size = |field: &str| config[field].as_u64();
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
        ("expert_count", "num_experts"),
        ("expert_count", "n_routed_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_group_count", "n_group"),
        ("expert_group_used_count", "topk_group"),
        ("expert_shared_count", "n_shared_experts"),
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ("ssm.conv_kernel", "linear_conv_kernel_dim"),
        ("ssm.state_size", "linear_key_head_dim"),
        ("ssm.group_count", "linear_num_key_heads"),
        ("ssm.time_step_rank", "linear_num_value_heads"),
        ("attention.q_lora_rank", "q_lora_rank"),
        ("attention.kv_lora_rank", "kv_lora_rank"),
    ] {
        put(name, size(field).map(Key::Count));
    }
    for (name, value) in [
        ("attention.layer_norm_rms_epsilon", &config["rms_norm_eps"]),
        ("attn_logit_softcapping", &config["attn_logit_softcapping"]),
        ("final_logit_softcapping", &config["final_logit_softcapping"]),
        ("expert_weights_scale", &config["routed_scaling_factor"]),
    ] {
        put(name, value.as_f64().map(Key::Number));
    }
    let experts = if matches!(architecture, "gpt-oss" | "minimax-m2") {
        "intermediate_size"
    } else {
        "moe_intermediate_size"
    };
    put("expert_feed_forward_length", size(experts).map(Key::Count));
    put("expert_weights_norm", config["norm_topk_prob"].as_bool().filter(|v| *v).map(Key::Flag));
    // Released files of these say it in their config.json.
    let sigmoid = ["deepseek_v3", "glm4_moe", "minimax_m2"].iter().any(|name| config["model_type"] == *name);
    put("expert_gating_func", sigmoid.then_some(Key::Count(2)));
    put(
        "attention.sliding_window",
        match architecture {
            "llama" => None,
            // Zero says that there is none.
            "phi3" => Some(Key::Count(size("sliding_window").unwrap_or(0))),
            _ => size("sliding_window").map(Key::Count),
        },
    );
    for (name, key) in rope_keys(config, architecture) {
        put(name, Some(key));
    }
    if let (Some(n), Some(dim)) = (size("linear_num_value_heads"), size("linear_value_head_dim")) {
        put("ssm.inner_size", Some(Key::Count(n * dim)));
    }
    if let (Some(nope), Some(rope)) = (size("qk_nope_head_dim"), size("qk_rope_head_dim")) {
        put("rope.dimension_count", Some(Key::Count(rope)));
        let value = size("v_head_dim").map(Key::Count);
        if age == Age::Old {
            put("attention.key_length", Some(Key::Count(nope + rope)));
            put("attention.value_length", value);
        } else {
            let rank = size("kv_lora_rank").unwrap();
            put("attention.head_count_kv", Some(Key::Count(1)));
            put("attention.key_length", Some(Key::Count(rank + rope)));
            put("attention.value_length", Some(Key::Count(rank)));
            put("attention.key_length_mla", Some(Key::Count(nope + rope)));
            put("attention.value_length_mla", value);
        }
    }
    keys
}

/// The metadata of rotary positions.
fn rope_keys(config: &Value, architecture: &str) -> Vec<(&'static str, Key)> {
    let size = |field: &str| config[field].as_u64();
    let all = &config["rope_parameters"];
    // Of several kinds of layers the ones that see everything.
    let rope = if all["full_attention"].is_object() { &all["full_attention"] } else { all };
    let mut keys = Vec::new();
    let mut put = |name: &'static str, value: Option<Key>| keys.extend(value.map(|value| (name, value)));
    let number = |value: &Value| value.as_f64().map(Key::Number);
    // All Gemma 2 have the same.
    put("rope.freq_base", number(&rope["rope_theta"]).filter(|_| architecture != "gemma2"));
    put("rope.freq_base_swa", number(&all["sliding_attention"]["rope_theta"]));
    let original = match architecture {
        "phi3" => size("original_max_position_embeddings"),
        _ => rope["original_max_position_embeddings"].as_u64().filter(|_| rope["rope_type"] == "yarn"),
    };
    put("rope.scaling.original_context_length", original.map(Key::Count));
    match rope["rope_type"].as_str() {
        Some(kind @ ("linear" | "yarn")) => {
            put("rope.scaling.type", Some(Key::Text(kind.to_owned())));
            put("rope.scaling.factor", number(&rope["factor"]));
            put("rope.scaling.yarn_beta_fast", number(&rope["beta_fast"]));
            put("rope.scaling.yarn_beta_slow", number(&rope["beta_slow"]));
            let tenth = rope["mscale_all_dim"].as_f64().map(|m| Key::Number(0.1 * m));
            put("rope.scaling.yarn_log_multiplier", tenth);
        }
        Some("longrope") => {
            let whole = size("max_position_embeddings").unwrap() as f64;
            let original = original.unwrap() as f64;
            let factor = (1.0 + (whole / original).max(1.0).ln() / original.ln()).sqrt();
            put("rope.scaling.attn_factor", Some(Key::Number(factor)));
        }
        _ => {}
    }
    let head = head_dim(config);
    let rotated = rope["partial_rotary_factor"].as_f64().map(|share| (head as f64 * share) as u64);
    let rotated = rotated.or_else(|| matches!(architecture, "llama" | "smollm3").then_some(head));
    put("rope.dimension_count", size("rotary_dim").or(rotated).map(Key::Count));
    keys
}
