//! GGUF files of mixed block formats as whole models: each computes what a file of its dequantised values does.
//!
//! The mixture is llama.cpp's Q4_K_M (`llama_tensor_get_type` in its `llama-quant.cpp`), with the formats that it takes where
//! rows are no whole number of blocks of 256. The writers round plainly; the layouts are those of ggml's `ggml-common.h`.

use half::f16;
use parallax_model::WeightDtype;

use super::writer::{Age, Gguf, convert, grown};
use super::{as_recorded, bits, logits, logits_in, prompt, recording, relative, worst, write};

/// The number of a block format in GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q4K = 12,
    Q5K = 13,
    Q6K = 14,
}

fn half_of(value: f32) -> ([u8; 2], f32) {
    let half = f16::from_f32(value);
    (half.to_le_bytes(), half.to_f32())
}

/// The nearest code at a scale, of 0 where that is nothing.
fn code(value: f32, scale: f32, low: i32, high: i32) -> i32 {
    if scale == 0.0 { 0 } else { ((value / scale).round() as i32).clamp(low, high) }
}

impl Kind {
    fn block(self) -> usize {
        if self < Self::Q4K { 32 } else { 256 }
    }

    /// Bytes of a block, whose values become what the bytes mean.
    fn quantise(self, values: &mut [f32]) -> Vec<u8> {
        match self {
            Self::Q8_0 => q8_0(values),
            Self::Q5_0 => q5(values, false),
            Self::Q5_1 => q5(values, true),
            Self::Q4K => with_minimums(values, 4),
            Self::Q5K => with_minimums(values, 5),
            Self::Q6K => q6k(values),
        }
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// A scale and signed bytes.
fn q8_0(values: &mut [f32]) -> Vec<u8> {
    let (bytes, scale) = half_of(largest(values) / 127.0);
    let mut out = bytes.to_vec();
    for value in values {
        let code = code(*value, scale, -127, 127);
        out.push(code as i8 as u8);
        *value = scale * code as f32;
    }
    out
}

/// A scale, perhaps a minimum, the fifth bits as one word, then nibbles: byte `i` has weights `i` and `i + 16`. Without a
/// minimum 16 is zero.
fn q5(values: &mut [f32], minimum: bool) -> Vec<u8> {
    let (mut out, scale, low) = if minimum {
        let low = values.iter().copied().fold(f32::INFINITY, f32::min);
        let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let ((a, scale), (b, low)) = (half_of((high - low) / 31.0), half_of(low));
        ([a, b].concat(), scale, low)
    } else {
        let (bytes, scale) = half_of(largest(values) / 15.0);
        (bytes.to_vec(), scale, -16.0 * scale)
    };
    let codes: Vec<i32> = values.iter().map(|v| code(v - low, scale, 0, 31)).collect();
    for (value, code) in values.iter_mut().zip(&codes) {
        *value = scale * *code as f32 + low;
    }
    let fifth = codes.iter().zip(0..).fold(0u32, |word, (code, i)| word | (*code as u32 >> 4) << i);
    out.extend(fifth.to_le_bytes());
    out.extend((0..16).map(|i| (codes[i] & 15 | (codes[i + 16] & 15) << 4) as u8));
    out
}

/// Q4_K and Q5_K: eight parts of 32 weights with six bits each of scale and minimum.
fn with_minimums(values: &mut [f32], bits: u32) -> Vec<u8> {
    let last = (1 << bits) - 1;
    let ends: Vec<(f32, f32)> = values
        .chunks(32)
        .map(|part| part.iter().fold((0f32, 0f32), |(low, high), v| (low.min(*v), high.max(*v))))
        .collect();
    let steps: Vec<f32> = ends.iter().map(|(low, high)| (high - low) / last as f32).collect();
    let (scale_bytes, scale) = half_of(largest(&steps) / 63.0);
    let (minimum_bytes, minimum) = half_of(ends.iter().fold(0f32, |m, (low, _)| m.max(-low)) / 63.0);
    let scales: Vec<i32> = steps.iter().map(|step| code(*step, scale, 0, 63)).collect();
    let minimums: Vec<i32> = ends.iter().map(|(low, _)| code(-low, minimum, 0, 63)).collect();
    let mut codes = Vec::new();
    for (j, part) in values.chunks_mut(32).enumerate() {
        let (step, low) = (scale * scales[j] as f32, minimum * minimums[j] as f32);
        for value in part {
            let code = code(*value + low, step, 0, last);
            codes.push(code);
            *value = step * code as f32 - low;
        }
    }
    let mut out = [scale_bytes, minimum_bytes].concat();
    // The first four in the low six bits of a byte, whose high two are those of the last four.
    out.extend((0..4).map(|j| (scales[j] | scales[j + 4] >> 4 << 6) as u8));
    out.extend((0..4).map(|j| (minimums[j] | minimums[j + 4] >> 4 << 6) as u8));
    out.extend((4..8).map(|j| (scales[j] & 15 | (minimums[j] & 15) << 4) as u8));
    if bits == 5 {
        // Bit `j` of byte `i` is the fifth of weight `i` of part `j`.
        out.extend((0..32).map(|i| (0..8).fold(0u8, |byte, j| byte | ((codes[32 * j + i] >> 4) as u8) << j)));
    }
    // Two parts share their bytes.
    for pair in codes.chunks(64) {
        out.extend((0..32).map(|i| (pair[i] & 15 | (pair[i + 32] & 15) << 4) as u8));
    }
    out
}

/// Sixteen parts of 16 weights with a signed byte of scale; of six bits 32 is zero.
fn q6k(values: &mut [f32]) -> Vec<u8> {
    let steps: Vec<f32> = values.chunks(16).map(|part| largest(part) / 31.0).collect();
    let (scale_bytes, scale) = half_of(largest(&steps) / 127.0);
    // Negative ones too: they are allowed.
    let sign = |j: usize| if j % 3 == 1 { -1 } else { 1 };
    let scales: Vec<i32> =
        steps.iter().enumerate().map(|(j, step)| sign(j) * code(*step, scale, 0, 127)).collect();
    let mut codes = Vec::new();
    for (j, part) in values.chunks_mut(16).enumerate() {
        let step = scale * scales[j] as f32;
        for value in part {
            let code = code(*value, step, -32, 31);
            codes.push(code + 32);
            *value = step * code as f32;
        }
    }
    let (mut low, mut high) = (Vec::new(), Vec::new());
    for half in codes.chunks(128) {
        low.extend((0..64).map(|i| (half[i] & 15 | (half[i + 64] & 15) << 4) as u8));
        high.extend((0..32).map(|i| (0..4).fold(0, |b, j| b | (half[32 * j + i] >> 4) << (2 * j)) as u8));
    }
    [low, high, scales.iter().map(|s| *s as i8 as u8).collect(), scale_bytes.to_vec()].concat()
}

/// What Q4_K_M stores a matrix as; `None` is f32.
fn kind(name: &str, n_layers: usize, tied: bool, k: usize) -> Option<Kind> {
    let (layer, tensor) = match name.strip_prefix("blk.") {
        Some(rest) => rest.split_once('.').map(|(layer, tensor)| (layer.parse().unwrap(), tensor))?,
        None => (0, name),
    };
    let more_bits = layer < n_layers / 8
        || layer >= 7 * n_layers / 8
        || layer.checked_sub(n_layers / 8).is_some_and(|i| i % 3 == 2);
    let kind = match tensor {
        "output.weight" => Kind::Q6K,
        "token_embd.weight" if tied => Kind::Q6K,
        "attn_v.weight" | "ffn_down.weight" | "ffn_down_exps.weight" if more_bits => Kind::Q6K,
        "attn_qkv.weight" => Kind::Q5K,
        // Routers stay as they are.
        "ffn_gate_inp.weight" => return None,
        _ => Kind::Q4K,
    };
    match kind {
        _ if k.is_multiple_of(256) => Some(kind),
        _ if !k.is_multiple_of(32) => None,
        Kind::Q4K => Some(Kind::Q5_0),
        Kind::Q5K => Some(Kind::Q5_1),
        _ => Some(Kind::Q8_0),
    }
}

/// The file with its matrices quantised, and the kinds that it has; the values are what the blocks mean.
fn mixed(mut gguf: Gguf, n_layers: usize) -> (Gguf, Vec<Kind>) {
    let tied = !gguf.tensors.iter().any(|t| t.name == "output.weight");
    let mut kinds = Vec::new();
    for t in gguf.tensors.iter_mut().filter(|t| t.shape.len() > 1) {
        let Some(kind) = kind(&t.name, n_layers, tied, t.shape[t.shape.len() - 1]) else { continue };
        let bytes = t.values.chunks_mut(kind.block()).flat_map(|block| kind.quantise(block)).collect();
        gguf.stored.insert(t.name.clone(), (kind as u32, bytes));
        kinds.push(kind);
    }
    kinds.sort_unstable();
    kinds.dedup();
    (gguf, kinds)
}

/// Recording, name of its architecture, factor of its sizes, width of the feed-forward parts, and the formats of the file.
type Case = (&'static str, &'static str, u64, Option<u64>, &'static [Kind]);

const CASES: [Case; 6] = [
    ("llama", "llama", 4, Some(512), &[Kind::Q4K, Kind::Q6K]),
    ("llama3-rope", "llama", 8, None, &[Kind::Q5_0, Kind::Q8_0, Kind::Q4K, Kind::Q6K]),
    ("phi3", "phi3", 4, None, &[Kind::Q5_0, Kind::Q8_0, Kind::Q4K, Kind::Q5K, Kind::Q6K]),
    ("gemma3", "gemma3", 2, None, &[Kind::Q5_0, Kind::Q8_0]),
    ("qwen3-moe", "qwen3moe", 4, None, &[Kind::Q5_0, Kind::Q8_0, Kind::Q4K, Kind::Q6K]),
    ("deepseek-v3", "deepseek2", 4, None, &[Kind::Q5_0, Kind::Q8_0, Kind::Q4K, Kind::Q6K]),
];

/// Largest change of the middle row of logits by weights that stay blocks, against the same values in f32: rows that are
/// multiplied with them are rounded to eight bits. Measured were 1.8 % to 3.6 %.
const OF_BLOCKS: f64 = 0.05;
/// The same of DeepSeek-V3, whose experts a smaller change exchanges: measured were 9.1 %.
const OF_BLOCKS_OF_DEEPSEEK: f64 = 0.15;

#[test]
fn mixtures_of_block_formats_compute_what_their_values_do() {
    for (name, architecture, factor, ffn, expected_kinds) in CASES {
        let golden = grown(recording(name), factor, ffn);
        let n_layers = golden["config"]["num_hidden_layers"].as_u64().unwrap() as usize;
        let dir = tempfile::tempdir().unwrap();
        let open = |gguf: &Gguf, file: &str| as_recorded(&golden, write(gguf, &dir.path().join(file)));
        let plain = convert(&golden, architecture, Age::New);
        let before = open(&plain, "before.gguf");
        let (mut gguf, kinds) = mixed(plain, n_layers);
        assert_eq!(kinds, expected_kinds, "{name}");
        let stored = open(&gguf, "mixed.gguf");
        gguf.stored.clear();
        let values = open(&gguf, "values.gguf");

        let tokens = prompt(&golden);
        let expected = logits(&values, &tokens);
        assert_eq!(bits(&logits(&stored, &tokens)), bits(&expected), "{name}");
        let moved = worst(&logits(&before, &tokens), &expected);
        assert!(moved > 1e-2, "{name}: rounding changes something: {moved}");
        let (got, bytes) = logits_in(WeightDtype::Native, &stored, &tokens);
        let [middle, largest] = relative(&got, &expected, stored.config().vocab);
        let (_, plain_bytes) = logits_in(WeightDtype::F32, &stored, &tokens);
        println!("{name}: {middle:.1e}, at most {largest:.1e}, {bytes} of {plain_bytes} bytes");
        let bound = if name == "deepseek-v3" { OF_BLOCKS_OF_DEEPSEEK } else { OF_BLOCKS };
        assert!(middle < bound, "{name}: {middle}");
        assert!(bytes * 3 < plain_bytes, "{name}: {bytes} of {plain_bytes} bytes");
    }
}
