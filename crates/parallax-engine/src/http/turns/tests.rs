//! Conversations with tools by the essence of every family's templates, which refuse what theirs refuse.

use parallax_model::{ChatTemplate, Conversation};

use super::super::conversation::call_value;
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
/// That of mistralai/Mistral-7B-Instruct-v0.3, Mistral-Nemo-Instruct-2407 and Mistral-Small-24B-Instruct-2501.
const MISTRAL: &str = "{% for m in messages %}\
    {% if m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS][{% for call in m.tool_calls %}\
    {% if call.id is not defined or call.id | length != 9 %}{{ raise_exception('an id is not of length 9') }}{% endif %}\
    {{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}{{ ', ' if not loop.last }}{% endfor %}]</s>\
    {% elif m.role == 'tool' %}\
    {% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('nor is this') }}{% endif %}\
    [TOOL_RESULTS]{{ m.content | string }}, {{ m.tool_call_id }}[/TOOL_RESULTS]\
    {% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}";
/// That of deepseek-ai/DeepSeek-R1 (January 2025), DeepSeek-V3 and the models distilled from R1.
const DEEPSEEK_R1: &str = "{% for m in messages %}\
    {% if m['role'] == 'assistant' and m['content'] is none %}{% for call in m['tool_calls'] %}\
    {{ '<｜tool▁calls▁begin｜>' + call['type'] + '<｜tool▁sep｜>' + call['function']['name'] + ' ' + call['function']['arguments'] }}\
    {% endfor %}{% elif m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] }}\
    {% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}";
/// That of deepseek-ai/DeepSeek-V3.1.
const DEEPSEEK_V31: &str = "{% for m in messages %}\
    {% if m['role'] == 'assistant' and m['tool_calls'] is defined and m['tool_calls'] is not none %}\
    {% for call in m['tool_calls'] %}{% if loop.first and m['content'] is not none %}{{ m['content'] }}{% endif %}\
    {{ '<｜tool▁calls▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] }}{% endfor %}\
    {% elif m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] }}\
    {% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}";
/// That of moonshotai/Kimi-K2-Instruct and Kimi-K2-Thinking.
const KIMI: &str = "{% for m in messages %}{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{% endif %}\
    {% if m.content is string %}{{ m.content }}{% endif %}\
    {% if m.get('tool_calls') %}<|tool_calls_section_begin|>{% for call in m['tool_calls'] %}\
    <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>{% if call['function']['arguments'] is string %}\
    {{ call['function']['arguments'] }}{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}<|tool_call_end|>\
    {% endfor %}<|tool_calls_section_end|>{% endif %}<|im_end|>{% endfor %}";
/// That of openai/gpt-oss-20b and gpt-oss-120b.
const HARMONY: &str = "{% set last = namespace(name=none) %}{% for m in messages %}{% if 'tool_calls' in m %}\
    {% set call = m.tool_calls[0].function %}{% set last.name = call.name %}\
    {% if m.content and m.thinking %}{{ raise_exception('both content and thinking') }}{% endif %}\
    {% if m.content or m.thinking %}<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}\
    to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>\
    {% elif m.role == 'tool' %}{% if last.name is none %}{{ raise_exception('a result of no call') }}{% endif %}\
    functions.{{ last.name }}<|message|>{{ m.content | tojson }}<|end|>\
    {% else %}{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}";
/// That of meta-llama/Llama-3.1-8B-Instruct, 3.2 and 3.3.
const LLAMA3: &str = "{% for m in messages %}{% if 'tool_calls' in m %}\
    {% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}{% set call = m.tool_calls[0].function %}\
    {{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}\
    {% elif m.role == 'tool' %}ipython: {{ m.content }}<|eot_id|>\
    {% else %}{{ m.role }}: {{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if false %}<|python_tag|>{% endif %}";
/// That of Qwen/Qwen3-8B.
const HERMES: &str = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content.split('</think>')[-1] }}\
    {% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endif %}\
    <|im_end|>{% endfor %}";
/// That of Qwen/Qwen3-Coder-30B-A3B-Instruct.
const QWEN_XML: &str = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}\
    {% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call><function={{ call.function.name }}>\
    {% for name, value in call.function.arguments | items %}\
    <parameter={{ name }}>{{ value if value is string else value | tojson }}</parameter>{% endfor %}\
    </function></tool_call>{% endfor %}{% endif %}<|im_end|>{% endfor %}";
/// That of MiniMaxAI/MiniMax-M2.
const MINIMAX: &str = "{% for m in messages %}]~b]{{ m.role }} {{ m.content }}\
    {% if m.tool_calls %}<minimax:tool_call>{% for call in m.tool_calls %}<invoke name=\"{{ call.function.name }}\">\
    {% for name, value in call.function.arguments | items %}\
    <parameter name=\"{{ name }}\">{{ value if value is string else value | tojson }}</parameter>{% endfor %}\
    </invoke>{% endfor %}</minimax:tool_call>{% endif %}[e~[{% endfor %}";
/// That of zai-org/GLM-4.5-Air and GLM-4.6.
const GLM: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.strip() }}\
    {% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}\
    {% for name, value in call.function.arguments.items() %}<arg_key>{{ name }}</arg_key>\
    <arg_value>{{ value | tojson(ensure_ascii=False) if value is not string else value }}</arg_value>{% endfor %}\
    </tool_call>{% endfor %}{% endif %}{% endfor %}";

/// The templates of a dialect.
fn templates(dialect: Dialect) -> &'static [&'static str] {
    match dialect {
        Dialect::Hermes => &[HERMES],
        Dialect::Llama3 => &[LLAMA3],
        Dialect::Mistral => &[MISTRAL],
        Dialect::DeepSeek => &[DEEPSEEK_R1, DEEPSEEK_V31],
        Dialect::Kimi => &[KIMI],
        Dialect::Glm => &[GLM],
        Dialect::Glm4 => &[GLM4],
        Dialect::Phi4 => &[PHI4],
        Dialect::QwenXml => &[QWEN_XML],
        Dialect::MiniMax => &[MINIMAX],
        Dialect::Harmony => &[HARMONY],
    }
}

fn conversation() -> Vec<Value> {
    vec![
        asks("q"),
        calls_of("", &[weather("1"), call_value("1", "t", &json!({}))]),
        result("1", "31 C"),
        calls_of("Hot.", &[call_value("1", "t", &json!({}))]),
    ]
}

fn asks(question: &str) -> Value {
    json!({"role": "user", "content": question})
}

fn calls_of(says: &str, calls: &[Value]) -> Value {
    json!({"role": "assistant", "content": says, "tool_calls": calls})
}

fn weather(id: &str) -> Value {
    call_value(id, "w", &json!({"c": "Rome", "n": [1, 2]}))
}

fn result(id: &str, content: &str) -> Value {
    json!({"role": "tool", "tool_call_id": id, "content": content})
}

/// Two calls under these ids, and their results the other way round.
fn two_calls(first: &str, second: &str) -> Vec<Value> {
    vec![
        calls_of("", &[weather(first), call_value(second, "t", &json!({}))]),
        result(second, "noon"),
        result(first, "31 C"),
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
fn every_family_is_shown_a_call_and_its_result() {
    let turns = || vec![asks("How hot?"), calls_of("", &[weather("call_0")]), result("call_0", "31 C")];
    for dialect in Dialect::ALL {
        for template in templates(dialect) {
            assert_eq!(Dialect::of_template(template), dialect);
            let text = rendered(template, turns());
            let places: Vec<Option<usize>> =
                ["How hot?", "Rome", "31 C"].map(|word| text.find(word)).to_vec();
            assert!(places.is_sorted() && places[0].is_some(), "{dialect:?}: {text}");
            assert!(text.contains("[1, 2]") && !text.contains('\\'), "{dialect:?}: {text}");
        }
    }
}

#[test]
fn mistral_is_shown_nine_letters_of_an_id() {
    let more = calls_of("", &[weather("call-ab12"), weather("call_7f3a001")]);
    let turns = [vec![asks("q")], two_calls("call_7f3a000", "aB3dE6gH9"), vec![more]].concat();
    let (shaped, _) = shape(Dialect::Mistral, turns.clone(), Vec::new());
    let short = shaped[1]["tool_calls"][0]["id"].as_str().unwrap();
    assert_eq!(shaped[1]["tool_calls"][1]["id"], "aB3dE6gH9");
    assert_eq!(
        (&shaped[2]["tool_call_id"], &shaped[3]["tool_call_id"]),
        (&json!("aB3dE6gH9"), &json!(short))
    );
    for call in shaped[4]["tool_calls"].as_array().unwrap() {
        let other = call["id"].as_str().unwrap();
        assert!(other.len() == 9 && other.bytes().all(|c| c.is_ascii_alphanumeric()) && other != short);
    }
    let shown = format!(
        "[INST]q[/INST][TOOL_CALLS][{{\"name\": \"w\", \"arguments\": {{\"c\": \"Rome\", \"n\": [1, 2]}}, \"id\": \"{short}\"}}, \
         {{\"name\": \"t\", \"arguments\": {{}}, \"id\": \"aB3dE6gH9\"}}]</s>\
         [TOOL_RESULTS]noon, aB3dE6gH9[/TOOL_RESULTS][TOOL_RESULTS]31 C, {short}[/TOOL_RESULTS]"
    );
    assert_eq!(rendered(MISTRAL, turns[..4].to_vec()), shown);
}

#[test]
fn deepseek_is_shown_arguments_as_text_and_no_empty_content() {
    let arguments = r#"{"c": "Rome", "n": [1, 2]}"#;
    let turns = vec![asks("q"), calls_of("\n", &[weather("1")]), result("1", "31 C")];
    assert_eq!(
        rendered(DEEPSEEK_R1, turns.clone()),
        format!(
            "<user>q<｜tool▁calls▁begin｜>function<｜tool▁sep｜>w {arguments}<｜tool▁output▁begin｜>31 C"
        )
    );
    assert_eq!(
        rendered(DEEPSEEK_V31, turns),
        format!("<user>q<｜tool▁calls▁begin｜>w<｜tool▁sep｜>{arguments}<｜tool▁output▁begin｜>31 C")
    );
    assert_eq!(
        rendered(DEEPSEEK_V31, vec![calls_of("Let me see.", &[weather("1")])]),
        format!("Let me see.<｜tool▁calls▁begin｜>w<｜tool▁sep｜>{arguments}")
    );
    // What is said without a call is what it was, even nothing.
    let silent = vec![json!({"role": "assistant", "content": ""})];
    assert_eq!(shape(Dialect::DeepSeek, silent.clone(), Vec::new()).0, silent);
}

#[test]
fn kimi_is_shown_calls_numbered_through_the_conversation() {
    // Some clients begin anew in every turn.
    let again = calls_of("", &[call_value("a", "t", &json!({}))]);
    let later = vec![again, result("a", "one"), result("never asked for", "?")];
    assert_eq!(
        rendered(KIMI, [vec![asks("q")], two_calls("a", "b"), later].concat()),
        "q<|im_end|><|tool_calls_section_begin|>\
         <|tool_call_begin|>functions.w:0<|tool_call_argument_begin|>{\"c\": \"Rome\", \"n\": [1, 2]}<|tool_call_end|>\
         <|tool_call_begin|>functions.t:1<|tool_call_argument_begin|>{}<|tool_call_end|>\
         <|tool_calls_section_end|><|im_end|>\
         ## Return of functions.t:1\nnoon<|im_end|>## Return of functions.w:0\n31 C<|im_end|>\
         <|tool_calls_section_begin|>\
         <|tool_call_begin|>functions.t:2<|tool_call_argument_begin|>{}<|tool_call_end|>\
         <|tool_calls_section_end|><|im_end|>\
         ## Return of functions.t:2\none<|im_end|>## Return of never asked for\n?<|im_end|>"
    );
}

#[test]
fn gpt_oss_is_shown_its_thoughts_before_its_calls() {
    let thinks = |says: &str| {
        let mut message = calls_of(says, &[weather("a")]);
        message["reasoning_content"] = json!("I must look.");
        message
    };
    let call = "to=functions.w<|channel|>commentary json<|message|>{\"c\": \"Rome\", \"n\": [1, 2]}<|call|>";
    let thought = "<|channel|>analysis<|message|>I must look.";
    assert_eq!(
        rendered(HARMONY, vec![thinks(""), result("a", "31 C")]),
        format!("{thought}<|end|>{call}functions.w<|message|>\"31 C\"<|end|>")
    );
    assert_eq!(rendered(HARMONY, vec![thinks("\n")]), format!("{thought}<|end|>{call}"));
    assert_eq!(rendered(HARMONY, vec![thinks("Wait.")]), format!("{thought}\n\nWait.<|end|>{call}"));
    // Without calls there may be both.
    let mut answer = json!({"role": "assistant", "content": "Hot.", "reasoning_content": "31 is hot."});
    let (shaped, _) = shape(Dialect::Harmony, vec![answer.clone()], Vec::new());
    answer["thinking"] = json!("31 is hot.");
    assert_eq!(shaped, [answer]);
}

#[test]
fn llama_and_gpt_oss_are_shown_one_call_and_its_result_at_a_time() {
    let mut turns = two_calls("a", "b");
    turns[0]["reasoning_content"] = json!("Two things.");
    turns.extend([result("c", "?"), asks("so?")]);
    assert_eq!(
        rendered(LLAMA3, turns.clone()),
        "{\"name\": \"w\", \"parameters\": {\"c\": \"Rome\", \"n\": [1, 2]}}<|eot_id|>ipython: 31 C<|eot_id|>\
         {\"name\": \"t\", \"parameters\": {}}<|eot_id|>ipython: noon<|eot_id|>ipython: ?<|eot_id|>user: so?<|eot_id|>"
    );
    assert_eq!(
        rendered(HARMONY, turns[..3].to_vec()),
        "<|channel|>analysis<|message|>Two things.<|end|>\
         to=functions.w<|channel|>commentary json<|message|>{\"c\": \"Rome\", \"n\": [1, 2]}<|call|>\
         functions.w<|message|>\"31 C\"<|end|>\
         to=functions.t<|channel|>commentary json<|message|>{}<|call|>functions.t<|message|>\"noon\"<|end|>"
    );
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
    for dialect in [Dialect::Hermes, Dialect::Glm, Dialect::QwenXml, Dialect::MiniMax] {
        assert_eq!(shape(dialect, conversation(), tools()), (conversation(), tools()));
    }
    let (untouched, _) = shape(Dialect::Glm4, vec![json!({"role": "user", "content": "q"})], Vec::new());
    assert_eq!(untouched, [json!({"role": "user", "content": "q"})]);
}
