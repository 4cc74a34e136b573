//! Frames and whole messages as Anthropic's clients read them.

use super::super::generation::{Ending, TokenReport};
use super::*;

fn names(frames: &[Frame]) -> Vec<&str> {
    frames.iter().filter_map(|f| f.event).collect()
}

fn frame(shows_thoughts: bool) -> MessageFrame {
    MessageFrame { id: "1".into(), model: "m".into(), shows_thoughts }
}

fn token(parts: Vec<Part>) -> Delta {
    Delta::Token {
        parts,
        report: TokenReport { id: 0, logprob: 0.0, version: 0, reasoning: false, top: vec![] },
    }
}

#[test]
fn thoughts_are_signed_alike_in_pieces_and_whole_or_left_out() {
    let one = Collected { reasoning: "hm, so".into(), content: "a".into(), ..Collected::default() };
    let whole = frame(true).whole(&one);
    let signature = whole["content"][0]["signature"].as_str().unwrap();
    assert_eq!(signature.len(), 32);
    for shows in [true, false] {
        let mut writer = MessageWriter::new(frame(shows), 3);
        let mut frames = writer.delta(0, token(vec![Part::Reasoning("hm,".into())]));
        frames.extend(writer.delta(0, token(vec![Part::Reasoning(" so".into())])));
        frames.extend(writer.delta(0, token(vec![Part::Content("a".into())])));
        frames.extend(writer.end());
        let data: Vec<Value> = frames.iter().map(|f| serde_json::from_str(&f.data).unwrap()).collect();
        let deltas: Vec<&Value> = data.iter().map(|d| &d["delta"]["type"]).collect();
        let signed = data.iter().any(|d| d["delta"]["signature"] == signature);
        assert_eq!((signed, deltas.contains(&&json!("thinking_delta"))), (shows, shows));
        assert!(deltas.contains(&&json!("text_delta")));
    }
    let kinds = frame(false).whole(&one)["content"].as_array().unwrap().len();
    assert_eq!(kinds, 1);
}

#[test]
fn events_come_in_anthropics_order() {
    let mut writer = MessageWriter::new(frame(true), 3);
    let mut frames = writer.begin();
    frames.extend(writer.delta(0, token(vec![Part::Reasoning("hm".into())])));
    frames.extend(writer.delta(0, token(vec![Part::Content("a".into())])));
    frames.extend(writer.delta(0, token(vec![Part::Content("b".into())])));
    let call = ToolCall { name: "w".into(), arguments: "{}".into(), texts: vec![] };
    frames.extend(writer.delta(0, token(vec![Part::Call(call)])));
    let usage = Usage { prompt_tokens: 3, cached_tokens: 1, completion_tokens: 5, reasoning_tokens: 0 };
    let end = Ending {
        parts: vec![Part::Content("\n".into())],
        report: None,
        reason: FinishReason::Stop,
        stop: None,
        usage,
    };
    frames.extend(writer.delta(0, Delta::End(end)));
    frames.extend(writer.end());
    assert_eq!(
        names(&frames),
        [
            "message_start",
            "ping",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    let delta: Value = serde_json::from_str(&frames[frames.len() - 2].data).unwrap();
    assert_eq!(delta["delta"]["stop_reason"], "tool_use");
    assert_eq!((&delta["usage"]["output_tokens"], &delta["usage"]["input_tokens"]), (&json!(5), &json!(2)));
}

#[test]
fn arguments_come_in_pieces_and_broken_ones_are_shown() {
    let begun = || token(vec![Part::CallBegun("w".into()), Part::Arguments("{\"c\":".into())]);
    let mut writer = MessageWriter::new(frame(true), 3);
    let mut frames = writer.delta(0, begun());
    frames.extend(writer.delta(0, token(vec![Part::Arguments("1}".into()), Part::CallEnded])));
    // The second breaks off.
    frames.extend(writer.delta(0, begun()));
    frames.extend(writer.end());
    let data: Vec<Value> = frames.iter().map(|f| serde_json::from_str(&f.data).unwrap()).collect();
    let pieces = data.iter().map(|d| (&d["index"], &d["delta"]["partial_json"]));
    let pieces: Vec<_> = pieces.filter(|(_, piece)| !piece.is_null()).collect();
    let (first, second, open, rest) = (json!(0), json!(1), json!("{\"c\":"), json!("1}"));
    assert_eq!(pieces, [(&first, &open), (&first, &rest), (&second, &open)]);
    let call = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"];
    assert_eq!(names(&frames)[..4], call);
    assert_eq!(names(&frames)[6..], ["content_block_stop", "message_delta", "message_stop"]);
    let calls = ["{\"c\":1}", "{\"c\":"].map(|arguments| ToolCall::new("w", arguments.into()));
    let whole = frame(true).whole(&Collected { calls: calls.to_vec(), ..Collected::default() });
    assert_eq!(whole["content"][0]["input"], json!({"c": 1}));
    assert_eq!(whole["content"][1]["input"], json!({"INVALID_JSON": "{\"c\":"}));
}

#[test]
fn every_end_has_anthropics_word() {
    let stop = Some("x".to_owned());
    for (reason, stop, calls, word) in [
        (FinishReason::Stop, stop.as_ref(), true, "stop_sequence"),
        (FinishReason::Length, None, true, "max_tokens"),
        (FinishReason::Aborted, None, true, "pause_turn"),
        (FinishReason::Stop, None, true, "tool_use"),
        (FinishReason::Stop, None, false, "end_turn"),
    ] {
        assert_eq!(stop_reason(Some(reason), stop, calls), word);
    }
}

#[test]
fn blocks_become_messages() {
    let body = json!({"system": [{"type": "text", "text": "be kind"}], "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "let me see"}, {"type": "tool_use", "id": "t1", "name": "w", "input": {"c": 1, "d": null}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1",
            "content": [{"type": "text", "text": "sunny"}]}, {"type": "text", "text": "so?"}]},
    ]});
    let got = conversation(&Fields::of(&body, "").unwrap()).unwrap();
    let roles: Vec<&str> = got.iter().filter_map(|m| m["role"].as_str()).collect();
    assert_eq!(roles, ["system", "user", "assistant", "tool", "user"]);
    assert_eq!(got[2]["reasoning_content"], "hm");
    assert_eq!(got[2]["tool_calls"][0]["function"]["arguments"], json!({"c": 1, "d": null}));
    assert_eq!(got[3], json!({"role": "tool", "tool_call_id": "t1", "content": "sunny"}));
}
