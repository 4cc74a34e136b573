//! What holds tool calls to their schemas as each model family writes calls: the marker that opens one, and a grammar of
//! what follows it.
//!
//! Where arguments are markup and not JSON, each has its place in the order of the schema, and those that may be texts are
//! free up to their closing tag, unless the schema lists them; whatever else is JSON under its part of the schema.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::{JSON_SPACE, with_space};
use crate::markup::{Dialect, MAX_NAME_BYTES, ToolSchema};

/// A grammar behind a marker.
#[derive(Debug, PartialEq)]
pub(super) struct CallGrammar {
    /// What opens a call; `None`: the grammar tells calls from other answers by itself, from the beginning.
    pub marker: Option<&'static str>,
    /// In llguidance's variant of Lark.
    pub lark: String,
}

/// How a family writes arguments as markup: texts with the tool's or the argument's name at `NAME`.
struct Elements {
    marker: &'static str,
    open: &'static str,
    open_argument: &'static str,
    close_argument: &'static str,
    close: &'static str,
    end: &'static str,
}

const GLM: Elements = Elements {
    marker: "<tool_call>",
    open: "NAME",
    open_argument: "<arg_key>NAME</arg_key>\n<arg_value>",
    close_argument: "</arg_value>",
    close: "",
    end: "</tool_call>",
};

const QWEN_XML: Elements = Elements {
    marker: "<tool_call>",
    open: "<function=NAME>",
    open_argument: "<parameter=NAME>\n",
    close_argument: "</parameter>",
    close: "</function>",
    end: "</tool_call>",
};

const MINIMAX: Elements = Elements {
    marker: "<minimax:tool_call>",
    open: "<invoke name=\"NAME\">",
    open_argument: "<parameter name=\"NAME\">",
    close_argument: "</parameter>",
    close: "</invoke>",
    end: "</minimax:tool_call>",
};

/// The grammar of a dialect's calls of these tools. `control`: the id of a control token of this text, if it is one.
pub(super) fn grammar(
    dialect: Dialect,
    tools: &[ToolSchema],
    control: impl Fn(&str) -> Option<u32>,
) -> CallGrammar {
    // What is a token of its own must be asked for as that token.
    let mark = |text: &str| control(text).map_or_else(|| quoted(text), |id| format!("<[{id}]>"));
    let (marker, start) = match dialect {
        Dialect::Hermes => ("<tool_call>", format!("S {}", object(tools, "arguments"))),
        Dialect::Mistral => {
            let (call, arguments) = (object(tools, "arguments"), mark("[ARGS]"));
            let named = each(tools, |i, name| format!("{} {arguments} S args_{i}", quoted(name)));
            ("[TOOL_CALLS]", format!("S \"[\" S {call} (S \",\" S {call})* S \"]\" | {named}"))
        }
        Dialect::DeepSeek => {
            let (between, end) = (mark("<｜tool▁sep｜>"), mark("<｜tool▁call▁end｜>"));
            let call = each(tools, |i, name| {
                let name = quoted(name);
                let fenced = format!("\"function\" {between} {name} \"\\n```json\\n\" args_{i} \"\\n```\"");
                format!("{fenced} | {name} {between} args_{i}")
            });
            ("<｜tool▁call▁begin｜>", format!("{call} {end}"))
        }
        Dialect::Kimi => {
            let (arguments, end) = (mark("<|tool_call_argument_begin|>"), mark("<|tool_call_end|>"));
            let call = each(tools, |i, name| format!("{} NUMBER S {arguments} S args_{i}", quoted(name)));
            ("<|tool_call_begin|>", format!("S \"functions.\" {call} S {end}\nNUMBER: /:[0-9]{{1,3}}/"))
        }
        Dialect::Phi4 => {
            let (call, end) = (object(tools, "arguments"), mark("<|/tool_call|>"));
            ("<|tool_call|>", format!("S \"[\" S {call} (S \",\" S {call})* S \"]\" S {end}"))
        }
        Dialect::Glm4 => return glm4(tools, &mark("<|assistant|>")),
        Dialect::Harmony => {
            let (channel, kind, message) = (mark("<|channel|>"), mark("<|constrain|>"), mark("<|message|>"));
            let header = format!("({channel} \"commentary\")? (\" \"? {kind}? \"json\")? {message}");
            ("to=functions.", each(tools, |i, name| format!("{} {header} args_{i}", quoted(name))))
        }
        Dialect::Llama3 => {
            let (tag, call) = (mark("<|python_tag|>"), object(tools, "parameters"));
            let lark = format!("start: {tag}? {call} (\";\" S {call})* | FREE?\nFREE: /[^{{](.|\\n)*/\n");
            return CallGrammar { marker: None, lark: lark + &rules(tools) };
        }
        Dialect::Glm => return elements(&GLM, tools, mark),
        Dialect::QwenXml => return elements(&QWEN_XML, tools, mark),
        Dialect::MiniMax => return elements(&MINIMAX, tools, mark),
    };
    CallGrammar { marker: Some(marker), lark: format!("start: {start}\n{}", rules(tools)) }
}

/// Calls that nothing opens but a tool's name on a line of its own, at the beginning or behind `between`. Other answers are free,
/// unless they begin as a call does, of one of these tools or of another.
fn glm4(tools: &[ToolSchema], between: &str) -> CallGrammar {
    let call = each(tools, |i, _| format!("name_{i} S args_{i}"));
    let start = format!("start: (free? {between})? {call} S ({between} {call} S)* | free?\n");
    let mut lark = start + "free: FREE\n" + &rules(tools);
    let mut other = String::from("FREE: /(.|\\n)+/ & ~/(.|\\n)*<\\|assistant\\|>(.|\\n)*/");
    let _ = write!(other, r" & ~/\s*[A-Za-z0-9_.\-]{{1,{MAX_NAME_BYTES}}}[ \t]*\n\s*\{{(.|\n)*/");
    for (i, tool) in tools.iter().enumerate() {
        // A name has no characters that mean something in an expression but the dot.
        let line = format!("{}[ \\t]*\\n", tool.name.replace('.', "\\."));
        let _ = writeln!(lark, "name_{i}: NAME_{i}\nNAME_{i}: /[ \\n]{{0,16}}{line}/");
        let _ = write!(other, " & ~/\\s*{line}(.|\\n)*/");
    }
    CallGrammar { marker: None, lark: lark + &other + "\n" }
}

/// A grammar of one call as an object.
pub(super) fn object_grammar(tools: &[ToolSchema]) -> String {
    format!("start: {}\n{}", object(tools, "arguments"), rules(tools))
}

/// A call of any tool, as an object with its name and, under `arguments`, its arguments.
fn object(tools: &[ToolSchema], arguments: &str) -> String {
    let arguments = quoted(&quoted(arguments));
    each(tools, |i, name| {
        let name = quoted(&quoted(name));
        format!(
            "\"{{\" S \"\\\"name\\\"\" S \":\" S {name} S \",\" S {arguments} S \":\" S args_{i} S \"}}\""
        )
    })
}

/// One of the calls that `call` makes of a tool's number and name.
fn each(tools: &[ToolSchema], call: impl Fn(usize, &str) -> String) -> String {
    let calls = tools.iter().enumerate().map(|(i, tool)| call(i, &tool.name));
    format!("({})", calls.collect::<Vec<_>>().join(" | "))
}

/// White space, and the arguments of each tool as JSON.
fn rules(tools: &[ToolSchema]) -> String {
    let mut lark = format!("S: /{JSON_SPACE}/\n");
    for (i, tool) in tools.iter().enumerate() {
        // Writing to a String does not fail.
        let _ = writeln!(lark, "args_{i}: %json {}", with_space(&tool.arguments));
    }
    lark
}

/// Calls as elements with an element for each argument.
fn elements(family: &Elements, tools: &[ToolSchema], mark: impl Fn(&str) -> String) -> CallGrammar {
    // Tags that are tokens of their own stand apart from the text around them.
    let tags = |text: &str| {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let end = match rest.find('<') {
                Some(0) => rest.find('>').map_or(rest.len(), |at| at + 1),
                Some(at) => at,
                None => rest.len(),
            };
            let (part, after) = rest.split_at(end);
            parts.push(mark(part));
            rest = after;
        }
        parts.join(" ")
    };
    let named = |text: &str, name: &str| {
        let (before, after) = text.split_once("NAME").expect("elements have a name");
        format!("{} {name} {}", tags(before), tags(after))
    };
    let close = mark(family.close_argument);
    let free = match close.strip_prefix('"') {
        Some(_) => format!("text[suffix={close}]: /(.|\\n)*/"),
        None => format!("text: /(.|\\n)*/ {close}"),
    };
    let mut lark = format!("S: /{JSON_SPACE}/\nKEY: /[^<>\"\\n]{{1,64}}/\n{free}\n");
    let mut calls = Vec::new();
    for (i, ToolSchema { name, arguments }) in tools.iter().enumerate() {
        let mut call = format!("{} S", named(family.open, &quoted(name)));
        let required = arguments["required"].as_array().map_or(&[][..], Vec::as_slice);
        match arguments["properties"].as_object() {
            None => {
                let _ = write!(call, " ({} text S)*", named(family.open_argument, "KEY"));
            }
            Some(known) => {
                for (j, (key, schema)) in known.iter().enumerate() {
                    let value = match Argument::of(schema) {
                        Argument::Text => "text".to_owned(),
                        Argument::OneOf(texts) => format!("({}) \"\\n\"? {close}", texts.join(" | ")),
                        Argument::Json => {
                            let schema = with_space(&part(arguments, schema));
                            let _ = writeln!(lark, "json_{i}_{j}: %json {schema}");
                            format!("json_{i}_{j} \"\\n\"? {close}")
                        }
                    };
                    let often = if required.contains(&json!(key)) { "" } else { "?" };
                    let open = named(family.open_argument, &quoted(key));
                    let _ = write!(call, " ({open} {value} S){often}");
                }
            }
        }
        calls.push(format!("{call} {}", tags(family.close)));
    }
    let start = format!("start: S ({}) S {}\n", calls.join(" | "), tags(family.end));
    CallGrammar { marker: Some(family.marker), lark: start + &lark }
}

/// How an argument is written as markup.
enum Argument {
    /// Anything.
    Text,
    /// One of these, quoted.
    OneOf(Vec<String>),
    /// JSON.
    Json,
}

impl Argument {
    fn of(schema: &Value) -> Self {
        let values = schema["enum"].as_array().cloned().or_else(|| Some(vec![schema.get("const")?.clone()]));
        if let Some(values) = values {
            let texts = values.iter().map(|value| value.as_str().map(quoted));
            return texts.collect::<Option<_>>().map_or(Self::Json, Self::OneOf);
        }
        let json = ["integer", "number", "boolean", "null", "array", "object"];
        let is_json = |kind: &Value| kind.as_str().is_some_and(|kind| json.contains(&kind));
        match &schema["type"] {
            Value::Array(kinds) if !kinds.is_empty() && kinds.iter().all(is_json) => Self::Json,
            kind if is_json(kind) => Self::Json,
            _ if schema.get("$ref").is_some() => Self::Json,
            _ => Self::Text,
        }
    }
}

/// A part of a schema with the definitions that references in it lead to.
fn part(whole: &Value, part: &Value) -> Value {
    let mut part = part.clone();
    for name in ["$defs", "definitions"] {
        if let (Some(definitions), Some(fields)) = (whole.get(name), part.as_object_mut()) {
            fields.entry(name).or_insert_with(|| definitions.clone());
        }
    }
    part
}

/// A text as a literal of the grammar.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests;
