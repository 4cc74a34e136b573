//! The HTTP server over a toy language model that counts through the alphabet: shapes, streams, stops, errors, limits.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "http")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parallax_engine::http::{HttpLimits, Readiness, Updates, WeightLoader};
use parallax_model::{Adapter, LoraTensors};
use serde_json::{Value, json};

#[path = "support/alphabet.rs"]
mod alphabet;
#[path = "http/fields.rs"]
mod fields;

use alphabet::{Alphabet, LETTERS, Setup, chat, post, send, start, start_until, with};

#[tokio::test]
async fn a_chat_answer_has_text_reason_and_counts() {
    let address = start(Setup::default()).await;
    let answer = post(address, "/v1/chat/completions", &chat("uvw")).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "xyz");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let usage = &answer["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"], &usage["total_tokens"]),
        (&json!(3), &json!(4), &json!(7))
    );

    let answer =
        post(address, "/v1/chat/completions", &with(chat("abc"), "max_tokens", json!(5))).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "defgh");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");

    let answer =
        post(address, "/v1/chat/completions", &with(chat("abc"), "stop", json!(["gh", "zz"]))).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "def");
    assert_eq!(
        (&answer["choices"][0]["finish_reason"], &answer["choices"][0]["stop_reason"]),
        (&json!("stop"), &json!("gh"))
    );
    let shown = with(with(chat("abc"), "stop", json!("gh")), "include_stop_str_in_output", json!(true));
    let answer = post(address, "/v1/chat/completions", &shown).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "defgh");
}

#[tokio::test]
async fn log_probabilities_and_alternatives_are_reported() {
    let address = start(Setup::default()).await;
    let ask = with(
        with(with(chat("a"), "logprobs", json!(true)), "top_logprobs", json!(3)),
        "max_tokens",
        json!(2),
    );
    let whole = post(address, "/v1/chat/completions", &ask).await.json();
    let content = whole["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 2);
    assert_eq!((&content[0]["token"], &content[0]["bytes"]), (&json!("b"), &json!([98])));
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(content[0]["top_logprobs"][0]["logprob"], content[0]["logprob"]);

    let streamed = post(address, "/v1/chat/completions", &with(ask, "stream", json!(true))).await;
    let said: Vec<Value> = streamed
        .events()
        .iter()
        .filter_map(|e| serde_json::from_str::<Value>(e).ok())
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(said, content);

    let text = json!({"prompt": "ab", "logprobs": 2, "max_tokens": 2, "temperature": 0});
    let report = post(address, "/v1/completions", &text).await.json()["choices"][0]["logprobs"].clone();
    assert_eq!((&report["tokens"], &report["text_offset"]), (&json!(["c", "d"]), &json!([0, 1])));
    assert_eq!(report["top_logprobs"][0].as_object().unwrap().len(), 2);
}

#[tokio::test]
async fn several_choices_and_prompts_keep_their_places() {
    let address = start(Setup::default()).await;
    let ask = json!({"prompt": ["ab", "mn"], "n": 2, "max_tokens": 2, "temperature": 0});
    let answer = post(address, "/v1/completions", &ask).await.json();
    let texts: Vec<&str> =
        answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["cd", "cd", "op", "op"]);
    assert_eq!(
        (&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]),
        (&json!(4), &json!(8))
    );
    let ids = json!({"prompt": [[0, 1], [12, 13]], "max_tokens": 1, "temperature": 0, "echo": true});
    let answer = post(address, "/v1/completions", &ids).await.json();
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["choices"][1]["text"]),
        (&json!("abc"), &json!("mno"))
    );

    let ask = with(
        with(with(chat("x"), "n", json!(3)), "stream", json!(true)),
        "stream_options",
        json!({"include_usage": true}),
    );
    let answer = post(address, "/v1/chat/completions", &ask).await;
    let mut texts = [String::new(), String::new(), String::new()];
    for event in answer.events() {
        let Ok(chunk) = serde_json::from_str::<Value>(&event) else { continue };
        for choice in chunk["choices"].as_array().unwrap() {
            let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
            texts[index].push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        }
    }
    assert_eq!(texts, ["yz", "yz", "yz"]);
}

#[tokio::test]
async fn a_stream_gives_the_same_text_piece_by_piece() {
    let address = start(Setup::default()).await;
    let body =
        with(with(chat("uvw"), "stream", json!(true)), "stream_options", json!({"include_usage": true}));
    let answer = post(address, "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let said: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(said, "xyz");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "stop");
    assert_eq!(chunks[chunks.len() - 1]["usage"]["completion_tokens"], 4);

    let body = json!({"prompt": "uv", "stream": true, "temperature": 0, "max_tokens": 2});
    let text = post(address, "/v1/completions", &body).await.body;
    assert!(text.contains("\"text\":\"w\"") && text.contains("\"object\":\"text_completion\""), "{text}");
}

#[tokio::test]
async fn a_lost_stage_is_an_error_event_or_a_503() {
    let address = start(Setup { fails_at_x: true, ..Setup::default() }).await;
    let answer = post(address, "/v1/chat/completions", &chat("abcx")).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("3..6"), "{}", answer.body);

    let answer = post(address, "/v1/chat/completions", &with(chat("uv"), "stream", json!(true))).await;
    assert_eq!(answer.status, 200);
    let last: Value = serde_json::from_str(answer.events().last().unwrap()).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("connection lost"), "{}", answer.body);
    assert!(!answer.body.contains("[DONE]"));

    let ask = json!({"model": "alphabet", "max_tokens": 9, "stream": true, "messages": [{"role": "user", "content": "uv"}]});
    let answer = post(address, "/v1/messages", &ask).await;
    let last: Value = serde_json::from_str(answer.events().last().unwrap()).unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("overloaded_error")));

    let ask = json!({"input": "uv", "stream": true, "temperature": 0});
    let answer = post(address, "/v1/responses", &ask).await;
    let last: Value = serde_json::from_str(answer.events().last().unwrap()).unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
}

#[tokio::test]
async fn messages_and_responses_answer_in_their_own_shapes() {
    let address = start(Setup::default()).await;
    let ask = json!({"model": "alphabet", "max_tokens": 9, "temperature": 0, "system": "a",
                     "messages": [{"role": "user", "content": "uv"}], "stop_sequences": ["yz"]});
    let answer = post(address, "/v1/messages", &ask).await.json();
    assert_eq!(
        (&answer["type"], &answer["content"]),
        (&json!("message"), &json!([{"type": "text", "text": "wx"}]))
    );
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("stop_sequence"), &json!("yz")));
    let counted = post(address, "/v1/messages/count_tokens", &ask).await.json();
    assert_eq!(counted, json!({"input_tokens": 2}));
    let prefilled = with(
        ask.clone(),
        "messages",
        json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "lm"}]),
    );
    let answer = post(address, "/v1/messages", &with(prefilled, "max_tokens", json!(2))).await.json();
    assert_eq!((&answer["content"][0]["text"], &answer["stop_reason"]), (&json!("no"), &json!("max_tokens")));

    let ask = json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "uv"}]}], "temperature": 0,
                     "max_output_tokens": 2});
    let answer = post(address, "/v1/responses", &ask).await.json();
    assert_eq!(
        (&answer["status"], &answer["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    assert_eq!(answer["output"][0]["content"][0]["text"], "wx");
    let answer = post(address, "/v1/responses", &with(ask, "stream", json!(true))).await;
    let events: Vec<Value> = answer.events().iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let numbers: Vec<u64> = events.iter().map(|e| e["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>());
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["text"], "wx");
}

#[tokio::test]
async fn responses_report_tokens_where_they_are_asked_for() {
    let address = start(Setup::default()).await;
    let ask = json!({"input": "uv", "temperature": 0, "max_output_tokens": 2});
    let plain = post(address, "/v1/responses", &ask).await.json();
    assert_eq!(plain["output"][0]["content"][0]["logprobs"], json!([]));
    let ask = with(ask, "include", json!(["message.output_text.logprobs", "file_search_call.results"]));
    let ask = with(ask, "top_logprobs", json!(2));
    let whole = post(address, "/v1/responses", &ask).await.json();
    let reported = &whole["output"][0]["content"][0]["logprobs"];
    assert_eq!((&reported[0]["token"], &reported[1]["token"]), (&json!("w"), &json!("x")));
    assert_eq!(reported[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert!((-0.1..=0.0).contains(&reported[1]["logprob"].as_f64().unwrap()), "{reported}");
    let answer = post(address, "/v1/responses", &with(ask, "stream", json!(true))).await;
    let events: Vec<Value> = answer.events().iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let of = |kind: &str| -> Vec<Value> {
        events
            .iter()
            .filter(|e| e["type"] == kind)
            .flat_map(|e| e["logprobs"].as_array().unwrap().clone())
            .collect()
    };
    assert_eq!(json!(of("response.output_text.delta")), *reported);
    assert_eq!(json!(of("response.output_text.done")), *reported);
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["logprobs"], *reported);
}

#[tokio::test]
async fn every_answer_has_the_name_of_its_request() {
    let address = start(Setup::default()).await;
    let fresh =
        [send(address, "GET", "/v1/models", "", b"").await, send(address, "GET", "/nowhere", "", b"").await];
    let [first, second] = fresh.map(|answer| answer.header("x-request-id").unwrap().to_owned());
    assert!(first.starts_with("req_") && second.starts_with("req_") && first != second);
    let given = send(address, "GET", "/v1/models", "x-request-id: mine\r\n", b"").await;
    assert_eq!((given.header("x-request-id"), given.header("request-id")), (Some("mine"), Some("mine")));
    let long = format!("x-request-id: {}\r\n", "m".repeat(200));
    let refused = send(address, "GET", "/v1/models", &long, b"").await;
    assert!(refused.header("request-id").unwrap().starts_with("req_"));
}

#[tokio::test]
async fn tokens_and_texts_are_translated() {
    let address = start(Setup::default()).await;
    let answer =
        post(address, "/tokenize", &json!({"prompt": "abc", "return_token_strs": true})).await.json();
    assert_eq!(
        answer,
        json!({"count": 3, "max_model_len": 64, "tokens": [0, 1, 2], "token_strs": ["a", "b", "c"]})
    );
    let chat = json!({"messages": [{"role": "user", "content": "xy"}]});
    assert_eq!(post(address, "/tokenize", &chat).await.json()["tokens"], json!([23, 24]));
    let answer = post(address, "/detokenize", &json!({"tokens": [7, 8]})).await.json();
    assert_eq!(answer, json!({"prompt": "hi"}));
}

#[tokio::test]
async fn keys_readiness_models_metrics_and_the_pages() {
    let ready = Arc::new(AtomicBool::new(false));
    let seen = ready.clone();
    let readiness: Readiness =
        Arc::new(
            move || if seen.load(Ordering::SeqCst) { Ok(()) } else { Err("waiting for layers 3..6".into()) },
        );
    let limits = HttpLimits { api_keys: vec!["secret".into(), "other".into()], ..HttpLimits::default() };
    let address = start(Setup { limits, readiness: Some(readiness), ..Setup::default() }).await;
    let key = "authorization: Bearer secret\r\ncontent-type: application/json\r\n";
    assert_eq!(send(address, "GET", "/v1/models", "", b"").await.status, 401);
    assert_eq!(send(address, "GET", "/v1/models", "authorization: Bearer secre\r\n", b"").await.status, 401);
    assert_eq!(send(address, "GET", "/v1/models", "x-api-key: other\r\n", b"").await.status, 200);
    let refused = send(address, "POST", "/v1/messages", "", b"{}").await;
    assert_eq!((refused.status, &refused.json()["type"]), (401, &json!("error")));
    let models = send(address, "GET", "/v1/models", key, b"").await.json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("alphabet"), &json!(64))
    );
    assert_eq!(send(address, "GET", "/v1/models/alphabet", key, b"").await.status, 200);

    let body = chat("y").to_string();
    let answer = send(address, "POST", "/v1/chat/completions", key, body.as_bytes()).await;
    assert_eq!((answer.status, answer.body.contains("waiting for layers 3..6")), (503, true));
    assert_eq!(send(address, "GET", "/health", "", b"").await.status, 503);
    ready.store(true, Ordering::SeqCst);
    assert_eq!(send(address, "GET", "/health", "", b"").await.status, 200);
    assert_eq!(send(address, "POST", "/v1/chat/completions", key, body.as_bytes()).await.status, 200);

    let metrics = send(address, "GET", "/metrics", "", b"").await;
    assert_eq!(metrics.status, 200);
    assert!(
        metrics.body.contains("vllm:generation_tokens_total{model_name=\"alphabet\"} 2"),
        "{}",
        metrics.body
    );
    let status = send(address, "GET", "/cluster/status", key, b"").await.json();
    assert_eq!((&status["ready"], &status["engine"]["generated_tokens"]), (&json!(true), &json!(2)));
    for path in ["/", "/cluster"] {
        let page = send(address, "GET", path, "", b"").await;
        assert_eq!((page.status, page.body.contains("<!doctype html>")), (200, true));
        assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    }
}

#[tokio::test]
async fn rates_and_seats_are_limited_with_the_time_to_wait() {
    let limits = HttpLimits { requests_per_minute: Some(2), ..HttpLimits::default() };
    let address = start(Setup { limits, ..Setup::default() }).await;
    for _ in 0..2 {
        assert_eq!(post(address, "/tokenize", &json!({"prompt": "a"})).await.status, 200);
    }
    let answer = post(address, "/v1/chat/completions", &chat("a")).await;
    assert_eq!(answer.status, 429);
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
}

#[tokio::test]
async fn many_clients_are_served_together() {
    let address = start(Setup::default()).await;
    let asks = (0..20).map(|i| async move {
        let start = LETTERS.chars().nth(i).unwrap().to_string();
        let answer = post(address, "/v1/chat/completions", &with(chat(&start), "max_tokens", json!(6))).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.json()["choices"][0]["message"]["content"], LETTERS[i + 1..i + 7]);
    });
    futures::future::join_all(asks).await;
}

/// `usage` of the answer to a completion request.
fn usage(answer: &Value) -> (u64, u64) {
    let usage = &answer["usage"];
    (
        usage["prompt_tokens"].as_u64().unwrap(),
        usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
    )
}

#[tokio::test]
async fn cached_tokens_are_those_that_nobody_had_to_compute_for_the_request() {
    let address = start(Setup::default()).await;
    let ask = json!({"prompt": "abcdefghijk", "max_tokens": 5, "temperature": 0, "n": 2, "stop": "no"});
    let first = post(address, "/v1/completions", &ask).await.json();
    assert_eq!((first["choices"][0]["text"].as_str(), usage(&first)), (Some("lm"), (11, 0)));
    let again = post(address, "/v1/completions", &ask).await.json();
    let (prompt, cached) = usage(&again);
    assert!(prompt == 11 && cached > 0 && cached < 11, "{again}");

    let streamed = with(
        with(with(ask, "stream", json!(true)), "stop", json!([])),
        "stream_options",
        json!({"include_usage": true, "continuous_usage_stats": true}),
    );
    let answer = post(address, "/v1/completions", &streamed).await;
    let chunks: Vec<Value> = answer.events().iter().filter_map(|e| serde_json::from_str(e).ok()).collect();
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == 11), "{}", answer.body);
    assert_eq!(usage(chunks.last().unwrap()), (11, cached));
    let prints: std::collections::BTreeSet<String> =
        chunks.iter().map(|chunk| chunk["system_fingerprint"].to_string()).collect();
    assert_eq!(prints.len(), 1);
}

#[tokio::test]
async fn keys_share_no_prefixes_and_salts_part_them_further() {
    let limits = HttpLimits { api_keys: vec!["one".into(), "two".into()], ..HttpLimits::default() };
    let address = start(Setup { limits, ..Setup::default() }).await;
    let ask = json!({"prompt": "abcdefghijk", "max_tokens": 1, "temperature": 0});
    for (key, salt, found) in [
        ("one", json!(null), false),
        ("one", json!(null), true),
        ("two", json!(null), false),
        ("one", json!("mine"), false),
        ("one", json!("mine"), true),
    ] {
        let headers = format!("authorization: Bearer {key}\r\ncontent-type: application/json\r\n");
        let body = with(ask.clone(), "cache_salt", salt).to_string();
        let answer = send(address, "POST", "/v1/completions", &headers, body.as_bytes()).await.json();
        assert_eq!(usage(&answer).1 > 0, found, "{key}: {answer}");
    }
}

#[tokio::test]
async fn only_some_servers_let_a_request_go_before_others() {
    let ask = |priority: i32| json!({"prompt": "ab", "max_tokens": 1, "priority": priority});
    let address = start(Setup::default()).await;
    assert_eq!(post(address, "/v1/completions", &ask(7)).await.status, 200);
    let refused = post(address, "/v1/completions", &ask(-1)).await;
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("priority")));
    let limits = HttpLimits { urgent_requests: true, ..HttpLimits::default() };
    let address = start(Setup { limits, ..Setup::default() }).await;
    assert_eq!(post(address, "/v1/completions", &ask(-1)).await.status, 200);
}

#[tokio::test]
async fn every_error_under_a_route_of_anthropic_has_its_shape() {
    let address = start(Setup::default()).await;
    let headers = "content-type: text/plain\r\n";
    for (method, path, status) in
        [("GET", "/v1/messages", 405), ("POST", "/v1/messages", 415), ("POST", "/v1/messages/nothing", 404)]
    {
        let answer = send(address, method, path, headers, b"{}").await;
        assert_eq!((answer.status, answer.json()["type"].as_str()), (status, Some("error")), "{path}");
    }
    assert_eq!(send(address, "GET", "/v1/completions", "", b"").await.json()["error"]["code"], 405);
}

/// A server whose model waits at the letter x until the test lets it go on, and an answer that has got there.
struct Stopping {
    address: std::net::SocketAddr,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    answer: tokio::task::JoinHandle<alphabet::Answer>,
    go_on: std::sync::mpsc::Sender<()>,
}

/// Asks the server to stop while it answers.
async fn stop_while_it_answers(patience: Duration) -> Stopping {
    let (arrived, mut arrival) = tokio::sync::mpsc::unbounded_channel();
    let (go_on, goes_on) = std::sync::mpsc::channel();
    let at_x = move || {
        let _ = arrived.send(());
        let _ = goes_on.recv();
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let setup = Setup { at_x: Some(Box::new(at_x)), ..Setup::default() };
    let (address, server) = start_until(setup, async { stopped.await.unwrap() }, patience).await;
    let answer = tokio::spawn(async move { post(address, "/v1/chat/completions", &chat("uvw")).await });
    arrival.recv().await.unwrap();
    stop.send(()).unwrap();
    Stopping { address, server, answer, go_on }
}

#[tokio::test]
async fn a_server_that_stops_finishes_what_it_began_and_lets_nobody_in() {
    let Stopping { address, server, answer, go_on } = stop_while_it_answers(Duration::from_secs(3600)).await;
    while send(address, "GET", "/health", "", b"").await.status == 200 {}
    for path in ["/v1/chat/completions", "/v1/messages", "/tokenize"] {
        let refused = post(address, path, &chat("a")).await;
        assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{path}");
        assert!(refused.body.contains("being stopped"), "{}", refused.body);
    }
    assert!(!server.is_finished());
    go_on.send(()).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!((answer.status, &answer.json()["choices"][0]["message"]["content"]), (200, &json!("xyz")));
    server.await.unwrap().unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn a_server_that_stops_does_not_wait_for_ever() {
    let Stopping { server, answer, go_on, .. } = stop_while_it_answers(Duration::ZERO).await;
    server.await.unwrap().unwrap();
    drop((answer, go_on));
}

#[cfg(feature = "structured")]
#[tokio::test]
async fn answers_are_held_to_a_form() {
    let address = start(Setup::default()).await;
    for (field, form, text) in [
        ("guided_regex", json!("[m-p]{4}"), "mnop"),
        ("guided_choice", json!(["bad", "cab"]), "bad"),
        ("guided_grammar", json!("start: \"b\" /[x-z]/ \"a\""), "bxa"),
        ("structured_outputs", json!({"regex": "q+r"}), "qr"),
    ] {
        let answer = post(address, "/v1/chat/completions", &with(chat("a"), field, form)).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], text, "{field}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
    let text = json!({"prompt": "a", "guided_regex": "[m-p]{4}", "temperature": 0});
    assert_eq!(post(address, "/v1/completions", &text).await.json()["choices"][0]["text"], "mnop");
    let item = json!({"input": "a", "guided_regex": "[m-p]{4}", "temperature": 0});
    let answer = post(address, "/v1/responses", &item).await.json();
    assert_eq!(answer["output"][0]["content"][0]["text"], "mnop");
    let tool = json!({"type": "function", "function": {"name": "w", "strict": true,
                      "parameters": {"properties": {"a": {"type": "nonsense"}}, "required": ["a"]}}});
    let nothing = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [null]}}});
    let both = with(with(chat("a"), "tools", json!([tool])), "response_format", nothing);
    let refused = post(address, "/v1/chat/completions", &both).await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["param"]),
        (400, &json!("tools")),
        "{}",
        refused.body
    );
    // Where no tool may be called, the form alone rules; so does a text that the client writes out.
    for alone in [
        with(both.clone(), "tool_choice", json!("none")),
        with(with(both, "response_format", Value::Null), "guided_choice", json!(["null"])),
    ] {
        let answer = post(address, "/v1/chat/completions", &alone).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], "null", "{answer}");
    }
    let format =
        |schema: Value| json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    for (path, ask, param) in [
        ("/v1/chat/completions", with(chat("a"), "guided_regex", json!("(")), "guided_regex"),
        (
            "/v1/chat/completions",
            with(chat("a"), "response_format", format(json!({"type": "nonsense"}))),
            "response_format",
        ),
        (
            "/v1/chat/completions",
            with(chat("a"), "guided_grammar", json!("start: start \"a\"")),
            "guided_grammar",
        ),
        // Letters alone cannot write an object.
        (
            "/v1/chat/completions",
            with(chat("a"), "response_format", json!({"type": "json_object"})),
            "response_format",
        ),
        (
            "/v1/responses",
            json!({"input": "a", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 3}}}}),
            "text.format",
        ),
    ] {
        let refused = post(address, path, &ask).await;
        assert_eq!(refused.status, 400, "{ask}: {}", refused.body);
        assert_eq!(refused.json()["error"]["param"], param, "{}", refused.body);
        assert!(!refused.body.contains("NoExtensionBias"), "{}", refused.body);
    }
}

#[tokio::test]
async fn operators_may_let_adapters_and_weights_change_while_serving() {
    let routes = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/update_weights"];
    let [load, unload, update] = routes;
    let closed = start(Setup::default()).await;
    for route in routes {
        let answer = post(closed, route, &json!({})).await;
        assert_eq!(answer.status, 404, "{}", answer.body);
        assert!(answer.body.contains("--allow-weight-updates"), "{}", answer.body);
    }

    let dir = tempfile::tempdir().unwrap();
    let tensors = LoraTensors { a: vec![1.0; 2], b: vec![1.0; 2], inputs: 2, outputs: 2 };
    let adapter = Adapter { rank: 1, alpha: 2.0, tensors: [("layers.0.q_proj".to_owned(), tensors)].into() };
    adapter.save(dir.path()).unwrap();
    let loader: WeightLoader = Arc::new(|path| match path.to_str() {
        Some("next") => Ok(Box::new(Alphabet { fails_at_x: false, at_x: None })),
        _ => Err("there is nothing".to_owned()),
    });
    let updates = Some(Updates { loader: Some(loader) });
    let address = start(Setup { updates, ..Setup::default() }).await;
    let pirate = json!({"lora_name": "pirate", "lora_path": dir.path()});
    let answer = post(address, load, &pirate).await;
    assert_eq!((answer.status, answer.body.contains("'pirate' added")), (200, true), "{}", answer.body);
    let again = post(address, load, &pirate).await;
    assert_eq!((again.status, again.body.contains("loaded already")), (400, true), "{}", again.body);
    assert_eq!(post(address, load, &with(pirate.clone(), "load_inplace", json!(true))).await.status, 200);
    let listed = send(address, "GET", "/v1/models", "", b"").await.json();
    assert_eq!(
        (&listed["data"][1]["id"], &listed["data"][1]["parent"]),
        (&json!("pirate"), &json!("alphabet"))
    );
    let asks = with(chat("uv"), "model", json!("pirate"));
    assert_eq!(post(address, "/v1/chat/completions", &asks).await.status, 200);
    for (field, value, status) in [
        ("lora_path", json!("nowhere"), 404),
        ("lora_name", json!("alphabet"), 400),
        ("lora_name", json!(7), 400),
    ] {
        let bad = with(json!({"lora_name": "other", "lora_path": dir.path()}), field, value);
        assert_eq!(post(address, load, &bad).await.status, status, "{bad}");
    }

    let updated = post(address, update, &json!({"path": "next", "on_swap": "finish"})).await;
    assert_eq!((updated.status, &updated.json()["version"]), (200, &json!(1)), "{}", updated.body);
    let reported = with(asks.clone(), "logprobs", json!(true));
    let token = post(address, "/v1/chat/completions", &reported).await.json();
    assert_eq!(token["choices"][0]["logprobs"]["content"][0]["weights_version"], 1, "{token}");
    for (body, words) in [
        (json!({"path": "elsewhere"}), "there is nothing"),
        (json!({"path": "next", "on_swap": "later"}), "on_swap"),
        (json!({}), "path is missing"),
    ] {
        let refused = post(address, update, &body).await;
        assert_eq!((refused.status, refused.body.contains(words)), (400, true), "{}", refused.body);
    }

    let name = json!({"lora_name": "pirate"});
    assert_eq!(post(address, unload, &name).await.status, 200);
    assert_eq!(post(address, unload, &name).await.status, 404);
    assert_eq!(post(address, "/v1/chat/completions", &asks).await.status, 404);
}

#[tokio::test]
async fn a_prompts_own_log_probabilities_are_reported_on_demand() {
    let address = start(Setup::default()).await;
    let ask = json!({"prompt": "abd", "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0});
    let answer = post(address, "/v1/completions", &ask).await.json();
    let scored = answer["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!((scored.len(), &scored[0]), (3, &Value::Null));
    assert_eq!(scored[1]["1"]["decoded_token"], "b");
    let likely = scored[1]["1"]["logprob"].as_f64().unwrap();
    let unlikely = scored[2]["3"]["logprob"].as_f64().unwrap();
    assert!(likely > -0.1 && unlikely < -10.0, "{answer}");
    for bad in [("prompt_logprobs", json!(1)), ("stream", json!(true))] {
        let refused = post(address, "/v1/completions", &with(ask.clone(), bad.0, bad.1)).await;
        assert_eq!(
            (refused.status, refused.body.contains("prompt_logprobs")),
            (400, true),
            "{}",
            refused.body
        );
    }
}
