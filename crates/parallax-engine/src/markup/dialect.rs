//! Which family writes how, found in the chat template.

use std::collections::BTreeSet;

use super::calls::{self, CallSyntax, ToolCall};
use super::{THINK, THINK_END};

/// Llama 3's marker in front of a call.
pub(super) const PYTHON_TAG: &str = "<|python_tag|>";
/// GLM-4's, between turns: also between the calls of one answer.
pub(super) const ASSISTANT: &str = "<|assistant|>";
/// Longest name of a tool, as OpenAI has it.
pub(crate) const MAX_NAME_BYTES: usize = 64;

/// How a model family writes tool calls and thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Dialect {
    /// `<tool_call>{"name", "arguments"}</tool_call>`: Hermes, Qwen, and what many others imitate.
    #[default]
    Hermes,
    /// The whole answer is `{"name", "parameters"}`, several with `;` between, with or without `<|python_tag|>`: Llama 3.
    Llama3,
    /// `[TOOL_CALLS]` before a JSON list, or before `name[ARGS]{...}`: Mistral.
    Mistral,
    /// `<｜tool▁calls▁begin｜>` and its kin: DeepSeek V3, R1 and V3.1.
    DeepSeek,
    /// `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>`: Kimi K2.
    Kimi,
    /// `<tool_call>name <arg_key>..</arg_key><arg_value>..</arg_value></tool_call>`: GLM-4.5 and later.
    Glm,
    /// The name on a line of its own and a JSON object behind it, several with `<|assistant|>` between: GLM-4 and GLM-Z1 up to
    /// those of April 2025.
    Glm4,
    /// `<|tool_call|>[{"name", "arguments"}]<|/tool_call|>`: Phi-4-mini.
    Phi4,
    /// `<tool_call><function=name><parameter=key>..</parameter></function></tool_call>`: Qwen3-Coder, Qwen3-Next and 3.5.
    QwenXml,
    /// `<minimax:tool_call><invoke name="name"><parameter name="key">..</parameter></invoke></minimax:tool_call>`: MiniMax-M2.
    MiniMax,
    /// Channels: `<|channel|>analysis<|message|>`: GPT-OSS.
    Harmony,
}

impl Dialect {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 11] = [
        Self::Hermes,
        Self::Llama3,
        Self::Mistral,
        Self::DeepSeek,
        Self::Kimi,
        Self::Glm,
        Self::Glm4,
        Self::Phi4,
        Self::QwenXml,
        Self::MiniMax,
        Self::Harmony,
    ];

    /// The dialect that a chat template teaches its model.
    pub fn of_template(source: &str) -> Self {
        let signs = [
            ("<|channel|>", Self::Harmony),
            ("<|tool_calls_section_begin|>", Self::Kimi),
            ("<｜tool▁calls▁begin｜>", Self::DeepSeek),
            ("[TOOL_CALLS]", Self::Mistral),
            ("<arg_key>", Self::Glm),
            ("<minimax:tool_call>", Self::MiniMax),
            ("<function=", Self::QwenXml),
            ("<tool_call>", Self::Hermes),
            ("<|/tool|>", Self::Phi4),
            ("'observation'", Self::Glm4),
            (PYTHON_TAG, Self::Llama3),
            ("\"parameters\": dictionary", Self::Llama3),
        ];
        signs.iter().find(|(sign, _)| source.contains(sign)).map_or_else(Self::default, |(_, d)| *d)
    }

    /// Markers that are special tokens in some vocabularies and must then be kept in the text.
    pub fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::Glm => &[
                THINK,
                THINK_END,
                "<tool_call>",
                "</tool_call>",
                "<arg_key>",
                "</arg_key>",
                "<arg_value>",
                "</arg_value>",
            ],
            Self::QwenXml => &[THINK, THINK_END, "<tool_call>", "</tool_call>"],
            Self::MiniMax => &[THINK, THINK_END, "<minimax:tool_call>", "</minimax:tool_call>"],
            Self::Llama3 => &[PYTHON_TAG, THINK, THINK_END],
            Self::Glm4 => &[ASSISTANT, THINK, THINK_END],
            Self::Phi4 => &["<|tool_call|>", "<|/tool_call|>", THINK, THINK_END],
            Self::Mistral => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", THINK, THINK_END],
            Self::DeepSeek => &[
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁calls▁end｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁call▁end｜>",
                "<｜tool▁sep｜>",
                THINK,
                THINK_END,
            ],
            Self::Kimi => &[
                "<|tool_calls_section_begin|>",
                "<|tool_calls_section_end|>",
                "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
                THINK,
                THINK_END,
            ],
            Self::Harmony => &[
                "<|start|>",
                "<|channel|>",
                "<|constrain|>",
                "<|message|>",
                "<|end|>",
                "<|call|>",
                "<|return|>",
            ],
        }
    }

    /// What opens thoughts at the beginning of an answer, what ends them, and what to say to begin the answer proper.
    pub fn thoughts(self) -> [&'static str; 3] {
        match self {
            Self::Harmony => [
                "<|channel|>analysis<|message|>",
                "<|end|>",
                "<|end|><|start|>assistant<|channel|>final<|message|>",
            ],
            _ => [THINK, THINK_END, THINK_END],
        }
    }

    /// Whether an answer that begins like this, behind white space, is calls as a whole. `None`: more must be seen.
    pub(super) fn is_whole_call(self, begun: &str) -> Option<bool> {
        match self {
            Self::Llama3 if begun.starts_with('{') || begun.starts_with(PYTHON_TAG) => Some(true),
            Self::Llama3 if PYTHON_TAG.starts_with(begun) => None,
            Self::Glm4 => is_named_call(begun),
            _ => Some(false),
        }
    }

    /// The calls of an answer that is nothing else; `offered` are the tools, empty if they are unknown: then any may be called.
    pub(super) fn whole_answer(self, text: &str, offered: &BTreeSet<String>) -> Option<Vec<ToolCall>> {
        match self {
            Self::Glm4 => calls::glm4(text),
            Self::Llama3 if !offered.is_empty() => calls::whole_of_tools(text, offered),
            _ => calls::whole(text),
        }
    }

    pub(super) fn call_syntaxes(self) -> &'static [CallSyntax] {
        match self {
            Self::Hermes => &[CallSyntax::Hermes],
            Self::Glm => &[CallSyntax::Glm],
            Self::Glm4 => &[CallSyntax::Glm4],
            Self::Phi4 => &[CallSyntax::Phi4],
            Self::QwenXml => &[CallSyntax::QwenXml],
            Self::MiniMax => &[CallSyntax::MiniMax],
            Self::Llama3 => &[CallSyntax::PythonTag],
            Self::Mistral => &[CallSyntax::Mistral],
            Self::DeepSeek => &[CallSyntax::DeepSeek],
            Self::Kimi => &[CallSyntax::Kimi],
            Self::Harmony => &[],
        }
    }
}

/// A character of a tool's name.
pub(crate) fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}

/// Whether a text begins with a name on a line of its own and `{` behind it.
pub(super) fn is_named_call(text: &str) -> Option<bool> {
    let text = text.trim_start();
    let rest = text.trim_start_matches(is_of_name);
    let name_bytes = text.len() - rest.len();
    if name_bytes > MAX_NAME_BYTES || (name_bytes == 0 && !rest.is_empty()) {
        return Some(false);
    }
    let rest = rest.trim_start_matches([' ', '\t']);
    match rest.strip_prefix('\n').map(str::trim_start) {
        Some("") => None,
        Some(behind) => Some(behind.starts_with('{')),
        None if rest.is_empty() => None,
        None => Some(false),
    }
}
