//! Quantised Hugging Face checkpoints: a weight that is stored as several tensors (codes, scales, zero points) appears in
//! the index under its plain name, and is put together when it is read.
//!
//! Each gives rows in a format of the kernels: bit-exact four-bit or eight-bit blocks where the stored numbers allow it,
//! else f32 values that are rounded to bf16 unless another format was asked for.

mod fp8;
mod int;
mod mxfp4;

use parallax_kernels::WeightKind;
use serde_json::Value;

use self::int::block_kind;
pub(super) use self::{fp8::Scaled, int::Coded, mxfp4::Mxfp4};
use super::{StoredDtype, WeightIndex, reader::Form};
use crate::error::OpenError;

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
    /// Eight-bit floats [N, K], multiplied by a scale per tensor, row, or block of these sizes; the scales may be bytes
    /// that hold exponents.
    Fp8 { codes: String, scale: String, block: [usize; 2], exponents: bool },
    /// Codes packed along the inputs [K / per, N], groups of inputs sharing a scale [groups, N] and a zero point. Which
    /// input is of which group may be listed: it is said to be in an order of its own where `scattered`.
    Gptq { base: String, bits: u32, zero_offset: i64, scattered: bool },
    /// Four-bit codes packed along the outputs [K, N / 8] in AWQ's order.
    Awq { base: String },
    /// compressed-tensors "pack-quantized": symmetric codes packed along the inputs [N, K / per], scales [N, groups],
    /// groups as GPTQ's.
    Packed { base: String, bits: u32, scattered: bool },
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

/// Whether a scale is a byte that holds an exponent, as in files that are older than the type for it. Other whole numbers
/// are no scales.
fn holds_exponents(name: &str, dtype: StoredDtype, settings: &Value) -> Result<bool, OpenError> {
    let said = settings["scale_fmt"].as_str().is_some_and(|format| format.eq_ignore_ascii_case("ue8m0"));
    match dtype {
        StoredDtype::Byte if said => Ok(true),
        StoredDtype::Byte => Err(unsupported(
            name,
            "U8 where quantization_config does not say \"scale_fmt\": \"ue8m0\" (exponents)",
        )),
        StoredDtype::Signed(_) => Err(unsupported(name, format!("{}, which is no scale", dtype.name()))),
        _ => Ok(false),
    }
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
                let scattered = settings["desc_act"] == true && settings["static_groups"] != true;
                let recipe = Recipe::Gptq { base: base.to_owned(), bits, zero_offset, scattered };
                (format!("{base}.weight"), vec![columns, rows * (32 / bits) as usize], recipe)
            }
        } else if let Some(base) = name.strip_suffix(".weight_packed") {
            let weights = packed_settings(name, settings)?;
            let bits = weights["num_bits"].as_u64().unwrap_or(4) as u32;
            let [n, packed] = info.shape[..] else { continue };
            if !matches!(bits, 4 | 8) || weights["symmetric"] == false || weights["type"] == "float" {
                return Err(unsupported(name, format!("pack-quantized as {weights}")));
            }
            let scattered = weights["actorder"] == "group" || weights["actorder"] == true;
            let recipe = Recipe::Packed { base: base.to_owned(), bits, scattered };
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
            let exponents = holds_exponents(&scale, index.tensors[&scale].dtype, settings)?;
            let block = [size(0).max(1), size(1).max(1)];
            let recipe = Recipe::Fp8 { codes: name.clone(), scale, block, exponents };
            (name.clone(), info.shape.clone(), recipe)
        } else {
            continue;
        };
        found.push(derived);
    }
    index.derived.extend(found.into_iter().map(|(name, shape, recipe)| (name, Derived { shape, recipe })));
    Ok(())
}

impl Derived {
    /// The stored tensor that grows in memory where no format is asked for, and its bytes there: eight-bit floats and
    /// scattered groups become bf16, codes blocks with a scale for 32 of them. Scattered groups that turn out to be in
    /// order take less.
    pub(crate) fn in_memory(&self) -> Option<(String, u64)> {
        let coded = |bits, scattered| if scattered { WeightKind::Bf16 } else { block_kind(bits) };
        let (tensor, kind) = match &self.recipe {
            Recipe::Fp8 { codes, .. } => (codes.clone(), WeightKind::Bf16),
            Recipe::Gptq { base, bits, scattered, .. } => {
                (format!("{base}.qweight"), coded(*bits, *scattered))
            }
            Recipe::Awq { base } => (format!("{base}.qweight"), coded(4, false)),
            Recipe::Packed { base, bits, scattered } => {
                (format!("{base}.weight_packed"), coded(*bits, *scattered))
            }
            Recipe::Mxfp4 { .. } => return None,
        };
        let (values, bytes) = kind.block();
        Some((tensor, (self.shape.iter().product::<usize>() / values * bytes) as u64))
    }
}

impl WeightIndex {
    /// Reads what all rows of a weight share.
    pub(super) fn open_derived(&self, derived: &Derived, size: [usize; 2]) -> Result<Form, OpenError> {
        Ok(match &derived.recipe {
            Recipe::Fp8 { codes, scale, block, exponents } => {
                Form::Scaled(Scaled::open(self, codes, scale, *exponents, *block, size)?)
            }
            Recipe::Gptq { base, bits, zero_offset, .. } => {
                Form::Coded(Coded::gptq(self, base, *bits, *zero_offset, size)?)
            }
            Recipe::Awq { base } => Form::Coded(Coded::awq(self, base, size)?),
            Recipe::Packed { base, bits, .. } => Form::Coded(Coded::packed(self, base, *bits, size)?),
            Recipe::Mxfp4 { base } => Form::Mxfp4(Mxfp4::open(self, base, size[1])?),
        })
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

#[cfg(test)]
mod tests;
