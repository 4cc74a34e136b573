"""The official OpenAI client over the matrix of parameters; prints what it got as JSON."""
import json
import sys

import openai

url = sys.argv[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz .?{}\":,0123456789"
client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
out = {}
messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
ask = dict(model="toy", messages=messages, max_tokens=24, temperature=0.8, seed=11)
chat = client.chat.completions.create


def choice(**changes):
    return chat(**{**ask, **changes}).choices[0]


def streamed(**changes):
    texts, finishes, usage, logprobs = {}, {}, None, []
    options = {"include_usage": True}
    for chunk in chat(**{**ask, **changes}, stream=True, stream_options=options):
        if chunk.usage:
            usage = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens, chunk.usage.total_tokens]
        for one in chunk.choices:
            texts[one.index] = texts.get(one.index, "") + (one.delta.content or "")
            finishes[one.index] = one.finish_reason or finishes.get(one.index)
            if one.logprobs:
                logprobs += [entry.logprob for entry in one.logprobs.content]
    order = sorted(texts)
    return [[texts[i] for i in order], [finishes[i] for i in order], usage, logprobs]


out["models"] = [m.id for m in client.models.list()]
out["model"] = client.models.retrieve("toy").id
whole = chat(**ask)
out["text"] = whole.choices[0].message.content
out["role"] = whole.choices[0].message.role
out["finish"] = whole.choices[0].finish_reason
out["usage"] = [whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens]
out["same_seed_same_text"] = choice().message.content == out["text"]
out["other_seed_other_text"] = choice(seed=12).message.content != out["text"]
out["streamed"] = streamed()[:3]

# Every sampling parameter, whole and streamed: the same text both ways.
matrix = {
    "greedy": {"temperature": 0},
    "top_p": {"top_p": 0.4},
    "top_k": {"extra_body": {"top_k": 3}},
    "min_p": {"extra_body": {"min_p": 0.3}},
    "typical_p": {"extra_body": {"typical_p": 0.4}},
    "stop_ids": {"extra_body": {"stop_token_ids": list(range(22))}},
    "min_tokens": {"extra_body": {"stop_token_ids": list(range(22)), "min_tokens": 5}},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {
        "type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["n"],
        "additionalProperties": False}}}},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.5},
    "repetition": {"extra_body": {"repetition_penalty": 1.5}},
    "bias": {"logit_bias": {"3": 100}},
    "stop": {"stop": ["e", "a"]},
    "max_completion_tokens": {"max_completion_tokens": 5, "max_tokens": None},
    "n": {"n": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 4},
    "user": {"user": "ann", "metadata": {"a": "b"}, "store": False},
    "tools_unused": {"tools": [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}],
                     "tool_choice": "none"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
}
out["matrix"] = {}
for name, changes in matrix.items():
    answer = chat(**{**ask, **changes})
    texts = [one.message.content for one in answer.choices]
    logprobs = [e.logprob for one in answer.choices if one.logprobs for e in one.logprobs.content]
    again = streamed(**changes)
    out["matrix"][name] = {
        "texts": texts,
        "finish": [one.finish_reason for one in answer.choices],
        "same_streamed": again[0] == texts and again[1] == [one.finish_reason for one in answer.choices]
        and again[2] == [answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens],
        "same_logprobs": logprobs == again[3],
        "logprobs": len(logprobs),
    }
content = choice(logprobs=True, top_logprobs=4).logprobs.content
out["alternatives"] = [len(entry.top_logprobs) for entry in content]

weather = {"type": "function", "function": {"name": "w", "parameters": {
    "type": "object", "properties": {"c": {"enum": ["a", "b"]}}, "required": ["c"], "additionalProperties": False}}}
for name, wanted in {"named": {"type": "function", "function": {"name": "w"}}, "required": "required"}.items():
    forced = choice(tools=[weather], tool_choice=wanted, max_tokens=80)
    call = forced.message.tool_calls[0].function
    out["forced_" + name] = [forced.finish_reason, call.name, json.loads(call.arguments)["c"] in "ab"]

forced = dict(tools=[weather], tool_choice="required", max_tokens=80)
call = choice(**forced).message.tool_calls[0]
names, arguments, ids, finish = "", "", set(), None
for chunk in chat(**{**ask, **forced}, stream=True):
    for one in chunk.choices:
        finish = one.finish_reason or finish
        for delta in one.delta.tool_calls or []:
            names += delta.function.name or ""
            arguments += delta.function.arguments or ""
            ids.add(delta.id)
out["streamed_call"] = [finish, names, arguments == call.function.arguments, len(ids - {None})]
closing = {str(LETTERS.index("}")): 50}
anything = choice(response_format={"type": "json_object"}, logit_bias=closing)
out["json_object"] = [anything.finish_reason, json.loads(anything.message.content)]
function = {"type": "function", "name": "w", "parameters": weather["function"]["parameters"], "strict": True}
called = client.responses.create(model="toy", input="hello", tools=[function], tool_choice="required",
                                 max_output_tokens=80)
item = called.output[-1]
out["response_call"] = [called.status, item.type, item.name, json.loads(item.arguments)["c"] in "ab"]
with client.responses.stream(model="toy", input="hello", tools=[function], tool_choice="required",
                             max_output_tokens=80) as events:
    seen = [event.type for event in events]
    out["response_call_stream"] = [seen[-1], "response.function_call_arguments.delta" in seen,
                                   seen.count("response.function_call_arguments.done")]

text = client.completions.create(model="toy", prompt=["hello", "there"], max_tokens=5, logprobs=2, echo=True, seed=1)
out["completions"] = [[one.text[:5], one.finish_reason, len(one.logprobs.tokens)] for one in text.choices]
out["completion_stream"] = sum(
    len(one.text) for chunk in client.completions.create(model="toy", prompt="hello", max_tokens=5, stream=True)
    for one in chunk.choices)

response = client.responses.create(model="toy", input="hello", instructions="be kind", max_output_tokens=6,
                                   temperature=0)
out["response"] = [response.status, response.incomplete_details.reason, len(response.output_text),
                   response.usage.output_tokens]
with client.responses.stream(model="toy", input="hello", instructions="be kind", max_output_tokens=6,
                             temperature=0) as events:
    seen = list(events)
    out["response_stream"] = [seen[0].type, seen[-1].type, seen[-1].response.output_text == response.output_text]


def failure(call):
    try:
        call()
    except openai.APIStatusError as e:
        return [type(e).__name__, e.status_code, e.body["message"]]
    return "no failure"


out["too_hot"] = failure(lambda: chat(**{**ask, "temperature": 9}))
out["too_long"] = failure(lambda: client.completions.create(model="toy", prompt="a" * 300, max_tokens=1))
out["no_model"] = failure(lambda: chat(**{**ask, "model": "gpt-9"}))
stranger = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
out["stranger"] = failure(lambda: stranger.models.list())
print(json.dumps(out))
