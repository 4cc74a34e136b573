//! What an answer must look like: `response_format`, and vLLM's guided fields.

#[cfg(feature = "structured")]
mod or_calls;

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
#[cfg(feature = "structured")]
pub(super) use or_calls::CallsOrForm;

/// Alternatives of `guided_choice`.
const MAX_CHOICES: usize = 1024;

/// A form, before it is compiled; the field that asked for it is named in complaints.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Format {
    pub field: &'static str,
    pub form: Form,
}

/// The kinds of form.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    Schema(Value),
    Object,
    Regex(String),
    Grammar(String),
    Choice(Vec<String>),
}

#[cfg(feature = "structured")]
impl Form {
    /// It says what an answer's JSON is, and nothing of calls: those may stand in its place. Expressions, grammars and choices
    /// say what the text is, calls in it included.
    pub(super) fn leaves_calls(&self) -> bool {
        matches!(self, Self::Schema(_) | Self::Object)
    }

    /// What the compiler takes.
    pub(super) fn spec(&self) -> crate::structured::GrammarSpec {
        use crate::structured::GrammarSpec;
        match self.clone() {
            Self::Schema(schema) => GrammarSpec::JsonSchema(schema),
            Self::Object => GrammarSpec::JsonObject,
            Self::Regex(regex) => GrammarSpec::Regex(regex),
            Self::Grammar(grammar) => GrammarSpec::Grammar(grammar),
            Self::Choice(choices) => GrammarSpec::Choice(choices),
        }
    }
}

/// `response_format` of the chat API, and vLLM's `guided_json`, `guided_regex`, `guided_grammar`, `guided_choice` or
/// `structured_outputs`.
///
/// # Errors
/// 400 naming the field, also when two of them ask for different things.
pub(super) fn read(body: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    let mut found: Vec<Format> = Vec::new();
    if let Some(format) = body.object("response_format")? {
        found.extend(response_format(&format, "response_format", true)?);
    }
    let guided = [
        ("guided_json", "json"),
        ("guided_regex", "regex"),
        ("guided_grammar", "grammar"),
        ("guided_choice", "choice"),
    ];
    for (field, kind) in guided {
        if body.has(field) {
            found.push(Format { field, form: guide(body, field, kind)? });
        }
    }
    if let Some(outputs) = body.object("structured_outputs")? {
        for kind in ["json", "regex", "grammar", "choice"] {
            if outputs.has(kind) {
                found.push(Format { field: "structured_outputs", form: guide(&outputs, kind, kind)? });
            }
        }
        if outputs.flag("json_object")? == Some(true) {
            found.push(Format { field: "structured_outputs", form: Form::Object });
        }
    }
    if found.len() > 1 {
        let why = format!("{} and {} both ask for a form: use one", found[0].field, found[1].field);
        return Err(ApiError::invalid(Some(found[1].field), why));
    }
    Ok(found.pop())
}

/// `{"type": "text" | "json_object" | "json_schema", ..}`; in the chat API the schema stands in an object `json_schema`, in
/// the responses API beside the type.
///
/// # Errors
/// 400 naming the field.
pub(super) fn response_format(
    format: &Fields<'_>,
    field: &'static str,
    nested: bool,
) -> Result<Option<Format>, ApiError> {
    let words = [("text", 0), ("json_object", 1), ("json_schema", 2)];
    let form = match format.choice("type", &words)?.ok_or_else(|| format.missing("type"))? {
        0 => return Ok(None),
        1 => Form::Object,
        _ => {
            let inner = if nested {
                let inner = format.object("json_schema")?.ok_or_else(|| format.missing("json_schema"))?;
                inner.text("name")?;
                inner
            } else {
                format.required_text("name")?;
                format.clone()
            };
            inner.flag("strict")?;
            let schema = inner.get("schema").ok_or_else(|| inner.missing("schema"))?;
            Form::Schema(schema_of(schema, &inner.path("schema"))?)
        }
    };
    Ok(Some(Format { field, form }))
}

/// `output_config.format` of the messages API, `{"type": "json_schema", "schema": ..}`, and `output_format`, its first name.
///
/// # Errors
/// 400 naming the field.
pub(super) fn output_config(body: &Fields<'_>) -> Result<Option<Format>, ApiError> {
    let mut newer = None;
    if let Some(config) = body.object("output_config")? {
        newer = config.object("format")?;
    }
    let (field, format) = match (newer, body.object("output_format")?) {
        (None, None) => return Ok(None),
        (Some(format), None) => ("output_config.format", format),
        (None, Some(format)) => ("output_format", format),
        (Some(_), Some(_)) => {
            return Err(body.fault("output_format", "and output_config.format both ask for a form: use one"));
        }
    };
    format.choice("type", &[("json_schema", ())])?.ok_or_else(|| format.missing("type"))?;
    let schema = format.get("schema").ok_or_else(|| format.missing("schema"))?;
    let form = Form::Schema(schema_of(schema, &format.path("schema"))?);
    Ok(Some(Format { field, form }))
}

fn guide(fields: &Fields<'_>, name: &str, kind: &str) -> Result<Form, ApiError> {
    Ok(match kind {
        "json" => {
            let value = fields.get(name).ok_or_else(|| fields.missing(name))?;
            match value {
                Value::String(text) => {
                    let parsed: Value = serde_json::from_str(text)
                        .map_err(|e| fields.fault(name, format!("is not a JSON schema: {e}")))?;
                    Form::Schema(schema_of(&parsed, &fields.path(name))?)
                }
                schema => Form::Schema(schema_of(schema, &fields.path(name))?),
            }
        }
        "regex" => Form::Regex(fields.required_text(name)?.to_owned()),
        "grammar" => Form::Grammar(fields.required_text(name)?.to_owned()),
        _ => {
            let choices = fields.texts(name, MAX_CHOICES)?;
            if choices.is_empty() {
                return Err(fields.fault(name, "must hold at least one choice"));
            }
            Form::Choice(choices)
        }
    })
}

fn schema_of(schema: &Value, path: &str) -> Result<Value, ApiError> {
    match schema {
        Value::Object(_) => Ok(schema.clone()),
        Value::Bool(true) => Ok(json!({})),
        other => Err(wrong(path, "a JSON schema", other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(body: &Value) -> Result<Option<Format>, ApiError> {
        read(&Fields::of(body, "").unwrap())
    }

    #[test]
    fn every_way_to_ask_is_understood() {
        let schema = json!({"type": "integer"});
        let asked = json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}});
        assert_eq!(format(&asked).unwrap().unwrap().form, Form::Schema(schema.clone()));
        for (body, form) in [
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(Form::Object)),
            (json!({"guided_json": schema}), Some(Form::Schema(schema.clone()))),
            (json!({"guided_json": "{\"type\": \"integer\"}"}), Some(Form::Schema(schema.clone()))),
            (json!({"guided_regex": "a+"}), Some(Form::Regex("a+".into()))),
            (
                json!({"structured_outputs": {"grammar": "start: \"a\""}}),
                Some(Form::Grammar("start: \"a\"".into())),
            ),
            (json!({"guided_choice": ["a", "b"]}), Some(Form::Choice(vec!["a".into(), "b".into()]))),
        ] {
            assert_eq!(format(&body).unwrap().map(|f| f.form), form, "{body}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (body, name) in [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": 3}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_regex": 3}), "guided_regex"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
        ] {
            let error = format(&body).expect_err(&body.to_string()).to_string();
            assert!(error.contains(name), "{body}: {error}");
        }
    }

    #[test]
    fn anthropics_format_has_two_names() {
        let format = json!({"type": "json_schema", "schema": {"type": "integer"}});
        let read = |body: Value| output_config(&Fields::of(&body, "").unwrap());
        let wanted = Form::Schema(json!({"type": "integer"}));
        for (body, field) in [
            (json!({"output_config": {"format": format, "effort": "high"}}), "output_config.format"),
            (json!({"output_format": format}), "output_format"),
        ] {
            assert_eq!(read(body).unwrap(), Some(Format { field, form: wanted.clone() }));
        }
        for (body, name) in [
            (json!({"output_format": format, "output_config": {"format": format}}), "output_format"),
            (json!({"output_format": {"type": "json_schema"}}), "output_format.schema"),
        ] {
            let error = read(body.clone()).expect_err(&body.to_string()).to_string();
            assert!(error.contains(name), "{body}: {error}");
        }
        assert_eq!(read(json!({"output_config": {}})).unwrap(), None);
    }
}
