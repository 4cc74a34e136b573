//! What fields beyond the plain ones change in an answer.

use serde_json::{Value, json};

use super::alphabet::{Setup, chat, post, start, with};
use super::usage;

#[tokio::test]
async fn responses_take_what_chat_takes_and_tell_what_they_were_asked() {
    let address = start(Setup::default()).await;
    let ask = json!({"input": "abc", "temperature": 0, "max_output_tokens": 6});
    for (field, value, text) in [
        ("stop", json!("gh"), "def"),
        ("stop_token_ids", json!([5]), "de"),
        ("logit_bias", json!({"0": 100}), "aaaaaa"),
        ("bad_words", json!(["ef"]), "deabcd"),
        ("n", json!(1), "defghi"),
    ] {
        let answer = post(address, "/v1/responses", &with(ask.clone(), field, value)).await.json();
        assert_eq!(answer["output"][0]["content"][0]["text"], text, "{field}");
    }
    let plain = post(address, "/v1/responses", &ask).await.json();
    for (field, value) in [
        ("truncation", json!("disabled")),
        ("reasoning", json!({"effort": null, "summary": null})),
        ("user", Value::Null),
        ("service_tier", json!("default")),
        ("background", json!(false)),
    ] {
        assert_eq!(plain.get(field), Some(&value), "{field}");
    }
    let told = with(with(ask, "truncation", json!("auto")), "user", json!("ann"));
    let told = with(told, "reasoning", json!({"effort": "low", "summary": "auto"}));
    let told = with(told, "text", json!({"format": {"type": "text"}, "verbosity": "low"}));
    let answer = post(address, "/v1/responses", &told).await.json();
    for field in ["truncation", "user", "reasoning", "text"] {
        assert_eq!(answer[field], told[field], "{field}");
    }
}

#[tokio::test]
async fn tokens_and_words_are_kept_out_of_answers() {
    let address = start(Setup::default()).await;
    for (field, value, text) in [
        ("allowed_token_ids", json!([3, 4]), "dedede"),
        ("bad_words", json!("e"), "dabcda"),
        ("bad_words", json!(["ef", "bd"]), "deabcd"),
        ("bad_words", json!(["zz", "def"]), "deabcd"),
    ] {
        let ask = with(with(chat("abc"), "max_tokens", json!(6)), field, value.clone());
        let answer = post(address, "/v1/chat/completions", &ask).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], text, "{field}: {value}");
    }
}

#[tokio::test]
async fn prompts_are_cut_and_tokens_told_whole_and_streamed() {
    let address = start(Setup::default()).await;
    let asks = [
        ("/v1/chat/completions", chat("abcuv")),
        ("/v1/completions", json!({"prompt": "abcuv", "temperature": 0, "max_tokens": 9, "echo": true})),
    ];
    for (path, ask) in asks {
        let ask = with(with(ask, "truncate_prompt_tokens", json!(2)), "return_token_ids", json!(true));
        for (stop, ids) in [(json!([]), json!([22, 23, 24, 25, 26])), (json!("yz"), json!([22, 23, 24, 25]))]
        {
            let ask = with(ask.clone(), "stop", stop);
            let whole = post(address, path, &ask).await.json();
            let choice = &whole["choices"][0];
            assert_eq!((&choice["token_ids"], usage(&whole).0), (&ids, 2), "{whole}");
            let of_prompt = [&whole["prompt_token_ids"], &choice["prompt_token_ids"]];
            assert!(of_prompt.contains(&&json!([20, 21])), "{whole}");
            assert!(!choice["text"].is_string() || choice["text"].as_str().unwrap().starts_with("uvwx"));

            let streamed = with(with(ask, "echo", json!(false)), "stream", json!(true));
            let answer = post(address, path, &streamed).await;
            let chunks: Vec<Value> =
                answer.events().iter().filter_map(|e| serde_json::from_str(e).ok()).collect();
            let told: Vec<&Value> =
                chunks.iter().flat_map(|c| c["choices"][0]["token_ids"].as_array().unwrap()).collect();
            assert_eq!(json!(told), ids, "{path}");
            let prompts = chunks.iter().filter(|c| {
                [&c["prompt_token_ids"], &c["choices"][0]["prompt_token_ids"]].contains(&&json!([20, 21]))
            });
            assert_eq!(prompts.count(), 1, "{path}");
        }
    }
    let long =
        json!({"prompt": "a".repeat(90), "truncate_prompt_tokens": -1, "max_tokens": 2, "temperature": 0});
    let answer = post(address, "/v1/completions", &long).await.json();
    assert_eq!((usage(&answer).0, &answer["choices"][0]["text"]), (62, &json!("bc")));
}

#[tokio::test]
async fn an_echo_is_what_was_asked_and_not_the_tokens_around_it() {
    let address = start(Setup { begins: true, ..Setup::default() }).await;
    let ask = json!({"prompt": "abc", "echo": true, "logprobs": 1, "max_tokens": 2, "temperature": 0});
    for (prompt, tokens, offsets) in [
        (json!("abc"), [".", "a", "b", "c", "d", "e"], [0, 0, 1, 2, 3, 4]),
        (json!([0, 26, 1, 2]), ["a", ".", "b", "c", "d", "e"], [0, 1, 1, 2, 3, 4]),
    ] {
        let answer = post(address, "/v1/completions", &with(ask.clone(), "prompt", prompt)).await.json();
        let choice = &answer["choices"][0];
        assert_eq!((&choice["text"], usage(&answer).0), (&json!("abcde"), 4), "{answer}");
        let report = &choice["logprobs"];
        assert_eq!((&report["tokens"], &report["text_offset"]), (&json!(tokens), &json!(offsets)));
        assert!(report["token_logprobs"][0].is_null() && report["token_logprobs"][1].is_number(), "{report}");
    }
}

#[tokio::test]
async fn thoughts_are_bounded_and_left_out_on_demand() {
    let template = Some("{{ messages[-1].content }}<think>");
    let address = start(Setup { template, ..Setup::default() }).await;
    let ask = with(with(chat("uv"), "ignore_eos", json!(true)), "max_tokens", json!(10));
    let thought = post(address, "/v1/chat/completions", &ask).await.json();
    assert_eq!(thought["choices"][0]["message"]["reasoning_content"], "..........");
    let silent = with(ask.clone(), "include_reasoning", json!(false));
    let whole = post(address, "/v1/chat/completions", &silent).await.json();
    assert_eq!(whole["choices"][0]["message"].get("reasoning_content"), None);
    assert_eq!(whole["usage"]["completion_tokens"], thought["usage"]["completion_tokens"]);
    let streamed = post(address, "/v1/chat/completions", &with(silent, "stream", json!(true))).await;
    assert!(!streamed.body.contains("reasoning_content"), "{}", streamed.body);
    // Behind two tokens comes the end of thoughts, as far as this vocabulary can write it.
    let bounded = with(with(ask, "thinking_token_budget", json!(2)), "return_token_ids", json!(true));
    let answer = post(address, "/v1/chat/completions", &bounded).await.json();
    assert_eq!(answer["choices"][0]["token_ids"], json!([26, 26, 26, 26, 19, 7, 8, 13, 10, 26]));
}
