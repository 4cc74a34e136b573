//! Calls in every family's way of writing them: those that schemas allow and no others.

use serde_json::{Value, json};

use crate::constraint::{Constraint, ConstraintState};
use crate::markup::{Dialect, Markup, MarkupOptions, Part, ToolSchema};
use crate::structured::{Grammars, VocabularyToken};

/// Control tokens of the vocabulary below, behind its 256 bytes and the end.
const CONTROLS: [&str; 12] = [
    "[TOOL_CALLS]",
    "[ARGS]",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|message|>",
    "<arg_key>",
    "</arg_value>",
    "<|/tool_call|>",
    "<|assistant|>",
];
const END: u32 = 256;

/// One token per byte, and control tokens if wanted.
fn grammars(controls: bool) -> Grammars {
    let mut vocabulary: Vec<VocabularyToken> = (0..=u8::MAX).map(|b| (vec![b], false)).collect();
    vocabulary.push((b"<end>".to_vec(), true));
    if controls {
        vocabulary.extend(CONTROLS.iter().map(|text| (text.as_bytes().to_vec(), true)));
    }
    Grammars::new(vocabulary, vec![END]).unwrap()
}

/// The tokens of a text.
fn tokens(text: &str, controls: bool) -> Vec<u32> {
    let (mut ids, mut rest) = (Vec::new(), text);
    while let Some(first) = rest.chars().next() {
        let control = CONTROLS.iter().position(|control| controls && rest.starts_with(control));
        let len = match control {
            Some(at) => {
                ids.push(END + 1 + u32::try_from(at).unwrap());
                CONTROLS[at].len()
            }
            None => {
                ids.extend(rest[..first.len_utf8()].bytes().map(u32::from));
                first.len_utf8()
            }
        };
        rest = &rest[len..];
    }
    ids
}

/// How much of a text may be said, in tokens, and whether the answer may end behind it.
fn said(constraint: &dyn Constraint, text: &str, controls: bool) -> (usize, usize, bool) {
    let mut state: Box<dyn ConstraintState> = constraint.start();
    let allows = |state: &mut Box<dyn ConstraintState>, id: u32| {
        let mut logits = vec![0.0; END as usize + 1 + CONTROLS.len()];
        state.mask(&mut logits).is_ok() && logits[id as usize] == 0.0
    };
    let ids = tokens(text, controls);
    for (i, id) in ids.iter().enumerate() {
        if !allows(&mut state, *id) || state.accept(*id).is_err() {
            return (i, ids.len(), false);
        }
    }
    (ids.len(), ids.len(), allows(&mut state, END))
}

fn tools() -> Vec<ToolSchema> {
    let arguments = json!({"type": "object", "required": ["city", "days"], "additionalProperties": false,
        "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/Days"}, "unit": {"enum": ["C", "F"]}},
        "$defs": {"Days": {"type": "integer", "minimum": 1, "maximum": 9}}});
    let other = json!({"type": "object", "required": ["days"], "additionalProperties": false,
        "properties": {"days": {"$ref": "#/$defs/Days"}}, "$defs": {"Days": {"enum": ["all"]}}});
    vec![
        ToolSchema { name: "weather".into(), arguments },
        ToolSchema { name: "any.thing".into(), arguments: json!({"type": "object"}) },
        ToolSchema { name: "closing".into(), arguments: other },
    ]
}

/// A call of each dialect with `DAYS` where the number of days stands and `FN` where the name does.
const CALLS: [(Dialect, &str); 14] = [
    (
        Dialect::Hermes,
        "Let me see.\n<tool_call>\n{\"name\": \"FN\", \"arguments\": {\"city\": \"Ulm\", \"days\": DAYS}}\n</tool_call>",
    ),
    (Dialect::Llama3, "{\"name\": \"FN\", \"parameters\": {\"city\": \"Ulm\", \"days\": DAYS}}"),
    (
        Dialect::Mistral,
        "[TOOL_CALLS][{\"name\": \"FN\", \"arguments\": {\"city\": \"Ulm\", \"days\": DAYS}}]",
    ),
    (Dialect::Mistral, "[TOOL_CALLS]FN[ARGS]{\"city\": \"Ulm\", \"days\": DAYS}"),
    (
        Dialect::DeepSeek,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>FN\n```json\n{\"city\": \"Ulm\", \"days\": DAYS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        Dialect::DeepSeek,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>FN<｜tool▁sep｜>{\"city\": \"Ulm\", \"days\": DAYS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        Dialect::Kimi,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.FN:0<|tool_call_argument_begin|>{\"city\": \"Ulm\", \"days\": DAYS}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (
        Dialect::Glm,
        "<tool_call>FN\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n<arg_key>days</arg_key>\n<arg_value>DAYS</arg_value>\n</tool_call>",
    ),
    (
        Dialect::QwenXml,
        "<tool_call>\n<function=FN>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\nDAYS\n</parameter>\n</function>\n</tool_call>",
    ),
    (
        Dialect::MiniMax,
        "<minimax:tool_call>\n<invoke name=\"FN\">\n<parameter name=\"city\">Ulm</parameter>\n<parameter name=\"days\">DAYS</parameter>\n</invoke>\n</minimax:tool_call>",
    ),
    (Dialect::Glm4, "FN\n{\"city\": \"Ulm\", \"days\": DAYS}"),
    (Dialect::Glm4, "\nFN \n{\"city\": \"Ulm\", \"days\": DAYS}"),
    (
        Dialect::Phi4,
        "So: <|tool_call|>[{\"name\": \"FN\", \"arguments\": {\"city\": \"Ulm\", \"days\": DAYS}}]<|/tool_call|>",
    ),
    (
        Dialect::Harmony,
        "<|channel|>commentary to=functions.FN <|constrain|>json<|message|>{\"city\": \"Ulm\", \"days\": DAYS}<|call|>",
    ),
];

#[test]
fn each_family_writes_calls_of_its_tools_and_no_others() {
    for controls in [false, true] {
        let grammars = grammars(controls);
        for (dialect, call) in CALLS {
            let constraint = grammars.calls(dialect, &tools()).unwrap();
            let good = call.replace("FN", "weather").replace("DAYS", "7");
            let (taken, all, may_end) = said(&*constraint, &good, controls);
            assert_eq!((taken, may_end), (all, true), "{dialect:?} {controls}: {good}");
            for (tool, days) in [("weather", "0"), ("weather", "\"7\""), ("wether", "7"), ("weather", "10")] {
                let bad = call.replace("FN", tool).replace("DAYS", days);
                let (taken, all, _) = said(&*constraint, &bad, controls);
                assert!(taken < all, "{dialect:?} {controls}: {bad}");
            }
        }
    }
}

#[test]
fn what_a_grammar_allows_is_read_as_the_call_that_it_is() {
    for (dialect, call) in CALLS {
        let text = call.replace("FN", "weather").replace("DAYS", "7");
        let mut markup = Markup::new(MarkupOptions { dialect, tools: true, ..MarkupOptions::default() });
        let parts = [markup.push(&text), markup.finish()].concat();
        let calls: Vec<&Part> = parts.iter().filter(|part| matches!(part, Part::Call(_))).collect();
        let [Part::Call(call)] = calls[..] else { panic!("{dialect:?}: {parts:?}") };
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
        assert_eq!(
            (call.name.as_str(), arguments),
            ("weather", json!({"city": "Ulm", "days": 7})),
            "{dialect:?}"
        );
    }
}

#[test]
fn answers_without_calls_are_free() {
    let grammars = grammars(false);
    for (dialect, _) in CALLS {
        let constraint = grammars.calls(dialect, &tools()).unwrap();
        for answer in ["", "It rains, { } and <b>.", "\n7", "weather", "Weather\nis {bad}"] {
            let (taken, all, may_end) = said(&*constraint, answer, false);
            assert_eq!((taken, may_end), (all, true), "{dialect:?}: {answer:?}");
        }
    }
}

#[test]
fn tools_keep_definitions_of_one_name_apart() {
    let grammars = grammars(false);
    let call = grammars.call(&tools()).unwrap();
    let ends = |text: &str| said(&*call, text, false).2;
    assert!(ends(r#"{"name": "closing", "arguments": {"days": "all"}}"#));
    assert!(ends(r#"{"name":"weather","arguments":{"city":"Ulm","days":3,"unit":"F"}}"#));
    assert!(ends(r#"{"name": "any.thing", "arguments": {"a": [1]}}"#));
    assert!(!ends(r#"{"name": "closing", "arguments": {"days": 3}}"#));
    assert!(!ends(r#"{"name": "weather", "arguments": {"city": "Ulm", "days": "all"}}"#));
}

#[test]
fn arguments_in_markup_may_be_left_out_listed_or_anything() {
    let grammars = grammars(false);
    let constraint = grammars.calls(Dialect::QwenXml, &tools()).unwrap();
    let allows = |inside: &str| {
        let (taken, all, _) = said(&*constraint, &format!("<tool_call>{inside}</tool_call>"), false);
        taken == all
    };
    let weather = |unit: &str| {
        format!(
            "<function=weather><parameter=city>\na < b\n</parameter><parameter=days>\n1</parameter>{unit}</function>"
        )
    };
    assert!(allows(&weather("")) && allows(&weather("<parameter=unit>\nF\n</parameter>\n")));
    assert!(!allows(&weather("<parameter=unit>\nK</parameter>")));
    assert!(allows(
        "<function=any.thing><parameter=x>\n1</parameter><parameter=y>\nz\n</parameter></function>"
    ));
    assert!(!allows("<function=closing></function>"));
}

#[test]
fn calls_without_a_marker_begin_an_answer_or_follow_the_token_between_turns() {
    let grammars = grammars(true);
    let constraint = grammars.calls(Dialect::Glm4, &tools()).unwrap();
    let allows = |text: &str| {
        let (taken, all, may_end) = said(&*constraint, text, true);
        taken == all && may_end
    };
    let all = "closing\n{\"days\": \"all\"}";
    assert!(allows(all) && allows(&format!("{all}<|assistant|>any.thing\n{{}}")));
    assert!(allows(&format!("Let me see:\n<|assistant|>{all}")) && allows("It is closing\n{today}"));
    assert!(!allows("closing\n{\"days\": \"none\"}") && !allows("closing\nit"), "a name begins a call");
    assert!(!allows("anything\n{}") && !allows("opening\n\n {\"days\": 1}"), "of no other tools");
    assert!(!allows("Let me see:<|assistant|>closing\n{}") && !allows("Let me see:<|assistant|>it"));
}
