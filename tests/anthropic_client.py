"""The official Anthropic client over messages, streams, tools, thoughts and counting; sync and async.

Arguments: the addresses of three servers with the API key `secret`, as `openai_client.py` beside this file has them: THINKER
with the model `toy`, TINY and NARROW with `tiny`. Every area is a function, and every check looks at what a parameter did to
an answer. Prints how many checks each area made, as JSON; the first that fails ends the script.
"""
import asyncio
import collections
import json
import math
import sys
import time
import typing

import anthropic

from checks import QUESTION, RENDERED, USER, Server, check, refusal, run, runner, until, until_refused

thinker, tiny, narrow = (Server(anthropic, *served) for served in zip(sys.argv[1:], ["toy", "tiny", "tiny"]))


# ---- one question, asked in six ways ----------------------------------------------------------------------------------
class Answer(typing.NamedTuple):
    # (type, what it says) of each block.
    blocks: list
    reason: str
    # The stop sequence that was met.
    met: typing.Optional[str]
    # Tokens of the prompt, cached or not, and of the answer.
    usage: tuple

    @property
    def text(self):
        return "".join(said for kind, said in self.blocks if kind == "text")


def said(block):
    if block.type == "thinking":
        return block.thinking, block.signature
    return block.text if block.type == "text" else (block.name, json.dumps(block.input))


def read(message):
    assert (message.type, message.role) == ("message", "assistant")
    usage = message.usage
    prompt = usage.input_tokens + usage.cache_read_input_tokens
    return Answer([(b.type, said(b)) for b in message.content], message.stop_reason, message.stop_sequence,
                  (prompt, usage.output_tokens))


def read_events(events):
    """The raw events put together, each where Anthropic's documentation has it."""
    kinds = [event.type for event in events if event.type != "ping"]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"]), kinds
    blocks, prompt = [], events[0].message.usage
    for event in events:
        if event.type == "content_block_start":
            assert event.index == len(blocks)
            blocks.append(event.content_block.model_dump())
            blocks[-1]["json"] = ""
        elif event.type == "content_block_delta":
            assert event.index == len(blocks) - 1
            for name, value in event.delta.model_dump(exclude={"type"}).items():
                name = "json" if name == "partial_json" else name
                blocks[-1][name] = blocks[-1][name] + value
    assert kinds.count("content_block_stop") == len(blocks)
    contents = {
        "text": lambda b: b["text"], "thinking": lambda b: (b["thinking"], b["signature"]),
        "tool_use": lambda b: (b["name"], json.dumps(json.loads(b["json"]))),
    }
    (end,) = [event for event in events if event.type == "message_delta"]
    return Answer([(b["type"], contents[b["type"]](b)) for b in blocks], end.delta.stop_reason, end.delta.stop_sequence,
                  (prompt.input_tokens + prompt.cache_read_input_tokens, end.usage.output_tokens))


def parameters(server, changes):
    """Sampling parameters, which this client has no arguments for, travel in `extra_body`; `None` takes one away."""
    asked = {"model": server.model, "max_tokens": 24, "messages": USER, "temperature": 0, **changes}
    extra = {name: asked.pop(name) for name in ["temperature", "top_p", "top_k"] if name in asked}
    return {**asked, "extra_body": {name: value for name, value in extra.items() if value is not None}}


def whole(server=tiny, **changes):
    """The client's own object."""
    return server.sync.messages.create(**parameters(server, changes))


def ask(server=tiny, **changes):
    """The answer, which is the same whole, as events and from the client's stream helper, sync and async."""
    asked = parameters(server, changes)
    answer = read(whole(server, **changes))
    check(read_events(list(server.sync.messages.create(**asked, stream=True))) == answer, changes, answer)
    with server.sync.messages.stream(**asked) as stream:
        check("".join(stream.text_stream) == answer.text, changes, answer)
        check(read(stream.get_final_message()) == answer, changes, answer)

    async def later():
        yield read(await server.later.messages.create(**asked))
        yield read_events([event async for event in await server.later.messages.create(**asked, stream=True)])
        async with server.later.messages.stream(**asked) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = read(await stream.get_final_message())
            yield final if text == answer.text else text

    async def all_later():
        return [one async for one in later()]

    check(runner.run(all_later()) == [answer] * 3, changes, answer)
    return answer


# ---- what the parameters do --------------------------------------------------------------------------------------------
def distributions(text):
    """For each token of an answer: its log-probability, and those of the likeliest tokens in its place."""
    steps = [*text, "<eos>"]
    prompts = [RENDERED + text[:i] for i in range(len(steps))]
    one = tiny.post("/v1/completions", model="tiny", prompt=prompts, max_tokens=1, temperature=0, logprobs=20)
    tops = [choice["logprobs"]["top_logprobs"][0] for choice in one["choices"]]
    return [(top.get(step, -math.inf), top) for step, top in zip(steps, tops)]


def sampling():
    """No seed is known here: many answers are drawn, and each token of theirs is looked up."""
    def drawn(**changes):
        texts = collections.Counter(whole(**{"temperature": 1, **changes}).content[0].text for _ in range(24))
        return [step for text in texts for step in distributions(text)], texts

    def all_hold(steps, holds):
        return all(holds(logprob, sorted(top.values(), reverse=True)) for logprob, top in steps)

    greedy, plain = ask(), drawn()
    check((greedy.text, greedy.reason, greedy.usage) == ("42", "end_turn", (len(tiny.ids(RENDERED)), 3)), greedy)
    check(len(plain[1]) > 2, plain[1])
    for changes, holds in [
        ({"top_k": 2}, lambda logprob, top: logprob >= top[1]),
        ({"top_p": 0.5}, lambda logprob, top: sum(math.exp(l) for l in top if l > logprob) < 0.501),
    ]:
        check(all_hold(drawn(**changes)[0], holds), changes)
        check(not all_hold(plain[0], holds), changes)
    for changes in [{"top_k": 1}, {"top_p": 1e-4}, {"temperature": 1e-3}]:
        check(ask(**{"temperature": 1, **changes}) == greedy, changes)
    check(len(drawn(top_k=0, top_p=1)[1]) > 2 and len(drawn(temperature=None)[1]) > 2, "the default is 1")
    check(len(drawn(temperature=0.1)[1]) < len(plain[1]))


def ends():
    hello = [{"role": "user", "content": "Who are you?"}]
    full = ask(messages=hello, max_tokens=100)
    check(full.text == "I am a tiny model, trained by a swarm." and full.reason == "end_turn", full)
    cut = ask(messages=hello, max_tokens=6)
    check((cut.text, cut.reason, cut.usage[1]) == ("I am a", "max_tokens", 6), cut)
    for sequences in [["model"], ["swarm", "model", "nowhere"]]:
        stopped = ask(messages=hello, max_tokens=100, stop_sequences=sequences)
        check((stopped.text, stopped.reason, stopped.met) == ("I am a tiny ", "stop_sequence", "model"), stopped)
    check(ask(messages=hello, max_tokens=100, stop_sequences=["nowhere"]) == full)


def conversations():
    """How messages become a prompt, and how long it is."""
    def same_prompt(rendered, **asked):
        answer = ask(**asked)
        text = tiny.post("/v1/completions", model="tiny", prompt=rendered, max_tokens=24, temperature=0)["choices"][0]["text"]
        check((answer.text, answer.usage[0]) == (text, len(tiny.ids(rendered))), rendered, answer)
        counting = {"model": "tiny", "messages": USER, **asked}
        counting.pop("max_tokens", None)
        check(tiny.sync.messages.count_tokens(**counting).input_tokens == answer.usage[0])
        check(runner.run(tiny.later.messages.count_tokens(**counting)).input_tokens == answer.usage[0])

    kind = f"<bos><system>be kind<user>{QUESTION}<assistant>"
    same_prompt(RENDERED)
    same_prompt(kind, system="be kind")
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "kind", "cache_control": {"type": "ephemeral"}}]
    same_prompt(kind, system=parts, messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}])
    # The assistant's words are gone on with.
    same_prompt(RENDERED + "4", messages=USER + [{"role": "assistant", "content": "4"}])
    for result in ["7", [{"type": "text", "text": "7"}]]:
        turns = USER + [
            {"role": "assistant", "content": [{"type": "text", "text": "so"},
                                              {"type": "tool_use", "id": "t", "name": "w", "input": {"c": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": result, "is_error": False},
                                         {"type": "text", "text": "and?"}]}]
        offered = [{"name": "w", "input_schema": {"type": "object"}}]
        same_prompt(f"{RENDERED}so<eos><user>7<user>and?<assistant>", messages=turns, tools=offered)
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    turns = USER + [{"role": "assistant", "content": [thought, {"type": "text", "text": "42"}]}, {"role": "user", "content": "so?"}]
    same_prompt(f"{RENDERED}42<eos><user>so?<assistant>", messages=turns)
    # What others make of an answer changes none of it.
    check(ask(metadata={"user_id": "ann"}, service_tier="auto", cache_control={"type": "ephemeral"}) == ask())
    check(ask(output_config={"effort": "low"}) == ask())
    long = [{"role": "user", "content": f"{time.time()} the same long beginning " * 4}]
    used = [whole(messages=long).usage for _ in range(2)]
    check(used[0].cache_read_input_tokens == 0 < used[0].input_tokens and used[1].cache_read_input_tokens > 100, used)
    check(used[0].input_tokens == used[1].input_tokens + used[1].cache_read_input_tokens, used)


def tools():
    weather = {"name": "w", "description": "the weather", "input_schema": {
        "type": "object", "properties": {"c": {"enum": ["a", "b"]}}, "required": ["c"], "additionalProperties": False}}
    hour = {"name": "t", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
    held = dict(tools=[weather, hour], max_tokens=400)
    for choice, names in [({"type": "tool", "name": "w"}, {"w"}), ({"type": "tool", "name": "t"}, {"t"}), ({"type": "any"}, {"w", "t"}),
                          ({"type": "any", "disable_parallel_tool_use": True}, {"w", "t"})]:
        called = ask(**held, tool_choice=choice)
        ((kind, (name, given)),) = called.blocks
        check((kind, called.reason) == ("tool_use", "tool_use") and name in names, called)
        check(json.loads(given) in ([{}] if name == "t" else [{"c": "a"}, {"c": "b"}]), called)
    # A long call comes in pieces; one that breaks off keeps what it has.
    def note(letters):
        return dict(tool_choice={"type": "tool", "name": "note"}, tools=[{"name": "note", "input_schema": {
            "type": "object", "properties": {"text": {"type": "string", "pattern": "^[a-z]{%d}$" % letters}}, "required": ["text"],
            "additionalProperties": False}}])

    def written(**asked):
        events = tiny.sync.messages.create(**parameters(tiny, asked), stream=True)
        return [event.delta.partial_json for event in events if event.type == "content_block_delta"]

    asked = dict(note(40), max_tokens=400)
    ((kind, (name, given)),) = ask(**asked).blocks
    pieces = written(**asked)
    check((kind, name) == ("tool_use", "note") and len(json.loads(given)["text"]) == 40, given)
    check(len(pieces) > 3 and json.loads("".join(pieces)) == json.loads(given), pieces)
    asked = dict(note(400), max_tokens=300)
    cut = whole(**asked)
    check((cut.stop_reason, cut.content[0].name) == ("max_tokens", "note"), cut)
    check(cut.content[0].input == {"INVALID_JSON": "".join(written(**asked))}, cut)
    # Hot answers are held too; the client reads the arguments while they come.
    for _ in range(8):
        with tiny.sync.messages.stream(**parameters(tiny, dict(held, tool_choice={"type": "tool", "name": "w"}, temperature=1))) as stream:
            snapshots = [event.snapshot for event in stream if event.type == "input_json"]
            block = stream.get_final_message().content[0]
        check(block.input["c"] in "ab" and snapshots[-1] == block.input and block.id.startswith("toolu_"), block)
    for choice in [{"type": "auto"}, {"type": "none"}, {"type": "auto", "disable_parallel_tool_use": True}]:
        check(ask(**held, tool_choice=choice).text == "42", choice)
    check(ask(**{**held, "tools": [{**weather, "strict": True}]}).text == "42")


def thinking():
    """A budget ends thoughts and leaves the rest to the answer; what is thought is signed, and can be sent back."""
    plain = ask(thinker)
    check([kind for kind, _ in plain.blocks] == ["text"] and plain.reason == "max_tokens", plain)
    check(ask(thinker, thinking={"type": "disabled"}) == plain)
    for budget in [1, 4, 9]:
        thought = ask(thinker, thinking={"type": "enabled", "budget_tokens": budget})
        (kinds, contents) = zip(*thought.blocks)
        check(kinds == ("thinking", "text") and len(contents[0][0]) == budget and len(contents[0][1]) == 32, thought)
        # Eight tokens end the thoughts; the template has opened them with seven.
        check(0 < len(contents[1]) <= 24 - 8 - budget and thought.usage == (plain.usage[0] + 7, 24), thought)
    adaptive = read(whole(thinker, thinking={"type": "adaptive"}))
    check(adaptive.blocks[0][0] == "thinking" and len(adaptive.blocks[0][1][0]) == 24 and adaptive.text == "", adaptive)
    with thinker.sync.messages.stream(**parameters(thinker, {"thinking": {"type": "enabled", "budget_tokens": 4}})) as stream:
        events = list(stream)
        final = stream.get_final_message()
    deltas = [event.delta.type for event in events if event.type == "content_block_delta"]
    check(list(dict.fromkeys(deltas)) == ["thinking_delta", "signature_delta", "text_delta"], deltas)
    check("".join(event.thinking for event in events if event.type == "thinking") == final.content[0].thinking)
    blocks = [block.model_dump(exclude_none=True) for block in final.content]
    answered = USER + [{"role": "assistant", "content": blocks}, {"role": "user", "content": "go on"}]
    check(ask(thinker, messages=answered, thinking={"type": "enabled", "budget_tokens": 4}).reason == "max_tokens")


# ---- refusals ----------------------------------------------------------------------------------------------------------
def errors():
    """Each is the client's own class, and says which field is wrong."""
    assistant = USER + [{"role": "assistant", "content": "so"}]
    for changes, word in [
        ({"temperature": 1.5}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": -1}, "top_k"), ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"), ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"stop_sequences": [""]}, "stop_sequences"), ({"container": "c"}, "container"),
        ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, "tools[0].type"), ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 24}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 4}, "messages": assistant}, "thinking"),
        ({"messages": [{"role": "user", "content": "a" * 3000}]}, "tokens"),
    ]:
        error = refusal(lambda: whole(**changes))
        check(error.status_code == 400 and word in error.body["error"]["message"], word, error)
        check(error.body["error"]["type"] == "invalid_request_error", error)
    mcp = {"extra_body": {"mcp_servers": [{"url": "u"}]}, "model": "tiny", "max_tokens": 1, "messages": USER}
    check("mcp_servers" in str(refusal(lambda: tiny.sync.messages.create(**mcp))))
    # A refusal comes before a stream begins, from both clients.
    hot = parameters(tiny, {"temperature": 2})
    refusal(lambda: tiny.sync.messages.create(**hot, stream=True))
    refusal(lambda: runner.run(tiny.later.messages.create(**hot)))
    check("gpt-9" in str(refusal(lambda: whole(model="gpt-9"), anthropic.NotFoundError)))
    refusal(lambda: tiny.sync.messages.batches.list(), anthropic.NotFoundError)
    stranger = parameters(tiny, {})
    error = refusal(lambda: tiny.sync.with_options(api_key="wrong").messages.create(**stranger), anthropic.AuthenticationError)
    check(error.status_code == 401 and error.body["error"]["type"] == "authentication_error" and "API key" in str(error), error)
    refusal(lambda: runner.run(tiny.later.with_options(api_key="wrong").messages.create(**stranger)), anthropic.AuthenticationError)


def limits():
    huge = [{"role": "user", "content": "a" * 20_000}]
    error = refusal(lambda: whole(narrow, messages=huge), anthropic.RequestTooLargeError)
    check(error.status_code == 413 and error.body["error"]["type"] == "request_too_large", error)

    async def seats():
        """Four requests of another API take all seats; a client that tries again gets in when they leave."""
        create, asked = narrow.later.messages.create, parameters(narrow, {})
        busy = {"model": "tiny", "messages": USER, "n": 64, "max_tokens": 400, "ignore_eos": True}
        taken = [asyncio.create_task(narrow.later.post("/v1/chat/completions", cast_to=object, body=busy)) for _ in range(4)]
        await until(lambda: narrow.metric("num_requests_waiting"), lambda n: n >= 200)
        try:
            check(False, await create(**asked))
        except anthropic.RateLimitError as error:
            check(error.status_code == 429 and int(error.response.headers["retry-after"]) > 0, error)
        patient, refused = narrow.retrying()
        again = asyncio.create_task(patient.messages.create(**asked))
        await refused.wait()
        for task in taken:
            task.cancel()
        return (await again).content[0].text

    check(runner.run(seats()) == "42")
    error = until_refused(lambda: whole(narrow, max_tokens=1))
    check(error.body["error"]["type"] == "rate_limit_error", error)


def together():
    """Many at once answer as each alone."""
    async def many():
        asked = [parameters(tiny, {"messages": [{"role": "user", "content": f"What is {i}+{i}?"}]}) for i in range(24)]
        alone = [read(await tiny.later.messages.create(**one)) for one in asked]
        return alone, [read(one) for one in await asyncio.gather(*(tiny.later.messages.create(**one) for one in asked))]

    alone, beside = runner.run(many())
    check(alone == beside and len({answer.text for answer in alone}) > 8)


run([sampling, ends, conversations, tools, thinking, errors, limits, together], anthropic)
