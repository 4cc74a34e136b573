//! Reading tool calls: each family's text between markers becomes names and JSON arguments.

use std::collections::BTreeSet;

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::dialect::{ASSISTANT, PYTHON_TAG, is_named_call, is_of_name};

/// A call that a model makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its arguments: the text of a JSON object, as the model wrote it.
    pub arguments: String,
    /// Arguments that the model wrote as plain text, where its family does so: name and text. In `arguments` they are
    /// JSON where they can be read as such.
    pub texts: Vec<(String, String)>,
}

impl ToolCall {
    fn new(name: &str, arguments: String) -> Self {
        Self { name: name.to_owned(), arguments, texts: Vec::new() }
    }

    fn of_texts(name: &str, texts: Vec<(String, String)>) -> Option<Self> {
        let name = name.trim();
        let value =
            |text: &String| serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone()));
        let arguments: Map<String, Value> =
            texts.iter().map(|(name, text)| (name.clone(), value(text))).collect();
        let readable = !name.is_empty() && !name.contains(['<', '{', '\n']);
        let arguments = Value::Object(arguments).to_string();
        readable.then(|| Self { texts, ..Self::new(name, arguments) })
    }

    /// Takes the arguments for which `is_text` as the model wrote them: `12` is a text where a text is asked for.
    pub fn keep_texts(&mut self, is_text: impl Fn(&str) -> bool) {
        let Ok(mut arguments) = serde_json::from_str::<Map<String, Value>>(&self.arguments) else { return };
        for (name, text) in self.texts.iter().filter(|(name, _)| is_text(name)) {
            arguments.insert(name.clone(), Value::String(text.clone()));
        }
        if !self.texts.is_empty() {
            self.arguments = Value::Object(arguments).to_string();
        }
    }
}

/// Texts between markers, by the marker that opens them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallSyntax {
    Hermes,
    Glm,
    Glm4,
    Phi4,
    PythonTag,
    Mistral,
    DeepSeek,
    Kimi,
    QwenXml,
    MiniMax,
}

type Found = (Vec<ToolCall>, usize);

impl CallSyntax {
    /// The marker that opens a call.
    pub(super) fn opening(self) -> &'static str {
        match self {
            Self::Hermes | Self::Glm | Self::QwenXml => "<tool_call>",
            Self::MiniMax => "<minimax:tool_call>",
            Self::Glm4 => ASSISTANT,
            Self::Phi4 => "<|tool_call|>",
            Self::PythonTag => PYTHON_TAG,
            Self::Mistral => "[TOOL_CALLS]",
            Self::DeepSeek => "<｜tool▁calls▁begin｜>",
            Self::Kimi => "<|tool_calls_section_begin|>",
        }
    }

    fn closing(self) -> Option<&'static str> {
        match self {
            Self::Hermes | Self::Glm | Self::QwenXml => Some("</tool_call>"),
            Self::MiniMax => Some("</minimax:tool_call>"),
            Self::Phi4 => Some("<|/tool_call|>"),
            Self::DeepSeek => Some("<｜tool▁calls▁end｜>"),
            Self::Kimi => Some("<|tool_calls_section_end|>"),
            // They run to the end of the answer.
            Self::Glm4 | Self::PythonTag | Self::Mistral => None,
        }
    }

    /// The calls in a text that begins with the opening marker, and the length of what they take. `None`: not complete, or
    /// not readable. `ended`: no more text comes.
    pub(super) fn read(self, text: &str, ended: bool) -> Option<Found> {
        let inside = &text[self.opening().len()..];
        let (body, end) = match self.closing() {
            Some(closing) => match inside.find(closing) {
                Some(at) => (&inside[..at], self.opening().len() + at + closing.len()),
                // A stop token may have taken the place of the closing marker.
                None if ended => (inside, text.len()),
                None => return None,
            },
            None if ended => (inside, text.len()),
            None => return None,
        };
        let calls = match self {
            Self::Hermes => vec![object(body)?],
            Self::Glm => vec![glm(body)?],
            Self::Glm4 => glm4(body)?,
            Self::Phi4 | Self::PythonTag => whole(body)?,
            Self::Mistral => mistral(body)?,
            Self::DeepSeek => deepseek(body)?,
            Self::Kimi => kimi(body)?,
            Self::QwenXml => elements(body, "<function=", "</function>", "<parameter=")?,
            Self::MiniMax => elements(body, "<invoke name=", "</invoke>", "<parameter name=")?,
        };
        (!calls.is_empty()).then_some((calls, end))
    }

    /// The text is complete and still not readable, or begins as no call does: waiting does not help.
    pub(super) fn is_hopeless(self, text: &str) -> bool {
        let inside = &text[self.opening().len()..];
        match self {
            Self::Glm4 => is_named_call(inside) == Some(false),
            _ => self.closing().is_some_and(|closing| inside.contains(closing)),
        }
    }
}

/// `{"name": .., "arguments" or "parameters": {..}}`.
fn object(text: &str) -> Option<ToolCall> {
    call_of(&serde_json::from_str(text.trim()).ok()?)
}

fn call_of(value: &Value) -> Option<ToolCall> {
    let (call, arguments) = call_members(value);
    let name = call.get("name")?.as_str()?;
    let arguments = match arguments {
        Some(Value::String(text)) if serde_json::from_str::<Map<String, Value>>(text).is_ok() => text.clone(),
        Some(object @ Value::Object(_)) => object.to_string(),
        None | Some(Value::Null) => "{}".to_owned(),
        Some(_) => return None,
    };
    Some(ToolCall::new(name, arguments))
}

/// The object that says what is called, and the arguments in it.
fn call_members(value: &Value) -> (&Value, Option<&Value>) {
    let call = value.get("function").filter(|f| f.is_object()).unwrap_or(value);
    (call, call.get("arguments").or_else(|| call.get("parameters")))
}

/// An answer that consists of calls: objects one after the other, with `;` between, or a list of them.
pub(super) fn whole(text: &str) -> Option<Vec<ToolCall>> {
    whole_of(text, |_| true)
}

/// As [`whole`]. Unless a marker stands in front, each object must name one of these tools and have arguments: it may be an
/// answer that happens to have a name.
pub(super) fn whole_of_tools(text: &str, offered: &BTreeSet<String>) -> Option<Vec<ToolCall>> {
    if text.trim_start().starts_with(PYTHON_TAG) {
        return whole(text);
    }
    whole_of(text, |value| {
        let (call, arguments) = call_members(value);
        let name = call.get("name").and_then(Value::as_str);
        arguments.is_some() && name.is_some_and(|name| offered.contains(name))
    })
}

fn whole_of(text: &str, is_call: impl Fn(&Value) -> bool) -> Option<Vec<ToolCall>> {
    let call_of = |value: &Value| call_of(value).filter(|_| is_call(value));
    let mut rest = text.trim();
    rest = rest.strip_prefix(PYTHON_TAG).unwrap_or(rest).trim();
    let mut calls = Vec::new();
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        match values.next()?.ok()? {
            Value::Array(list) => {
                for value in &list {
                    calls.push(call_of(value)?);
                }
            }
            value => calls.push(call_of(&value)?),
        }
        rest = rest[values.byte_offset()..].trim_start().trim_start_matches([';', ',']).trim_start();
    }
    (!calls.is_empty()).then_some(calls)
}

/// `[{..}, {..}]`, or `name[ARGS]{..}` and again after the next `[TOOL_CALLS]`; a call id may stand before the arguments.
fn mistral(body: &str) -> Option<Vec<ToolCall>> {
    if body.trim_start().starts_with(['[', '{']) {
        return whole(body);
    }
    body.split("[TOOL_CALLS]")
        .filter(|one| !one.trim().is_empty())
        .map(|one| {
            let (name, arguments) = match one.split_once("[ARGS]") {
                Some(split) => split,
                None => one.split_at(one.find('{')?),
            };
            let name = name.split("[CALL_ID]").next().unwrap_or_default();
            named(name, arguments)
        })
        .collect()
}

/// `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name\n```json\n{..}\n```<｜tool▁call▁end｜>`, or without type and fence.
fn deepseek(body: &str) -> Option<Vec<ToolCall>> {
    body.split("<｜tool▁call▁begin｜>")
        .skip(1)
        .map(|one| {
            let one = one.split("<｜tool▁call▁end｜>").next().unwrap_or_default();
            let (before, after) = one.split_once("<｜tool▁sep｜>")?;
            match after.split_once("```json") {
                Some((name, fenced)) => named(name, fenced.trim_end().trim_end_matches('`')),
                None => named(before, after),
            }
        })
        .collect()
}

/// `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{..}<|tool_call_end|>`.
fn kimi(body: &str) -> Option<Vec<ToolCall>> {
    body.split("<|tool_call_begin|>")
        .skip(1)
        .map(|one| {
            let one = one.split("<|tool_call_end|>").next().unwrap_or_default();
            let (id, arguments) = one.split_once("<|tool_call_argument_begin|>")?;
            let id = id.trim();
            let name = id.rsplit_once(':').map_or(id, |(name, _)| name);
            named(name.strip_prefix("functions.").unwrap_or(name), arguments)
        })
        .collect()
}

/// `name`, then `<arg_key>k</arg_key><arg_value>v</arg_value>` for each argument; a value is JSON where it can be read so.
fn glm(body: &str) -> Option<ToolCall> {
    let (name, mut rest) = match body.split_once("<arg_key>") {
        Some((name, rest)) => (name, Some(rest)),
        None => (body, None),
    };
    let mut texts = Vec::new();
    while let Some(one) = rest {
        let (key, after) = one.split_once("</arg_key>")?;
        let (_, after) = after.split_once("<arg_value>")?;
        let (value, after) = after.split_once("</arg_value>")?;
        texts.push((key.trim().to_owned(), value.to_owned()));
        rest = after.split_once("<arg_key>").map(|(_, rest)| rest);
    }
    ToolCall::of_texts(name, texts)
}

/// A name on a line of its own and an object behind it, again behind `<|assistant|>` or a line break.
pub(super) fn glm4(body: &str) -> Option<Vec<ToolCall>> {
    let (mut rest, mut calls) = (body.trim(), Vec::new());
    while !rest.is_empty() {
        let (name, behind) = rest.split_once('\n')?;
        let mut values = serde_json::Deserializer::from_str(behind).into_iter::<&RawValue>();
        let arguments = values.next()?.ok()?.get();
        calls.push(named(name, arguments).filter(|call| call.name.chars().all(is_of_name))?);
        let behind = behind[values.byte_offset()..].trim_start();
        rest = behind.strip_prefix(ASSISTANT).unwrap_or(behind).trim_start();
    }
    (!calls.is_empty()).then_some(calls)
}

/// Calls as elements: `open` with a name up to `>`, for each argument `parameter` with its name up to `>`, its text and
/// `</parameter>`, then `close`, which may be missing at the end. A line break around a text is no part of it.
fn elements(body: &str, open: &str, close: &str, parameter: &str) -> Option<Vec<ToolCall>> {
    let named = |rest: &mut &str| {
        let (name, after) = rest.split_once('>')?;
        *rest = after;
        Some(name.trim().trim_matches('"').to_owned())
    };
    let (mut rest, mut calls) = (body.trim(), Vec::new());
    while !rest.is_empty() {
        rest = rest.strip_prefix(open)?;
        let (name, mut texts) = (named(&mut rest)?, Vec::new());
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix(close) {
                rest = after.trim_start();
                break;
            }
            if rest.is_empty() {
                break;
            }
            rest = rest.strip_prefix(parameter)?;
            let key = named(&mut rest)?;
            let (text, after) = rest.split_once("</parameter>")?;
            let text = text.strip_prefix('\n').unwrap_or(text);
            texts.push((key, text.strip_suffix('\n').unwrap_or(text).to_owned()));
            rest = after;
        }
        calls.push(ToolCall::of_texts(&name, texts)?);
    }
    Some(calls)
}

/// A name and the text of its arguments.
pub(super) fn named(name: &str, arguments: &str) -> Option<ToolCall> {
    let (name, arguments) = (name.trim(), arguments.trim());
    let arguments = if arguments.is_empty() { "{}" } else { arguments };
    let readable = !name.is_empty() && serde_json::from_str::<Map<String, Value>>(arguments).is_ok();
    readable.then(|| ToolCall::new(name, arguments.to_owned()))
}
