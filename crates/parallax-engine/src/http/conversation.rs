//! Messages as templates expect them, out of OpenAI's chat messages and its responses API's items.
//!
//! Templates are written for transformers: `role`, `content` as a text, `tool_calls` with the arguments as an object.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};

/// Messages of one conversation.
const MAX_MESSAGES: usize = 4096;

/// The `messages` of a chat request.
///
/// # Errors
/// 400 naming the message and the field.
pub(super) fn chat(body: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let items = body.list("messages")?.ok_or_else(|| body.missing("messages"))?;
    within_limits(body, "messages", items.len())?;
    items.into_iter().map(|(path, item)| chat_message(&Fields::of(item, path)?)).collect()
}

/// 400 unless there are 1 to [`MAX_MESSAGES`].
pub(super) fn within_limits(body: &Fields<'_>, name: &str, n: usize) -> Result<(), ApiError> {
    if n == 0 || n > MAX_MESSAGES {
        return Err(body.fault(name, format!("must hold 1 to {MAX_MESSAGES} messages, not {n}")));
    }
    Ok(())
}

fn chat_message(message: &Fields<'_>) -> Result<Value, ApiError> {
    let roles = [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("tool", "tool"),
    ];
    let role = message.choice("role", &roles)?.ok_or_else(|| message.missing("role"))?;
    let content = text_content(message, "content", &["text", "input_text", "output_text", "refusal"])?;
    let mut out = json!({"role": role});
    match role {
        "assistant" => {
            let calls = message.list("tool_calls")?.unwrap_or_default();
            let calls: Vec<Value> = calls
                .into_iter()
                .map(|(path, call)| tool_call(&Fields::of(call, path)?))
                .collect::<Result<_, _>>()?;
            if content.is_none() && calls.is_empty() {
                return Err(
                    message.fault("content", "is missing (only a message with tool_calls may lack it)")
                );
            }
            out["content"] = json!(content.unwrap_or_default());
            if let Some(thoughts) = message.text("reasoning_content")?.or(message.text("reasoning")?) {
                out["reasoning_content"] = json!(thoughts);
            }
            if !calls.is_empty() {
                out["tool_calls"] = Value::Array(calls);
            }
        }
        _ => {
            out["content"] = json!(content.ok_or_else(|| message.missing("content"))?);
            if role == "tool" {
                out["tool_call_id"] = json!(message.required_text("tool_call_id")?);
            }
        }
    }
    if let Some(name) = message.text("name")? {
        out["name"] = json!(name);
    }
    Ok(out)
}

/// A text, or a list of text parts.
pub(super) fn text_content(
    message: &Fields<'_>,
    name: &str,
    kinds: &[&str],
) -> Result<Option<String>, ApiError> {
    match message.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(_)) => {
            let mut text = String::new();
            for (path, item) in message.list(name)?.unwrap_or_default() {
                let part = Fields::of(item, path)?;
                let kind = part.required_text("type")?;
                if !kinds.contains(&kind) {
                    return Err(
                        part.fault("type", format!("{kind:?} is not supported: this model reads text"))
                    );
                }
                text.push_str(part.required_text(if kind == "refusal" { "refusal" } else { "text" })?);
            }
            Ok(Some(text))
        }
        Some(other) => Err(wrong(&message.path(name), "a string or a list of parts", other)),
    }
}

fn tool_call(call: &Fields<'_>) -> Result<Value, ApiError> {
    let id = call.required_text("id")?;
    if let Some(kind) = call.text("type")?
        && kind != "function"
    {
        return Err(call.fault("type", format!("must be \"function\", not {kind:?}")));
    }
    let function = call.object("function")?.ok_or_else(|| call.missing("function"))?;
    let name = function.required_text("name")?;
    let arguments = arguments(&function, "arguments")?;
    Ok(call_value(id, name, &arguments))
}

/// The arguments of an earlier call: the text of a JSON object.
fn arguments(fields: &Fields<'_>, name: &str) -> Result<Value, ApiError> {
    let text = fields.required_text(name)?;
    if text.trim().is_empty() {
        return Ok(json!({}));
    }
    let object: Map<String, Value> = serde_json::from_str(text)
        .map_err(|e| fields.fault(name, format!("must be the text of a JSON object: {e}")))?;
    Ok(Value::Object(object))
}

/// A call as templates expect it.
pub(super) fn call_value(id: &str, name: &str, arguments: &Value) -> Value {
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// The `input` of a responses request, after its `instructions`.
///
/// # Errors
/// 400 naming the item and the field.
pub(super) fn responses(body: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = body.text("instructions")? {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    match body.get("input") {
        None => return Err(body.missing("input")),
        Some(Value::String(text)) => messages.push(json!({"role": "user", "content": text})),
        Some(Value::Array(_)) => {
            let items = body.list("input")?.unwrap_or_default();
            within_limits(body, "input", items.len())?;
            let mut thoughts = String::new();
            for (path, item) in items {
                responses_item(&Fields::of(item, path)?, &mut messages, &mut thoughts)?;
            }
        }
        Some(other) => return Err(wrong("input", "a string or a list of items", other)),
    }
    Ok(messages)
}

/// Adds an item to the messages. `thoughts` are those of the items before it that no message has yet.
fn responses_item(
    item: &Fields<'_>,
    messages: &mut Vec<Value>,
    thoughts: &mut String,
) -> Result<(), ApiError> {
    match item.text("type")?.unwrap_or("message") {
        "message" => {
            let roles =
                [("system", "system"), ("developer", "system"), ("user", "user"), ("assistant", "assistant")];
            let role = item.choice("role", &roles)?.ok_or_else(|| item.missing("role"))?;
            let content = text_content(item, "content", &["text", "input_text", "output_text", "refusal"])?;
            let mut message =
                json!({"role": role, "content": content.ok_or_else(|| item.missing("content"))?});
            if role == "assistant" {
                attach(thoughts, &mut message);
            } else {
                // What they led to was left out: they are nobody's.
                thoughts.clear();
            }
            messages.push(message);
        }
        "function_call" => {
            let id = item.required_text("call_id")?;
            let name = item.required_text("name")?;
            let call = call_value(id, name, &arguments(item, "arguments")?);
            // Calls that follow each other belong to one turn.
            let last = messages.pop_if(|last| last["role"] == "assistant");
            let mut message = last.unwrap_or_else(|| json!({"role": "assistant", "content": ""}));
            attach(thoughts, &mut message);
            match message.get_mut("tool_calls").and_then(Value::as_array_mut) {
                Some(calls) => calls.push(call),
                None => message["tool_calls"] = json!([call]),
            }
            messages.push(message);
        }
        "function_call_output" => {
            let id = item.required_text("call_id")?;
            let output = text_content(item, "output", &["text", "input_text", "output_text"])?;
            let output = output.ok_or_else(|| item.missing("output"))?;
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
        }
        // Which thoughts a model sees again is for its template to say.
        "reasoning" => {
            let content = text_content(item, "content", &["reasoning_text"])?;
            let summary = text_content(item, "summary", &["summary_text"])?;
            let told = [content, summary].into_iter().flatten().find(|text| !text.is_empty());
            add_thoughts(thoughts, &told.unwrap_or_default());
        }
        other => return Err(item.fault("type", format!("{other:?} is not supported by this server"))),
    }
    Ok(())
}

/// Gives a message of the assistant the thoughts before it.
fn attach(thoughts: &mut String, message: &mut Value) {
    if thoughts.is_empty() {
        return;
    }
    let more = std::mem::take(thoughts);
    match &mut message["reasoning_content"] {
        Value::String(all) => add_thoughts(all, &more),
        none => *none = Value::String(more),
    }
}

fn add_thoughts(all: &mut String, more: &str) {
    if !all.is_empty() && !more.is_empty() {
        all.push('\n');
    }
    all.push_str(more);
}

/// Takes an assistant's message from the end, which the answer is to continue.
pub(super) fn take_prefill(messages: &mut Vec<Value>) -> Option<String> {
    let ends_with_text = messages
        .last()
        .is_some_and(|m| m["role"] == "assistant" && m.get("tool_calls").is_none() && messages.len() > 1);
    if !ends_with_text {
        return None;
    }
    let last = messages.pop()?;
    last["content"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(value: &Value) -> Result<Vec<Value>, ApiError> {
        chat(&Fields::of(&json!({"messages": value}), "").unwrap())
    }

    #[test]
    fn a_conversation_with_tools_becomes_what_templates_expect() {
        let got = messages(&json!([
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
            {"role": "user", "content": "hi", "name": "Ann"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
                "function": {"name": "w", "arguments": "{\"c\": 1}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]))
        .unwrap();
        assert_eq!(got[0], json!({"role": "system", "content": "be kind"}));
        assert_eq!(got[1], json!({"role": "user", "content": "hi", "name": "Ann"}));
        assert_eq!(got[2]["tool_calls"][0]["function"]["arguments"], json!({"c": 1}));
        assert_eq!(got[3], json!({"role": "tool", "tool_call_id": "c1", "content": "sunny"}));
    }

    #[test]
    fn items_of_the_responses_api_become_messages() {
        let body = json!({"instructions": "be kind", "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c1", "name": "w", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "w", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ]});
        let got = responses(&Fields::of(&body, "").unwrap()).unwrap();
        assert_eq!(got.len(), 4);
        assert_eq!(got[2]["tool_calls"].as_array().unwrap().len(), 2);
        assert_eq!(got[3]["role"], "tool");
    }

    #[test]
    fn thoughts_of_the_responses_api_stay_with_what_they_led_to() {
        let thinks = |text: &str| json!({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]});
        let calls =
            |id: &str| json!({"type": "function_call", "call_id": id, "name": "w", "arguments": "{}"});
        let answers = |id: &str| json!({"type": "function_call_output", "call_id": id, "output": "1"});
        let body = json!({"input": [
            {"role": "user", "content": "q"},
            thinks("a"), thinks("b"), calls("c1"), thinks("c"), calls("c2"), answers("c1"), answers("c2"),
            // As OpenAI gives them: a summary.
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "d"}], "encrypted_content": "?"},
            {"role": "assistant", "content": "hot"},
            thinks("of an answer that was cut off"),
            {"role": "user", "content": "so?"}, calls("c3"), answers("c3"),
        ]});
        let got = responses(&Fields::of(&body, "").unwrap()).unwrap();
        let thoughts: Vec<Option<&str>> = got.iter().map(|m| m["reasoning_content"].as_str()).collect();
        assert_eq!(thoughts, [None, Some("a\nb\nc"), None, None, Some("d"), None, None, None]);
        assert_eq!(got[1]["tool_calls"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn a_last_message_of_the_assistant_is_continued() {
        let mut messages =
            vec![json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "So"})];
        assert_eq!(take_prefill(&mut messages).as_deref(), Some("So"));
        assert_eq!(take_prefill(&mut messages), None);
        assert_eq!(messages.len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        for (value, name) in [
            (json!([]), "messages must hold"),
            (json!({}), "messages must be a list"),
            (json!(["hi"]), "messages[0] must be an object"),
            (json!([{"content": "x"}]), "messages[0].role is missing"),
            (json!([{"role": "robot", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content is missing"),
            (json!([{"role": "user", "content": 3}]), "messages[0].content"),
            (json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0].type"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (json!([{"role": "assistant"}]), "messages[0].content"),
            (json!([{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
            (json!([{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0].id"),
            (
                json!([{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "n", "arguments": "["}}]}]),
                "messages[0].tool_calls[0].function.arguments",
            ),
        ] {
            let error = messages(&value).expect_err(&value.to_string()).to_string();
            assert!(error.contains(name), "{value}: {error}");
        }
    }
}
