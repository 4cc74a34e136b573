//! LoRA adapters: y = x·Wᵀ + (alpha / rank)·((x·Aᵀ)·Bᵀ), with the names and shapes of the PEFT library.
//!
//! Stored as safetensors with rank and alpha in the metadata, so that the bytes alone are enough; equal
//! adapters give equal bytes. LoRA: Hu et al. 2021, arXiv 2106.09685.

pub(crate) mod modules;

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};

use self::modules::{hf_module, module_shape, split};
use crate::{
    config::ModelConfig,
    error::{AdapterError, SaveError},
};

/// The two factors of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraTensors {
    /// A, row-major [rank, inputs].
    pub a: Vec<f32>,
    /// B, row-major [outputs, rank].
    pub b: Vec<f32>,
    /// Width in.
    pub inputs: usize,
    /// Width out.
    pub outputs: usize,
}

/// An adapter for a whole model or for some of its layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Inner width.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f32,
    /// Factors by module name, e.g. `layers.3.q_proj`.
    pub tensors: BTreeMap<String, LoraTensors>,
}

#[derive(Serialize, Deserialize)]
struct Settings {
    rank: usize,
    alpha: f32,
}

/// Values and shape of A or B while a file is read.
type Half = (Vec<f32>, [usize; 2]);

/// Key of the one metadata entry. One, because the order of several would not be fixed.
const METADATA: &str = "lora";
const PREFIX: &str = "base_model.model.";

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl Adapter {
    /// alpha / rank.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Parameters.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(|t| t.a.len() + t.b.len()).sum()
    }

    /// Checks names and shapes against a model.
    ///
    /// # Errors
    /// The first module that does not fit.
    pub fn check(&self, config: &ModelConfig) -> Result<(), AdapterError> {
        for (module, t) in &self.tensors {
            let shape = split(module)
                .filter(|(layer, _)| *layer < config.n_layers)
                .and_then(|(layer, name)| module_shape(config, layer, name));
            let Some((inputs, outputs)) = shape else {
                return Err(AdapterError::UnknownModule { module: module.clone() });
            };
            let wrong = |which, found, expected| {
                Err(AdapterError::Shape { module: module.clone(), which, found, expected })
            };
            if t.inputs != inputs || t.a.len() != self.rank * inputs {
                return wrong("A", [t.a.len() / t.inputs.max(1), t.inputs], [self.rank, inputs]);
            }
            if t.outputs != outputs || t.b.len() != self.rank * outputs {
                return wrong("B", [t.outputs, t.b.len() / t.outputs.max(1)], [outputs, self.rank]);
            }
        }
        Ok(())
    }

    /// The adapter as a safetensors file. Equal adapters give equal bytes.
    ///
    /// # Errors
    /// A module name or a length that no file can hold.
    pub fn to_bytes(&self) -> Result<Vec<u8>, AdapterError> {
        let invalid = |e: &dyn std::fmt::Display| AdapterError::Invalid(e.to_string());
        let mut parts = Vec::new();
        for (module, t) in &self.tensors {
            let path =
                hf_module(module).ok_or_else(|| AdapterError::UnknownModule { module: module.clone() })?;
            parts.push((format!("{PREFIX}{path}.lora_A.weight"), vec![self.rank, t.inputs], f32_bytes(&t.a)));
            parts.push((
                format!("{PREFIX}{path}.lora_B.weight"),
                vec![t.outputs, self.rank],
                f32_bytes(&t.b),
            ));
        }
        let mut views = Vec::with_capacity(parts.len());
        for (name, shape, bytes) in &parts {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(|e| invalid(&e))?;
            views.push((name.as_str(), view));
        }
        let settings = serde_json::to_string(&Settings { rank: self.rank, alpha: self.alpha })
            .map_err(|e| invalid(&e))?;
        serialize(views, Some(HashMap::from([(METADATA.to_owned(), settings)]))).map_err(|e| invalid(&e))
    }

    /// Reads a safetensors adapter, ours or PEFT's. PEFT keeps alpha in adapter_config.json, which
    /// [`Self::load`] reads; without either, alpha is taken to equal the rank.
    ///
    /// # Errors
    /// Broken bytes, foreign names, one module twice, half a pair, mixed ranks, or values that are not finite.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AdapterError> {
        let invalid = |reason: String| AdapterError::Invalid(reason);
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| invalid(e.to_string()))?;
        let settings = metadata
            .metadata()
            .as_ref()
            .and_then(|m| m.get(METADATA))
            .map(|text| serde_json::from_str::<Settings>(text))
            .transpose()
            .map_err(|e| invalid(format!("metadata: {e}")))?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| invalid(e.to_string()))?;
        let mut halves: BTreeMap<String, [Option<Half>; 2]> = BTreeMap::new();
        for (name, view) in file.iter() {
            if is_of_experts(name) {
                return Err(AdapterError::Experts { tensor: name.to_owned() });
            }
            let (module, half) =
                parse_name(name).ok_or_else(|| invalid(format!("unknown tensor {name:?}")))?;
            let [rows, columns] = view.shape() else {
                return Err(invalid(format!("tensor {name:?} is not a matrix")));
            };
            let values =
                values(&view).ok_or_else(|| invalid(format!("tensor {name:?} is not f32, f16 or bf16")))?;
            if let Some(bad) = values.iter().find(|v| !v.is_finite()) {
                return Err(invalid(format!("tensor {name:?} holds {bad}")));
            }
            // A language model has two spellings.
            let before = halves.entry(module).or_default()[half].replace((values, [*rows, *columns]));
            if before.is_some() {
                return Err(invalid(format!("tensor {name:?} is there in another spelling, too")));
            }
        }
        let mut rank = settings.as_ref().map(|s| s.rank);
        let mut tensors = BTreeMap::new();
        for (module, pair) in halves {
            let [Some((a, [r, inputs])), Some((b, [outputs, r_b]))] = pair else {
                return Err(invalid(format!("module {module:?} has only one of A and B")));
            };
            let rank = *rank.get_or_insert(r);
            if r != rank || r_b != rank || rank == 0 {
                return Err(invalid(format!("module {module:?} has ranks {r} and {r_b}, expected {rank}")));
            }
            tensors.insert(module, LoraTensors { a, b, inputs, outputs });
        }
        let rank = rank.unwrap_or(0);
        let alpha = settings.map_or(rank as f32, |s| s.alpha);
        if rank == 0 || !alpha.is_finite() {
            return Err(invalid(format!("rank {rank}, alpha {alpha}")));
        }
        Ok(Self { rank, alpha, tensors })
    }

    /// Writes `adapter_model.safetensors` and `adapter_config.json` into a directory, as PEFT does.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), SaveError> {
        let bytes =
            self.to_bytes().map_err(|e| SaveError::Encode { path: dir.to_owned(), reason: e.to_string() })?;
        let targets: std::collections::BTreeSet<&str> =
            self.tensors.keys().filter_map(|m| split(m).map(|(_, name)| name)).collect();
        let config = serde_json::json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.alpha,
            "target_modules": targets, "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": false,
        });
        crate::files::write(&dir.join("adapter_config.json"), format!("{config:#}\n").as_bytes())?;
        crate::files::write(&dir.join("adapter_model.safetensors"), &bytes)
    }

    /// Reads a directory that [`Self::save`] or PEFT wrote, or a single safetensors file.
    ///
    /// # Errors
    /// As [`Self::from_bytes`], or the file cannot be read.
    pub fn load(path: &Path) -> Result<Self, AdapterError> {
        let file = if path.is_dir() { path.join("adapter_model.safetensors") } else { path.to_owned() };
        let bytes = std::fs::read(&file).map_err(|source| AdapterError::Io { path: file.clone(), source })?;
        let mut adapter = Self::from_bytes(&bytes)?;
        let config = file.with_file_name("adapter_config.json");
        if let Ok(text) = std::fs::read(&config) {
            let config: serde_json::Value = serde_json::from_slice(&text)
                .map_err(|e| AdapterError::Invalid(format!("{}: {e}", config.display())))?;
            adapter.apply_settings(&config)?;
        }
        Ok(adapter)
    }

    /// What adapter_config.json says about the scale, and what of it would change the formula.
    fn apply_settings(&mut self, config: &serde_json::Value) -> Result<(), AdapterError> {
        let refuse = |what: &str| {
            Err(AdapterError::Invalid(format!(
                "{what} is not supported; merge the adapter into its base model"
            )))
        };
        if config["use_dora"] == true {
            return refuse("DoRA");
        }
        if config["bias"].as_str().is_some_and(|bias| bias != "none") {
            return refuse("a trained bias");
        }
        if config["fan_in_fan_out"] == true {
            return refuse("fan_in_fan_out");
        }
        let pattern = |name: &str| config[name].as_object().is_some_and(|map| !map.is_empty());
        if pattern("rank_pattern") || pattern("alpha_pattern") {
            return refuse("a rank or alpha per module");
        }
        if let Some(alpha) = config["lora_alpha"].as_f64() {
            self.alpha = alpha as f32;
        }
        if config["use_rslora"] == true {
            // Rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732) scales by alpha / sqrt(rank): kept as the
            // alpha that gives this scale.
            self.alpha *= (self.rank as f32).sqrt();
        }
        Ok(())
    }
}

/// Module and half (0 = A, 1 = B) of a PEFT tensor name.
fn parse_name(name: &str) -> Option<(String, usize)> {
    let path = name.strip_prefix(PREFIX)?;
    let (path, half) = match path.strip_suffix(".lora_A.weight") {
        Some(path) => (path, 0),
        None => (path.strip_suffix(".lora_B.weight")?, 1),
    };
    // The second is that of a language model beside a vision tower.
    let layers = ["model.layers.", "model.language_model.layers."];
    let (layer, rest) = layers.iter().find_map(|prefix| path.strip_prefix(prefix))?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let module = format!("layers.{layer}.{}", rest.split_once('.')?.1);
    path.ends_with(hf_module(&module)?.strip_prefix("model")?).then_some((module, half))
}

/// Whether a tensor is of routed experts or of the router that chooses them, in any family's names.
fn is_of_experts(name: &str) -> bool {
    let routers = [".mlp.gate.", ".mlp.router.", ".block_sparse_moe.gate."];
    name.contains(".experts.") || routers.iter().any(|router| name.contains(router))
}

fn values(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let bytes = view.data();
    let stored = match view.dtype() {
        Dtype::F32 => crate::weights::StoredDtype::F32,
        Dtype::F16 => crate::weights::StoredDtype::F16,
        Dtype::BF16 => crate::weights::StoredDtype::BF16,
        _ => return None,
    };
    Some(crate::weights::to_f32(stored, bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Adapter {
        let t = LoraTensors {
            a: (0..8).map(|i| i as f32).collect(),
            b: (0..12).map(|i| -(i as f32)).collect(),
            inputs: 4,
            outputs: 6,
        };
        let tensors = [("layers.0.q_proj".to_owned(), t.clone()), ("layers.11.down_proj".to_owned(), t)];
        Adapter { rank: 2, alpha: 16.0, tensors: BTreeMap::from(tensors) }
    }

    #[test]
    fn bytes_round_trip_and_are_stable() {
        let adapter = sample();
        let bytes = adapter.to_bytes().unwrap();
        assert_eq!(Adapter::from_bytes(&bytes).unwrap(), adapter);
        assert_eq!(adapter.clone().to_bytes().unwrap(), bytes);
        let names = SafeTensors::deserialize(&bytes).unwrap();
        assert!(names.tensor("base_model.model.model.layers.11.mlp.down_proj.lora_B.weight").is_ok());
    }

    #[test]
    fn directory_round_trips_with_the_peft_config() {
        let dir = tempfile::tempdir().unwrap();
        let adapter = sample();
        adapter.save(dir.path()).unwrap();
        assert_eq!(Adapter::load(dir.path()).unwrap(), adapter);
        assert!(
            std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap().contains("\"LORA\"")
        );
    }

    #[test]
    fn peft_settings_set_the_scale_or_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        sample().save(dir.path()).unwrap();
        let path = dir.path().join("adapter_config.json");
        let load = |settings: serde_json::Value| {
            std::fs::write(&path, settings.to_string()).unwrap();
            Adapter::load(dir.path())
        };
        assert_eq!(load(serde_json::json!({"r": 2, "lora_alpha": 6})).unwrap().scale(), 3.0);
        let stabilised = load(serde_json::json!({"r": 2, "lora_alpha": 6, "use_rslora": true})).unwrap();
        assert!((stabilised.scale() - 6.0 / 2f32.sqrt()).abs() < 1e-6);
        for refused in [
            serde_json::json!({"use_dora": true}),
            serde_json::json!({"bias": "all"}),
            serde_json::json!({"fan_in_fan_out": true}),
            serde_json::json!({"rank_pattern": {"q_proj": 4}}),
        ] {
            assert!(load(refused.clone()).unwrap_err().to_string().contains("merge"), "{refused}");
        }
        assert_eq!(load(serde_json::json!({"bias": "none", "rank_pattern": {}})).unwrap().alpha, 16.0);
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        let mut adapter = sample();
        adapter.tensors.get_mut("layers.0.q_proj").unwrap().a[3] = f32::NAN;
        let error = Adapter::from_bytes(&adapter.to_bytes().unwrap()).unwrap_err().to_string();
        assert!(error.contains("NaN") && error.contains("q_proj"), "{error}");
    }

    #[test]
    fn one_module_in_two_spellings_is_refused() {
        let bytes = sample().to_bytes().unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let other = |name: &str| name.replacen("model.layers.11", "model.language_model.layers.11", 1);
        let both = file.tensors().into_iter().flat_map(|(name, view)| {
            let again = (other(&name) != name).then(|| (other(&name), view.clone()));
            std::iter::once((name, view)).chain(again)
        });
        let views: Vec<_> = both.collect();
        let error = Adapter::from_bytes(&serialize(views, None).unwrap()).unwrap_err().to_string();
        assert!(error.contains("another spelling"), "{error}");
        let alone: Vec<_> = file.tensors().into_iter().map(|(name, view)| (other(&name), view)).collect();
        let adapter = Adapter::from_bytes(&serialize(alone, None).unwrap()).unwrap();
        assert_eq!(adapter.tensors, sample().tensors);
    }

    proptest! {
        #[test]
        fn mutated_bytes_never_panic(at in 0usize..2000, value: u8) {
            let mut bytes = sample().to_bytes().unwrap();
            let n = bytes.len();
            bytes[at % n] = value;
            if let Ok(adapter) = Adapter::from_bytes(&bytes) {
                prop_assert!(adapter.rank > 0);
            }
        }
    }
}
