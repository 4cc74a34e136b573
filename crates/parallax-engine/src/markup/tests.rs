//! Every dialect's calls and thoughts, and that it does not matter how the text is cut.

use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn all(dialect: Dialect) -> MarkupOptions {
    MarkupOptions { dialect, tools: true, reasoning: true, ..MarkupOptions::default() }
}

/// Parts with neighbours of one kind joined.
fn joined(parts: Vec<Part>) -> Vec<Part> {
    let mut out: Vec<Part> = Vec::new();
    for part in parts {
        match (out.last_mut(), part) {
            (Some(Part::Content(a)), Part::Content(b)) | (Some(Part::Reasoning(a)), Part::Reasoning(b)) => {
                a.push_str(&b);
            }
            (Some(Part::Call(call)), Part::Arguments(more)) => call.arguments.push_str(&more),
            (_, Part::CallBegun(name)) => out.push(call(&name, "")),
            (_, Part::CallEnded) => {}
            (_, Part::Call(call)) => out.push(Part::Call(ToolCall { texts: Vec::new(), ..call })),
            (_, part) => out.push(part),
        }
    }
    out
}

fn parts<S: AsRef<str>>(mut markup: Markup, pieces: &[S]) -> Vec<Part> {
    let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| markup.push(piece.as_ref())).collect();
    parts.extend(markup.finish());
    parts
}

/// Calls are read whole.
fn read<S: AsRef<str>>(options: MarkupOptions, pieces: &[S]) -> Vec<Part> {
    joined(parts(Markup::new(options), pieces))
}

/// Calls of the tools that the examples have are given out while they are written.
fn offering(options: MarkupOptions) -> Markup {
    Markup::new(options).offering(["w", "t", "get_weather"].map(str::to_owned))
}

fn characters(text: &str) -> Vec<String> {
    text.chars().map(String::from).collect()
}

fn call(name: &str, arguments: &str) -> Part {
    Part::Call(ToolCall { name: name.into(), arguments: arguments.into(), texts: Vec::new() })
}

fn content(text: &str) -> Part {
    Part::Content(text.into())
}

fn thought(text: &str) -> Part {
    Part::Reasoning(text.into())
}

/// Dialect, what the model says, what that means.
fn examples() -> Vec<(Dialect, &'static str, Vec<Part>)> {
    vec![
        (
            Dialect::Hermes,
            "<think>\nweather?</think>\n\n<tool_call>\n{\"name\": \"w\", \"arguments\": {\"c\": \"Rome\"}}\n</tool_call>\n<tool_call>{\"name\":\"t\",\"arguments\":{}}</tool_call>",
            vec![thought("\nweather?"), call("w", "{\"c\": \"Rome\"}"), call("t", "{}")],
        ),
        (
            Dialect::Hermes,
            "First. <tool_call>{\"name\":\"t\"}</tool_call> then <tool_call>no json</tool_call>",
            vec![content("First. "), call("t", "{}"), content("then <tool_call>no json</tool_call>")],
        ),
        // The end token took the place of the closing marker.
        (Dialect::Hermes, "<tool_call>{\"name\":\"t\",\"arguments\":{}}", vec![call("t", "{}")]),
        (
            Dialect::Llama3,
            "{\"name\": \"w\", \"parameters\": {\"c\": \"Rome\"}}; {\"name\": \"t\", \"parameters\": {}}",
            vec![call("w", "{\"c\": \"Rome\"}"), call("t", "{}")],
        ),
        (Dialect::Llama3, "<|python_tag|>{\"name\": \"w\", \"parameters\": {}}", vec![call("w", "{}")]),
        (Dialect::Llama3, "{\"answer\": 42}", vec![content("{\"answer\": 42}")]),
        (Dialect::Llama3, "Sure. {\"name\": \"w\"}", vec![content("Sure. {\"name\": \"w\"}")]),
        (
            Dialect::Mistral,
            "Let me see.[TOOL_CALLS] [{\"name\": \"w\", \"arguments\": {\"c\": 1}}, {\"name\": \"t\", \"arguments\": {}}]",
            vec![content("Let me see."), call("w", "{\"c\": 1}"), call("t", "{}")],
        ),
        (
            Dialect::Mistral,
            "[TOOL_CALLS]w[CALL_ID]abc[ARGS]{\"c\": 1}[TOOL_CALLS]t{}",
            vec![call("w", "{\"c\": 1}"), call("t", "{}")],
        ),
        (
            Dialect::DeepSeek,
            "<think>hm</think>Now:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>w\n```json\n{\"c\": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>t<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            vec![thought("hm"), content("Now:"), call("w", "{\"c\": 1}"), call("t", "{}")],
        ),
        (
            Dialect::Kimi,
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.w:0<|tool_call_argument_begin|>{\"c\": 1}<|tool_call_end|><|tool_calls_section_end|>",
            vec![call("w", "{\"c\": 1}")],
        ),
        (
            Dialect::Glm,
            "<think>a</think>\n<tool_call>w\n<arg_key>c</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>n</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
            vec![thought("a"), call("w", "{\"c\":\"Rome\",\"n\":3}")],
        ),
        (
            Dialect::Glm4,
            "\nget_weather \n{\"c\": \"Rome\",\n \"n\": 3}",
            vec![call("get_weather", "{\"c\": \"Rome\",\n \"n\": 3}")],
        ),
        (
            Dialect::Glm4,
            "<think>a</think>w\n{\"c\": 1}<|assistant|>t\n{}",
            vec![thought("a"), call("w", "{\"c\": 1}"), call("t", "{}")],
        ),
        (
            Dialect::Glm4,
            "Let me see.<|assistant|>w\n{\"c\": 1}",
            vec![content("Let me see."), call("w", "{\"c\": 1}")],
        ),
        (Dialect::Glm4, "Sure\n\nIt is {hot}.", vec![content("Sure\n\nIt is {hot}.")]),
        (Dialect::Glm4, "w\n{no json}", vec![content("w\n{no json}")]),
        (Dialect::Glm4, "a.<|assistant|>\nb {", vec![content("a.<|assistant|>\nb {")]),
        (
            Dialect::Phi4,
            "<|tool_call|>[{\"name\": \"w\", \"arguments\": {\"c\": 1}}, {\"name\": \"t\", \"arguments\": {}}]<|/tool_call|>",
            vec![call("w", "{\"c\": 1}"), call("t", "{}")],
        ),
        // Without a list, and the end token in the place of the closing marker.
        (
            Dialect::Phi4,
            "So: <|tool_call|>{\"name\": \"w\", \"arguments\": {}}, {\"name\": \"t\"}",
            vec![content("So: "), call("w", "{}"), call("t", "{}")],
        ),
        (Dialect::Phi4, "<|tool_call|>none<|/tool_call|>", vec![content("<|tool_call|>none<|/tool_call|>")]),
        (
            Dialect::QwenXml,
            "<think>\nhm\n</think>\n\nSo:\n<tool_call>\n<function=w>\n<parameter=c>\nRome\nand Ostia\n</parameter>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=t>\n</function>\n</tool_call>",
            vec![
                thought("\nhm\n"),
                content("So:\n"),
                call("w", "{\"c\":\"Rome\\nand Ostia\",\"n\":3}"),
                call("t", "{}"),
            ],
        ),
        // The end token took the place of both closing markers; without a function it is no call.
        (
            Dialect::QwenXml,
            "<tool_call><function=t><parameter=c>[1]</parameter>",
            vec![call("t", "{\"c\":[1]}")],
        ),
        (
            Dialect::QwenXml,
            "<tool_call>\n<function=t\n</tool_call>",
            vec![content("<tool_call>\n<function=t\n</tool_call>")],
        ),
        (
            Dialect::MiniMax,
            "<think>a</think>\n\n<minimax:tool_call>\n<invoke name=\"w\">\n<parameter name=\"c\">Rome</parameter>\n<parameter name=\"l\">[\"a\", 2]</parameter>\n</invoke>\n<invoke name=\"t\">\n</invoke>\n</minimax:tool_call>",
            vec![thought("a"), call("w", "{\"c\":\"Rome\",\"l\":[\"a\",2]}"), call("t", "{}")],
        ),
        (
            Dialect::Harmony,
            "<|channel|>analysis<|message|>think of it<|end|><|start|>assistant<|channel|>commentary to=functions.w <|constrain|>json<|message|>{\"c\": 1}<|call|>",
            vec![thought("think of it"), call("w", "{\"c\": 1}")],
        ),
        (
            Dialect::Harmony,
            "<|channel|>analysis<|message|>short<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>",
            vec![thought("short"), content("Hello.")],
        ),
        (Dialect::Harmony, "plain words", vec![content("plain words")]),
    ]
}

#[test]
fn each_dialect_is_read() {
    for (dialect, said, meant) in examples() {
        assert_eq!(read(all(dialect), &[said]), meant, "{dialect:?}: {said}");
        let written = parts(offering(all(dialect)), &characters(said));
        assert_eq!(joined(written), meant, "{dialect:?}, while it is written: {said}");
    }
}

/// Dialect, and what stands in front of a call's arguments and behind them.
const WRITTEN: [(Dialect, &str, &str); 15] = [
    (Dialect::Hermes, "<tool_call>\n{\"name\": \"w\", \"arguments\": ", "}\n</tool_call>"),
    (
        Dialect::Hermes,
        "<tool_call>{\"id\": [1, {\"a\": \"}\"}], \"name\":\"w\",\"arguments\":",
        ", \"n\": 7}</tool_call>",
    ),
    (Dialect::Hermes, "<tool_call>{\"name\": \"w\", \"arguments\":", "}"),
    (Dialect::Llama3, "{\"name\": \"w\", \"parameters\": ", "}"),
    (
        Dialect::Llama3,
        "<|python_tag|>{\"type\": \"function\", \"name\": \"w\", \"parameters\": ",
        ", \"n\": 7}",
    ),
    (Dialect::Mistral, "[TOOL_CALLS] [{\"name\": \"w\", \"arguments\": ", ", \"id\": \"abc\"}]"),
    (Dialect::Mistral, "[TOOL_CALLS]w[CALL_ID]abc[ARGS]", ""),
    (Dialect::Mistral, "[TOOL_CALLS]w", ""),
    (
        Dialect::DeepSeek,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>w\n```json\n",
        "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        Dialect::DeepSeek,
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>w<｜tool▁sep｜>",
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    (
        Dialect::Kimi,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.w:0<|tool_call_argument_begin|>",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (Dialect::Glm4, "w\n", ""),
    (Dialect::Phi4, "<|tool_call|>[{\"name\": \"w\", \"arguments\": ", "}, {\"name\": \"t\"}]<|/tool_call|>"),
    (Dialect::Harmony, "<|channel|>commentary to=functions.w <|constrain|>json<|message|>", "<|call|>"),
    (Dialect::Harmony, "<|start|>assistant to=functions.w<|channel|>commentary json<|message|>", ""),
];

#[test]
fn arguments_are_given_out_while_they_are_written() {
    let arguments = "{\"city\": \"Rome\"}";
    for (dialect, before, behind) in WRITTEN {
        let said = [before, arguments, behind].concat();
        let parts = parts(offering(all(dialect)), &characters(&said));
        // A bracket alone is not given out: it may be no argument's.
        let mut expected = vec![Part::CallBegun("w".into()), Part::Arguments("{\"".into())];
        expected.extend(arguments[2..].chars().map(|c| Part::Arguments(c.into())));
        expected.push(Part::CallEnded);
        assert_eq!(parts[..expected.len()], expected, "{dialect:?}: {said}");
        let more = if dialect == Dialect::Phi4 { vec![call("t", "{}")] } else { vec![] };
        assert_eq!(joined(parts[expected.len()..].to_vec()), more, "{dialect:?}: {said}");
    }
}

#[test]
fn calls_of_other_tools_and_arguments_in_other_forms_are_given_out_whole() {
    for (said, meant) in [
        ("{\"name\": \"unknown\", \"arguments\": {\"a\": 1}}", call("unknown", "{\"a\": 1}")),
        ("{\"arguments\": {\"a\": 1}, \"name\": \"w\"}", call("w", "{\"a\": 1}")),
        ("{\"name\": \"w\", \"arguments\": \"{\\\"a\\\": 1}\"}", call("w", "{\"a\": 1}")),
        ("{\"name\": \"w\", \"arguments\": null}", call("w", "{}")),
        ("{\"function\": {\"name\": \"w\", \"arguments\": {\"a\": 1}}}", call("w", "{\"a\": 1}")),
    ] {
        let parts =
            parts(offering(all(Dialect::Hermes)), &characters(&format!("<tool_call>{said}</tool_call>")));
        assert_eq!(parts, [meant], "{said}");
    }
}

#[test]
fn what_was_given_out_of_a_broken_call_stands() {
    let second = "<tool_call>{\"name\": \"t\", \"arguments\": {}}</tool_call>";
    for (dialect, said, meant) in [
        // Brackets close around what is no JSON.
        (
            Dialect::Hermes,
            "<tool_call>{\"name\": \"w\", \"arguments\": {\"a\": b}}</tool_call>",
            vec![call("w", "{\"a\": b}")],
        ),
        // They do not close.
        (
            Dialect::Hermes,
            "<tool_call>{\"name\": \"w\", \"arguments\": {\"a\": 1</tool_call>",
            vec![call("w", "{\"a\": 1")],
        ),
        (
            Dialect::Kimi,
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.w:0<|tool_call_argument_begin|>{\"a\": <|tool_call_end|><|tool_call_begin|>functions.t:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
            vec![call("w", "{\"a\": "), call("t", "{}")],
        ),
        // A bracket is missing behind them, or something else stands there.
        (
            Dialect::Hermes,
            "<tool_call>{\"name\": \"w\", \"arguments\": {}</tool_call>\n",
            vec![call("w", "{}")],
        ),
        (
            Dialect::Hermes,
            "<tool_call>{\"name\": \"w\", \"arguments\": {}} so</tool_call>\n",
            vec![call("w", "{}"), content("so</tool_call>\n")],
        ),
        (
            Dialect::Llama3,
            "{\"name\": \"w\", \"parameters\": {}}; {\"answer\": 42}",
            vec![call("w", "{}"), content("{\"answer\": 42}")],
        ),
    ] {
        let then = if dialect == Dialect::Hermes { second } else { "" };
        let mut meant = meant;
        meant.extend((dialect == Dialect::Hermes).then(|| call("t", "{}")));
        let said = [said, then].concat();
        for pieces in [characters(&said), vec![said.clone()]] {
            assert_eq!(joined(parts(offering(all(dialect)), &pieces)), meant, "{dialect:?}: {said}");
        }
    }
}

#[test]
fn without_tools_and_reasoning_markers_are_content() {
    let said = "<think>a</think><tool_call>{\"name\":\"t\"}</tool_call>";
    assert_eq!(read(MarkupOptions::default(), &[said]), [content(said)]);
    let only_tools = MarkupOptions { tools: true, ..MarkupOptions::default() };
    assert_eq!(read(only_tools, &[said]), [content("<think>a</think>"), call("t", "{}")]);
}

#[test]
fn thoughts_that_the_prompt_opened_end_with_the_closing_tag() {
    let options = MarkupOptions { in_reasoning: true, ..all(Dialect::Hermes) };
    assert_eq!(read(options, &["so</thi", "nk>\n4"]), [thought("so"), content("4")]);
    assert_eq!(read(options, &["never ends"]), [thought("never ends")]);
}

#[test]
fn a_forced_call_is_the_whole_answer() {
    for dialect in [Dialect::Hermes, Dialect::Harmony, Dialect::Mistral, Dialect::Glm4] {
        let options = MarkupOptions { forced_call: true, ..all(dialect) };
        assert_eq!(
            read(options, &["{\"name\":\"w\",", "\"arguments\":{\"a\":1}}"]),
            [call("w", "{\"a\":1}")]
        );
        assert_eq!(read(options, &["{\"name\":\"w\""]), [content("{\"name\":\"w\"")]);
        let pieces = ["{\"name\":\"w\",\"arguments\":{\"a\"", ":1"];
        let [first, second] = ["{\"a\"", ":1"].map(|piece| Part::Arguments(piece.into()));
        assert_eq!(parts(offering(options), &pieces), [Part::CallBegun("w".into()), first, second]);
    }
}

#[test]
fn content_is_not_held_back_without_need() {
    let mut markup = Markup::new(all(Dialect::Hermes));
    assert_eq!(markup.push("Hello"), [content("Hello")]);
    assert_eq!(markup.push(", <b"), [content(", <b")]);
    assert_eq!(markup.push(" <tool"), [content(" ")]);
    assert_eq!(markup.push("box>"), [content("<toolbox>")]);
}

#[test]
fn templates_tell_their_dialect() {
    for (source, dialect) in [
        ("{{'<tool_call>'}}", Dialect::Hermes),
        ("<tool_call> <arg_key>", Dialect::Glm),
        ("[TOOL_CALLS]", Dialect::Mistral),
        ("{{ '<|python_tag|>' }}", Dialect::Llama3),
        ("{{'<｜tool▁calls▁begin｜>'}}", Dialect::DeepSeek),
        ("<|start|>assistant<|channel|>final", Dialect::Harmony),
        ("<tool_call>\\n<function=example>", Dialect::QwenXml),
        ("{%- set begin = '<minimax:tool_call>' -%}", Dialect::MiniMax),
        // Of microsoft/Phi-4-mini-instruct, zai-org/GLM-4-9B-0414 and GLM-4.5, which both know observations.
        ("{{ message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}", Dialect::Phi4),
        ("{%- elif role == 'observation' %}\n<|observation|>\n{{ content }}", Dialect::Glm4),
        ("<tool_call>{{ tc.name }}<arg_key>{{ k }}</arg_key> <|observation|>", Dialect::Glm),
        // Of google/gemma-3-4b-it, which knows no tools.
        (
            "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else \"\") }}",
            Dialect::Hermes,
        ),
        ("nothing", Dialect::Hermes),
    ] {
        assert_eq!(Dialect::of_template(source), dialect, "{source}");
    }
}

#[test]
fn texts_stay_texts_where_the_schema_says_so() {
    let said = "<tool_call><function=write><parameter=content>\n{\"a\": 1}\n</parameter><parameter=n>12</parameter></function></tool_call>";
    let parts = Markup::new(all(Dialect::QwenXml)).push(said);
    let Some(Part::Call(call)) = parts.first() else { panic!("{parts:?}") };
    assert_eq!(call.arguments, "{\"content\":{\"a\":1},\"n\":12}");
    let mut call = call.clone();
    call.keep_texts(|name| name == "content");
    assert_eq!(call.arguments, "{\"content\":\"{\\\"a\\\": 1}\",\"n\":12}");
}

fn dialects() -> impl Strategy<Value = Dialect> {
    prop::sample::select(Dialect::ALL.to_vec())
}

/// Texts made of markers, calls and noise, so that the machine meets its own vocabulary in every order.
fn texts() -> impl Strategy<Value = String> {
    let mut words: Vec<String> = examples().into_iter().map(|(_, said, _)| said.to_owned()).collect();
    for dialect in Dialect::ALL {
        words.extend(dialect.markers().iter().map(|m| (*m).to_owned()));
    }
    for noise in [
        "a",
        " ",
        "\n",
        "{",
        "}",
        "<",
        "<|",
        "é",
        "{\"name\":\"t\",\"arguments\":{}}",
        "analysis",
        "[TOOL",
        "w\n",
    ] {
        words.push(noise.to_owned());
    }
    prop::collection::vec(prop::sample::select(words), 0..8).prop_map(|words| words.concat())
}

/// A text in pieces of so many characters, and of three behind them.
fn pieces(text: &str, cuts: Vec<usize>) -> Vec<String> {
    let mut characters = text.chars().peekable();
    let mut cuts = cuts.into_iter().chain(std::iter::repeat(3));
    std::iter::from_fn(|| {
        characters.peek()?;
        Some(characters.by_ref().take(cuts.next()?).collect())
    })
    .collect()
}

/// Arguments of a call, as one of two writers of JSON lays them out.
fn arguments() -> impl Strategy<Value = String> {
    const TEXT: &str = r#"[a-z\\"{}\[\],:;<> é\n]{0,10}"#;
    let members = |value: BoxedStrategy<Value>| {
        prop::collection::vec((TEXT, value), 0..4)
            .prop_map(|members| Value::Object(members.into_iter().collect()))
    };
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        TEXT.prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(3, 16, 4, move |inner| {
        let list = prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array);
        prop_oneof![list, members(inner)]
    });
    (members(value.boxed()), any::<bool>()).prop_map(|(arguments, pretty)| {
        if pretty { serde_json::to_string_pretty(&arguments).unwrap() } else { arguments.to_string() }
    })
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..9, 0..60)
}

proptest! {
    #[test]
    fn cuts_do_not_matter(
        dialect in dialects(), text in texts(), cuts in cuts(),
        tools: bool, reasoning: bool, in_reasoning: bool, forced_call: bool,
    ) {
        let options = MarkupOptions { dialect, tools, reasoning, in_reasoning, forced_call };
        let pieces = pieces(&text, cuts);
        let whole = read(options, &[&text]);
        prop_assert_eq!(read(options, &pieces), &whole[..]);
        let written = parts(offering(options), &[&text]);
        let is_silent = !written.iter().any(|part| matches!(part, Part::CallBegun(_)));
        let written = joined(written);
        prop_assert_eq!(joined(parts(offering(options), &pieces)), &written[..]);
        // What is no call, or no tool's on offer, reads as it does where calls are read whole.
        prop_assert!(!is_silent || written == whole, "{:?} is not {:?}", written, whole);
    }

    #[test]
    fn arguments_in_pieces_are_those_of_the_whole_call(
        written in prop::sample::select(WRITTEN.to_vec()), arguments in arguments(), cuts in cuts(),
    ) {
        let (dialect, before, behind) = written;
        let text = [before, &arguments, behind].concat();
        let whole = read(all(dialect), &[&text]);
        let meant = call("w", &arguments);
        prop_assert_eq!(whole.first(), Some(&meant));
        let written = parts(offering(all(dialect)), &pieces(&text, cuts));
        prop_assert!(matches!(written.first(), Some(Part::CallBegun(_))));
        prop_assert!(written.contains(&Part::CallEnded));
        prop_assert_eq!(joined(written), whole);
    }

    #[test]
    fn a_call_that_breaks_off_ends_where_it_does(
        written in prop::sample::select(WRITTEN.to_vec()), arguments in arguments(), cuts in cuts(),
        end in any::<prop::sample::Index>(),
    ) {
        let (dialect, before, behind) = written;
        let text = [before, &arguments, behind].concat();
        let n_before = before.chars().count();
        let n_kept = n_before + 1 + end.index(text.chars().count() - n_before);
        let kept: String = text.chars().take(n_kept).collect();
        let written = parts(offering(all(dialect)), &pieces(&kept, cuts));
        let has_ended = written.contains(&Part::CallEnded);
        let has_begun = matches!(written.first(), Some(Part::CallBegun(_)));
        match &joined(written)[..] {
            [Part::Call(first), ..] if has_begun => {
                let given = &first.arguments;
                prop_assert!(arguments.starts_with(given.as_str()), "{} is not of {}", given, arguments);
                prop_assert_eq!(has_ended, *given == arguments);
                prop_assert!(has_ended || kept.ends_with(given.as_str()), "{} is lost", kept);
            }
            others => prop_assert!(others.iter().all(|part| !matches!(part, Part::Call(_))), "{:?}", others),
        }
    }

    #[test]
    fn plain_text_is_content(dialect in dialects(), text in "[a-z .,]{1,40}") {
        prop_assert_eq!(read(all(dialect), &[&text]), vec![content(&text)]);
    }
}

#[test]
fn an_object_that_nothing_marks_is_a_call_only_of_a_tool_that_was_offered() {
    let of_w = |options: MarkupOptions, text: &str| {
        joined(parts(Markup::new(options).offering(["w".to_owned(), "t".to_owned()]), &[text]))
    };
    let llama = |text: &str| of_w(all(Dialect::Llama3), text);
    for text in [
        r#"{"name": "Ada", "born": 1815}"#,
        r#"{"name": "Ada", "parameters": {"c": 1}}"#,
        r#"{"name": "w"}"#,
        r#"{"name": "w", "born": 1815}"#,
        r#"{"function": {"name": "Ada", "parameters": {}}}"#,
        r#"{"name": 7, "parameters": {}}"#,
    ] {
        assert_eq!(llama(text), [content(text)]);
    }
    for text in [
        r#"{"name": "w", "parameters": {"c":1}}"#,
        r#"{"type": "function", "name": "w", "arguments": {"c":1}}"#,
        r#"{"type": "function", "function": {"name": "w", "parameters": {"c":1}}}"#,
    ] {
        assert_eq!(llama(text), [call("w", r#"{"c":1}"#)], "{text}");
    }
    assert_eq!(
        llama(r#"{"name": "t", "parameters": null}; {"name": "w", "parameters": {}}"#),
        [call("t", "{}"), call("w", "{}")]
    );
    // The first was given out before the second was seen.
    assert_eq!(
        llama(r#"{"name": "w", "parameters": {}}; {"name": "Ada", "parameters": {}}"#),
        [call("w", "{}"), content(r#"{"name": "Ada", "parameters": {}}"#)]
    );
    // What is marked is meant as a call, whatever its name.
    for marked in
        [r#"<|python_tag|>{"name": "Ada"}"#, r#"So: <|python_tag|>{"name": "Ada", "parameters": {}}"#]
    {
        assert_eq!(llama(marked).last(), Some(&call("Ada", "{}")), "{marked}");
    }
    let hermes = of_w(all(Dialect::Hermes), r#"<tool_call>{"name": "Ada"}</tool_call>"#);
    assert_eq!(hermes, [call("Ada", "{}")]);
    let forced = MarkupOptions { forced_call: true, ..all(Dialect::Llama3) };
    assert_eq!(of_w(forced, r#"{"name": "w", "arguments": {}}"#), [call("w", "{}")]);
}

#[test]
fn thoughts_are_known_while_they_go_on() {
    for (dialect, before, thoughts, behind) in [
        (Dialect::Hermes, " <thi", ["nk>a", "b</thin"], "k>c"),
        (Dialect::Harmony, "<|channel|>analysis", ["<|message|>a", "b"], "<|end|><|start|>assistant"),
    ] {
        let mut markup = Markup::new(all(dialect));
        let mut pushed = |piece: &str| {
            markup.push(piece);
            markup.is_reasoning()
        };
        assert!(
            !pushed(before) && pushed(thoughts[0]) && pushed(thoughts[1]) && !pushed(behind),
            "{dialect:?}"
        );
    }
}
