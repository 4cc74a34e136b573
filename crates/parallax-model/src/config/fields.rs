//! Reading the fields of a config.json: what is missing or of the wrong kind is an error that names the field.
//!
//! Two generations are read: `rope_theta` and `rope_scaling` at the top level, and the newer `rope_parameters`
//! object, which may hold one entry per kind of layer.

use serde_json::{Map, Value};

use super::{LayerConfig, MAX_DIM, MAX_LAYERS, ModelConfig, Norm, NormKind, Rope, RopeScaling};
use crate::{config::Family, error::ConfigError};

/// The fields of one config.json. `null` counts as absent.
#[derive(Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a Map<String, Value>);

/// A refusal of a field's value.
pub(crate) fn invalid(field: &str, value: impl std::fmt::Display, reason: &str) -> ConfigError {
    ConfigError::Invalid { field: field.to_owned(), value: format!("{value}"), reason: reason.to_owned() }
}

impl<'a> Fields<'a> {
    /// Any value.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    /// A count, if it is there.
    pub(crate) fn size_if(&self, name: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok());
        size.map(Some).ok_or_else(|| invalid(name, value, "it must be a whole number"))
    }

    /// A count, or what the architecture takes without.
    pub(crate) fn size_or(&self, name: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.size_if(name)?.unwrap_or(default))
    }

    /// A count that must be there.
    pub(crate) fn size(&self, name: &str) -> Result<usize, ConfigError> {
        self.size_if(name)?.ok_or_else(|| ConfigError::Missing { field: name.to_owned() })
    }

    /// A number, if it is there.
    pub(crate) fn float_if(&self, name: &str) -> Result<Option<f32>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().map(|v| Some(v as f32)).ok_or_else(|| invalid(name, value, "it must be a number"))
    }

    /// A number, or what the architecture takes without.
    pub(crate) fn float_or(&self, name: &str, default: f32) -> Result<f32, ConfigError> {
        Ok(self.float_if(name)?.unwrap_or(default))
    }

    /// A switch, or what the architecture takes without.
    pub(crate) fn bool_or(&self, name: &str, default: bool) -> bool {
        self.get(name).and_then(Value::as_bool).unwrap_or(default)
    }

    /// A text.
    pub(crate) fn text(&self, name: &str) -> Option<&'a str> {
        self.get(name).and_then(Value::as_str)
    }

    /// Refuses a switch that this architecture cannot follow.
    pub(crate) fn refuse(&self, name: &str) -> Result<(), ConfigError> {
        if self.bool_or(name, false) {
            return Err(invalid(name, true, "this architecture is supported only without it"));
        }
        Ok(())
    }

    /// The fields with these where they are absent.
    pub(crate) fn with_defaults(&self, defaults: &[(&str, u64)]) -> Map<String, Value> {
        let mut map = self.0.clone();
        for (name, value) in defaults.iter().filter(|(name, _)| self.get(name).is_none()) {
            map.insert((*name).to_owned(), (*value).into());
        }
        map
    }

    /// Whether a layer sees only a window: `layer_types` where it is there, else the architecture's rule.
    pub(crate) fn slides(&self, layer: usize, rule: bool) -> bool {
        let listed = self.get("layer_types").and_then(|types| types.get(layer));
        listed.map_or(rule, |kind| kind == "sliding_attention")
    }

    /// Refuses another activation than `expected`.
    pub(crate) fn activation(&self, name: &str, expected: &[&str]) -> Result<(), ConfigError> {
        match self.text(name) {
            Some(other) if !expected.contains(&other) => Err(invalid(
                name,
                other,
                &format!("this architecture is supported with {}", expected.join(", ")),
            )),
            _ => Ok(()),
        }
    }

    /// The texts of an array, if it is there.
    pub(crate) fn texts(&self, name: &str) -> Option<Vec<&'a str>> {
        self.get(name).and_then(Value::as_array).map(|a| a.iter().filter_map(Value::as_str).collect())
    }

    /// Number of decoder layers, within bounds.
    pub(crate) fn n_layers(&self) -> Result<usize, ConfigError> {
        let n = self.size("num_hidden_layers")?;
        if n == 0 || n > MAX_LAYERS {
            return Err(invalid("num_hidden_layers", n, &format!("it must be within 1..={MAX_LAYERS}")));
        }
        Ok(n)
    }

    /// H, within bounds.
    pub(crate) fn hidden(&self) -> Result<usize, ConfigError> {
        let n = self.size("hidden_size")?;
        if n == 0 || n > MAX_DIM {
            return Err(invalid("hidden_size", n, &format!("it must be within 1..={MAX_DIM}")));
        }
        Ok(n)
    }

    /// Epsilon of the RMS norms.
    pub(crate) fn eps(&self) -> Result<f32, ConfigError> {
        self.float_or("rms_norm_eps", 1e-6)
    }

    /// An RMS norm.
    pub(crate) fn rms(&self, name: &'static str) -> Result<Norm, ConfigError> {
        Ok(Norm { name, kind: NormKind::Rms, eps: self.eps()? })
    }

    /// An RMS norm whose weight is stored without its one, unless the file says that it was added.
    pub(crate) fn rms_plus_one(&self, name: &'static str) -> Result<Norm, ConfigError> {
        let added = self.bool_or("parallax_norms_hold_one", false);
        let kind = if added { NormKind::Rms } else { NormKind::RmsPlusOne };
        Ok(Norm { name, kind, eps: self.eps()? })
    }

    /// Q, K and D.
    pub(crate) fn heads(&self) -> Result<[usize; 3], ConfigError> {
        let n_heads = self.size("num_attention_heads")?;
        let n_kv_heads = self.size_or("num_key_value_heads", n_heads)?;
        let derived = self.hidden()?.checked_div(n_heads).unwrap_or(0);
        Ok([n_heads, n_kv_heads, self.size_or("head_dim", derived)?])
    }

    /// Elements of a head that are rotated.
    fn rotated(&self, head_dim: usize) -> Result<usize, ConfigError> {
        self.rotated_or(head_dim, 1.0)
    }

    /// The same, where the architecture rotates another share without being told.
    pub(crate) fn rotated_or(&self, head_dim: usize, default: f32) -> Result<usize, ConfigError> {
        let nested = Fields(self.rope_object(None).unwrap_or(self.0));
        let factor = match self.float_if("partial_rotary_factor")? {
            Some(factor) => factor,
            None => nested.float_or("partial_rotary_factor", default)?,
        };
        if !(factor > 0.0 && factor <= 1.0) {
            return Err(invalid("partial_rotary_factor", factor, "it must be within 0..=1"));
        }
        Ok((head_dim as f32 * factor) as usize)
    }

    /// The object of rotary parameters, of one kind of layer where there are several.
    fn rope_object(&self, kind: Option<&str>) -> Option<&'a Map<String, Value>> {
        let object = self.get("rope_parameters").or_else(|| self.get("rope_scaling"))?.as_object()?;
        match kind.and_then(|kind| object.get(kind)) {
            Some(nested) => nested.as_object(),
            None => Some(object),
        }
    }

    /// Whether rotary parameters are given for this kind of layer.
    pub(crate) fn has_rope_of(&self, kind: &str) -> bool {
        self.rope_object(None).is_some_and(|object| object.contains_key(kind))
    }

    /// A number among the rotary parameters.
    pub(crate) fn rope_number(&self, name: &str) -> Result<Option<f32>, ConfigError> {
        self.rope_object(None).map_or(Ok(None), |object| Fields(object).float_if(name))
    }

    /// Rotation of whole heads, or of the part that `partial_rotary_factor` says.
    pub(crate) fn rope(&self, head_dim: usize) -> Result<Rope, ConfigError> {
        self.rope_of(None, head_dim, 10_000.0)
    }

    /// Rotation in one kind of layer; `theta` where the file gives none.
    pub(crate) fn rope_of(
        &self,
        kind: Option<&str>,
        head_dim: usize,
        theta: f32,
    ) -> Result<Rope, ConfigError> {
        let object = self.rope_object(kind);
        let nested = object.map(Fields);
        let inner = nested.as_ref().map_or(Ok(None), |f| f.float_if("rope_theta"))?;
        let theta = match inner {
            Some(theta) => theta,
            None => self.float_or("rope_theta", theta)?,
        };
        let scaling = nested.map_or(Ok(None), |f| self.scaling(&f))?;
        Ok(Rope { theta, dims: self.rotated(head_dim)?, interleaved: false, scaling })
    }

    fn scaling(&self, f: &Fields<'_>) -> Result<Option<RopeScaling>, ConfigError> {
        let need = |name: &str| {
            let missing = || ConfigError::Missing { field: format!("rope_scaling.{name}") };
            f.float_if(name)?.ok_or_else(missing)
        };
        let original = || match f.size_if("original_max_position_embeddings")? {
            Some(n) => Ok(n),
            None => self
                .size("original_max_position_embeddings")
                .or_else(|_| self.size("max_position_embeddings")),
        };
        let list = |name: &str| -> Result<Vec<f32>, ConfigError> {
            let values = f.get(name).and_then(Value::as_array);
            let values =
                values.ok_or_else(|| ConfigError::Missing { field: format!("rope_scaling.{name}") })?;
            Ok(values.iter().filter_map(Value::as_f64).map(|v| v as f32).collect())
        };
        Ok(match f.text("rope_type").or_else(|| f.text("type")).unwrap_or("default") {
            "default" => None,
            "linear" => Some(RopeScaling::Linear { factor: need("factor")? }),
            "llama3" => Some(RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: original()?,
            }),
            "yarn" => {
                let factor = need("factor")?;
                // 0.1 · m · ln(factor) + 1, equation 22 of the paper.
                let scale = |m: f32| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let magnitude = match (
                    f.float_if("attention_factor")?,
                    f.float_if("mscale")?,
                    f.float_if("mscale_all_dim")?,
                ) {
                    (Some(given), _, _) => given,
                    (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
                    _ => scale(1.0),
                };
                Some(RopeScaling::Yarn {
                    factor,
                    beta_fast: f.float_or("beta_fast", 32.0)?,
                    beta_slow: f.float_or("beta_slow", 1.0)?,
                    original_context: original()?,
                    truncate: f.bool_or("truncate", true),
                    magnitude,
                })
            }
            // Within the original context the short factors hold; see `ModelConfig::context`.
            "longrope" | "su" => {
                let (whole, original) = (self.size("max_position_embeddings")?, original()?);
                let ratio = whole as f32 / original.max(1) as f32;
                let derived =
                    if ratio <= 1.0 { 1.0 } else { (1.0 + ratio.ln() / (original as f32).ln()).sqrt() };
                let magnitude = f.float_or("attention_factor", derived)?;
                let long = self.size_or(CONTEXT, original)? > original;
                let factors = list(if long { "long_factor" } else { "short_factor" })?;
                Some(RopeScaling::LongRope { factors, magnitude })
            }
            "factors" => Some(RopeScaling::Factors(list("factors")?)),
            other => {
                let reason = "supported kinds are default, linear, llama3, yarn and longrope";
                return Err(invalid("rope_scaling", other, reason));
            }
        })
    }

    /// Longest sequence: LongRoPE keeps to the original context unless a longer one was asked for.
    fn context(&self) -> Result<usize, ConfigError> {
        if let Some(context) = self.size_if(CONTEXT)? {
            return Ok(context);
        }
        let whole = self.size_or("max_position_embeddings", 2048)?;
        let nested = self.rope_object(None).map(Fields);
        let kind = nested.as_ref().and_then(|f| f.text("rope_type").or_else(|| f.text("type")));
        if !matches!(kind, Some("longrope" | "su")) {
            return Ok(whole);
        }
        let inner = nested.map_or(Ok(None), |f| f.size_if("original_max_position_embeddings"))?;
        Ok(inner.map_or_else(|| self.size_or("original_max_position_embeddings", whole), Ok)?.min(whole))
    }

    /// A model of these layers; what its architecture does outside of them is set by the caller afterwards.
    pub(crate) fn model(&self, family: Family, layers: Vec<LayerConfig>) -> Result<ModelConfig, ConfigError> {
        Ok(ModelConfig {
            family,
            n_layers: layers.len(),
            hidden: self.hidden()?,
            vocab: self.size("vocab_size")?,
            layers,
            embedding_scale: 1.0,
            final_norm: self.rms("model.norm")?,
            logit_scale: 1.0,
            logit_softcap: None,
            tied_embeddings: self.bool_or("tie_word_embeddings", false),
            max_context: self.context()?,
            bos: token_ids(self.get("bos_token_id")).first().copied(),
            eos: token_ids(self.get("eos_token_id")),
            source: Value::Object(self.0.clone()),
        })
    }
}

/// Our own field: the context that the model is run with, where that chooses its rotary factors.
pub(super) const CONTEXT: &str = "parallax_context";

pub(super) fn token_ids(value: Option<&Value>) -> Vec<u32> {
    match value {
        Some(Value::Number(n)) => n.as_u64().and_then(|n| u32::try_from(n).ok()).into_iter().collect(),
        Some(Value::Array(ids)) => ids.iter().flat_map(|v| token_ids(Some(v))).collect(),
        _ => Vec::new(),
    }
}
