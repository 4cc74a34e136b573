//! Quantised Hugging Face checkpoints as whole models: each computes what a checkpoint of its dequantised values does.
//!
//! The writers below round plainly and lay the numbers out as the released checkpoints do: blocks of FP8 as DeepSeek-V3 and
//! Qwen3-FP8, rows of FP8 and packed integers as compressed-tensors, GPTQ as AutoGPTQ (zero points less one), AWQ as AutoAWQ's
//! "gemm", MXFP4 as GPT-OSS. What is no linear layer stays bf16, as in all of them.

use half::{bf16, f16};
use parallax_model::{Checkpoint, StageInput, WeightDtype};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

use super::seeded::{Tensor, bits, hf_tensors, longest_prompt, relative, worst, write_safetensors};
use super::writer::grown;
use super::{OF_BLOCKS, forward_in, logits, logits_in, recording};

/// A tensor of the quantised file.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    /// A scale in f32, in bf16 or as a power of two (E8M0, or a byte that holds one) per block of these sizes.
    Fp8Blocks([usize; 2], Dtype),
    Fp8Rows,
    Gptq {
        bits: u32,
        group: usize,
        act_order: bool,
    },
    Awq {
        group: usize,
    },
    Packed {
        group: usize,
        act_order: bool,
    },
    Mxfp4,
}

/// What the weights become where no format is asked for.
#[derive(PartialEq)]
enum Native {
    /// bf16 of the values.
    Bf16,
    /// They stay blocks: so many bits a weight of the layers, scales included. The kernels round what is multiplied with
    /// them to eight bits.
    Blocks(f64),
}

/// Recording, factor of its sizes, format, what it becomes.
const CASES: [(&str, u64, Format, Native); 16] = [
    ("qwen3", 4, Format::Fp8Blocks([128, 128], Dtype::BF16), Native::Bf16),
    ("qwen3-moe-plain", 4, Format::Fp8Blocks([128, 128], Dtype::BF16), Native::Bf16),
    ("deepseek-v3", 1, Format::Fp8Blocks([32, 48], Dtype::F32), Native::Bf16),
    ("deepseek-v3", 1, Format::Fp8Blocks([32, 48], Dtype::F8_E8M0), Native::Bf16),
    ("deepseek-v3", 1, Format::Fp8Blocks([32, 48], Dtype::U8), Native::Bf16),
    ("llama", 4, Format::Fp8Rows, Native::Bf16),
    ("qwen2", 4, Format::Gptq { bits: 4, group: 128, act_order: false }, Native::Blocks(5.0)),
    ("qwen2", 4, Format::Gptq { bits: 4, group: 128, act_order: true }, Native::Bf16),
    ("llama", 4, Format::Gptq { bits: 8, group: 32, act_order: false }, Native::Blocks(8.5)),
    ("qwen3-moe-plain", 4, Format::Gptq { bits: 4, group: 32, act_order: false }, Native::Blocks(5.0)),
    ("llama", 4, Format::Awq { group: 64 }, Native::Blocks(5.0)),
    ("phi3", 4, Format::Awq { group: 64 }, Native::Blocks(5.0)),
    ("qwen3-moe-plain", 4, Format::Awq { group: 32 }, Native::Blocks(5.0)),
    ("llama", 4, Format::Packed { group: 32, act_order: false }, Native::Blocks(5.0)),
    ("llama", 4, Format::Packed { group: 32, act_order: true }, Native::Bf16),
    // With attention in bf16.
    ("gpt-oss", 2, Format::Mxfp4, Native::Blocks(6.9)),
];

impl Format {
    /// `quantization_config` of config.json.
    fn settings(self) -> Value {
        let compressed = |format: &str, weights: Value| {
            let group = json!({"targets": ["Linear"], "weights": weights, "input_activations": null});
            json!({"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
                "config_groups": {"group_0": group}, "quantization_status": "compressed"})
        };
        match self {
            Self::Fp8Blocks(block, dtype) => {
                let mut settings = json!({"quant_method": "fp8", "fmt": "e4m3",
                    "activation_scheme": "dynamic", "weight_block_size": block});
                if dtype == Dtype::U8 {
                    settings["scale_fmt"] = json!("ue8m0");
                }
                settings
            }
            Self::Fp8Rows => compressed(
                "float-quantized",
                json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "channel"}),
            ),
            Self::Gptq { bits, group, act_order } => json!({"quant_method": "gptq", "bits": bits,
                "group_size": group, "desc_act": act_order, "sym": true, "checkpoint_format": "gptq"}),
            Self::Awq { group } => json!({"quant_method": "awq", "bits": 4, "group_size": group,
                "version": "gemm", "zero_point": true}),
            Self::Packed { group, act_order } => compressed(
                "pack-quantized",
                json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group",
                    "group_size": group, "actorder": act_order.then_some("group")}),
            ),
            Self::Mxfp4 => json!({"quant_method": "mxfp4", "modules_to_not_convert":
                ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}),
        }
    }

    /// Whether a tensor is quantised.
    fn takes(self, t: &Tensor) -> bool {
        let routers = ["mlp.gate.weight", "mlp.router.weight"];
        match self {
            Self::Mxfp4 => t.name.ends_with("experts.gate_up_proj") || t.name.ends_with("experts.down_proj"),
            _ => {
                let linear = t.shape.len() == 2 && t.name.contains(".layers.") && t.name.ends_with(".weight");
                linear && !routers.iter().any(|router| t.name.ends_with(router))
            }
        }
    }

    /// The tensors that stand for one, which takes the values that they mean.
    fn quantise(self, t: &mut Tensor) -> Vec<Stored> {
        match self {
            Self::Fp8Blocks(block, dtype) => fp8(t, block, dtype, "weight_scale_inv"),
            Self::Fp8Rows => fp8(t, [1, t.shape[1]], Dtype::BF16, "weight_scale"),
            Self::Gptq { bits, group, act_order } => gptq(t, bits, group, act_order),
            Self::Awq { group } => awq(t, group),
            Self::Packed { group, act_order } => packed(t, group, act_order),
            Self::Mxfp4 => mxfp4(t),
        }
    }
}

/// A number as bytes of a type, and what it is then.
fn rounded(dtype: Dtype, value: f32) -> (Vec<u8>, f32) {
    match dtype {
        Dtype::F32 => (value.to_le_bytes().into(), value),
        Dtype::BF16 => (bf16::from_f32(value).to_le_bytes().into(), bf16::from_f32(value).to_f32()),
        Dtype::F16 => (f16::from_f32(value).to_le_bytes().into(), f16::from_f32(value).to_f32()),
        // The next larger one, so that no code has to be larger than there are.
        Dtype::F8_E8M0 | Dtype::U8 => {
            let exponent = value.log2().ceil() as i32;
            (vec![(exponent + 127) as u8], f32::powi(2.0, exponent))
        }
        other => panic!("{other:?}"),
    }
}

fn words(name: String, shape: Vec<usize>, words: &[u32]) -> Stored {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Stored { name, dtype: Dtype::I32, shape, bytes }
}

/// Values of the eight-bit floats 0..=0x7E: four bits of exponent with bias 7, three of mantissa; 0x7F is no number.
fn e4m3() -> Vec<f32> {
    let value = |code: i32| match code >> 3 {
        0 => (code & 7) as f32 / 512.0,
        exponent => (1.0 + (code & 7) as f32 / 8.0) * f32::powi(2.0, exponent - 7),
    };
    (0..0x7F).map(value).collect()
}

/// The nearest of ascending values.
fn nearest(table: &[f32], value: f32) -> usize {
    let above = table.partition_point(|v| *v < value).clamp(1, table.len() - 1);
    if value - table[above - 1] < table[above] - value { above - 1 } else { above }
}

fn fp8(t: &mut Tensor, block: [usize; 2], dtype: Dtype, suffix: &str) -> Vec<Stored> {
    let [n, k] = [t.shape[0], t.shape[1]];
    let blocks = [n.div_ceil(block[0]), k.div_ceil(block[1])];
    let block_of = |i: usize| i / k / block[0] * blocks[1] + i % k / block[1];
    let mut largest = vec![0f32; blocks[0] * blocks[1]];
    for (i, value) in t.values.iter().enumerate() {
        largest[block_of(i)] = largest[block_of(i)].max(value.abs());
    }
    let table = e4m3();
    let scales: Vec<(Vec<u8>, f32)> = largest.iter().map(|m| rounded(dtype, m / 448.0)).collect();
    let mut codes = Vec::with_capacity(n * k);
    for (i, value) in t.values.iter_mut().enumerate() {
        let scale = scales[block_of(i)].1;
        let code = nearest(&table, value.abs() / scale);
        codes.push(code as u8 | u8::from(*value < 0.0) << 7);
        *value = (table[code] * scale).copysign(*value);
    }
    let scale = Stored {
        name: t.name.replace("weight", suffix),
        dtype,
        shape: blocks.into(),
        bytes: scales.into_iter().flat_map(|(bytes, _)| bytes).collect(),
    };
    vec![Stored { name: t.name.clone(), dtype: Dtype::F8_E4M3, shape: t.shape.clone(), bytes: codes }, scale]
}

/// Integer codes of a matrix in groups of inputs, and what they mean.
struct Codes {
    /// [N, K]
    codes: Vec<u32>,
    /// [N, groups], as bytes of their type.
    scales: Vec<Vec<u8>>,
    /// [N, groups]
    zeros: Vec<u32>,
    groups: usize,
}

/// Rounds a matrix, whose values become those of the codes: around the middle code, or between the ends of each group.
fn codes(t: &mut Tensor, bits: u32, dtype: Dtype, symmetric: bool, group_of: &[usize]) -> Codes {
    let [n, k] = [t.shape[0], t.shape[1]];
    let (groups, last) = (group_of.iter().max().unwrap() + 1, ((1u32 << bits) - 1) as f32);
    let mut out = Codes { codes: vec![0; n * k], scales: Vec::new(), zeros: Vec::new(), groups };
    for row in 0..n {
        let values = &mut t.values[row * k..(row + 1) * k];
        for group in 0..groups {
            let members: Vec<usize> = (0..k).filter(|i| group_of[*i] == group).collect();
            let low = members.iter().fold(0f32, |m, i| m.min(values[*i]));
            let high = members.iter().fold(0f32, |m, i| m.max(values[*i]));
            let reach = if symmetric { 2.0 * high.max(-low) } else { high - low };
            let (bytes, scale) = rounded(dtype, reach / last);
            let zero = if symmetric { last.div_euclid(2.0) + 1.0 } else { (-low / scale).round().min(last) };
            for i in members {
                let code = ((values[i] / scale).round() + zero).clamp(0.0, last);
                out.codes[row * k + i] = code as u32;
                values[i] = scale * (code - zero);
            }
            out.scales.push(bytes);
            out.zeros.push(zero as u32);
        }
    }
    out
}

/// Fields of so many bits, the first in the lowest.
fn word(bits: u32, fields: impl IntoIterator<Item = u32>) -> u32 {
    fields.into_iter().zip(0..).fold(0, |word, (field, i)| word | field << (bits * i))
}

/// [N, groups] as [groups, N].
fn by_group<T: Clone>(of_rows: &[T], groups: usize) -> Vec<T> {
    (0..groups).flat_map(|group| of_rows.iter().skip(group).step_by(groups).cloned()).collect()
}

/// The group of each input. Act-order deals them out: 37 shares no divisor with the numbers of inputs here.
fn groups(k: usize, group: usize, act_order: bool) -> Vec<usize> {
    let place = |i: usize| if act_order { (i * 37 + 11) % k } else { i };
    (0..k).map(|i| place(i) / group).collect()
}

fn gptq(t: &mut Tensor, bits: u32, group: usize, act_order: bool) -> Vec<Stored> {
    let [n, k] = [t.shape[0], t.shape[1]];
    let group_of = groups(k, group, act_order);
    let coded = codes(t, bits, Dtype::F16, true, &group_of);
    let (per, groups) = ((32 / bits) as usize, coded.groups);
    let name = |what: &str| t.name.replace("weight", what);
    let along_inputs = |i: usize| {
        let (first, row) = (i / n * per, i % n);
        word(bits, (first..first + per).map(|column| coded.codes[row * k + column]))
    };
    let weights: Vec<u32> = (0..k / per * n).map(along_inputs).collect();
    let zeros = by_group(&coded.zeros, groups);
    let zeros: Vec<u32> = zeros.chunks(per).map(|c| word(bits, c.iter().map(|zero| zero - 1))).collect();
    let order: Vec<u32> = group_of.iter().map(|group| *group as u32).collect();
    let scales = by_group(&coded.scales, groups).concat();
    vec![
        words(name("qweight"), vec![k / per, n], &weights),
        words(name("qzeros"), vec![groups, n / per], &zeros),
        Stored { name: name("scales"), dtype: Dtype::F16, shape: vec![groups, n], bytes: scales },
        words(name("g_idx"), vec![k], &order),
    ]
}

fn awq(t: &mut Tensor, group: usize) -> Vec<Stored> {
    let [n, k] = [t.shape[0], t.shape[1]];
    let group_of: Vec<usize> = (0..k).map(|i| i / group).collect();
    let coded = codes(t, 4, Dtype::F16, false, &group_of);
    let groups = coded.groups;
    let name = |what: &str| t.name.replace("weight", what);
    // Eight outputs in a word, in this order.
    let eight = |outputs: &[u32]| word(4, [0, 2, 4, 6, 1, 3, 5, 7].map(|i| outputs[i]));
    let by_input: Vec<u32> = by_group(&coded.codes, k);
    let weights: Vec<u32> = by_input.chunks(8).map(eight).collect();
    let zeros: Vec<u32> = by_group(&coded.zeros, groups).chunks(8).map(eight).collect();
    let scales = by_group(&coded.scales, groups).concat();
    vec![
        words(name("qweight"), vec![k, n / 8], &weights),
        words(name("qzeros"), vec![groups, n / 8], &zeros),
        Stored { name: name("scales"), dtype: Dtype::F16, shape: vec![groups, n], bytes: scales },
    ]
}

fn packed(t: &mut Tensor, group: usize, act_order: bool) -> Vec<Stored> {
    let [n, k] = [t.shape[0], t.shape[1]];
    let group_of = groups(k, group, act_order);
    let coded = codes(t, 4, Dtype::BF16, true, &group_of);
    let weights: Vec<u32> = coded.codes.chunks(8).map(|c| word(4, c.iter().copied())).collect();
    let shape = [n, k].iter().flat_map(|n| (*n as i64).to_le_bytes()).collect();
    let scales = coded.scales.concat();
    let name = |what: &str| format!("{}_{what}", t.name);
    let mut stored = vec![
        words(name("packed"), vec![n, k / 8], &weights),
        Stored { name: name("scale"), dtype: Dtype::BF16, shape: vec![n, coded.groups], bytes: scales },
        Stored { name: name("shape"), dtype: Dtype::I64, shape: vec![2], bytes: shape },
    ];
    if act_order {
        let order: Vec<u32> = group_of.iter().map(|group| *group as u32).collect();
        stored.push(words(name("g_idx"), vec![k], &order));
    }
    stored
}

/// [E, K, N] in memory, [E, N, K / 32, 16] with exponents [E, N, K / 32] in the file: a byte has two neighbours.
fn mxfp4(t: &mut Tensor) -> Vec<Stored> {
    let [e, k, n] = [t.shape[0], t.shape[1], t.shape[2]];
    let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let (mut blocks, mut exponents) = (Vec::new(), Vec::new());
    for block in 0..e * n * k / 32 {
        let (row, first) = (block / (k / 32), block % (k / 32) * 32);
        let at = |i: usize| row / n * k * n + (first + i) * n + row % n;
        let largest = (0..32).fold(0f32, |m, i| m.max(t.values[at(i)].abs()));
        let exponent = largest.log2().floor() as i32 - 2;
        let mut nibbles = [0u8; 32];
        for (i, nibble) in nibbles.iter_mut().enumerate() {
            let value = &mut t.values[at(i)];
            let code = nearest(&table, value.abs() / f32::powi(2.0, exponent));
            *nibble = code as u8 | u8::from(*value < 0.0) << 3;
            *value = (table[code] * f32::powi(2.0, exponent)).copysign(*value);
        }
        exponents.push((exponent + 127) as u8);
        blocks.extend(nibbles.chunks(2).map(|pair| pair[0] | pair[1] << 4));
    }
    let stored = |what: &str, shape: Vec<usize>, bytes: Vec<u8>| Stored {
        name: format!("{}_{what}", t.name),
        dtype: Dtype::U8,
        shape,
        bytes,
    };
    vec![stored("blocks", vec![e, n, k / 32, 16], blocks), stored("scales", vec![e, n, k / 32], exponents)]
}

/// The quantised checkpoint, that of its values, and that of the values before.
fn checkpoints(golden: &Value, format: Format) -> (tempfile::TempDir, [Checkpoint; 3]) {
    let (mut tensors, mut file) = (hf_tensors(golden), Vec::new());
    let before = tensors.clone();
    for t in &mut tensors {
        if format.takes(t) {
            file.extend(format.quantise(t));
            continue;
        }
        let (bytes, values): (Vec<Vec<u8>>, Vec<f32>) =
            t.values.iter().map(|v| rounded(Dtype::BF16, *v)).unzip();
        t.values = values;
        let (name, shape) = (t.name.clone(), t.shape.clone());
        file.push(Stored { name, dtype: Dtype::BF16, shape, bytes: bytes.concat() });
    }
    let views = file.iter().map(|s| (&s.name, TensorView::new(s.dtype, s.shape.clone(), &s.bytes).unwrap()));
    let quantised = serialize(views, None).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str, config: &Value| {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        folder
    };
    let mut config = golden["config"].clone();
    let plain = ["values", "before"].map(|name| folder(name, &config));
    config["quantization_config"] = format.settings();
    let stored = folder("stored", &config);
    std::fs::write(stored.join("model.safetensors"), quantised).unwrap();
    for (folder, tensors) in plain.iter().zip([&tensors, &before]) {
        write_safetensors(tensors, &folder.join("model.safetensors"));
    }
    let [values, before] = plain;
    (dir, [stored, values, before].map(|folder| Checkpoint::open(&folder).unwrap()))
}

#[test]
fn quantised_checkpoints_compute_what_their_values_do() {
    for (name, factor, format, native) in CASES {
        let golden = grown(recording(name), factor, None);
        let (_dir, [stored, values, before]) = checkpoints(&golden, format);
        let (tokens, what) = (longest_prompt(&golden), format!("{name} {format:?}"));
        assert_eq!(stored.config().parameters(), values.config().parameters(), "{what}");
        let expected = logits(&values, &tokens);
        assert_eq!(bits(&logits(&stored, &tokens)), bits(&expected), "{what}");
        let moved = worst(&logits(&before, &tokens), &expected);
        assert!(moved > 1e-2, "{what}: rounding changes something: {moved}");

        let opened = stored.bytes_read();
        let (got, bytes) = logits_in(WeightDtype::Native, &stored, &tokens);
        let whole = 0..stored.config().n_layers;
        let spans: u64 = stored.tensor_spans(whole.clone()).iter().map(|span| span.len).sum();
        let read = stored.bytes_read() - opened;
        assert!(read <= spans, "{what}: {read} bytes read of {spans}");
        // What is planned with counts scales, groups and norms too, but not that small matrices are filled up to whole panels.
        let planned = stored.stage_bytes(whole, WeightDtype::Native) as f64 / bytes as f64;
        assert!(factor == 1 || (0.9..1.4).contains(&planned), "{what}: {planned} of its size");
        let (in_bf16, bytes_of_bf16) = logits_in(WeightDtype::Bf16, &values, &tokens);
        match native {
            Native::Bf16 => {
                assert_eq!(bits(&got), bits(&in_bf16), "{what}: as bf16");
                assert_eq!(bytes, bytes_of_bf16, "{what}");
            }
            Native::Blocks(n_bits) => {
                let [middle, largest] = relative(&got, &expected, stored.config().vocab);
                println!("{what}: {middle:.1e}, at most {largest:.1e}");
                assert!(middle < OF_BLOCKS, "{what}: {middle}");
                // The tables are bf16.
                let tables = 4 * stored.config().vocab * stored.config().hidden;
                let of_layers = |bytes: u64| (bytes - tables as u64) as f64;
                let found = of_layers(bytes) / of_layers(bytes_of_bf16) * 16.0;
                assert!((found / n_bits - 1.0).abs() < 0.02, "{what}: {found} bits a weight");
            }
        }
        // Two stages.
        let (n, half) = (tokens.len(), stored.config().n_layers / 2);
        let dtype = WeightDtype::Native;
        let x = forward_in(dtype, &stored, 0..half, StageInput::Tokens(&tokens), n).0;
        let last = half..stored.config().n_layers;
        let cut = forward_in(dtype, &stored, last, StageInput::Hidden(&x), n).0;
        assert_eq!(bits(&cut), bits(&got), "{what}: in two stages");
    }
}
