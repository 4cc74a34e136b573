//! Turns of a conversation as the templates of two families want them, which do not know `tool_calls`, or not even `tools`,
//! as transformers passes them. Their model cards say what to pass instead.

use parallax_model::chat_template::to_python_json as text;
use serde_json::{Value, json};

use crate::markup::Dialect;

/// What Phi-4-mini's card has in front of tools when there is no other instruction.
const SYSTEM_WITH_TOOLS: &str = "You are a helpful assistant with some tools.";

/// Messages and tools with tools, calls and their results where a dialect's template looks for them. Those of other dialects
/// are left as they are.
pub(super) fn shape(dialect: Dialect, messages: Vec<Value>, tools: Vec<Value>) -> (Vec<Value>, Vec<Value>) {
    match dialect {
        Dialect::Phi4 => (phi4(messages, &tools), Vec::new()),
        Dialect::Glm4 => (messages.into_iter().flat_map(glm4).collect(), tools),
        _ => (messages, tools),
    }
}

/// Tools are a text in the system message, calls are written out in the assistant's.
fn phi4(mut messages: Vec<Value>, tools: &[Value]) -> Vec<Value> {
    for message in &mut messages {
        let calls: Vec<String> = calls(message).map(object).collect();
        if !calls.is_empty() {
            let said = message["content"].as_str().unwrap_or_default();
            message["content"] = json!(format!("{said}<|tool_call|>[{}]<|/tool_call|>", calls.join(", ")));
        }
    }
    if !tools.is_empty() {
        let functions = Value::Array(tools.iter().map(|tool| tool["function"].clone()).collect());
        if messages.first().is_none_or(|first| first["role"] != "system") {
            messages.insert(0, json!({"role": "system", "content": SYSTEM_WITH_TOOLS}));
        }
        messages[0]["tools"] = json!(text(&functions));
    }
    messages
}

/// Every call is a turn of its own with the tool's name as `metadata`, results are observations.
fn glm4(mut message: Value) -> Vec<Value> {
    if message["role"] == "tool" {
        message["role"] = json!("observation");
        return vec![message];
    }
    let one = |call: &Value| {
        let (name, arguments) = (&call["name"], text(&call["arguments"]));
        json!({"role": "assistant", "metadata": name, "content": arguments})
    };
    let turns: Vec<Value> = calls(&message).map(one).collect();
    let says = turns.is_empty() || message["content"].as_str().is_some_and(|content| !content.is_empty());
    says.then_some(message).into_iter().chain(turns).collect()
}

/// The functions that a message calls.
fn calls(message: &Value) -> impl Iterator<Item = &Value> {
    message["tool_calls"].as_array().into_iter().flatten().map(|call| &call["function"])
}

fn object(call: &Value) -> String {
    format!("{{\"name\": {}, \"arguments\": {}}}", text(&call["name"]), text(&call["arguments"]))
}

#[cfg(test)]
mod tests {
    use parallax_model::{ChatTemplate, Conversation};

    use super::*;

    /// The essence of the template of microsoft/Phi-4-mini-instruct.
    const PHI4: &str = "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}\
        {{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}{% else %}\
        {{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}";
    /// That of zai-org/GLM-4-9B-0414.
    const GLM4: &str = "{%- if tools -%}<|system|>\n# 可用工具{% for tool in tools %}{{ '\n\n## ' + tool.function.name + '\n\n' }}\
        {{ tool.function | tojson(indent=4, ensure_ascii=False) }}{{ '\n' }}在调用上述函数时，请使用 Json 格式表示调用的参数。\
        {%- endfor %}{%- endif -%}\
        {% for m in messages %}{% if m.role == 'system' %}<|system|>\n{{ m.content }}{% endif %}{% endfor %}\
        {% for message in messages %}{% set role = message['role'] %}\
        {% set meta = message.get(\"metadata\", \"\") %}\
        {% if role == 'user' %}<|user|>\n{{ message.content }}{% elif role == 'assistant' and not meta %}<|assistant|>\n\
        {{ message.content }}{% elif role == 'assistant' and meta %}<|assistant|>{{ meta }}\n{{ message.content }}\
        {% elif role == 'observation' %}<|observation|>\n{{ message.content }}{% endif %}{% endfor %}";

    fn conversation() -> Vec<Value> {
        let call = |name: &str, arguments: Value| json!({"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}});
        vec![
            json!({"role": "user", "content": "q"}),
            json!({"role": "assistant", "content": "",
                   "tool_calls": [call("w", json!({"c": "Rome", "n": [1, 2]})), call("t", json!({}))]}),
            json!({"role": "tool", "tool_call_id": "1", "content": "31 C"}),
            json!({"role": "assistant", "content": "Hot.", "tool_calls": [call("t", json!({}))]}),
        ]
    }

    fn tools() -> Vec<Value> {
        vec![json!({"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}})]
    }

    fn rendered(source: &str, messages: Vec<Value>) -> String {
        let template = ChatTemplate::new(source, "", "").unwrap();
        let dialect = Dialect::of_template(source);
        let (messages, tools) = shape(dialect, messages, tools());
        let conversation = Conversation { messages, tools, ..Conversation::default() };
        template.render_conversation(&conversation, false).unwrap()
    }

    #[test]
    fn phi_finds_tools_in_the_system_message_and_calls_in_the_text() {
        let shown =
            r#"<|tool|>[{"name": "w", "parameters": {"type": "object"}}]<|/tool|><|end|><|user|>q<|end|>"#;
        let calls = r#"<|tool_call|>[{"name": "w", "arguments": {"c": "Rome", "n": [1, 2]}}, {"name": "t", "arguments": {}}]<|/tool_call|>"#;
        let rest = "<|end|><|tool|>31 C<|end|><|assistant|>Hot.<|tool_call|>[{\"name\": \"t\", \"arguments\": {}}]<|/tool_call|><|end|>";
        assert_eq!(
            rendered(PHI4, conversation()),
            format!("<|system|>{SYSTEM_WITH_TOOLS}{shown}<|assistant|>{calls}{rest}")
        );
        let system = vec![json!({"role": "system", "content": "Be kind."})];
        assert!(rendered(PHI4, system).starts_with("<|system|>Be kind.<|tool|>[{"));
    }

    #[test]
    fn glm_finds_tools_where_transformers_passes_them_and_every_call_in_a_turn_of_its_own() {
        let tools = "<|system|>\n# 可用工具\n\n## w\n\n{\n    \"name\": \"w\",\n    \"parameters\": {\n        \"type\": \"object\"\n    }\n}\n\
                     在调用上述函数时，请使用 Json 格式表示调用的参数。";
        assert_eq!(
            rendered(GLM4, conversation()).strip_prefix(tools).unwrap(),
            "<|user|>\nq<|assistant|>w\n{\"c\": \"Rome\", \"n\": [1, 2]}<|assistant|>t\n{}<|observation|>\n31 C\
             <|assistant|>\nHot.<|assistant|>t\n{}"
        );
    }

    #[test]
    fn other_families_find_what_transformers_passes() {
        assert_eq!(shape(Dialect::Hermes, conversation(), tools()), (conversation(), tools()));
        let (untouched, _) = shape(Dialect::Glm4, vec![json!({"role": "user", "content": "q"})], Vec::new());
        assert_eq!(untouched, [json!({"role": "user", "content": "q"})]);
    }
}
