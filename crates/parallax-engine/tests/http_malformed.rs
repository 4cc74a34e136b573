//! Malformed requests, generated over all endpoints and fields: each gets the right 4xx with a message that names the
//! field, in the shape of its API, and the server goes on serving.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "http")]

use parallax_engine::http::HttpLimits;
use serde_json::{Value, json};

#[path = "support/alphabet.rs"]
mod alphabet;

use alphabet::{Setup, chat, post, send, start};

/// One request and what must come back.
struct Case {
    path: &'static str,
    body: Value,
    /// Part of the message.
    names: String,
}

/// Wrong values for a field of a kind.
fn wrong(kind: &str) -> Vec<Value> {
    match kind {
        "text" => vec![json!(1), json!(true), json!([]), json!({})],
        "flag" => vec![json!("yes"), json!(1), json!([])],
        "count" => vec![json!("many"), json!(1.5), json!(true), json!([]), json!(-5)],
        "number" => vec![json!("warm"), json!(true), json!({}), json!(1e30), json!(-1e30)],
        "list" => vec![json!("a"), json!(1), json!({"a": 1})],
        "object" => vec![json!("a"), json!(1), json!([1])],
        "texts" => vec![json!(1), json!({}), json!([1]), json!([""]), json!([["a"]])],
        other => panic!("no kind {other}"),
    }
}

/// Path, a good body, and its fields with their kinds.
type Endpoint = (&'static str, Value, Vec<(&'static str, &'static str)>);

fn endpoints() -> Vec<Endpoint> {
    let sampling = [
        ("temperature", "number"),
        ("top_p", "number"),
        ("min_p", "number"),
        ("typical_p", "number"),
        ("presence_penalty", "number"),
        ("frequency_penalty", "number"),
        ("repetition_penalty", "number"),
        ("n", "count"),
        ("max_tokens", "count"),
        ("min_tokens", "count"),
        ("stop", "texts"),
        ("stop_token_ids", "list"),
        ("logit_bias", "object"),
        ("ignore_eos", "flag"),
        ("stream", "flag"),
        ("response_format", "object"),
        ("allowed_token_ids", "list"),
        ("bad_words", "texts"),
        ("truncate_prompt_tokens", "count"),
        ("return_token_ids", "flag"),
    ];
    // They change no answer.
    let hints = [
        ("user", "text"),
        ("metadata", "object"),
        ("store", "flag"),
        ("service_tier", "text"),
        ("safety_identifier", "text"),
        ("prompt_cache_key", "text"),
        ("prediction", "object"),
        ("verbosity", "text"),
    ];
    let mut of_chat = [&sampling[..], &hints].concat();
    of_chat.extend([
        ("messages", "list"),
        ("logprobs", "flag"),
        ("top_logprobs", "count"),
        ("tools", "list"),
        ("parallel_tool_calls", "flag"),
        ("max_completion_tokens", "count"),
        ("reasoning_effort", "text"),
        ("include_reasoning", "flag"),
        ("thinking_token_budget", "count"),
        ("chat_template_kwargs", "object"),
        ("model", "text"),
    ]);
    let mut of_text = [&sampling[..], &hints].concat();
    of_text.extend([("echo", "flag"), ("logprobs", "count"), ("model", "text")]);
    let message = json!([{"role": "user", "content": "a"}]);
    vec![
        ("/v1/chat/completions", chat("a"), of_chat),
        ("/v1/completions", json!({"prompt": "a"}), of_text),
        (
            "/v1/responses",
            json!({"input": "a"}),
            vec![
                ("model", "text"),
                ("instructions", "text"),
                ("temperature", "number"),
                ("top_p", "number"),
                ("top_k", "count"),
                ("min_p", "number"),
                ("presence_penalty", "number"),
                ("frequency_penalty", "number"),
                ("repetition_penalty", "number"),
                ("logit_bias", "object"),
                ("stop", "texts"),
                ("stop_token_ids", "list"),
                ("allowed_token_ids", "list"),
                ("bad_words", "texts"),
                ("guided_regex", "text"),
                ("thinking_token_budget", "count"),
                ("max_output_tokens", "count"),
                ("stream", "flag"),
                ("store", "flag"),
                ("user", "text"),
                ("metadata", "object"),
                ("service_tier", "text"),
                ("background", "flag"),
                ("truncation", "text"),
                ("text", "object"),
                ("reasoning", "object"),
                ("include", "list"),
                ("top_logprobs", "count"),
                ("tools", "list"),
            ],
        ),
        (
            "/v1/messages",
            json!({"model": "alphabet", "max_tokens": 4, "messages": message}),
            vec![
                ("model", "text"),
                ("messages", "list"),
                ("max_tokens", "count"),
                ("temperature", "number"),
                ("top_p", "number"),
                ("top_k", "count"),
                ("stop_sequences", "texts"),
                ("stream", "flag"),
                ("tools", "list"),
                ("tool_choice", "object"),
                ("thinking", "object"),
                ("min_p", "number"),
                ("metadata", "object"),
                ("service_tier", "text"),
                ("output_config", "object"),
                ("output_format", "object"),
                ("context_management", "object"),
            ],
        ),
        (
            "/v1/messages/count_tokens",
            json!({"model": "alphabet", "messages": message}),
            vec![("messages", "list"), ("tools", "list")],
        ),
        (
            "/tokenize",
            json!({"prompt": "a"}),
            vec![("prompt", "text"), ("add_special_tokens", "flag"), ("return_token_strs", "flag")],
        ),
        ("/detokenize", json!({"tokens": [1]}), vec![("tokens", "list")]),
    ]
}

/// Values of the right type that are wrong all the same.
fn particular() -> Vec<Case> {
    let chat_with = |fields: Value| {
        let mut body = chat("a");
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let messages_with = |fields: Value| {
        let mut body =
            json!({"model": "alphabet", "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    };
    let tool = json!({"type": "function", "function": {"name": "w"}});
    let mut cases = Vec::new();
    let mut add = |path, body, names: &str| cases.push(Case { path, body, names: names.to_owned() });
    for (fields, names) in [
        (json!({"temperature": 2.1}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"n": 0}), "n must be"),
        (json!({"n": 65}), "n must be"),
        (json!({"best_of": 4}), "best_of"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"min_tokens": 9, "max_tokens": 3}), "min_tokens"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"seed": "x"}), "seed"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": "x"}}), "logit_bias"),
        (json!({"logit_bias": {"1": 200}}), "logit_bias"),
        (json!({"logit_bias": {"9999": 1}}), "logit_bias"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"include_usage": 3}}), "include_usage"),
        (json!({"functions": [{"name": "w"}]}), "functions"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"audio": {"voice": "alloy"}}), "audio"),
        (json!({"chat_template": "{{ messages }}"}), "chat_template"),
        (json!({"documents": [{"text": "a"}]}), "documents"),
        (json!({"echo": true}), "echo"),
        (json!({"return_tokens_as_token_ids": true}), "return_tokens_as_token_ids"),
        (json!({"skip_special_tokens": false}), "skip_special_tokens"),
        (json!({"detokenize": false}), "detokenize"),
        (json!({"length_penalty": 1.5}), "length_penalty"),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [9999]}), "outside the vocabulary"),
        (json!({"stop_token_ids": [9999]}), "stop_token_ids holds 9999"),
        (json!({"bad_words": ["a".repeat(300)]}), "bad_words"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"thinking_token_budget": 0}), "thinking_token_budget"),
        (json!({"verbosity": "mute"}), "verbosity"),
        (json!({"tools": [tool, tool]}), "tools"),
        (json!({"tools": [tool], "tool_choice": "sometimes"}), "tool_choice"),
        (
            json!({"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "x"}}}),
            "tool_choice",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools[0].function.name"),
        (json!({"tools": [{"type": "function", "function": {"name": "w", "parameters": 3}}]}), "parameters"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "w", "parameters": {"properties": 5}}}]}),
            "tools[0].function.parameters.properties",
        ),
        (json!({"response_format": {"type": "yaml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (json!({"guided_json": "{"}), "guided_json"),
        (json!({"guided_choice": []}), "guided_choice"),
        (json!({"guided_regex": "a", "guided_choice": ["b"]}), "guided_choice"),
        (json!({"reasoning_effort": "extreme"}), "reasoning_effort"),
        (json!({"continue_final_message": true}), "continue_final_message"),
        (json!({"add_generation_prompt": true, "continue_final_message": true}), "add_generation_prompt"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [3]}), "messages[0]"),
        (json!({"messages": [{"content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "robot", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 7}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "content[0].type"),
        (json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "content[0].text"),
        (json!({"messages": [{"role": "tool", "content": "a"}]}), "tool_call_id"),
        (json!({"messages": [{"role": "assistant"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "assistant", "tool_calls": [{}]}]}), "tool_calls[0].id"),
        (json!({"messages": [{"role": "user", "content": "a".repeat(70)}]}), "70 tokens"),
        (json!({"messages": [{"role": "user", "content": ""}]}), "prompt is empty"),
    ] {
        add("/v1/chat/completions", chat_with(fields), names);
    }
    for (body, names) in [
        (json!({}), "prompt"),
        (json!({"prompt": 3}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": ["a", 3]}), "prompt[1]"),
        (json!({"prompt": [1, "a"]}), "prompt[1]"),
        (json!({"prompt": [99]}), "99"),
        (json!({"prompt": [-1]}), "prompt[0]"),
        (json!({"prompt": "a", "suffix": "b"}), "suffix"),
        (json!({"prompt": "a", "thinking_token_budget": 3}), "thinking_token_budget"),
        (json!({"prompt": "a", "skip_special_tokens": false}), "skip_special_tokens"),
        (json!({"prompt": "a", "truncate_prompt_tokens": -2}), "truncate_prompt_tokens"),
        (json!({"prompt": "a", "logprobs": 21}), "logprobs"),
        (json!({"prompt": "a", "echo": true, "stream": true}), "echo"),
    ] {
        add("/v1/completions", body, names);
    }
    for (body, names) in [
        (json!({}), "input"),
        (json!({"input": 3}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type"),
        (json!({"input": [{"role": "user"}]}), "input[0].content"),
        (
            json!({"input": [{"type": "function_call", "call_id": "c", "name": "w", "arguments": "["}]}),
            "arguments",
        ),
        (json!({"input": [{"type": "function_call_output", "output": "x"}]}), "call_id"),
        (json!({"input": "a", "previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"input": "a", "background": true}), "background"),
        (
            json!({"input": "a", "text": {"format": {"type": "json_schema", "schema": {}}}}),
            "text.format.name",
        ),
        (json!({"input": "a", "reasoning": {"effort": "wild"}}), "reasoning.effort"),
        (json!({"input": "a", "include": [1]}), "include[0]"),
        (json!({"input": "a", "include": ["file_search_call.results", "banana"]}), "include[1]"),
        (json!({"input": "a", "truncation": "banana"}), "truncation"),
        (json!({"input": "a", "max_tool_calls": 3}), "max_tool_calls"),
        (json!({"input": "a", "prompt": {"id": "p"}}), "prompt"),
        (json!({"input": "a", "text": {"verbosity": "mute"}}), "text.verbosity"),
        (json!({"input": "a", "reasoning": {"summary": 3}}), "reasoning.summary"),
        (json!({"input": "a", "n": 2}), "n is not supported"),
        (json!({"input": "a", "return_token_ids": true}), "return_token_ids"),
        (
            json!({"input": "a", "guided_regex": "a", "text": {"format": {"type": "json_object"}}}),
            "text.format and guided_regex",
        ),
        (json!({"input": "a", "top_logprobs": 2}), "top_logprobs"),
        (json!({"input": "a", "tools": [{"type": "web_search"}]}), "tools[0].type"),
    ] {
        add("/v1/responses", body, names);
    }
    for (fields, names) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"model": null}), "model"),
        (json!({"temperature": 1.5}), "temperature"),
        (json!({"messages": [{"role": "system", "content": "a"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": []}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "content[0].type"),
        (json!({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}), "tool_use_id"),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "w"}]}]}),
            "input",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]}),
            "content[0].type",
        ),
        (json!({"system": 3}), "system"),
        (json!({"system": [{"type": "image"}]}), "system[0].type"),
        (json!({"thinking": {"type": "often"}}), "thinking.type"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": -1}}), "budget_tokens"),
        (json!({"thinking": {"type": "enabled"}}), "budget_tokens"),
        (json!({"output_config": {"format": {"type": "json_object"}}}), "output_config.format.type"),
        (json!({"output_config": {"format": {"type": "json_schema"}}}), "output_config.format.schema"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 100_000}}), "budget_tokens"),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": 2},
                   "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
            "thinking cannot be enabled",
        ),
        (json!({"tools": [{"name": "w"}]}), "tools[0].input_schema"),
        (json!({"tools": [{"input_schema": {"type": "object"}}]}), "tools[0].name"),
        (json!({"tools": [{"type": "bash_20250124", "name": "bash"}]}), "tools[0].type"),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"tool_choice": {"type": "perhaps"}}), "tool_choice.type"),
        (json!({"mcp_servers": [{"url": "x"}]}), "mcp_servers"),
        (
            json!({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}),
            "context_management",
        ),
        (json!({"output_config": {"effort": "extreme"}}), "output_config.effort"),
        (json!({"output_format": {"type": "json_object"}}), "output_format.type"),
        (
            json!({"output_format": {"type": "json_schema", "schema": {}},
                   "output_config": {"format": {"type": "json_schema", "schema": {}}}}),
            "output_format and output_config.format",
        ),
        (json!({"metadata": {"user_id": 7}}), "metadata.user_id"),
        (json!({"seed": "x"}), "seed"),
        (
            json!({"tools": [{"name": "w", "input_schema": {"properties": [1]}}]}),
            "tools[0].input_schema.properties",
        ),
    ] {
        add("/v1/messages", messages_with(fields), names);
    }
    for (path, body, names) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "messages"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [99]}), "99"),
        ("/detokenize", json!({"tokens": ["a"]}), "tokens[0]"),
    ] {
        add(path, body, names);
    }
    cases
}

/// Every endpoint's fields with values of the wrong type.
fn generated() -> Vec<Case> {
    let mut cases = Vec::new();
    for (path, body, fields) in endpoints() {
        for (field, kind) in fields {
            for value in wrong(kind) {
                let mut body = body.clone();
                body[field] = value;
                cases.push(Case { path, body, names: field.to_owned() });
            }
        }
    }
    cases
}

fn check_shape(path: &str, error: &Value, status: u16) {
    if path.starts_with("/v1/messages") {
        assert_eq!(error["type"], "error", "{path}: {error}");
        assert!(
            error["error"]["type"]
                .as_str()
                .is_some_and(|t| t.ends_with("_error") || t == "request_too_large")
        );
    } else {
        assert_eq!(error["error"]["code"], status, "{path}: {error}");
    }
    assert!(error["error"]["message"].as_str().is_some_and(|m| m.len() > 5), "{path}: {error}");
}

#[tokio::test]
async fn every_malformed_field_gets_a_400_that_names_it() {
    let address = start(Setup::default()).await;
    let mut cases = generated();
    cases.extend(particular());
    assert!(cases.len() >= 200, "{} cases", cases.len());
    println!("{} malformed requests", cases.len());
    for Case { path, body, names } in cases {
        let answer = post(address, path, &body).await;
        assert_eq!(answer.status, 400, "{path} {body}: {}", answer.body);
        check_shape(path, &answer.json(), 400);
        assert!(answer.body.contains(&names), "{path} {body} must name {names}: {}", answer.body);
    }
    assert_eq!(post(address, "/v1/chat/completions", &chat("y")).await.status, 200);
}

#[tokio::test]
async fn bodies_that_are_no_request_get_the_right_4xx() {
    let limits = HttpLimits { body_bytes: 4096, ..HttpLimits::default() };
    let address = start(Setup { limits, ..Setup::default() }).await;
    let json = "content-type: application/json\r\n";
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(1000), "]".repeat(1000));
    let large = chat(&"a".repeat(5000)).to_string();
    let mut n = 0;
    for (path, _, _) in endpoints() {
        let bodies: Vec<(&str, Vec<u8>, u16)> = vec![
            (json, b"".to_vec(), 400),
            (json, b"{".to_vec(), 400),
            (json, b"[]".to_vec(), 400),
            (json, b"null".to_vec(), 400),
            (json, b"\"text\"".to_vec(), 400),
            (json, b"{\"model\": \"alphabet\",}".to_vec(), 400),
            (json, b"{\"a\": 1} trailing".to_vec(), 400),
            (json, b"{\"a\": NaN}".to_vec(), 400),
            (json, vec![b'{', b'"', 0xff, 0xfe, b'"', b':', b'1', b'}'], 400),
            (json, deep.clone().into_bytes(), 400),
            (json, large.clone().into_bytes(), 413),
            ("content-type: text/plain\r\n", b"{}".to_vec(), 415),
            ("content-type: application/x-www-form-urlencoded\r\n", b"a=1".to_vec(), 415),
            ("content-type: multipart/form-data\r\n", b"x".to_vec(), 415),
            // So pages of any origin can send, without asking first.
            ("", b"{}".to_vec(), 415),
        ];
        for (headers, body, status) in bodies {
            let answer = send(address, "POST", path, headers, &body).await;
            assert_eq!(answer.status, status, "{path} {}: {}", String::from_utf8_lossy(&body), answer.body);
            check_shape(path, &answer.json(), status);
            n += 1;
        }
        let answer = send(address, "GET", path, "", b"").await;
        assert_eq!(answer.status, 405, "{path}");
        assert!(answer.body.contains(&format!("{path} does not take GET")), "{}", answer.body);
        assert!(answer.head.to_ascii_lowercase().contains("allow: post"), "{}", answer.head);
        let unknown = json!({"model": "gpt-9", "prompt": "a", "input": "a", "tokens": [1], "max_tokens": 1,
                             "messages": [{"role": "user", "content": "a"}]});
        let answer = post(address, path, &unknown).await;
        assert_eq!(answer.status, 404, "{path}: {}", answer.body);
        check_shape(path, &answer.json(), 404);
        n += 2;
    }
    for (path, named) in [
        ("/nothing", "GET /nothing"),
        ("/v1/nothing", "GET /v1/nothing"),
        ("/chat/completions", "base_url"),
        ("/v1/models/other", "other"),
    ] {
        let answer = send(address, "GET", path, "", b"").await;
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.body.contains(named), "{path}: {}", answer.body);
        n += 1;
    }
    println!("{n} requests that are none");
    assert_eq!(post(address, "/v1/chat/completions", &chat("y")).await.status, 200);
}
