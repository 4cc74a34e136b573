//! Turns of a conversation as the templates of some families want them, where that is not what transformers passes: they know
//! no `tool_calls`, or no `tools`, or only calls of a certain name, or one at a time. Their templates and model cards say so.

use std::collections::{BTreeMap, VecDeque};

use parallax_model::chat_template::to_python_json as text;
use serde_json::{Value, json};

use crate::markup::Dialect;

/// What Phi-4-mini's card has in front of tools when there is no other instruction.
const SYSTEM_WITH_TOOLS: &str = "You are a helpful assistant with some tools.";
/// Letters and digits that Mistral's templates want in a call's id, neither more nor less.
const MISTRAL_ID_LENGTH: usize = 9;
const LETTERS_AND_DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Messages and tools with tools, calls, their results and thoughts where a dialect's template looks for them. Those of other
/// dialects are left as they are.
pub(super) fn shape(dialect: Dialect, messages: Vec<Value>, tools: Vec<Value>) -> (Vec<Value>, Vec<Value>) {
    let turns = messages.into_iter();
    match dialect {
        Dialect::Phi4 => (phi4(turns.collect(), &tools), Vec::new()),
        Dialect::Glm4 => (turns.flat_map(glm4).collect(), tools),
        Dialect::Mistral => (turns.map(mistral).collect(), tools),
        Dialect::DeepSeek => (turns.map(deepseek).collect(), tools),
        Dialect::Kimi => (kimi(turns.collect()), tools),
        Dialect::Llama3 => (one_call_a_turn(turns), tools),
        Dialect::Harmony => (one_call_a_turn(turns.map(harmony)), tools),
        _ => (turns.collect(), tools),
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

/// Templates refuse ids of other lengths, such as OpenAI's and ours.
fn mistral(mut message: Value) -> Value {
    calls_mut(&mut message).for_each(|call| shorten(call, "id"));
    shorten(&mut message, "tool_call_id");
    message
}

/// An id of another form becomes letters and digits of its digest: equal ids stay equal.
fn shorten(named: &mut Value, field: &str) {
    let Some(Value::String(id)) = named.get_mut(field) else { return };
    if id.len() != MISTRAL_ID_LENGTH || id.bytes().any(|c| !c.is_ascii_alphanumeric()) {
        let digest = blake3::hash(id.as_bytes());
        let digits = digest.as_bytes()[..MISTRAL_ID_LENGTH].iter();
        *id = digits.map(|byte| char::from(LETTERS_AND_DIGITS[usize::from(*byte) % 62])).collect();
    }
}

/// Arguments are joined to other text as they are; a message with calls must have no content, not an empty one, for R1's
/// first template to see the calls.
fn deepseek(mut message: Value) -> Value {
    let mut has_calls = false;
    for call in calls_mut(&mut message) {
        has_calls = true;
        let arguments = &mut call["function"]["arguments"];
        *arguments = json!(text(arguments));
    }
    if has_calls && message["content"].as_str().is_some_and(|content| content.trim().is_empty()) {
        message["content"] = Value::Null;
    }
    message
}

/// Calls are numbered through the conversation: the id is all that tells the model a call's name, and a result's too.
fn kimi(mut messages: Vec<Value>) -> Vec<Value> {
    let mut n_calls = 0;
    // By the ids that the client knows, which may come again in a later turn.
    let mut unanswered: BTreeMap<String, VecDeque<String>> = BTreeMap::new();
    for message in &mut messages {
        for call in calls_mut(message) {
            let id = format!("functions.{}:{n_calls}", call["function"]["name"].as_str().unwrap_or_default());
            n_calls += 1;
            if let Value::String(known) = std::mem::replace(&mut call["id"], json!(id)) {
                unanswered.entry(known).or_default().push_back(id);
            }
        }
        if let Some(Value::String(id)) = message.get_mut("tool_call_id")
            && let Some(numbered) = unanswered.get_mut(id.as_str()).and_then(VecDeque::pop_front)
        {
            *id = numbered;
        }
    }
    messages
}

/// Thoughts are `thinking`. The template has no place for a text between thoughts and a call and refuses it, but shows a text
/// alone as a thought: so both are one thought.
fn harmony(mut message: Value) -> Value {
    let mut thoughts = message["reasoning_content"].as_str().unwrap_or_default().to_owned();
    if thoughts.is_empty() {
        return message;
    }
    if message.get("tool_calls").is_some() {
        let said = message["content"].as_str().unwrap_or_default().trim();
        if !said.is_empty() {
            thoughts.push_str("\n\n");
            thoughts.push_str(said);
        }
        message["content"] = json!("");
    }
    message["thinking"] = json!(thoughts);
    message
}

/// Every call is a turn of its own with its result behind it: Llama's template refuses a turn with several, GPT-OSS's shows the
/// first and takes all results for its.
fn one_call_a_turn(messages: impl Iterator<Item = Value>) -> Vec<Value> {
    let mut turns = Vec::new();
    let mut messages = messages.peekable();
    while let Some(mut message) = messages.next() {
        let calls = match message.get_mut("tool_calls") {
            Some(Value::Array(calls)) if calls.len() > 1 => std::mem::take(calls),
            _ => {
                turns.push(message);
                continue;
            }
        };
        let mut results: BTreeMap<String, VecDeque<Value>> = BTreeMap::new();
        while let Some(result) = messages.next_if(|next| next["role"] == "tool") {
            let id = result["tool_call_id"].as_str().unwrap_or_default().to_owned();
            results.entry(id).or_default().push_back(result);
        }
        for call in calls {
            let id = call["id"].as_str().unwrap_or_default();
            let result = results.get_mut(id).and_then(VecDeque::pop_front);
            message["tool_calls"] = json!([call]);
            // What was said and thought before the calls stands before the first.
            turns.push(std::mem::replace(&mut message, json!({"role": "assistant", "content": ""})));
            turns.extend(result);
        }
        turns.extend(results.into_values().flatten());
    }
    turns
}

/// The functions that a message calls.
fn calls(message: &Value) -> impl Iterator<Item = &Value> {
    message["tool_calls"].as_array().into_iter().flatten().map(|call| &call["function"])
}

/// A message's calls, whole.
fn calls_mut(message: &mut Value) -> impl Iterator<Item = &mut Value> {
    message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten()
}

fn object(call: &Value) -> String {
    format!("{{\"name\": {}, \"arguments\": {}}}", text(&call["name"]), text(&call["arguments"]))
}

#[cfg(test)]
mod tests;
