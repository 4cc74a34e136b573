//! Every stored format against values that other implementations made (`tests/golden/make-weights.py`).

use std::path::PathBuf;

use ::safetensors::tensor::{Dtype, TensorView, serialize};
use parallax_kernels::linear::linear;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{
    options::WeightDtype,
    weights::{Rows, Source, TensorInfo, safetensors, to_f32},
};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/golden/weights/{name}.safetensors"))
}

fn open(name: &str, settings: &Value) -> WeightIndex {
    let mut index = safetensors::index([Source::open(&golden(name)).unwrap()]).unwrap();
    derive(&mut index, settings).unwrap();
    index
}

/// Bit patterns; a negative zero, which integer arithmetic does not know, counts as zero.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| (v + 0.0).to_bits()).collect()
}

/// Compares every expected weight, whole and by rows; returns the kinds that "native" gives, by name.
fn check(index: &WeightIndex) -> Vec<(String, WeightKind)> {
    let mut kinds = Vec::new();
    for expected in index.tensors.keys().filter(|name| name.starts_with("expected.")) {
        let name = expected.strip_prefix("expected.").unwrap();
        let values = index.read_f32(expected).unwrap();
        assert_eq!(index.shape(name).unwrap(), index.shape(expected).unwrap(), "{name}");
        assert!(bits(&index.read_f32(name).unwrap()) == bits(&values), "{name}");
        let (k, n) = (*index.shape(name).unwrap().last().unwrap(), values.len());
        let rows = 3..n / k - 2;
        let some = index.read_rows_f32(name, rows.clone()).unwrap();
        assert!(bits(&some) == bits(&values[rows.start * k..rows.end * k]), "{name} {rows:?}");
        let pieces = [Rows { name: name.to_owned(), first: 3, n: rows.len() }];
        let packed = index.pack(&pieces, k, WeightDtype::Native).unwrap().remove(0);
        kinds.push((name.rsplit_once('.').unwrap().0.to_owned(), packed.kind()));
        let mut row = vec![0.0; k];
        for (i, want) in some.chunks_exact(k).enumerate() {
            packed.dequantize_row(i, &mut row).unwrap();
            if packed.kind() != WeightKind::Bf16 {
                assert!(bits(&row) == bits(want), "{name}: native loses nothing");
            }
            let close = row.iter().zip(want).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0);
            assert!(close, "{name} row {i}");
        }
        assert!(index.reader(name).unwrap().rows(0..n / k + 1).is_err());
    }
    assert!(!kinds.is_empty());
    kinds
}

fn kind_of(kinds: &[(String, WeightKind)], module: &str) -> WeightKind {
    kinds.iter().find(|(name, _)| name.contains(module)).unwrap().1
}

#[test]
fn ggml_blocks_decode_as_in_the_gguf_package() {
    let index = open("ggml", &Value::Null);
    let mut types = 0;
    for name in index.tensors.keys().filter(|name| name.ends_with(".raw")) {
        let ty = name.strip_suffix(".raw").unwrap();
        let number = match ty {
            "F32" => 0,
            "F16" => 1,
            "Q4_0" => 2,
            "Q4_1" => 3,
            "Q5_0" => 6,
            "Q5_1" => 7,
            "Q8_0" => 8,
            "Q2_K" => 10,
            "Q3_K" => 11,
            "Q4_K" => 12,
            "Q5_K" => 13,
            "Q6_K" => 14,
            "BF16" => 30,
            "MXFP4" => 39,
            other => panic!("{other} has no number"),
        };
        let dtype = StoredDtype::from_gguf(number).unwrap();
        assert_eq!(dtype.name(), ty);
        let raw = index.read_bytes(name).unwrap().1;
        let values = index.read_f32(&format!("{ty}.values")).unwrap();
        assert!(bits(&to_f32(dtype, &raw)) == bits(&values), "{ty}");
        types += 1;
    }
    assert_eq!(types, 14);
}

#[test]
fn fp8_scales_hold_per_block_row_or_tensor() {
    let settings = json!({"quant_method": "fp8", "weight_block_size": [64, 128]});
    let kinds = check(&open("fp8", &settings));
    assert!(kinds.iter().all(|(_, kind)| *kind == WeightKind::Bf16), "{kinds:?}");
    let mut index = safetensors::index([Source::open(&golden("fp8")).unwrap()]).unwrap();
    index.tensors.retain(|name, _| !name.contains("scale"));
    assert!(derive(&mut index, &settings).unwrap_err().to_string().contains("without a scale"));
}

#[test]
fn gptq_groups_stay_blocks_and_act_order_becomes_floats() {
    let kinds = check(&open("gptq4", &json!({"quant_method": "gptq", "bits": 4, "group_size": 32})));
    assert_eq!(kind_of(&kinds, "o_proj"), WeightKind::Int4);
    assert_eq!(kind_of(&kinds, "down_proj"), WeightKind::Bf16);
    let kinds = check(&open("gptq8", &json!({"quant_method": "gptq", "bits": 8})));
    assert_eq!(kind_of(&kinds, "o_proj"), WeightKind::Q8_0);
    let mut index = safetensors::index([Source::open(&golden("gptq4")).unwrap()]).unwrap();
    assert!(derive(&mut index, &json!({"quant_method": "gptq", "bits": 3})).is_err());
}

#[test]
fn gptq_version_two_stores_zero_points_as_they_are() {
    let name = "model.layers.0.self_attn.o_proj";
    let one = open("gptq4", &json!({"quant_method": "gptq", "bits": 4}));
    let two = open("gptq4", &json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}));
    let scales = one.read_f32(&format!("{name}.scales")).unwrap();
    let [one, two] = [one, two].map(|index| index.read_f32(&format!("{name}.weight")).unwrap());
    let (n, k) = (24, 128);
    for i in 0..n * k {
        let scale = scales[i % k / 32 * n + i / k];
        assert!((two[i] - one[i] - scale).abs() < 1e-5, "weight {i}");
    }
}

/// A file of zeros.
fn zeros(tensors: &[(&str, &str, &[usize])]) -> WeightIndex {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, dtype, shape) in tensors {
        let from = end;
        end += 4 * shape.iter().product::<usize>();
        header
            .insert((*name).to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": [from, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + end, 0);
    safetensors::index([Source::memory("zeros", bytes)]).unwrap()
}

#[test]
fn integers_that_do_not_fill_their_words_are_refused() {
    // 12 outputs in one word of 8 zero points; more groups than inputs, of no outputs.
    for (n, groups) in [(12, 1), (0, 1 << 40)] {
        let mut index = zeros(&[
            ("x.qweight", "I32", &[16, n]),
            ("x.qzeros", "I32", &[groups, n / 8]),
            ("x.scales", "F32", &[groups, n]),
        ]);
        derive(&mut index, &json!({"quant_method": "gptq", "bits": 4})).unwrap();
        assert!(index.reader("x.weight").is_err(), "{n} outputs, {groups} groups");
    }
}

#[test]
fn awq_packed_and_mxfp4_run_as_they_are_stored() {
    let kinds = check(&open("awq", &json!({"quant_method": "awq", "bits": 4, "group_size": 32})));
    assert_eq!(kind_of(&kinds, "gate_proj"), WeightKind::Int4);
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "group_size": 32});
    let settings =
        json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}});
    let kinds = check(&open("packed", &settings));
    assert_eq!(kind_of(&kinds, "up_proj"), WeightKind::Int4);
    let kinds = check(&open("mxfp4", &json!({"quant_method": "mxfp4"})));
    assert_eq!(kind_of(&kinds, "experts"), WeightKind::Mxfp4);
}

/// `quantization_config` of llm-compressor's GPTQ with an activation order.
fn in_order(bits: u32) -> Value {
    let weights = json!({"num_bits": bits, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32,
        "actorder": "group"});
    json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}})
}

#[test]
fn packed_groups_in_an_order_of_their_own_are_found_by_input() {
    let kinds = check(&open("packed_order4", &in_order(4)));
    assert_eq!(kind_of(&kinds, "down_proj"), WeightKind::Bf16);
    assert_eq!(kind_of(&check(&open("packed_order8", &in_order(8))), "gate_proj"), WeightKind::Bf16);
    // Read in the order of the inputs, it is another weight.
    let mut index = open("packed_order4", &in_order(4));
    index.tensors.remove("model.layers.0.mlp.down_proj.weight_g_idx").unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    assert_ne!(index.read_f32(name).unwrap(), index.read_f32(&format!("expected.{name}")).unwrap());
}

#[test]
fn an_order_that_is_that_of_the_inputs_costs_nothing() {
    let ordered = open("packed_order4", &in_order(4));
    let mut plain = open("packed_order4", &in_order(4));
    plain.tensors.retain(|name, _| !name.ends_with("weight_g_idx"));
    // Listed in order; and -1 throughout, which says that there is none.
    for module in ["mlp.up_proj", "self_attn.o_proj"] {
        let name = format!("model.layers.0.{module}.weight");
        let [a, b] = [&ordered, &plain].map(|index| index.reader(&name).unwrap());
        assert_eq!((a.kind(), a.native()), (WeightKind::Int4, WeightKind::Int4), "{module}");
        assert!(a.rows(0..24).unwrap() == b.rows(0..24).unwrap(), "{module}");
    }
}

#[test]
fn groups_that_are_not_there_are_named() {
    for (file, list, settings) in [
        ("packed_order4", "model.layers.0.mlp.down_proj.weight_g_idx", in_order(4)),
        ("gptq4", "model.layers.0.mlp.down_proj.g_idx", json!({"quant_method": "gptq", "bits": 4})),
    ] {
        for bad in [4i32, -1, i32::MIN] {
            let mut index = open(file, &settings);
            let name = format!("{}.weight", list.rsplit_once('.').unwrap().0);
            let (mut bytes, info) = (index.read_bytes(list).unwrap().1, index.tensors[list].clone());
            bytes[4 * 77..4 * 78].copy_from_slice(&bad.to_le_bytes());
            index.files.push(Source::memory("list", bytes));
            let changed = TensorInfo { file: index.files.len() - 1, offset: 0, ..info };
            index.tensors.insert(list.to_owned(), changed);
            let error = index.read_f32(&name).unwrap_err().to_string();
            for word in [list, &format!("group {bad}"), "there are 4"] {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
    }
}

#[test]
fn every_byte_of_a_quantised_weight_is_read_once() {
    let gptq = json!({"quant_method": "gptq", "bits": 4});
    let awq = json!({"quant_method": "awq", "bits": 4});
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [64, 128]});
    for (file, settings, module) in [
        ("gptq4", &gptq, "mlp.down_proj"),
        ("awq", &awq, "mlp.gate_proj"),
        ("packed_order4", &in_order(4), "mlp.down_proj"),
        ("fp8", &fp8, "self_attn.q_proj"),
    ] {
        let index = open(file, settings);
        let base = format!("model.layers.0.{module}.");
        let name = format!("{base}weight");
        let stored = index.tensors.iter().filter(|(name, _)| name.starts_with(&base));
        let stored: u64 = stored.filter(|(name, _)| !name.ends_with("_shape")).map(|(_, t)| t.len).sum();
        let (n, k) = (index.shape(&name).unwrap()[0], index.shape(&name).unwrap()[1]);
        let piece = |first, n| Rows { name: name.clone(), first, n };
        let before = index.bytes_read();
        // Some rows after the other, as heads are.
        index.pack(&[piece(0, 8), piece(8, 8), piece(16, n - 16)], k, WeightDtype::Native).unwrap();
        assert_eq!(index.bytes_read() - before, stored, "{file}");
    }
}

/// Two rows of eight-bit floats, a scale for each of these dtype and bytes.
fn scaled(dtype: Dtype, scales: &[u8]) -> WeightIndex {
    // 1, 2 and -1.5, 448.
    let codes = [0x38, 0x40, 0xbc, 0x7e];
    let views = [
        ("x.weight", TensorView::new(Dtype::F8_E4M3, vec![2, 2], &codes).unwrap()),
        ("x.weight_scale_inv", TensorView::new(dtype, vec![2, 1], scales).unwrap()),
    ];
    safetensors::index([Source::memory("scaled", serialize(views, None).unwrap())]).unwrap()
}

#[test]
fn bytes_are_exponents_where_the_settings_say_so() {
    let settings =
        |format: Value| json!({"quant_method": "fp8", "weight_block_size": [1, 2], "scale_fmt": format});
    let read = |mut index: WeightIndex, format: Value| {
        derive(&mut index, &settings(format)).map(|()| index.read_f32("x.weight").unwrap())
    };
    // Eight times, and an eighth.
    let expected: [f32; 4] = [8.0, 16.0, -0.1875, 56.0];
    let bytes = [130, 124];
    assert_eq!(read(scaled(Dtype::U8, &bytes), json!("ue8m0")).unwrap(), expected);
    assert_eq!(read(scaled(Dtype::U8, &bytes), json!("UE8M0")).unwrap(), expected);
    // A type of their own says it already.
    assert_eq!(read(scaled(Dtype::F8_E8M0, &bytes), Value::Null).unwrap(), expected);
    // Numbers stay numbers, as in DeepSeek-V3.1.
    let numbers: Vec<u8> = [8.0f32, 0.125].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(read(scaled(Dtype::F32, &numbers), json!("ue8m0")).unwrap(), expected);
    for (dtype, format) in
        [(Dtype::U8, Value::Null), (Dtype::U8, json!("float")), (Dtype::I8, json!("ue8m0"))]
    {
        let error = read(scaled(dtype, &bytes), format.clone()).unwrap_err().to_string();
        let what = if dtype == Dtype::U8 { "\"scale_fmt\": \"ue8m0\"" } else { "I8" };
        assert!(error.contains("x.weight_scale_inv") && error.contains(what), "{format}: {error}");
    }
}

/// What is said where a file is not read with these settings.
fn refusal(file: &str, settings: &Value) -> Option<String> {
    let mut index = safetensors::index([Source::open(&golden(file)).unwrap()]).unwrap();
    derive(&mut index, settings).err().map(|e| e.to_string())
}

#[test]
fn awq_in_another_layout_than_gemm_is_refused_by_name() {
    for (field, value, fine) in [
        ("version", Value::Null, true),
        ("version", json!("gemm"), true),
        ("version", json!("GEMM"), true),
        ("format", json!("gemm"), true),
        ("version", json!("gemv"), false),
        ("version", json!("gemv_fast"), false),
        ("version", json!("GEMV"), false),
        ("version", json!("exllama"), false),
        ("version", json!("marlin"), false),
        ("version", json!(2), false),
        ("format", json!("llm-awq"), false),
        ("bits", json!(8), false),
    ] {
        let mut settings = json!({"quant_method": "awq", "bits": 4, "group_size": 32});
        settings[field] = value.clone();
        match refusal("awq", &settings) {
            None => assert!(fine, "{field} {value} is read"),
            Some(text) => {
                assert!(!fine, "{text}");
                assert!(text.contains(&value.to_string()) && text.contains(".qweight"), "{text}");
                assert!(text.contains("\"gemm\""), "what to do instead: {text}");
            }
        }
    }
}

#[test]
fn packed_groups_that_are_not_read_alike_are_refused_by_name() {
    let weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "group_size": 32});
    for (field, value, fine) in [
        ("num_bits", json!(8), false),
        ("symmetric", json!(false), false),
        ("type", json!("float"), false),
        // As if it were said.
        ("symmetric", Value::Null, true),
        // Read off the scales.
        ("group_size", json!(128), true),
    ] {
        let mut others = weights.clone();
        others[field] = value.clone();
        let groups =
            json!({"kv": {"weights": null}, "attention": {"weights": weights}, "mlp": {"weights": others}});
        let settings = json!({"quant_method": "compressed-tensors", "config_groups": groups});
        match refusal("packed", &settings) {
            None => assert!(fine, "{field} {value} is read"),
            Some(text) => {
                assert!(!fine, "{text}");
                for word in [".weight_packed", field, &value.to_string(), "\"attention\"", "\"mlp\""] {
                    assert!(text.contains(word), "{word}: {text}");
                }
            }
        }
    }
    // The first group that has weights is the one that counts.
    let groups = json!({"kv": {"weights": null}, "all": {"weights": {"num_bits": 8, "symmetric": false}}});
    let refused = refusal("packed", &json!({"config_groups": groups})).unwrap();
    assert!(refused.contains("symmetric"), "{refused}");
}

#[test]
fn any_source_is_quantised_to_what_was_asked_for() {
    let index = open("fp8", &json!({"weight_block_size": [64, 128]}));
    let name = "model.layers.0.self_attn.q_proj.weight";
    let (n, k) = (72, 160);
    let exact = index.read_f32(name).unwrap();
    let largest = exact.iter().fold(0f32, |m, v| m.max(v.abs()));
    let x: Vec<f32> = (0..k).map(|i| (i % 7) as f32 - 3.0).collect();
    for dtype in ["f32", "bf16", "f16", "q8_0", "q6_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0"] {
        let dtype: WeightDtype = dtype.parse().unwrap();
        let pieces = [(0, 40), (40, 32)].map(|(first, n)| Rows { name: name.to_owned(), first, n });
        let parts = index.pack(&pieces, k, dtype).unwrap();
        assert_eq!(parts.len(), 1, "neighbours of one format are one weight");
        assert_eq!((parts[0].n(), parts[0].k()), (n, k));
        let (mut y, mut row) = (vec![0.0; n], vec![0.0; k]);
        linear(&x, &parts[0], &mut y).unwrap();
        for (i, want) in exact.chunks_exact(k).enumerate() {
            parts[0].dequantize_row(i, &mut row).unwrap();
            let worst = row.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= largest / 7.0, "{dtype} row {i} off by {worst}");
            let dot: f32 = row.iter().zip(&x).map(|(a, b)| a * b).sum();
            assert!((y[i] - dot).abs() < 0.02 * largest * k as f32, "{dtype} output {i}: {} and {dot}", y[i]);
        }
    }
}

proptest! {
    #[test]
    fn broken_settings_and_shapes_are_errors(bits in 0u64..20, cut in 0usize..4, grow in 0usize..3) {
        for name in ["gptq4", "awq", "packed", "packed_order4", "mxfp4", "fp8"] {
            let mut index = safetensors::index([Source::open(&golden(name)).unwrap()]).unwrap();
            for (i, info) in index.tensors.values_mut().enumerate() {
                if i % 4 == cut && let Some(last) = info.shape.last_mut() {
                    *last = *last * grow / 2;
                }
            }
            // AWQ has four bits or is refused.
            let (method, bits) = if name == "awq" { ("awq", 4) } else { ("gptq", bits) };
            let _ = derive(&mut index, &json!({"quant_method": method, "bits": bits, "weight_block_size": [grow, bits]}));
            let names: Vec<String> = index.derived.keys().cloned().collect();
            for name in names {
                let _ = index.read_f32(&name);
            }
        }
    }
}
