"""The official Anthropic client over messages, streams and counting; prints what it got as JSON."""
import json
import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="secret", max_retries=0)
out = {}
ask = dict(model="toy", max_tokens=12, extra_body={"temperature": 0}, system="be kind",
           messages=[{"role": "user", "content": "hello there"}])
whole = client.messages.create(**ask)
out["whole"] = [whole.type, whole.role, whole.content[0].type, whole.stop_reason, whole.usage.output_tokens]
text = whole.content[0].text
with client.messages.stream(**ask) as stream:
    out["same_streamed"] = "".join(stream.text_stream) == text
    final = stream.get_final_message()
    out["final"] = [final.content[0].text == text, final.stop_reason, final.usage.output_tokens]
out["events"] = [event.type for event in client.messages.create(**ask, stream=True)]
counted = client.messages.count_tokens(model="toy", system="be kind", messages=ask["messages"])
out["counted"] = counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
stopped = client.messages.create(**{**ask, "stop_sequences": [text[3:5]]})
out["stopped"] = [stopped.stop_reason, stopped.stop_sequence == text[3:5], text.startswith(stopped.content[0].text)]
prefilled = client.messages.create(**{**ask, "messages": ask["messages"] + [{"role": "assistant", "content": "so"}]})
out["prefilled"] = prefilled.stop_reason
tool = {"name": "w", "description": "weather", "input_schema": {"type": "object", "properties": {"c": {"type": "string"}}}}
turns = ask["messages"] + [
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "w", "input": {"c": "rome"}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}]},
]
out["tools"] = client.messages.create(**{**ask, "messages": turns, "tools": [tool]}).stop_reason
forced = {**ask, "tools": [{**tool, "input_schema": {**tool["input_schema"], "required": ["c"],
          "properties": {"c": {"enum": ["a", "b"]}}, "additionalProperties": False}, "strict": True}], "max_tokens": 200,
          "extra_body": {"temperature": 0.8, "seed": 11}}
out["forced"] = []
for wanted in [{"type": "tool", "name": "w"}, {"type": "any"}]:
    called = client.messages.create(**forced, tool_choice=wanted)
    block = called.content[-1]
    with client.messages.stream(**forced, tool_choice=wanted) as stream:
        kinds = [event.type for event in stream if event.type == "input_json"]
        final = stream.get_final_message().content[-1]
    out["forced"].append([called.stop_reason, block.type, block.name, block.input["c"] in "ab",
                          final.input["c"] in "ab", bool(kinds)])
unthinking = client.messages.create(**ask, thinking={"type": "disabled"})
out["unthinking"] = [unthinking.stop_reason, [block.type for block in unthinking.content]]
thoughtful = {**ask, "max_tokens": 24, "thinking": {"type": "enabled", "budget_tokens": 4}}
thought = client.messages.create(**thoughtful)
out["thinking"] = [[block.type for block in thought.content], len(thought.content[0].thinking),
                   0 < len(thought.content[-1].text) <= 12, thought.usage.output_tokens, len(thought.content[0].signature) > 0]
with client.messages.stream(**thoughtful) as stream:
    deltas = [event.delta.type for event in stream if event.type == "content_block_delta"]
    final = stream.get_final_message()
out["thinking_streamed"] = [final.content[0].thinking == thought.content[0].thinking,
                            final.content[0].signature == thought.content[0].signature, list(dict.fromkeys(deltas))]
answered = ask["messages"] + [{"role": "assistant", "content": [b.model_dump() for b in thought.content]},
                              {"role": "user", "content": "go on"}]
out["thinking_returned"] = client.messages.create(**{**thoughtful, "messages": answered}).stop_reason
sampled = {"temperature": 0.9, "top_p": 0.5, "top_k": 4}
out["parameters"] = client.messages.create(**{**ask, "extra_body": sampled, "metadata": {"user_id": "u"}}).stop_reason


def failure(call):
    try:
        call()
    except anthropic.APIStatusError as e:
        return [type(e).__name__, e.status_code, e.body["error"]["type"], e.body["error"]["message"]]
    return "no failure"


out["too_hot"] = failure(lambda: client.messages.create(**{**ask, "extra_body": {"temperature": 1.5}}))
out["too_much_thinking"] = failure(lambda: client.messages.create(**{**thoughtful, "max_tokens": 4}))
out["no_model"] = failure(lambda: client.messages.create(**{**ask, "model": "other"}))
stranger = anthropic.Anthropic(base_url=sys.argv[1], api_key="wrong", max_retries=0)
out["stranger"] = failure(lambda: stranger.messages.create(**ask))
print(json.dumps(out))
