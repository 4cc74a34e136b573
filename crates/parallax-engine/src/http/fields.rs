//! Reading request bodies: every complaint names the field by its path, such as `messages[2].content[0].text`.
//!
//! `null` counts as absent, as OpenAI's clients send it. Fields that nobody knows are ignored: clients are newer than
//! servers.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// An object of a request and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

/// A body as JSON.
///
/// # Errors
/// 400 when it is no JSON, is nested deeper than 128 levels, or is no object.
pub(super) fn parse(body: &[u8]) -> Result<Value, ApiError> {
    if body.is_empty() {
        return Err(ApiError::invalid(None, "the request body is empty: send a JSON object"));
    }
    let value: Value = serde_json::from_slice(body)
        .map_err(|e| ApiError::invalid(None, format!("the request body is not valid JSON: {e}")))?;
    match value {
        Value::Object(_) => Ok(value),
        other => Err(ApiError::invalid(
            None,
            format!("the request body must be a JSON object, not {}", kind(&other)),
        )),
    }
}

/// What a value is, for complaints.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl<'a> Fields<'a> {
    /// The fields of a value at `path` (empty: the body itself).
    ///
    /// # Errors
    /// 400 when it is no object.
    pub(super) fn of(value: &'a Value, path: impl Into<String>) -> Result<Self, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Self { map, path }),
            other => Err(wrong(&path, "an object", other)),
        }
    }

    /// The path of a field of this object.
    pub(super) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// A complaint about a field of this object; `why` goes on after the path.
    pub(super) fn fault(&self, name: &str, why: impl std::fmt::Display) -> ApiError {
        let path = self.path(name);
        ApiError::invalid(Some(&path), format!("{path} {why}"))
    }

    /// The value as it is.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// All fields that are not null.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.as_str(), value))
    }

    /// Whether the field is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&self.path(name), "a string", other)),
        }
    }

    pub(super) fn required_text(&self, name: &str) -> Result<&'a str, ApiError> {
        self.text(name)?.ok_or_else(|| self.missing(name))
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong(&self.path(name), "true or false", other)),
        }
    }

    pub(super) fn number(&self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Number(number)) => {
                let number = number.as_f64().unwrap_or(f64::NAN);
                if number >= f64::from(*range.start()) && number <= f64::from(*range.end()) {
                    Ok(Some(number as f32))
                } else {
                    let (low, high) = (range.start(), range.end());
                    Err(self.fault(name, format!("must be between {low} and {high}, not {number}")))
                }
            }
            Some(other) => Err(wrong(&self.path(name), "a number", other)),
        }
    }

    pub(super) fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value @ Value::Number(_)) => match value.as_i64() {
                Some(number) if range.contains(&number) => Ok(Some(number)),
                _ if value.as_i64().is_none() && value.as_u64().is_none() => {
                    Err(self.fault(name, format!("must be a whole number, not {value}")))
                }
                _ => {
                    let (low, high) = (range.start(), range.end());
                    Err(self.fault(name, format!("must be between {low} and {high}, not {value}")))
                }
            },
            Some(other) => Err(wrong(&self.path(name), "a whole number", other)),
        }
    }

    /// A count of at least `low`.
    pub(super) fn count(&self, name: &str, low: i64, high: i64) -> Result<Option<usize>, ApiError> {
        let number = self.integer(name, low..=high)?;
        Ok(number.map(|n| usize::try_from(n).expect("the range begins at zero or above")))
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.get(name).map(|value| Fields::of(value, self.path(name))).transpose()
    }

    /// The items of a list with their paths.
    pub(super) fn list(&self, name: &str) -> Result<Option<Vec<(String, &'a Value)>>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(items)) => {
                let path = self.path(name);
                Ok(Some(items.iter().enumerate().map(|(i, item)| (format!("{path}[{i}]"), item)).collect()))
            }
            Some(other) => Err(wrong(&self.path(name), "a list", other)),
        }
    }

    /// A string, or a list of up to `most` strings; none of them empty.
    pub(super) fn texts(&self, name: &str, most: usize) -> Result<Vec<String>, ApiError> {
        let texts = match self.get(name) {
            None => Vec::new(),
            Some(Value::String(text)) => vec![text.clone()],
            Some(Value::Array(items)) => items
                .iter()
                .enumerate()
                .map(|(i, item)| match item {
                    Value::String(text) => Ok(text.clone()),
                    other => Err(wrong(&format!("{}[{i}]", self.path(name)), "a string", other)),
                })
                .collect::<Result<_, _>>()?,
            Some(other) => return Err(wrong(&self.path(name), "a string or a list of strings", other)),
        };
        if texts.len() > most || texts.iter().any(String::is_empty) {
            return Err(self.fault(name, format!("takes up to {most} strings, none of them empty")));
        }
        Ok(texts)
    }

    /// One of the words of a closed set.
    pub(super) fn choice<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, ApiError> {
        let Some(word) = self.text(name)? else { return Ok(None) };
        let found = words.iter().find(|(known, _)| *known == word);
        let known = || words.iter().map(|(w, _)| format!("{w:?}")).collect::<Vec<_>>().join(", ");
        found
            .map(|(_, value)| Some(*value))
            .ok_or_else(|| self.fault(name, format!("must be one of {}, not {word:?}", known())))
    }

    pub(super) fn missing(&self, name: &str) -> ApiError {
        self.fault(name, "is missing")
    }

    /// Fields of OpenAI's that tell its servers something and change no answer here: of the right type they must be all the
    /// same.
    pub(super) fn hints(&self) -> Result<(), ApiError> {
        for name in
            ["user", "safety_identifier", "service_tier", "prompt_cache_key", "prompt_cache_retention"]
        {
            self.text(name)?;
        }
        for name in ["metadata", "prediction"] {
            self.object(name)?;
        }
        self.flag("store")?;
        self.verbosity()
    }

    /// How much the model is to say, which no template here passes on.
    pub(super) fn verbosity(&self) -> Result<(), ApiError> {
        self.choice("verbosity", &[("low", ()), ("medium", ()), ("high", ())])?;
        Ok(())
    }

    /// 400 when the field is there and is not one of the harmless values.
    pub(super) fn unsupported(&self, name: &str, harmless: &[Value]) -> Result<(), ApiError> {
        match self.get(name) {
            Some(value) if !harmless.contains(value) => {
                Err(self.fault(name, "is not supported by this server"))
            }
            _ => Ok(()),
        }
    }
}

/// A complaint about a value of the wrong type.
pub(super) fn wrong(path: &str, expected: &str, got: &Value) -> ApiError {
    let what = if path.is_empty() { "the request body" } else { path };
    ApiError::invalid(Some(path), format!("{what} must be {expected}, not {}", kind(got)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn complaints_name_the_path() {
        let body = json!({"a": {"b": [1, {"c": true}]}, "n": 3, "x": 1.5, "big": 1e300, "none": null});
        let root = Fields::of(&body, "").unwrap();
        let a = root.object("a").unwrap().unwrap();
        let (path, item) = a.list("b").unwrap().unwrap()[1].clone();
        let inner = Fields::of(item, path).unwrap();
        for (error, words) in [
            (inner.text("c").unwrap_err(), "a.b[1].c must be a string, not a boolean"),
            (inner.required_text("d").unwrap_err(), "a.b[1].d is missing"),
            (root.integer("x", 0..=9).unwrap_err(), "x must be a whole number, not 1.5"),
            (root.integer("n", 4..=9).unwrap_err(), "n must be between 4 and 9, not 3"),
            (root.number("big", 0.0..=2.0).unwrap_err(), "big must be between 0 and 2"),
            (root.choice("a", &[("x", 1)]).unwrap_err(), "a must be a string"),
            (root.unsupported("n", &[json!(0)]).unwrap_err(), "n is not supported"),
        ] {
            assert!(error.to_string().contains(words), "{error} / {words}");
        }
        for hint in [
            json!({"user": 1}),
            json!({"metadata": "a"}),
            json!({"store": "no"}),
            json!({"verbosity": "mute"}),
        ] {
            assert!(Fields::of(&hint, "").unwrap().hints().is_err(), "{hint}");
        }
        let hints = json!({"user": "ann", "metadata": {"a": "b"}, "store": true, "verbosity": "low", "prediction": null});
        assert!(Fields::of(&hints, "").unwrap().hints().is_ok());
        assert_eq!(root.text("none").unwrap(), None);
        assert_eq!(root.integer("n", 0..=9).unwrap(), Some(3));
    }

    #[test]
    fn bodies_that_are_no_objects_are_refused() {
        for body in ["", "{", "[]", "3", "\"a\"", "null", "{\"a\":1}x"] {
            assert!(parse(body.as_bytes()).is_err(), "{body}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(500), "]".repeat(500));
        assert!(parse(deep.as_bytes()).unwrap_err().to_string().contains("recursion limit"));
    }
}
