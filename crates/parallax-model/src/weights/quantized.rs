//! Quantised Hugging Face checkpoints: a weight that is stored as several tensors (codes, scales, zero points) appears in
//! the index under its plain name, and is put together when it is read.
//!
//! Each reader gives rows in a format of the kernels: bit-exact four-bit or eight-bit blocks where the stored numbers
//! allow it, else f32 values that are rounded to bf16 unless another format was asked for.

mod fp8;
mod int;

use std::ops::Range;

use half::f16;
use parallax_kernels::WeightKind;
use serde_json::Value;

use super::{StoredDtype, WeightIndex, to_f32};
use crate::error::OpenError;

/// Rows of a weight in a format that the kernels know.
#[derive(Debug)]
pub(crate) struct StoredRows {
    pub(crate) kind: WeightKind,
    /// The kind that "native" gives them.
    pub(crate) native: WeightKind,
    pub(crate) bytes: Vec<u8>,
}

/// A weight that several stored tensors make up.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Derived {
    /// Row-major shape, the last dimension being the inputs.
    pub(crate) shape: Vec<usize>,
    recipe: Recipe,
}

/// How the stored tensors make up the weight. Names are those of the stored tensors.
#[derive(Clone, Debug, PartialEq)]
enum Recipe {
    /// Eight-bit floats [N, K], multiplied by a scale per tensor, row, or block of these sizes.
    Fp8 { codes: String, scale: String, block: [usize; 2] },
    /// Codes packed along the inputs [K / per, N], groups of inputs sharing a scale [groups, N] and a zero point.
    Gptq { base: String, bits: u32, zero_offset: i64 },
    /// Four-bit codes packed along the outputs [K, N / 8] in AWQ's order.
    Awq { base: String },
    /// compressed-tensors "pack-quantized": symmetric codes packed along the inputs [N, K / per], scales [N, groups].
    Packed { base: String, bits: u32 },
    /// Four-bit floats: bytes [.., K / 32, 16] with exponents [.., K / 32].
    Mxfp4 { base: String },
}

fn unsupported(name: &str, what: impl Into<String>) -> OpenError {
    OpenError::UnsupportedDtype {
        name: name.to_owned(),
        dtype: what.into(),
        readable: "FP8 with scales per tensor, row or block; GPTQ; AWQ of version \"gemm\"; symmetric pack-quantized of one \
            number of bits; MXFP4",
    }
}

/// That AWQ codes are laid out as AutoAWQ's "gemm" does it, which is meant where nothing is said. The other versions have as
/// many codes in another order: square matrices would be read, wrongly.
fn check_awq(name: &str, settings: &Value) -> Result<(), OpenError> {
    let bits = settings["bits"].as_u64().unwrap_or(4);
    if bits != 4 {
        return Err(unsupported(name, format!("AWQ with {bits} bits")));
    }
    // The newer name of the field counts where the older one is not there.
    let field = if settings["version"].is_null() { "format" } else { "version" };
    match &settings[field] {
        Value::Null => Ok(()),
        Value::String(version) if version.eq_ignore_ascii_case("gemm") => Ok(()),
        other => {
            Err(unsupported(name, format!("AWQ of {field} {other} (quantise the model again with \"gemm\")")))
        }
    }
}

/// `weights` of compressed-tensors' groups of layers. Which layer is of which group is not looked at: groups whose codes are
/// not read alike are refused. How many inputs share a scale may differ: that is read off the scales.
fn packed_settings<'a>(name: &str, settings: &'a Value) -> Result<&'a Value, OpenError> {
    let groups = settings["config_groups"].as_object().into_iter().flatten();
    let mut groups = groups
        .map(|(group, scheme)| (group, &scheme["weights"]))
        // Groups of activations alone.
        .filter(|(_, weights)| !weights.is_null());
    let Some((first, weights)) = groups.next() else { return Ok(&Value::Null) };
    let read = [("num_bits", Value::from(4)), ("symmetric", Value::from(true)), ("type", Value::from("int"))];
    for (group, others) in groups {
        for (field, absent) in &read {
            let [a, b] = [weights, others].map(|w| if w[*field].is_null() { absent } else { &w[*field] });
            if a != b {
                let what = format!("pack-quantized with {field} {a} in {first:?} and {b} in {group:?}");
                return Err(unsupported(name, what));
            }
        }
    }
    Ok(weights)
}

/// Finds the quantised weights among the tensors. `settings` is `quantization_config` of config.json.
pub(crate) fn derive(index: &mut WeightIndex, settings: &Value) -> Result<(), OpenError> {
    let method = settings["quant_method"].as_str().unwrap_or_default();
    let mut found = Vec::new();
    for (name, info) in &index.tensors {
        let derived = if let Some(base) = name.strip_suffix(".qweight") {
            let [rows, columns] = info.shape[..] else { continue };
            if method == "awq" {
                check_awq(name, settings)?;
                // K by N / 8.
                (format!("{base}.weight"), vec![columns * 8, rows], Recipe::Awq { base: base.to_owned() })
            } else {
                let bits = settings["bits"].as_u64().unwrap_or(4) as u32;
                if !matches!(bits, 4 | 8) {
                    return Err(unsupported(name, format!("GPTQ with {bits} bits")));
                }
                // Version 1 stores zero points less one; "gptq_v2" stores them as they are.
                let zero_offset = i64::from(settings["checkpoint_format"].as_str() != Some("gptq_v2"));
                let recipe = Recipe::Gptq { base: base.to_owned(), bits, zero_offset };
                (format!("{base}.weight"), vec![columns, rows * (32 / bits) as usize], recipe)
            }
        } else if let Some(base) = name.strip_suffix(".weight_packed") {
            let weights = packed_settings(name, settings)?;
            let bits = weights["num_bits"].as_u64().unwrap_or(4) as u32;
            let [n, packed] = info.shape[..] else { continue };
            if !matches!(bits, 4 | 8) || weights["symmetric"] == false || weights["type"] == "float" {
                return Err(unsupported(name, format!("pack-quantized as {weights}")));
            }
            let recipe = Recipe::Packed { base: base.to_owned(), bits };
            (format!("{base}.weight"), vec![n, packed * (32 / bits) as usize], recipe)
        } else if let Some(base) = name.strip_suffix("_blocks") {
            let [outer @ .., blocks, 16] = info.shape.as_slice() else { continue };
            if !index.tensors.contains_key(&format!("{base}_scales")) {
                continue;
            }
            let shape = outer.iter().copied().chain([blocks * 32]).collect();
            (base.to_owned(), shape, Recipe::Mxfp4 { base: base.to_owned() })
        } else if info.dtype.is_fp8() {
            let scale = ["_scale_inv", "_scale"]
                .map(|suffix| format!("{name}{suffix}"))
                .into_iter()
                .find(|scale| index.tensors.contains_key(scale))
                .ok_or_else(|| unsupported(name, format!("{} without a scale", info.dtype.name())))?;
            let size = |i: usize| {
                settings["weight_block_size"][i].as_u64().and_then(|v| usize::try_from(v).ok()).unwrap_or(128)
            };
            let recipe = Recipe::Fp8 { codes: name.clone(), scale, block: [size(0).max(1), size(1).max(1)] };
            (name.clone(), info.shape.clone(), recipe)
        } else {
            continue;
        };
        found.push(derived);
    }
    for (name, shape, recipe) in found {
        if shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).is_none() {
            return Err(OpenError::Shape { name, found: shape, expected: Vec::new() });
        }
        index.derived.insert(name, Derived { shape, recipe });
    }
    Ok(())
}

impl WeightIndex {
    /// Rows of a weight, seen as a matrix over the last dimension, in a format of the kernels.
    pub(crate) fn stored_rows(&self, name: &str, rows: Range<usize>) -> Result<StoredRows, OpenError> {
        let shape = self.shape(name)?;
        let k = shape.last().copied().unwrap_or(1);
        let n = shape.iter().rev().skip(1).product::<usize>();
        if rows.start > rows.end || rows.end > n {
            return Err(OpenError::Shape {
                name: name.to_owned(),
                found: vec![n, k],
                expected: vec![rows.end, k],
            });
        }
        let Some(derived) = self.derived.get(name) else { return self.plain_rows(name, rows) };
        match &derived.recipe {
            Recipe::Fp8 { codes, scale, block } => self.fp8_rows(codes, scale, *block, rows, [n, k]),
            Recipe::Gptq { base, bits, zero_offset } => {
                self.gptq_rows(base, *bits, *zero_offset, rows, [n, k])
            }
            Recipe::Awq { base } => self.awq_rows(base, rows, [n, k]),
            Recipe::Packed { base, bits } => self.packed_rows(base, *bits, rows, [n, k]),
            Recipe::Mxfp4 { base } => self.mxfp4_rows(base, rows, k),
        }
    }

    /// Rows of a tensor that is stored as it is.
    fn plain_rows(&self, name: &str, rows: Range<usize>) -> Result<StoredRows, OpenError> {
        let info = self.get(name)?;
        let bytes = self.read_rows(name, rows)?;
        Ok(match info.dtype {
            StoredDtype::Kind(kind) => StoredRows { kind, native: kind, bytes },
            other => floats(&to_f32(other, &bytes), WeightKind::F32),
        })
    }

    /// GPT-OSS: the low nibble of byte `i` is weight `2 i`, the high one `2 i + 1`.
    fn mxfp4_rows(&self, base: &str, rows: Range<usize>, k: usize) -> Result<StoredRows, OpenError> {
        let (blocks, scales) = (format!("{base}_blocks"), format!("{base}_scales"));
        let per_row = k / 32;
        let n = self.get(&blocks)?.len as usize / (per_row * 16).max(1);
        self.check_elements(&scales, n * per_row)?;
        // The last dimension of the blocks is within a row: `per_row` of their rows make one of ours.
        let codes = self.read_rows(&blocks, rows.start * per_row..rows.end * per_row)?;
        let exponents = self.read_rows(&scales, rows)?;
        let mut bytes = Vec::with_capacity(exponents.len() * 17);
        for (exponent, codes) in exponents.iter().zip(codes.as_chunks::<16>().0) {
            bytes.push(*exponent);
            let code = |i: usize| codes[i / 2] >> (i % 2 * 4) & 15;
            bytes.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
        }
        Ok(StoredRows { kind: WeightKind::Mxfp4, native: WeightKind::Mxfp4, bytes })
    }

    /// That a tensor has this many elements.
    fn check_elements(&self, name: &str, expected: usize) -> Result<(), OpenError> {
        let shape = &self.get(name)?.shape;
        if shape.iter().product::<usize>() == expected {
            return Ok(());
        }
        Err(OpenError::Shape { name: name.to_owned(), found: shape.clone(), expected: vec![expected] })
    }
}

/// Float rows; `native` is what they become when no format is asked for.
fn floats(values: &[f32], native: WeightKind) -> StoredRows {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    StoredRows { kind: WeightKind::F32, native, bytes }
}

/// The f16 with exactly this value.
fn exact_f16(value: f32) -> Option<f16> {
    let half = f16::from_f32(value);
    (half.to_f32() == value).then_some(half)
}

#[cfg(test)]
mod tests;
