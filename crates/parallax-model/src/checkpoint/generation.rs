//! What the makers of a model sample with, from generation_config.json.
//!
//! The fields are those that vLLM takes from there, and as there `do_sample` is not looked at. Ranges are not judged: who
//! samples knows which values it takes.

use serde_json::Value;

use crate::error::ConfigError;

/// What to sample with where a request does not say: fields of generation_config.json, as they are in the file. `None` is
/// what the file does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Divides the logits; 0 is greedy.
    pub temperature: Option<f32>,
    /// Probability, 0 to 1, that the likeliest tokens have together which are kept; 1 keeps all.
    pub top_p: Option<f32>,
    /// How many tokens are kept, the likeliest; 0 keeps all, which files also write as -1.
    pub top_k: Option<usize>,
    /// Fraction of the likeliest token's probability, 0 to 1, that a token has at least which is kept; 0 keeps all.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens that are there already; 1 changes nothing.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// From a generation_config.json.
    ///
    /// # Errors
    /// A field that is neither a number nor null, or a `top_k` that counts nothing.
    pub(super) fn read(file: &Value) -> Result<Self, ConfigError> {
        let float = |field: &str| number(file, field).map(|number| number.map(|v| v as f32));
        Ok(Self {
            temperature: float("temperature")?,
            top_p: float("top_p")?,
            top_k: match number(file, "top_k")? {
                Some(k) if k.fract() != 0.0 => return Err(invalid(file, "top_k", "a whole number")),
                // The cast makes 0 of what is below.
                other => other.map(|k| k as usize),
            },
            min_p: float("min_p")?,
            repetition_penalty: float("repetition_penalty")?,
        })
    }

    /// Puts what is said into a generation_config.json, an object.
    pub(super) fn write(&self, file: &mut Value) {
        // By their shortest text, which 0.6 as f64 has and the nearest f32 to it has not.
        let float = |v: f32| v.to_string().parse::<f64>().map_or(Value::Null, Value::from);
        for (field, value) in [
            ("temperature", self.temperature.map(float)),
            ("top_p", self.top_p.map(float)),
            ("top_k", self.top_k.map(Value::from)),
            ("min_p", self.min_p.map(float)),
            ("repetition_penalty", self.repetition_penalty.map(float)),
        ] {
            if let Some(value) = value {
                file[field] = value;
            }
        }
    }
}

/// A number; none where the field is not there or null.
fn number(file: &Value, field: &str) -> Result<Option<f64>, ConfigError> {
    match &file[field] {
        Value::Null => Ok(None),
        value => value.as_f64().map(Some).ok_or_else(|| invalid(file, field, "a number")),
    }
}

fn invalid(file: &Value, field: &str, expected: &str) -> ConfigError {
    ConfigError::Invalid {
        field: field.to_owned(),
        value: file[field].to_string(),
        reason: format!("it should be {expected}, or not be there"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn fields_are_handed_on_as_they_are() {
        let read = |file: Value| GenerationDefaults::read(&file).unwrap();
        let whole = json!({"bos_token_id": 1, "do_sample": false, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
            "min_p": 0, "repetition_penalty": 1.05, "max_new_tokens": 2048});
        let all = GenerationDefaults {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            min_p: Some(0.0),
            repetition_penalty: Some(1.05),
        };
        assert_eq!(read(whole), all);
        for nothing in [Value::Null, json!([]), json!({"temperature": null, "do_sample": true})] {
            assert_eq!(read(nothing), GenerationDefaults::default());
        }
        for (k, expected) in [(json!(-1), 0), (json!(0), 0), (json!(50.0), 50)] {
            assert_eq!(read(json!({"top_k": k})).top_k, Some(expected), "{k}");
        }
        // Whoever samples says what it does not take.
        assert_eq!(read(json!({"temperature": -3.5})).temperature, Some(-3.5));
    }

    #[test]
    fn what_is_no_number_is_named() {
        for field in ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"] {
            for value in [json!("0.5"), json!(true), json!([1])] {
                let error = GenerationDefaults::read(&json!({field: value})).unwrap_err().to_string();
                assert!(error.contains(field) && error.contains(&value.to_string()), "{error}");
            }
        }
        let error = GenerationDefaults::read(&json!({"top_k": 0.5})).unwrap_err().to_string();
        assert!(error.contains("top_k") && error.contains("whole number"), "{error}");
    }

    #[test]
    fn a_checkpoint_has_those_of_its_directory() {
        assert_eq!(Checkpoint::tiny().unwrap().generation_defaults(), GenerationDefaults::default());
        let tiny = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny"));
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(tiny.join(file), dir.path().join(file)).unwrap();
        }
        let path = dir.path().join("generation_config.json");
        std::fs::write(&path, r#"{"eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20}"#).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let expected =
            GenerationDefaults { temperature: Some(0.6), top_k: Some(20), ..GenerationDefaults::default() };
        assert_eq!(checkpoint.generation_defaults(), expected);
        assert!(checkpoint.config().eos.contains(&7), "end tokens are read as well");

        // A copy keeps them, to the digit.
        let files = checkpoint.text_files().unwrap();
        let (_, copy) = files.into_iter().find(|(name, _)| name == "generation_config.json").unwrap();
        let copy: Value = serde_json::from_slice(&copy).unwrap();
        assert_eq!((&copy["temperature"], &copy["top_k"]), (&json!(0.6), &json!(20)));
        assert!(copy.get("top_p").is_none());

        std::fs::write(&path, r#"{"temperature": "warm"}"#).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("generation_config.json") && error.contains("temperature"), "{error}");
    }
}
