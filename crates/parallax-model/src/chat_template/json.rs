//! JSON as Python's `json.dumps` writes it, which is what models have seen of tools and calls, and the `tojson` filter of
//! templates, with the arguments and defaults that transformers gives it.

use std::io::{self, Write};

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// A value as `json.dumps(value, ensure_ascii=False)` writes it: a space behind commas and colons, nothing escaped that need
/// not be.
///
/// # Errors
/// Keys that are no texts.
pub fn to_python_json(value: &impl Serialize) -> Result<String, serde_json::Error> {
    written(value, Python::default())
}

/// As [`to_python_json`], each member on a line of its own behind `indent` spaces for each level.
///
/// # Errors
/// As [`to_python_json`].
pub fn to_python_json_lines(value: &impl Serialize, indent: usize) -> Result<String, serde_json::Error> {
    written(value, Python::indented(indent))
}

/// The filter: `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
#[expect(clippy::needless_pass_by_value, reason = "filters take their arguments by value")]
pub(super) fn tojson(value: &Value, ensure_ascii: Option<bool>, options: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = ensure_ascii.or(options.get("ensure_ascii")?).unwrap_or(false);
    let mut style = options.get::<Option<usize>>("indent")?.map_or_else(Python::default, Python::indented);
    if let Some((item, key)) = separators(&options)? {
        (style.item, style.key) = (item, key);
    }
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let refused = |e| Error::new(ErrorKind::InvalidOperation, "not to be written as JSON").with_source(e);
    let text = if sort_keys {
        let mut sorted = serde_json::to_value(value).map_err(refused)?;
        sorted.sort_all_objects();
        written(&sorted, style)
    } else {
        written(value, style)
    };
    let text = text.map_err(refused)?;
    Ok(Value::from_safe_string(if ensure_ascii { in_ascii(&text) } else { text }))
}

fn separators(options: &Kwargs) -> Result<Option<(String, String)>, Error> {
    let Some(given) = options.get::<Option<Vec<String>>>("separators")? else { return Ok(None) };
    match <[String; 2]>::try_from(given) {
        Ok([item, key]) => Ok(Some((item, key))),
        Err(_) => Err(Error::new(ErrorKind::InvalidOperation, "separators are two texts")),
    }
}

fn written(value: &impl Serialize, style: Python) -> Result<String, serde_json::Error> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, style))?;
    Ok(String::from_utf8(bytes).expect("JSON is text"))
}

/// What is not ASCII stands only inside of texts, where it may be escaped.
fn in_ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

struct Python {
    /// Between members.
    item: String,
    /// Behind a key.
    key: String,
    /// Spaces of a level; `None`: all on one line.
    indent: Option<usize>,
    level: usize,
    /// The array or object that is open has members.
    filled: bool,
}

impl Default for Python {
    fn default() -> Self {
        Self { item: ", ".to_owned(), key: ": ".to_owned(), indent: None, level: 0, filled: false }
    }
}

impl Python {
    fn indented(indent: usize) -> Self {
        Self { item: ",".to_owned(), indent: Some(indent), ..Self::default() }
    }

    fn open(&mut self) {
        self.level += 1;
        self.filled = false;
    }

    fn line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        self.indent.map_or(Ok(()), |spaces| write!(writer, "\n{:width$}", "", width = spaces * self.level))
    }

    fn member<W: ?Sized + Write>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, end: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if self.filled {
            self.line(writer)?;
        }
        self.filled = true;
        writer.write_all(end)
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open();
        writer.write_all(b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.member(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open();
        writer.write_all(b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.member(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{ChatTemplate, Conversation};

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
        ];
        let value = json!({"b": [1, {}, []], "a": "it's <é> & 😀\n"});
        for (filter, expected) in cases {
            let template = ChatTemplate::new(&format!("{{{{ tools[0] | {filter} }}}}"), "", "").unwrap();
            let conversation = Conversation { tools: vec![value.clone()], ..Conversation::default() };
            assert_eq!(template.render_conversation(&conversation, false).unwrap(), expected, "{filter}");
        }
        let wrong = ChatTemplate::new("{{ 1 | tojson(separators=(',',)) }}", "", "").unwrap();
        assert!(wrong.render(&[], false).unwrap_err().to_string().contains("two texts"));
    }
}
