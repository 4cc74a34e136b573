//! Reading tool calls: each family's text between markers becomes names and JSON arguments.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::dialect::{ASSISTANT, PYTHON_TAG, is_named_call, is_of_name};
use super::overlap;
use super::running::Layout;

/// Mistral's, between a name and its arguments.
const ARGUMENTS: &str = "[ARGS]";
/// Between a name and the id of its call.
const CALL_ID: &str = "[CALL_ID]";
pub(super) const MISTRAL_CALL: &str = "[TOOL_CALLS]";

pub(super) const DEEPSEEK_CALL: &str = "<｜tool▁call▁begin｜>";
pub(super) const DEEPSEEK_CALL_END: &str = "<｜tool▁call▁end｜>";
pub(super) const DEEPSEEK_SEPARATOR: &str = "<｜tool▁sep｜>";
pub(super) const FENCE: &str = "```json";

pub(super) const KIMI_CALL: &str = "<|tool_call_begin|>";
pub(super) const KIMI_CALL_END: &str = "<|tool_call_end|>";
pub(super) const KIMI_ARGUMENTS: &str = "<|tool_call_argument_begin|>";

/// A call that a model makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its arguments: the text of a JSON object, as the model wrote it where its family writes JSON.
    pub arguments: String,
    /// Arguments that the model wrote as plain text, where its family does so: name and text. In `arguments` they are
    /// JSON where they can be read as such.
    pub texts: Vec<(String, String)>,
}

impl ToolCall {
    pub(crate) fn new(name: &str, arguments: String) -> Self {
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

impl CallSyntax {
    /// The marker that opens a call.
    pub(super) fn opening(self) -> &'static str {
        match self {
            Self::Hermes | Self::Glm | Self::QwenXml => "<tool_call>",
            Self::MiniMax => "<minimax:tool_call>",
            Self::Glm4 => ASSISTANT,
            Self::Phi4 => "<|tool_call|>",
            Self::PythonTag => PYTHON_TAG,
            Self::Mistral => MISTRAL_CALL,
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

    /// Where the closing marker is in what stands behind the opening one; it does not begin in the first `from` bytes.
    pub(super) fn closing_in(self, inside: &str, from: usize) -> Option<Range<usize>> {
        let closing = self.closing()?;
        let at = from + inside[from..].find(closing)?;
        Some(at..at + closing.len())
    }

    /// Bytes at the end of a text that may be the beginning of the closing marker.
    pub(super) fn undecided(self, inside: &str) -> usize {
        self.closing().map_or(0, |closing| overlap(inside, closing))
    }

    /// How the text between the markers is laid out.
    pub(super) fn layout(self) -> Layout {
        match self {
            Self::Hermes => Layout::Object,
            Self::Phi4 | Self::PythonTag => Layout::Objects,
            Self::Mistral => Layout::Mistral,
            Self::DeepSeek => Layout::DeepSeek,
            Self::Kimi => Layout::Kimi,
            Self::Glm4 => Layout::Line,
            Self::Glm | Self::QwenXml | Self::MiniMax => Layout::Elements,
        }
    }

    /// The calls in the text between the markers. `None`: it cannot be read as calls and nothing else.
    pub(super) fn read(self, body: &str) -> Option<Vec<ToolCall>> {
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
        (!calls.is_empty()).then_some(calls)
    }

    /// What stands behind the opening marker begins as no call does: waiting does not help.
    pub(super) fn is_hopeless(self, inside: &str) -> bool {
        self == Self::Glm4 && is_named_call(inside) == Some(false)
    }
}

/// Fields of an object, each as it is written.
type RawFields<'a> = BTreeMap<String, &'a RawValue>;

/// `{"name": .., "arguments" or "parameters": {..}}`.
fn object(text: &str) -> Option<ToolCall> {
    let (name, arguments) = members(text)?;
    let arguments = match arguments {
        None | Some("null") => "{}".to_owned(),
        Some(object) if object.starts_with('{') => object.to_owned(),
        Some(text) => serde_json::from_str(text).ok()?,
    };
    is_object(&arguments).then(|| ToolCall::new(&name, arguments))
}

/// What is called, and the text of its arguments.
fn members(text: &str) -> Option<(String, Option<&str>)> {
    let outer: RawFields<'_> = serde_json::from_str(text.trim()).ok()?;
    let inner = outer.get("function").copied().map(RawValue::get);
    let inner: Option<RawFields<'_>> = inner.and_then(|text| serde_json::from_str(text).ok());
    let call = inner.unwrap_or(outer);
    let name = serde_json::from_str(call.get("name")?.get()).ok()?;
    let arguments = call.get("arguments").or_else(|| call.get("parameters"));
    Some((name, arguments.copied().map(RawValue::get)))
}

fn is_object(text: &str) -> bool {
    serde_json::from_str::<Map<String, Value>>(text).is_ok()
}

/// An answer that consists of calls: objects one after the other, with `;` between, or a list of them.
pub(super) fn whole(text: &str) -> Option<Vec<ToolCall>> {
    whole_of(text, object)
}

/// As [`whole`]. Unless a marker stands in front, each object must name one of these tools and have arguments: it may be an
/// answer that happens to have a name.
pub(super) fn whole_of_tools(text: &str, offered: &BTreeSet<String>) -> Option<Vec<ToolCall>> {
    if text.trim_start().starts_with(PYTHON_TAG) {
        return whole(text);
    }
    whole_of(text, |one| {
        let (name, arguments) = members(one)?;
        if arguments.is_some() && offered.contains(&name) { object(one) } else { None }
    })
}

fn whole_of(text: &str, call_of: impl Fn(&str) -> Option<ToolCall>) -> Option<Vec<ToolCall>> {
    let mut rest = text.trim();
    rest = rest.strip_prefix(PYTHON_TAG).unwrap_or(rest).trim();
    let mut calls = Vec::new();
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<&RawValue>();
        let value = values.next()?.ok()?.get();
        if value.starts_with('[') {
            for one in serde_json::from_str::<Vec<&RawValue>>(value).ok()? {
                calls.push(call_of(one.get())?);
            }
        } else {
            calls.push(call_of(value)?);
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
    body.split(MISTRAL_CALL)
        .filter(|one| !one.trim().is_empty())
        .map(|one| {
            let (name, arguments) = mistral_parts(one)?;
            named(name, arguments)
        })
        .collect()
}

/// A name without the id behind it, and what stands where its arguments begin.
pub(super) fn mistral_parts(text: &str) -> Option<(&str, &str)> {
    let (marker, object) = (text.find(ARGUMENTS), text.find('{'));
    let (before, arguments) = match (marker, object) {
        (Some(at), object) if object.is_none_or(|object| at < object) => {
            (&text[..at], &text[at + ARGUMENTS.len()..])
        }
        (_, object) => text.split_at(object?),
    };
    let name = before.split_once(CALL_ID).map_or(before, |(name, _)| name);
    Some((name.trim(), arguments))
}

/// `<｜tool▁call▁begin｜>function<｜tool▁sep｜>name\n```json\n{..}\n```<｜tool▁call▁end｜>`, or without type and fence.
fn deepseek(body: &str) -> Option<Vec<ToolCall>> {
    body.split(DEEPSEEK_CALL)
        .skip(1)
        .map(|one| {
            let one = one.split(DEEPSEEK_CALL_END).next().unwrap_or_default();
            let (before, after) = one.split_once(DEEPSEEK_SEPARATOR)?;
            match after.split_once(FENCE) {
                Some((name, fenced)) if !after.trim_start().starts_with('{') => {
                    named(name, fenced.trim_end().trim_end_matches('`'))
                }
                _ => named(before, after),
            }
        })
        .collect()
}

/// `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{..}<|tool_call_end|>`.
fn kimi(body: &str) -> Option<Vec<ToolCall>> {
    body.split(KIMI_CALL)
        .skip(1)
        .map(|one| {
            let one = one.split(KIMI_CALL_END).next().unwrap_or_default();
            let (id, arguments) = one.split_once(KIMI_ARGUMENTS)?;
            named(kimi_name(id), arguments)
        })
        .collect()
}

/// The name in a call's id.
pub(super) fn kimi_name(id: &str) -> &str {
    let id = id.trim();
    let name = id.rsplit_once(':').map_or(id, |(name, _)| name);
    name.strip_prefix("functions.").unwrap_or(name)
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
    let readable = !name.is_empty() && is_object(arguments);
    readable.then(|| ToolCall::new(name, arguments.to_owned()))
}
