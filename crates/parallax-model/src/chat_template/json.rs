//! JSON as Python's `json.dumps` writes it, which is what models have seen of tools and calls, and the `tojson` filter of
//! templates, with the arguments and defaults that transformers gives it.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde_json::{Number, Value as Json};

use super::MAX_TEXT_BYTES;

/// Spaces of one level that a template may ask for: it comes with the model, from anybody.
const MAX_INDENT: usize = 64;

/// A value as `json.dumps(value, ensure_ascii=False)` writes it: a space behind commas and colons, nothing escaped that need
/// not be.
pub fn to_python_json(value: &Json) -> String {
    let mut text = String::new();
    Style::default().write(value, 0, &mut text);
    text
}

/// The filter: `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`, the first two by position too.
#[expect(clippy::needless_pass_by_value, reason = "filters take their arguments by value")]
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<usize>,
    options: Kwargs,
) -> Result<Value, Error> {
    let is_true = |given: Option<Value>| given.is_some_and(|value| value.is_true());
    let ensure_ascii = is_true(ensure_ascii.or(options.get("ensure_ascii")?));
    let sort_keys = is_true(options.get("sort_keys")?);
    let style = Style::new(indent.or(options.get("indent")?), options.get("separators")?)?;
    options.assert_all_used()?;
    let mut value = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::InvalidOperation, "not to be written as JSON").with_source(error)
    })?;
    if sort_keys {
        value.sort_all_objects();
    }
    let mut text = String::new();
    style.write(&value, 0, &mut text);
    if text.len() > style.most_bytes {
        let rule = format!("a value is more than {MAX_TEXT_BYTES} bytes of JSON");
        return Err(Error::new(ErrorKind::InvalidOperation, rule));
    }
    Ok(Value::from_safe_string(if ensure_ascii { in_ascii(&text) } else { text }))
}

struct Style {
    /// Between members.
    item: String,
    /// Behind a key.
    key: String,
    /// Spaces of a level; `None`: all on one line.
    indent: Option<usize>,
    /// What is longer than this is not written to its end.
    most_bytes: usize,
}

impl Default for Style {
    fn default() -> Self {
        Self { item: ", ".to_owned(), key: ": ".to_owned(), indent: None, most_bytes: usize::MAX }
    }
}

impl Style {
    fn new(indent: Option<usize>, separators: Option<Vec<String>>) -> Result<Self, Error> {
        let refused = |rule: String| Err(Error::new(ErrorKind::InvalidOperation, rule));
        if indent.is_some_and(|spaces| spaces > MAX_INDENT) {
            return refused(format!("an indent is {MAX_INDENT} spaces at most"));
        }
        let default = Self { indent, most_bytes: MAX_TEXT_BYTES, ..Self::default() };
        match separators.map(<[String; 2]>::try_from) {
            Some(Ok([item, key])) => Ok(Self { item, key, ..default }),
            Some(Err(_)) => refused("separators are two texts".to_owned()),
            None if indent.is_some() => Ok(Self { item: ",".to_owned(), ..default }),
            None => Ok(default),
        }
    }

    fn write(&self, value: &Json, level: usize, text: &mut String) {
        match value {
            Json::Number(number) => text.push_str(&python_number(number)),
            Json::Array(members) => {
                let members = members.iter().map(|member| (None, member));
                self.write_members(['[', ']'], members, level, text);
            }
            Json::Object(members) => {
                let members = members.iter().map(|(key, member)| (Some(key), member));
                self.write_members(['{', '}'], members, level, text);
            }
            // Python and serde_json escape the same characters.
            Json::Null | Json::Bool(_) | Json::String(_) => text.push_str(&value.to_string()),
        }
    }

    fn write_members<'a>(
        &self,
        [open, close]: [char; 2],
        members: impl ExactSizeIterator<Item = (Option<&'a String>, &'a Json)>,
        level: usize,
        text: &mut String,
    ) {
        let line = |level: usize, text: &mut String| {
            if let Some(spaces) = self.indent {
                text.push('\n');
                text.extend(std::iter::repeat_n(' ', spaces * level));
            }
        };
        let empty = members.len() == 0;
        text.push(open);
        for (i, (key, member)) in members.enumerate() {
            if text.len() > self.most_bytes {
                return;
            }
            if i > 0 {
                text.push_str(&self.item);
            }
            line(level + 1, text);
            if let Some(key) = key {
                text.push_str(&Json::from(key.as_str()).to_string());
                text.push_str(&self.key);
            }
            self.write(member, level + 1, text);
        }
        if !empty {
            line(level, text);
        }
        text.push(close);
    }
}

/// Whole numbers as they are; others as `repr(float)`: the shortest digits that name them, with an exponent of two digits at
/// least where the number is below 1e-4 or from 1e16 on.
fn python_number(number: &Number) -> String {
    let Some(float) = number.as_f64().filter(|_| number.is_f64()) else { return number.to_string() };
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').expect("that is how floats are written");
    let exponent: i32 = exponent.parse().expect("a float's exponent is a number");
    let fixed = float.to_string();
    match exponent {
        -4..16 if fixed.contains('.') => fixed,
        -4..16 => format!("{fixed}.0"),
        _ => format!("{digits}e{exponent:+03}"),
    }
}

/// Escapes what is not ASCII, and DEL, as Python does: both stand only inside of texts.
fn in_ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() && c != '\u{7f}' {
            ascii.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{ChatTemplate, Conversation, TemplateError};

    fn shown(filter: &str, value: &super::Json) -> Result<String, TemplateError> {
        let template = ChatTemplate::new(&format!("{{{{ tools[0] | {filter} }}}}"), "", "").unwrap();
        let conversation = Conversation { tools: vec![value.clone()], ..Conversation::default() };
        template.render_conversation(&conversation, false)
    }

    /// Python 3: `json.dumps(v, ...)` of `{"b": [1, {}, []], "a": "it's <é> & 😀\n"}`.
    #[test]
    fn values_are_written_as_python_writes_them() {
        let cases = [
            ("tojson", r#"{"b": [1, {}, []], "a": "it's <é> & 😀\n"}"#),
            ("tojson(ensure_ascii=False)", r#"{"b": [1, {}, []], "a": "it's <é> & 😀\n"}"#),
            ("tojson(ensure_ascii=True)", r#"{"b": [1, {}, []], "a": "it's <\u00e9> & \ud83d\ude00\n"}"#),
            ("tojson(separators=(',', ':'))", r#"{"b":[1,{},[]],"a":"it's <é> & 😀\n"}"#),
            ("tojson(sort_keys=True)", r#"{"a": "it's <é> & 😀\n", "b": [1, {}, []]}"#),
            (
                "tojson(indent=4)",
                "{\n    \"b\": [\n        1,\n        {},\n        []\n    ],\n    \"a\": \"it's <é> & 😀\\n\"\n}",
            ),
            (
                "tojson(true, 1)",
                "{\n \"b\": [\n  1,\n  {},\n  []\n ],\n \"a\": \"it's <\\u00e9> & \\ud83d\\ude00\\n\"\n}",
            ),
        ];
        let value = json!({"b": [1, {}, []], "a": "it's <é> & 😀\n"});
        for (filter, expected) in cases {
            assert_eq!(shown(filter, &value).unwrap(), expected, "{filter}");
        }
    }

    /// Python 3: `json.dumps([1.0, 0.1, 1e15, 1e16, -2.5e-5, 0.0001, 1.5e300, 12345678901234567890, -0.0, "\x7f"])`.
    #[test]
    fn numbers_are_written_as_python_writes_them() {
        let value =
            json!([1.0, 0.1, 1e15, 1e16, -2.5e-5, 0.0001, 1.5e300, 12345678901234567890u64, -0.0, "\u{7f}"]);
        let expected = "[1.0, 0.1, 1000000000000000.0, 1e+16, -2.5e-05, 0.0001, 1.5e+300, 12345678901234567890, -0.0, \"\\u007f\"]";
        assert_eq!(shown("tojson(1)", &value).unwrap(), expected);
    }

    #[test]
    fn what_a_template_must_not_ask_for_is_an_error() {
        for (filter, rule) in [
            ("tojson(separators=(',',))", "two texts"),
            ("tojson(indent=70000)", "64 spaces"),
            ("tojson(spaces=2)", "spaces"),
        ] {
            let refused = shown(filter, &json!([1])).unwrap_err().to_string();
            assert!(refused.contains(rule), "{filter}: {refused}");
        }
    }

    #[test]
    fn a_value_of_mostly_spaces_is_an_error() {
        let deep = (0..100).fold(json!(vec![1; 6000]), |value, _| json!([value]));
        let refused = shown("tojson(indent=64)", &deep).unwrap_err().to_string();
        assert!(refused.contains("more than 33554432 bytes"), "{refused}");
        assert_eq!(shown("tojson", &deep).unwrap(), super::to_python_json(&deep));
    }
}
