//! Chat messages to a prompt, by the model's own Jinja template.
//!
//! Templates are written for Python's Jinja: `pycompat` gives the string methods they call, and the three
//! functions that the transformers library adds are here too (`raise_exception`, `strftime_now`, the `tojson`
//! filter). The clock is an argument of [`ChatTemplate::render_at`]; a core reads none.

mod date_time;
mod json;

use std::io;

use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};
use serde::{Deserialize, Serialize};

use crate::error::TemplateError;
pub use date_time::DateTime;
pub use json::to_python_json;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A conversation with everything that a template may look at. Messages are JSON objects in the shape that templates
/// expect: `role`, `content`, and where there are any `tool_calls` (arguments as an object), `tool_call_id`, `name`,
/// `reasoning_content`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The messages, first to last.
    pub messages: Vec<serde_json::Value>,
    /// Tools that the model may call, in OpenAI's shape; empty: templates see none.
    pub tools: Vec<serde_json::Value>,
    /// Further variables, such as `enable_thinking`. They cannot replace the ones above.
    pub variables: serde_json::Map<String, serde_json::Value>,
    /// What `strftime_now` writes in the format that it is given; `None`: the function is undefined.
    pub now: Option<DateTime>,
}

/// A compiled chat template with the special tokens it may name.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
}

const NAME: &str = "chat";
/// Template instructions of one rendering, about a second; a long conversation takes some ten thousand.
const FUEL: u64 = 10_000_000;
/// Bytes that a template may write, and `tojson` make of one value: more than any context holds. Indented JSON of a request
/// may be hundreds of times as long as the request.
const MAX_TEXT_BYTES: usize = 32 << 20;

/// What a template has written.
#[derive(Default)]
struct Text(Vec<u8>);

impl io::Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_TEXT_BYTES - self.0.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// The template has a syntax error.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TemplateError::Compile(format!("{e:#}")))?);
        // A template comes with the model, from anybody: one that loops without end is an error, not a hang.
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", json::tojson);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| TemplateError::Compile(format!("{e:#}")))?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for a conversation. `add_generation_prompt` opens the assistant's turn at the end.
    ///
    /// # Errors
    /// The template refuses the messages (`raise_exception`) or uses something that is not there.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.render_at(messages, add_generation_prompt, None)
    }

    /// As [`Self::render`]; `now` is what `strftime_now` writes. Without it a template that asks sees `strftime_now` undefined
    /// and uses its own default.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_at(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        now: Option<DateTime>,
    ) -> Result<String, TemplateError> {
        let messages =
            messages.iter().map(|m| serde_json::json!({"role": m.role, "content": m.content})).collect();
        self.render_conversation(
            &Conversation { messages, now, ..Conversation::default() },
            add_generation_prompt,
        )
    }

    /// As [`Self::render`], for a conversation with tools and variables.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_conversation(
        &self,
        conversation: &Conversation,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let mut environment = self.environment.clone();
        if let Some(now) = conversation.now {
            environment.add_function("strftime_now", move |format: String| now.format(&format));
        }
        let template =
            environment.get_template(NAME).map_err(|e| TemplateError::Compile(format!("{e:#}")))?;
        // Templates ask whether tools and documents are none, as transformers passes them.
        let tools = if conversation.tools.is_empty() {
            Value::from(())
        } else {
            Value::from(Serde(&conversation.tools))
        };
        let known = context! {
            messages => Value::from(Serde(&conversation.messages)),
            add_generation_prompt,
            tools,
            documents => Value::from(()),
            bos_token => &self.bos_token,
            eos_token => &self.eos_token,
        };
        let variables = Value::from(Serde(&conversation.variables));
        let mut text = Text::default();
        let written = template.render_captured_to(context! { ..known, ..variables }, &mut text).map(drop);
        written.map_err(|error| {
            TemplateError::Render(match error.kind() {
                // Nothing else keeps it from writing.
                ErrorKind::WriteFailure => format!("it writes more than {MAX_TEXT_BYTES} bytes"),
                _ => format!("{error:#}"),
            })
        })?;
        Ok(String::from_utf8(text.0).expect("templates write text"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pycompat_methods_and_special_tokens_work() {
        let t = ChatTemplate::new(
            "{{ bos_token }}{% for m in messages %}[{{ m['role'].upper() }}]{{ m.content.strip() }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
            "<s>",
            "</s>",
        )
        .unwrap();
        assert_eq!(t.render(&[ChatMessage::new("user", "  hi ")], true).unwrap(), "<s>[USER]hi</s>>");
    }

    #[test]
    fn raise_exception_reaches_the_caller() {
        let t = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "").unwrap();
        assert!(t.render(&[], false).unwrap_err().to_string().contains("roles must alternate"));
    }

    #[test]
    fn a_template_without_end_is_an_error() {
        let loops = "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let t = ChatTemplate::new(loops, "", "").unwrap();
        assert!(t.render(&[], false).unwrap_err().to_string().contains("fuel"));
    }

    #[test]
    fn a_template_that_writes_more_than_any_context_holds_is_an_error() {
        let repeats = "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}";
        let t = ChatTemplate::new(repeats, "", "").unwrap();
        let written = |n: usize| t.render(&[ChatMessage::new("user", "é".repeat(n))], false);
        assert_eq!(written(3).unwrap(), "é".repeat(3 * 9999));
        let refused = written(10_000).unwrap_err().to_string();
        assert!(refused.contains("more than 33554432 bytes"), "{refused}");
    }

    #[test]
    fn tojson_and_date_are_available() {
        let t = ChatTemplate::new(
            "{{ messages[0].content | tojson }} {{ strftime_now('%d') if strftime_now is defined else 'none' }}",
            "",
            "",
        )
        .unwrap();
        let m = [ChatMessage::new("user", "a\"b")];
        let now = DateTime::from_unix_seconds(1_795_305_600);
        assert_eq!(t.render(&m, false).unwrap(), "\"a\\\"b\" none");
        assert_eq!(t.render_at(&m, false, Some(now)).unwrap(), "\"a\\\"b\" 22");
    }

    /// How openai/gpt-oss-20b, meta-llama/Llama-3.2-1B-Instruct and ibm-granite/granite-3.1-2b-instruct ask.
    #[test]
    fn templates_get_the_date_in_their_format() {
        let now = Some(DateTime::from_unix_seconds(1_795_305_600));
        for (source, expected) in [
            (
                "{{- \"Current date: \" + strftime_now(\"%Y-%m-%d\") + \"\\n\\n\" }}",
                "Current date: 2026-11-22\n\n",
            ),
            ("{%- set date_string = strftime_now(\"%d %b %Y\") %}{{- date_string }}", "22 Nov 2026"),
            (
                "{{ \"Today's Date: \" + strftime_now('%B %d, %Y') + \".\" }}",
                "Today's Date: November 22, 2026.",
            ),
        ] {
            let t = ChatTemplate::new(source, "", "").unwrap();
            assert_eq!(t.render_at(&[], true, now).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn real_world_constructs_render() {
        // The idioms of the Llama 3 and Qwen3 templates: namespaces, slices, none tests, string methods.
        let source = "{%- set ns = namespace(found=false, last=messages|length - 1) %}
{%- if tools is not none %}TOOLS{% endif %}
{%- if messages[0]['role'] == 'system' %}{{- '<sys>' + messages[0]['content']|trim + '</sys>' }}{% set messages = messages[1:] %}{% endif %}
{%- for message in messages[::-1] %}{% if message.role == 'user' and not ns.found %}{% set ns.found = true %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
{{- '<' ~ message.role ~ '>' ~ content }}
{%- if message.tool_calls is defined and message.tool_calls.startswith('y') %}no{% endif %}
{%- if not loop.last %}{{ ' ' }}{% endif %}
{%- endfor %} {{ ns.last }}";
        let t = ChatTemplate::new(source, "", "").unwrap();
        let m = [
            ChatMessage::new("system", " be brief "),
            ChatMessage::new("user", "q"),
            ChatMessage::new("assistant", "<think>t</think>\n\na"),
        ];
        assert_eq!(t.render(&m, false).unwrap(), "<sys>be brief</sys><user>q <assistant>a 1");
    }

    #[test]
    fn tools_and_variables_reach_the_template() {
        let source = "{% if tools %}{{ tools | length }}:{{ tools[0].function.name }} {% endif %}\
                      {% for m in messages %}{{ m.role }}{% if m.tool_calls %} calls \
                      {{ m.tool_calls[0].function.arguments | tojson }}{% endif %} {% endfor %}\
                      {{ enable_thinking if enable_thinking is defined else 'unsaid' }}{{ bos_token }}";
        let t = ChatTemplate::new(source, "<s>", "").unwrap();
        let mut conversation = Conversation {
            messages: vec![serde_json::json!({"role": "assistant", "content": null,
                "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]})],
            tools: vec![serde_json::json!({"type": "function", "function": {"name": "add"}})],
            ..Conversation::default()
        };
        assert_eq!(
            t.render_conversation(&conversation, true).unwrap(),
            "1:add assistant calls {\"a\": 1} unsaid<s>"
        );
        conversation.tools.clear();
        conversation.variables.insert("enable_thinking".into(), false.into());
        conversation.variables.insert("bos_token".into(), "forged".into());
        assert_eq!(
            t.render_conversation(&conversation, true).unwrap(),
            "assistant calls {\"a\": 1} False<s>"
        );
    }

    #[test]
    fn syntax_error_is_named() {
        assert!(matches!(ChatTemplate::new("{% for %}", "", ""), Err(TemplateError::Compile(_))));
    }
}
