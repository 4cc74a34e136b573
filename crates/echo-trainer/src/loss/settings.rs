//! A loss as a file has it: its parts, or the name of a preset and what is different.
//!
//! A part that is given goes over the preset's, field by field: `preset = "dapo"` with `surrogate = { high = 0.3 }` keeps the
//! lower clip. Another `kind` replaces the whole part, whose fields mean something else then.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::LossKind;
use super::config::{Anchor, LossConfig, Normaliser, RatioLevel};
use super::kl::KlTerm;

/// Makes a preset.
type Make = fn() -> LossConfig;

/// The presets by name, with the clips and temperatures that their sources have.
const PRESETS: [(&str, Make); 16] = [
    ("grpo", LossConfig::grpo),
    ("bnpo", || LossConfig::trl(LossKind::Bnpo, 0.2, 0.2, None, 1)),
    ("dapo", LossConfig::dapo),
    // The length is the run's own: a file must name it.
    ("dr_grpo", || LossConfig::dr_grpo(0)),
    ("gspo", LossConfig::gspo),
    ("gspo_token", LossConfig::gspo_token),
    ("cispo", LossConfig::cispo),
    ("sapo", LossConfig::sapo),
    ("ppo", LossConfig::ppo),
    ("decoupled_ppo", LossConfig::decoupled_ppo),
    ("verl_vanilla", || LossConfig::verl_vanilla(0.2, 0.2)),
    ("verl_gspo", || LossConfig::verl_gspo(3e-4, 4e-4)),
    ("verl_cispo", || LossConfig::verl_cispo(0.2, 0.2)),
    ("verl_sapo", || LossConfig::verl_sapo(1.0, 1.05)),
    ("verl_dppo_tv", || LossConfig::verl_dppo_tv(0.2, 0.2)),
    ("verl_reinforce", LossConfig::verl_reinforce),
];

/// A loss in a file that is none.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum LossSettingsError {
    #[error("preset = {name:?}: no loss has that name; there are {}", names())]
    Preset { name: String },
    #[error(
        "dr_grpo divides by a length that is not named: add normaliser = {{ length = N }}, usually max_completion_tokens"
    )]
    Length,
    #[error("missing field `{part}`; give it, or a preset such as \"grpo\"")]
    Missing { part: &'static str },
    #[error("{part}: {reason}")]
    Part { part: &'static str, reason: String },
}

/// The names of all presets.
fn names() -> String {
    PRESETS.map(|(name, _)| name).join(", ")
}

impl LossConfig {
    /// The loss that files call `name`, for example `grpo`, `dapo`, `gspo`, `decoupled_ppo` or `verl_cispo`; `None` when no
    /// loss is called so. The constant of `dr_grpo` is 0 here, which no run takes: it must be given.
    pub fn preset(name: &str) -> Option<Self> {
        PRESETS.iter().find(|(known, _)| *known == name).map(|(_, make)| make())
    }
}

/// What may stand in a file. Parts that only change some fields of a preset's are read when those are known.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LossSettings {
    preset: Option<String>,
    surrogate: Option<Value>,
    normaliser: Option<Value>,
    count_empty: Option<bool>,
    level: Option<RatioLevel>,
    anchor: Option<Anchor>,
    log_ratio: Option<Value>,
    correction: Option<Value>,
    kl: Option<KlTerm>,
}

impl TryFrom<LossSettings> for LossConfig {
    type Error = LossSettingsError;

    fn try_from(given: LossSettings) -> Result<Self, LossSettingsError> {
        let named = |name: &String| {
            Self::preset(name).ok_or_else(|| LossSettingsError::Preset { name: name.clone() })
        };
        let preset = given.preset.as_ref().map(named).transpose()?;
        let default = preset.unwrap_or_else(Self::grpo);
        let normaliser = part("normaliser", preset.map(|p| p.normaliser), given.normaliser)?;
        if normaliser == (Normaliser::SequenceMeanTokenSumNorm { length: 0 }) {
            return Err(LossSettingsError::Length);
        }
        Ok(Self {
            surrogate: part("surrogate", preset.map(|p| p.surrogate), given.surrogate)?,
            normaliser,
            count_empty: given.count_empty.unwrap_or(default.count_empty),
            level: given.level.unwrap_or(default.level),
            anchor: given.anchor.unwrap_or(default.anchor),
            log_ratio: part("log_ratio", Some(default.log_ratio), given.log_ratio)?,
            correction: part("correction", Some(default.correction), given.correction)?,
            kl: given.kl.or(default.kl),
        })
    }
}

/// One part of a loss: the preset's with what is given over it.
fn part<T: Serialize + DeserializeOwned>(
    part: &'static str,
    preset: Option<T>,
    given: Option<Value>,
) -> Result<T, LossSettingsError> {
    let failed = |error: serde_json::Error| LossSettingsError::Part { part, reason: error.to_string() };
    match (preset, given) {
        (Some(preset), None) => Ok(preset),
        (None, None) => Err(LossSettingsError::Missing { part }),
        (None, Some(given)) => serde_json::from_value(given).map_err(failed),
        (Some(preset), Some(given)) => {
            let mut value = serde_json::to_value(preset).map_err(failed)?;
            lay_over(&mut value, given);
            serde_json::from_value(value).map_err(failed)
        }
    }
}

/// Puts `given` over `value`, field by field where both are tables of the same kind.
fn lay_over(value: &mut Value, given: Value) {
    let other_kind = |old: &Map<String, Value>, new: &Map<String, Value>| {
        new.get("kind").is_some_and(|kind| Some(kind) != old.get("kind"))
    };
    match (value, given) {
        (Value::Object(old), Value::Object(new)) if !other_kind(old, &new) => {
            for (name, given) in new {
                lay_over(old.entry(name).or_insert(Value::Null), given);
            }
        }
        (value, given) => *value = given,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::loss::config::{Correction, Normaliser, Surrogate};

    fn read(settings: Value) -> Result<LossConfig, String> {
        serde_json::from_value(settings).map_err(|e: serde_json::Error| e.to_string())
    }

    #[test]
    fn every_preset_is_valid_and_is_what_it_is_called() {
        for (name, make) in PRESETS {
            let mut settings = json!({ "preset": name });
            let mut loss = make();
            if name == "dr_grpo" {
                settings["normaliser"] = json!({ "length": 64 });
                loss = LossConfig::dr_grpo(64);
            }
            loss.validate().unwrap();
            assert_eq!(read(settings), Ok(loss), "{name}");
            assert_eq!(read(serde_json::to_value(loss).unwrap()), Ok(loss), "{name}, all parts written out");
        }
        let unknown = read(json!({ "preset": "dappo" })).unwrap_err();
        assert!(unknown.contains("dappo") && unknown.contains("decoupled_ppo, verl_vanilla"), "{unknown}");
        for lengthless in [json!({ "preset": "dr_grpo" }), json!({ "preset": "dr_grpo", "normaliser": {} })] {
            let length = read(lengthless).unwrap_err();
            assert!(length.contains("normaliser = { length = N }"), "{length}");
        }
    }

    #[test]
    fn parts_of_a_preset_are_changed_one_by_one() {
        let dapo = LossConfig::dapo();
        let clip = Surrogate::Clip { low: 0.2, high: 0.3, dual: None, cap: None };
        let changed = read(json!({ "preset": "dapo", "surrogate": { "high": 0.3 }, "count_empty": false }));
        assert_eq!(changed, Ok(LossConfig { surrogate: clip, count_empty: false, ..dapo }));
        // Another kind brings all of its fields itself.
        let other = read(json!({ "preset": "dapo", "surrogate": { "kind": "cispo", "most": 3.0 } }));
        let cispo = Surrogate::Cispo { least: None, most: 3.0 };
        assert_eq!(other, Ok(LossConfig { surrogate: cispo, ..dapo }));
        let sums = read(json!({ "preset": "dr_grpo", "normaliser": { "kind": "token_sum" } }));
        assert_eq!(sums.unwrap().normaliser, Normaliser::TokenSum);
        // Deeper, and where the preset has nothing.
        let decoupled =
            read(json!({ "preset": "decoupled_ppo", "correction": { "weight": { "upper": 4 } } }));
        assert_eq!(decoupled.unwrap().correction.weight, Correction::tis(4.0).weight);
        let held = read(json!({ "preset": "grpo", "kl": { "weight": 0.05 }, "log_ratio": { "high": 10.0 } }));
        let held = held.unwrap();
        assert_eq!((held.kl, held.log_ratio.high), (Some(KlTerm::trl(0.05)), Some(10.0)));
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let missing = read(json!({ "surrogate": { "kind": "reinforce" } })).unwrap_err();
        assert!(missing.contains("`normaliser`") && missing.contains("preset"), "{missing}");
        for (settings, named) in [
            (json!({ "preset": "grpo", "klip": 1 }), "klip"),
            (json!({ "preset": "grpo", "surrogate": { "hihg": 1.0 } }), "hihg"),
            (json!({ "preset": "grpo", "normaliser": { "kind": "token_men" } }), "token_men"),
        ] {
            let unknown = read(settings).unwrap_err();
            assert!(unknown.contains(named), "{named}: {unknown}");
        }
    }
}
