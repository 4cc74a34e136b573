"""The official OpenAI client over every endpoint and parameter: whole and streamed, sync and async.

Arguments: the addresses of three servers with the API key `secret`, and options. THINKER serves the model `toy`, whose chat
template can open thoughts; TINY serves `tiny`, the embedded model; NARROW too, with one running sequence, 4 requests at
once, 20 in a minute and bodies of 20,000 bytes. Every area is a function, and every check looks at what a parameter did to
an answer. Prints how many checks each area made, as JSON; the first that fails ends the script.
"""
import argparse
import asyncio
import collections
import datetime
import inspect
import json
import math
import random
import re
import sys
import time
import typing

import openai
import pydantic

from checks import QUESTION, RENDERED, USER, Server, check, nobody, refusal, run, runner, until, until_refused

parser = argparse.ArgumentParser()
parser.add_argument("thinker")
parser.add_argument("tiny")
parser.add_argument("narrow")
parser.add_argument("--schemas", type=int, default=1000, help="answers to ask for, each under a schema of its own")
parser.add_argument("--only", help="one area")
options = parser.parse_args()

LETTERS = "abcdefghijklmnopqrstuvwxyz .?{}\":,0123456789</>"
# Probabilities are compared as sums of rounded ones.
NEARLY = 1e-3

thinker, tiny, narrow = (
    Server(openai, url, model) for url, model in [(options.thinker, "toy"), (options.tiny, "tiny"), (options.narrow, "tiny")])


# ---- one question, asked in four ways ---------------------------------------------------------------------------------
class Answer(typing.NamedTuple):
    """What every endpoint tells about an answer; a list has an entry for each choice."""

    texts: list
    thoughts: list
    # (name, arguments) of each call.
    calls: list
    finishes: list
    # Tokens of the prompt, of the answer, of both.
    usage: tuple
    # (token, log-probability, {alternative: log-probability}).
    tokens: list = []

    @property
    def text(self):
        return self.texts[0]


def usage_of(usage):
    return usage and (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)


def chat_tokens(logprobs):
    entries = logprobs.content if logprobs else []
    return [(e.token, e.logprob, {t.token: t.logprob for t in e.top_logprobs}) for e in entries]


def completion_tokens(logprobs):
    return list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs)) if logprobs else []


def whole_chat(answer):
    assert [c.index for c in answer.choices] == list(range(len(answer.choices))) and answer.object == "chat.completion"
    messages = [c.message for c in answer.choices]
    assert all(message.role == "assistant" for message in messages)
    return Answer(
        [m.content or "" for m in messages], [getattr(m, "reasoning_content", "") for m in messages],
        [[(call.function.name, call.function.arguments) for call in m.tool_calls or []] for m in messages],
        [c.finish_reason for c in answer.choices], usage_of(answer.usage), [chat_tokens(c.logprobs) for c in answer.choices])


def streamed_chat(chunks):
    """The same out of the pieces; the usage comes once, in the last chunk, which has no choice."""
    n = 1 + max(choice.index for chunk in chunks for choice in chunk.choices)
    texts, thoughts, finishes = [""] * n, [""] * n, [None] * n
    calls, tokens = [{} for _ in range(n)], [[] for _ in range(n)]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for i, delta in {choice.index: choice.delta for chunk in reversed(chunks) for choice in chunk.choices}.items():
        assert delta.role == "assistant", (i, delta)
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        i, delta = choice.index, choice.delta
        assert finishes[i] is None, "nothing comes behind the end"
        texts[i] += delta.content or ""
        thoughts[i] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            name, arguments = calls[i].get(call.index, ("", ""))
            calls[i][call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
        tokens[i] += chat_tokens(choice.logprobs)
        finishes[i] = choice.finish_reason
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True] and not chunks[-1].choices
    return Answer(texts, thoughts, [list(of.values()) for of in calls], finishes, usage_of(chunks[-1].usage), tokens)


def whole_completion(answer):
    assert [c.index for c in answer.choices] == list(range(len(answer.choices))) and answer.object == "text_completion"
    n = len(answer.choices)
    return Answer([c.text for c in answer.choices], [""] * n, [[]] * n, [c.finish_reason for c in answer.choices],
                  usage_of(answer.usage), [completion_tokens(c.logprobs) for c in answer.choices])


def streamed_completion(chunks):
    n = 1 + max(choice.index for chunk in chunks for choice in chunk.choices)
    texts, finishes, tokens = [""] * n, [None] * n, [[] for _ in range(n)]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        finishes[choice.index] = choice.finish_reason
        tokens[choice.index] += completion_tokens(choice.logprobs)
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True] and not chunks[-1].choices
    return Answer(texts, [""] * n, [[]] * n, finishes, usage_of(chunks[-1].usage), tokens)


def whole_response(response):
    thoughts = [part.text for item in response.output if item.type == "reasoning" for part in item.content]
    calls = [(item.name, item.arguments) for item in response.output if item.type == "function_call"]
    finish = response.incomplete_details.reason if response.status == "incomplete" else response.status
    usage = response.usage
    return Answer([response.output_text], ["".join(thoughts)], [calls], [finish],
                  (usage.input_tokens, usage.output_tokens, usage.total_tokens))


def streamed_response(events):
    """The last event holds the whole response; the pieces before it must say the same."""
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[:2] == ["response.created", "response.in_progress"]
    answer = whole_response(events[-1].response)
    assert kinds[-1] == ("response.completed" if answer.finishes == ["completed"] else "response.incomplete")

    def joined(kind):
        return "".join(event.delta for event in events if event.type == kind)

    assert joined("response.output_text.delta") == answer.text
    assert joined("response.reasoning_text.delta") == answer.thoughts[0]
    assert joined("response.function_call_arguments.delta") == "".join(arguments for _, arguments in answer.calls[0])
    return answer


# An endpoint: its method, what is asked unless a case says otherwise, and how its answers are read.
BASE = dict(max_tokens=24, seed=11, temperature=1, ignore_eos=True)
ENDPOINTS = {
    "chat": (lambda client: client.chat.completions, whole_chat, streamed_chat,
             {**BASE, "messages": USER, "logprobs": True, "top_logprobs": 20}),
    "completions": (lambda client: client.completions, whole_completion, streamed_completion,
                    {**BASE, "prompt": RENDERED, "logprobs": 20}),
    "responses": (lambda client: client.responses, whole_response, streamed_response,
                  {"input": USER, "max_output_tokens": 24, "temperature": 0}),
}


def arguments_of(create, server, parameters):
    """Those that the client has no argument for travel in `extra_body`; `None` takes one away."""
    known = inspect.signature(create).parameters
    parameters = {"model": server.model, **{name: value for name, value in parameters.items() if value is not None}}
    extra = {name: value for name, value in parameters.items() if name not in known}
    return {**{name: value for name, value in parameters.items() if name in known}, "extra_body": extra}


async def all_of(stream):
    return [piece async for piece in await stream]


def whole(endpoint, server=tiny, **changes):
    """The client's own object."""
    methods, _, _, base = ENDPOINTS[endpoint]
    create = methods(server.sync).create
    return create(**arguments_of(create, server, {**base, **changes}))


def pieces(endpoint, server=tiny, **changes):
    """The client's own chunks or events."""
    methods, _, _, base = ENDPOINTS[endpoint]
    create = methods(server.sync).create
    return list(create(**arguments_of(create, server, {**base, **changes}), stream=True))


def ask(endpoint, server=tiny, **changes):
    """The answer, which is the same whole and streamed, from the sync and from the async client."""
    methods, read_whole, read_streamed, base = ENDPOINTS[endpoint]
    sync, later = methods(server.sync).create, methods(server.later).create
    arguments = arguments_of(sync, server, {**base, **changes})
    streams = {"stream": True, **({} if endpoint == "responses" else {"stream_options": {"include_usage": True}})}
    answer = read_whole(sync(**arguments))
    check(read_streamed(list(sync(**arguments, **streams))) == answer, endpoint, changes, answer)
    check(read_whole(runner.run(later(**arguments))) == answer, endpoint, changes, answer)
    check(read_streamed(runner.run(all_of(later(**arguments, **streams)))) == answer, endpoint, changes, answer)
    return answer


# ---- what a parameter does to tokens, told from the model's own log-probabilities --------------------------------------
def better(alternatives, logprob):
    """The probability of all tokens that are likelier."""
    return sum(math.exp(other) for other in alternatives.values() if other > logprob)


def rank(token):
    return sum(other > token[1] for other in token[2].values())


def in_nucleus(token, p):
    return better(token[2], token[1]) < p + NEARLY


def is_typical(token, p):
    """The tokens whose surprise is nearer to the expected one have less than p together."""
    _, logprob, alternatives = token
    expected = -sum(math.exp(l) * l for l in alternatives.values())
    distance = abs(-logprob - expected)
    return sum(math.exp(l) for l in alternatives.values() if abs(-l - expected) < distance - NEARLY) < p + NEARLY


def is_penalised_choice(tokens, presence, frequency):
    """Each is the likeliest once the penalties of the answer so far are taken off."""
    seen, fits = collections.Counter(), True
    for token, logprob, alternatives in tokens:
        def penalised(text, logprob):
            return logprob - presence * (seen[text] > 0) - frequency * seen[text]

        best = max(penalised(text, other) for text, other in alternatives.items())
        fits = fits and penalised(token, logprob) >= best - NEARLY
        seen[token] += 1
    return fits


def shown(tokens):
    """The text of tokens: markers of the model leave none."""
    return "".join(token for token, _, _ in tokens if len(token) == 1)


def every(answer, holds):
    return all(holds(token) for tokens in answer.tokens for token in tokens)


def mean_logprob(answer):
    all_tokens = [token[1] for tokens in answer.tokens for token in tokens]
    return sum(all_tokens) / len(all_tokens)


def sampling(endpoint):
    """The parameters that chat and completions share; how each cuts off tokens is what llama.cpp and vLLM mean by it."""
    plain, greedy = ask(endpoint), ask(endpoint, temperature=0)
    check(len(plain.tokens[0]) == 24 and shown(plain.tokens[0]) == plain.text and plain.finishes == ["length"], plain)
    steps = greedy.tokens[0]
    check(plain.usage == (len(tiny.ids(RENDERED)), 24, len(tiny.ids(RENDERED)) + 24), plain.usage)
    check(every(greedy, lambda t: rank(t) == 0) and not every(plain, lambda t: rank(t) == 0), greedy)
    check(ask(endpoint, seed=12).text != plain.text)
    check(len({whole(endpoint, seed=None).choices[0].model_dump_json() for _ in range(4)}) > 1)

    # Several choices: the first is the lone one, all differ, the prompt counts once.
    many = ask(endpoint, n=8)
    check(many.text == plain.text and len(set(many.texts)) == 8, many.texts)
    check(many.usage[:2] == (plain.usage[0], 8 * 24), many.usage)
    check(ask(endpoint, n=2, best_of=2).texts == many.texts[:2])
    check(mean_logprob(ask(endpoint, n=8, temperature=0.3)) > mean_logprob(many) > mean_logprob(ask(endpoint, n=8, temperature=2)))

    # What cuts off tokens; without it the same seeds choose some of those.
    for parameters, holds in [
        ({"top_k": 2}, lambda t: rank(t) < 2),
        ({"top_p": 0.5}, lambda t: in_nucleus(t, 0.5)),
        ({"min_p": 0.4}, lambda t: t[1] >= max(t[2].values()) + math.log(0.4) - NEARLY),
        ({"typical_p": 0.3}, lambda t: is_typical(t, 0.3)),
    ]:
        check(every(ask(endpoint, n=8, **parameters), holds), parameters)
        check(not every(many, holds), parameters)
    check(ask(endpoint, top_k=-1, top_p=1, min_p=0, typical_p=1) == plain)

    # Penalties: exactly the likeliest token after them.
    for parameters, presence, frequency in [
        ({"presence_penalty": 1.5}, 1.5, 0), ({"frequency_penalty": 0.75}, 0, 0.75),
        ({"presence_penalty": 0.5, "frequency_penalty": 0.5}, 0.5, 0.5), ({"frequency_penalty": -2}, 0, -2),
    ]:
        penalised = ask(endpoint, temperature=0, **parameters)
        check(is_penalised_choice(penalised.tokens[0], presence, frequency), parameters, penalised.text)
        check(not is_penalised_choice(greedy.tokens[0], presence, frequency), parameters, greedy.text)
    repeated = ask(endpoint, temperature=0, repetition_penalty=5)
    check(len(set(repeated.text)) > len(set(greedy.text)) + 4 and not set(repeated.text[:4]) & set(QUESTION), repeated.text)

    # Biases: one token again and again, or the first one never.
    check(ask(endpoint, logit_bias={str(tiny.ids("z")[0]): 100}).text == "z" * 24)
    second = sorted(steps[0][2].items(), key=lambda pair: -pair[1])[1][0]
    check(ask(endpoint, temperature=0, logit_bias={str(tiny.ids(steps[0][0])[0]): -100}).tokens[0][0][0] == second)

    # Where an answer ends.
    check(ask(endpoint, max_tokens=5).tokens == [plain.tokens[0][:5]])
    check(ask(endpoint, max_tokens=9, max_completion_tokens=5).usage[1] == 5)
    own = ask(endpoint, temperature=0, ignore_eos=False)
    check((own.text, own.finishes, own.usage[1]) == ("42", ["stop"], 3), own)
    word = greedy.text[8:11]
    before = greedy.text[:greedy.text.index(word)]
    stop = {"temperature": 0, "stop": ["never", word]}
    stopped = ask(endpoint, **stop)
    check((stopped.text, stopped.finishes) == (before, ["stop"]) and len(before) + 3 <= stopped.usage[1] < 20, stopped)
    check(ask(endpoint, **{**stop, "stop": word}) == stopped)
    check(whole(endpoint, **stop).choices[0].model_extra["stop_reason"] == word)
    check(ask(endpoint, **stop, include_stop_str_in_output=True).text == before + word)
    end = {"temperature": 0, "stop_token_ids": tiny.ids(greedy.text[4]), "logprobs": None, "top_logprobs": None}
    at = [step[0] for step in steps].index(greedy.text[4])
    ended = ask(endpoint, **end)
    check((ended.text, ended.finishes, ended.usage[1]) == (shown(steps[:at]), ["stop"], at + 1), ended)
    late = ask(endpoint, **end, min_tokens=12)
    check(greedy.text[4] not in late.text and late.usage[1] > 12, late)

    # Log-probabilities: of each token that there is, and as many others as were asked for.
    check(every(plain, lambda t: len(t[2]) == 20 and sum(map(math.exp, t[2].values())) < 1 + NEARLY))
    check(every(plain, lambda t: rank(t) == 20 or abs(t[2].get(t[0], math.inf) - t[1]) < NEARLY))
    few = {"top_logprobs": 3} if endpoint == "chat" else {"logprobs": 3}
    check([t[1] for t in ask(endpoint, **few).tokens[0]] == [t[1] for t in plain.tokens[0]])
    check(every(ask(endpoint, **few), lambda t: len(t[2]) == 3))
    check(ask(endpoint, logprobs=None, top_logprobs=None) == plain._replace(tokens=[[]]))

    # What others make of an answer changes none of it.
    hints = dict(user="ann", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="s", verbosity="low",
                 prompt_cache_key="k", prediction={"type": "content", "content": "42"}, priority=3, nobody_knows_this=1)
    check(ask(endpoint, **hints) == plain)


def cached(endpoint):
    """Prompts with a common beginning share their pages, among requests of one salt."""
    salt = str(time.time())
    text = "the same long beginning of two prompts " * 4
    asked = {"messages": [{"role": "user", "content": text}]} if endpoint == "chat" else {"prompt": text}
    of = [whole(endpoint, **asked, cache_salt=s).usage.prompt_tokens_details.cached_tokens for s in [salt, salt, salt + "2"]]
    check(of[0] == 0 and of[1] > 100 and of[2] == 0, of)


def stream_options(endpoint):
    check(all(chunk.usage is None for chunk in pieces(endpoint)))
    check(pieces(endpoint, stream_options={"include_usage": True, "include_obfuscation": False})[-1].usage.completion_tokens == 24)
    told = pieces(endpoint, stream_options={"include_usage": True, "continuous_usage_stats": True})
    made = [chunk.usage.completion_tokens for chunk in told]
    check(made == sorted(made) and len(set(made)) > 10 and made[-1] == 24, made)
    check(len({chunk.usage.prompt_tokens for chunk in told}) == 1)


class Point(pydantic.BaseModel):
    x: typing.Literal[1, 2, 3]
    up: bool


POINT = {**Point.model_json_schema(), "additionalProperties": False}
FORMS = [
    ({"guided_choice": ["north", "south"]}, r"north|south"),
    ({"guided_regex": r"[a-c]{3}-[0-9]{2}"}, r"[a-c]{3}-[0-9]{2}"),
    ({"guided_grammar": 'start: "a" ("b" | "c")'}, r"ab|ac"),
    ({"guided_json": POINT}, Point),
    ({"guided_json": json.dumps(POINT)}, Point),
    ({"structured_outputs": {"choice": ["east", "west"]}}, r"east|west"),
    ({"structured_outputs": {"regex": "[xy]{4}"}}, r"[xy]{4}"),
    ({"structured_outputs": {"grammar": 'start: "q" | "r"'}}, r"q|r"),
    ({"structured_outputs": {"json": POINT}}, Point),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": POINT}}}, Point),
]


def forms(endpoint):
    """An answer has the form that was asked for, even at a high temperature, and ends by itself."""
    for asked, wanted in FORMS:
        answer = ask(endpoint, **asked, temperature=1.5, max_tokens=120, ignore_eos=None)
        if wanted is Point:
            Point.model_validate_json(answer.text)
        check(wanted is Point or re.fullmatch(wanted, answer.text), asked, answer.text)
        check(answer.finishes == ["stop"], asked, answer.finishes)
    # An object of any kind: a bias closes it before long.
    closing = {str(i): 30 for i in tiny.ids('}"]')}
    for asked in [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]:
        answer = ask(endpoint, **asked, logit_bias=closing, max_tokens=200, ignore_eos=None)
        check(isinstance(json.loads(answer.text), dict) and answer.finishes == ["stop"], answer.text)
    check(ask(endpoint, response_format={"type": "text"}) == ask(endpoint))


def chat_sampling():
    sampling("chat")
    cached("chat")
    stream_options("chat")
    forms("chat")


def completions_sampling():
    sampling("completions")
    cached("completions")
    stream_options("completions")
    forms("completions")
    # The same tokens under the same seed, whichever endpoint rendered the prompt.
    check(ask("completions").tokens == ask("chat").tokens)


# ---- what each endpoint has for itself ---------------------------------------------------------------------------------
def models():
    for server in [tiny, thinker]:
        check([m.id for m in server.sync.models.list()] == [server.model])
        check(runner.run(server.later.models.retrieve(server.model)).id == server.model)


def completions():
    greedy = dict(temperature=0, logprobs=None, max_tokens=6)
    one, other = (ask("completions", **greedy, prompt=p).text for p in ["What is", "Hello"])
    # A text, token ids, several of either; two choices for each prompt, in their order.
    check(ask("completions", **greedy, prompt=["What is", "Hello"]).texts == [one, other])
    check(ask("completions", **greedy, prompt=tiny.ids("What is")).texts == [one])
    several = ask("completions", **greedy, prompt=[tiny.ids("What is"), tiny.ids("Hello")], n=2)
    check(several.texts == [one, one, other, other] and several.usage[:2] == (12, 24), several)
    check(ask("completions", **greedy, prompt="What is", add_special_tokens=False).text == one)
    check(ask("completions", max_tokens=None).usage[1] == 16, "OpenAI's default")
    # The prompt again, with its own log-probabilities: those that it has when it is an answer.
    no_end = {"logit_bias": {str(tiny.ids("<eos>")[0]): -100}, "temperature": 0, "max_tokens": 6}
    one = ask("completions", **no_end, prompt="What is", logprobs=None).text
    echoed = whole("completions", **no_end, prompt="What is", echo=True, logprobs=2).choices[0]
    check(echoed.text == "What is" + one and len(echoed.logprobs.tokens) == 13)
    check(echoed.logprobs.token_logprobs[0] is None and echoed.logprobs.text_offset == list(range(13)))
    check(whole("completions", **no_end, prompt="What is", echo=True, logprobs=None).choices[0].text == "What is" + one)
    scored = whole("completions", prompt="What is" + one, max_tokens=1, prompt_logprobs=0).choices[0].model_extra["prompt_logprobs"]
    of_ids = [token and next(iter(token.values())) for token in scored]
    check(of_ids[0] is None and "".join(t["decoded_token"] for t in of_ids[1:]) == ("What is" + one)[1:])
    both = zip(of_ids[1:], echoed.logprobs.token_logprobs[1:])
    check(all(abs(t["logprob"] - logprob) < NEARLY for t, logprob in both))
    check(tiny.post("/detokenize", tokens=tiny.ids("What is"))["prompt"] == "What is")


def conversations():
    """How messages become a prompt."""
    greedy = dict(temperature=0, logprobs=None, top_logprobs=None)
    kind = {"role": "system", "content": "be kind"}
    answer = ask("chat", **greedy, messages=[kind] + USER)
    check(answer.text == ask("completions", temperature=0, logprobs=None, prompt=f"<bos><system>be kind<user>{QUESTION}<assistant>").text)
    check(ask("chat", **greedy, messages=[{**kind, "role": "developer"}] + USER) == answer)
    parts = [{"type": "text", "text": QUESTION[:4]}, {"type": "text", "text": QUESTION[4:]}]
    check(ask("chat", **greedy, messages=[kind, {"role": "user", "content": parts, "name": "ann"}]) == answer)
    call = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": "{\"c\": 1}"}}
    turns = USER + [{"role": "assistant", "content": "so", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "1"}]
    told = ask("chat", **greedy, messages=turns)
    check(told.usage[0] == len(tiny.ids(f"<bos><user>{QUESTION}<assistant>so<eos><user>1<assistant>")), told.usage)
    # The assistant's last words are gone on with.
    begun = USER + [{"role": "assistant", "content": "4"}]
    goes_on = ask("chat", **greedy, messages=begun, continue_final_message=True, add_generation_prompt=False)
    check(goes_on.text == ask("completions", temperature=0, logprobs=None, prompt=RENDERED + "4").text)
    check(ask("chat", **greedy, add_generation_prompt=False).usage[0] == len(tiny.ids(RENDERED)) - 1)
    check(tiny.post("/tokenize", messages=USER)["tokens"] == tiny.ids(RENDERED))


def thoughts():
    """A template that can open thoughts does when it is told to; what is thought is no part of the answer."""
    thinks = dict(server=thinker, temperature=0, top_logprobs=5, ignore_eos=None)
    silent = ask("chat", **thinks)
    check(len(silent.text) == 24 and silent.thoughts == [""], silent)
    for asked in [{"reasoning_effort": "high"}, {"reasoning_effort": "minimal"}, {"chat_template_kwargs": {"enable_thinking": True}}]:
        thought = ask("chat", **thinks, **asked)
        check(thought.text == "" and len(thought.thoughts[0]) == 24 and thought.usage[0] == silent.usage[0] + 7, thought)
    check(ask("chat", **thinks, reasoning_effort="none") == silent)
    # Thoughts that the model opens and closes by itself, made by a form.
    asked = dict(guided_regex="<think>[a-z]{3}</think>[0-9]{2}", ignore_eos=None)
    both = ask("chat", **asked)
    check(re.fullmatch("[a-z]{3}", both.thoughts[0]) and re.fullmatch("[0-9]{2}", both.text), both)
    with tiny.sync.chat.completions.stream(model="tiny", messages=USER, extra_body=asked) as stream:
        kinds = {event.type for event in stream}
        check(stream.get_final_completion().choices[0].message.content.isdigit() and "content.delta" in kinds, kinds)
    # The tokens of thoughts are told apart: here <think>, three letters and </think> of seven.
    counted = whole("chat", **asked)
    check(5 <= counted.usage.completion_tokens_details.reasoning_tokens < counted.usage.completion_tokens, counted.usage)
    check(whole("chat").usage.completion_tokens_details.reasoning_tokens == 0)
    effort = ask("responses", server=thinker, reasoning={"effort": "high"})
    check(effort.text == "" and len(effort.thoughts[0]) == 24, effort)
    thinking = whole("responses", server=thinker, reasoning={"effort": "high"}).usage
    check(thinking.output_tokens_details.reasoning_tokens == thinking.output_tokens == 24, thinking)
    check(ask("responses", server=thinker, reasoning={"effort": "none"}).thoughts == [""])


WEATHER = {"type": "function", "function": {"name": "w", "description": "the weather", "parameters": {
    "type": "object", "properties": {"c": {"enum": ["a", "b"]}}, "required": ["c"], "additionalProperties": False}}}
TIME = {"type": "function", "function": {"name": "t", "parameters": {"type": "object", "additionalProperties": False}}}


def note(letters):
    """A tool with one long argument."""
    return {"type": "function", "function": {"name": "note", "parameters": {
        "type": "object", "properties": {"text": {"type": "string", "pattern": "^[a-z]{%d}$" % letters}}, "required": ["text"],
        "additionalProperties": False}}}


CALL = r'<tool_call>\{"name": "(w|t)", "arguments": \{"c": "[ab]"\}\}</tool_call>'


def tools():
    free = dict(tools=[WEATHER, TIME], max_tokens=400, ignore_eos=None, logprobs=None, top_logprobs=None)
    for choice, names in [({"type": "function", "function": {"name": "w"}}, {"w"}), ("required", {"w", "t"})]:
        for seed in range(4):
            forced = ask("chat", **free, tool_choice=choice, seed=seed, temperature=1.5)
            ((name, arguments),) = forced.calls[0]
            check(name in names and forced.finishes == ["tool_calls"] and forced.text == "", forced)
            check(json.loads(arguments) in ([{}] if name == "t" else [{"c": "a"}, {"c": "b"}]), forced)
    # A long call comes in pieces: who is called, then the arguments as they are written.
    for seed in range(3):
        asked = {**free, "tools": [note(40)], "tool_choice": "required", "seed": seed, "temperature": 1.5}
        ((_, arguments),) = ask("chat", **asked).calls[0]
        deltas = [call for chunk in pieces("chat", **asked) for choice in chunk.choices for call in choice.delta.tool_calls or []]
        first, *more = deltas
        check((first.index, first.type, first.function.name, first.function.arguments) == (0, "function", "note", "") and first.id, first)
        check(len(more) > 3 and all((d.index, d.id, d.type, d.function.name) == (0, None, None, None) for d in more), more)
        check("".join(d.function.arguments for d in more) == arguments and len(json.loads(arguments)["text"]) == 40, arguments)
    # One that breaks off keeps what it has.
    cut = ask("chat", **{**asked, "tools": [note(400)], "max_tokens": 300, "temperature": 0})
    ((name, arguments),) = cut.calls[0]
    check((name, cut.finishes, cut.text) == ("note", ["length"], ""), cut)
    check(re.match(r'\{\s*"text"', arguments) and not arguments.endswith("}"), arguments)
    # Two calls in one answer, made by a form; one of them if the client wants no more.
    twice = {**free, "guided_regex": CALL + CALL}
    check(len(ask("chat", **twice).calls[0]) == 2 and len(ask("chat", **twice, parallel_tool_calls=True).calls[0]) == 2)
    check(len(ask("chat", **twice, parallel_tool_calls=False).calls[0]) == 1)
    calls = whole("chat", **twice).choices[0].message.tool_calls
    check(len({call.id for call in calls}) == 2 and all(call.type == "function" for call in calls))
    deltas = [call for chunk in pieces("chat", **twice) for choice in chunk.choices for call in choice.delta.tool_calls or []]
    check([d.index for d in deltas] == sorted(d.index for d in deltas) and {d.index for d in deltas} == {0, 1}, deltas)
    check([d.function.name for d in deltas if d.id] == [call.function.name for call in calls], deltas)
    # `auto` leaves an answer alone, and so does a strict tool that is not called; without tools markup is text.
    check(ask("chat", **free, tool_choice="auto", temperature=0).text == ask("chat", temperature=0, ignore_eos=None).text)
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    check(ask("chat", **{**free, "tools": [strict]}, temperature=0).text == "42")
    for asked in [{"tool_choice": "none"}, {"tools": None}]:
        spoken = ask("chat", **{**free, "guided_regex": CALL, **asked})
        check(spoken.calls == [[]] and re.fullmatch(CALL, spoken.text) and spoken.finishes == ["stop"], spoken)


def responses():
    said = ask("responses")
    check((said.text, said.finishes) == ("42", ["completed"]), said)
    # Texts, items and instructions make the prompt that the chat endpoint makes of them.
    check(ask("responses", input=QUESTION) == said)
    check(ask("responses", input=[{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]) == said)
    kind = {"role": "system", "content": "be kind"}
    chat = whole("chat", messages=[kind] + USER, temperature=0, ignore_eos=None).choices[0].message.content
    check(ask("responses", instructions="be kind").text == chat == ask("responses", input=[kind] + USER).text)
    turns = USER + [{"type": "reasoning", "id": "r", "summary": []},
                    {"type": "function_call", "call_id": "c", "name": "w", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "1"}]
    check(ask("responses", input=turns).usage[0] == len(tiny.ids(f"<bos><user>{QUESTION}<assistant><eos><user>1<assistant>")))
    # Sampling: seeds give the chat endpoint's answers, a small top_p leaves the likeliest token alone.
    long = {"input": "hello there", "max_output_tokens": 40}
    hot = ask("responses", **long, temperature=1.5, seed=3)
    chat = whole("chat", messages=[{"role": "user", "content": "hello there"}], temperature=1.5, seed=3, max_tokens=40, ignore_eos=None)
    check(hot.text == chat.choices[0].message.content != ask("responses", **long).text)
    check(ask("responses", **long, temperature=1.5, top_p=1e-4, seed=3) == ask("responses", **long))
    check(len({whole("responses", **long, temperature=1.5).output_text for _ in range(4)}) > 1)
    cut = ask("responses", input="Who are you?", max_output_tokens=6)
    check((cut.text, cut.finishes, cut.usage[1]) == ("I am a", ["max_output_tokens"], 6), cut)
    # Forms.
    asked = {"format": {"type": "json_schema", "name": "p", "strict": True, "schema": POINT}}
    for seed in range(4):
        held = ask("responses", text=asked, temperature=1.5, max_output_tokens=400, seed=seed)
        check(Point.model_validate_json(held.text) and held.finishes == ["completed"], held)
    parsed = tiny.sync.responses.parse(model="tiny", input=QUESTION, text_format=Point)
    check(isinstance(parsed.output_parsed, Point))
    check(ask("responses", text={"format": {"type": "text"}}) == said)
    nothing = {**POINT, "properties": {}, "required": []}
    objects = [ask("responses", text={"format": {"type": "json_object"}}, temperature=1, seed=seed) for seed in range(8)]
    check(all(answer.text.startswith("{") for answer in objects), objects)
    check(all(json.loads(answer.text) == {} for answer in objects if answer.finishes == ["completed"]), objects)
    check({answer.finishes[0] for answer in objects} == {"completed", "max_output_tokens"}, objects)
    check(ask("responses", text={"format": {"type": "json_schema", "name": "n", "schema": nothing}}).text.split() in [["{}"], ["{", "}"]])
    # Tools.
    function = {"type": "function", "strict": True, **WEATHER["function"]}
    for choice in ["required", {"type": "function", "name": "w"}]:
        called = ask("responses", tools=[function], tool_choice=choice, temperature=1.5, max_output_tokens=400, seed=5)
        ((name, arguments),) = called.calls[0]
        check(name == "w" and json.loads(arguments)["c"] in "ab" and called.finishes == ["completed"], called)
    long = {"type": "function", **note(40)["function"]}
    asked = dict(tools=[long], tool_choice="required", temperature=1.5, max_output_tokens=400, seed=5)
    ((_, arguments),) = ask("responses", **asked).calls[0]
    written = [e.delta for e in pieces("responses", **asked) if e.type == "response.function_call_arguments.delta"]
    check(len(written) > 3 and "".join(written) == arguments and len(json.loads(arguments)["text"]) == 40, written)
    asked.update(tools=[{"type": "function", **note(400)["function"]}], temperature=0, max_output_tokens=300)
    check(ask("responses", **asked).finishes == ["max_output_tokens"])
    (item,) = whole("responses", **asked).output
    check((item.type, item.name, item.status) == ("function_call", "note", "incomplete") and item.arguments.startswith("{"), item)
    for choice in ["none", "auto"]:
        check(ask("responses", tools=[function], tool_choice=choice, parallel_tool_calls=False) == said)
    # Log-probabilities where they are asked for, as the chat has them.
    asked = dict(include=["message.output_text.logprobs"], top_logprobs=3)
    (item,) = whole("responses", **asked).output
    pairs = [(e.token, e.logprob, {t.token: t.logprob for t in e.top_logprobs}) for e in item.content[0].logprobs]
    check("".join(token for token, *_ in pairs).startswith(item.content[0].text) and len(pairs[0][2]) == 3, pairs)
    deltas = [e for e in pieces("responses", **asked) if e.type == "response.output_text.delta"]
    check([entry.token for delta in deltas for entry in delta.logprobs] == [token for token, *_ in pairs])
    # What is told back.
    told = whole("responses", metadata={"a": "b"}, user="ann", store=True, parallel_tool_calls=False, top_p=0.5, instructions="be kind")
    check((told.metadata, told.parallel_tool_calls, told.top_p, told.instructions) == ({"a": "b"}, False, 0.5, "be kind"))
    check(told.object == "response" and told.error is None and told.model_extra["store"] is False)
    text = "the same long beginning of two prompts " * 4
    salt = str(time.time())
    used = [whole("responses", input=text, cache_salt=s).usage.input_tokens_details.cached_tokens for s in [salt, salt, salt + "2"]]
    check(used[0] == 0 and used[1] > 100 and used[2] == 0, used)


def helpers():
    """What the client has above the plain requests: parsed answers and events of its own, from both clients."""
    ask_point = dict(model="tiny", messages=USER, response_format=Point, temperature=1.5)
    check(isinstance(tiny.sync.chat.completions.parse(**ask_point).choices[0].message.parsed, Point))

    class W(pydantic.BaseModel):
        c: typing.Literal["a", "b"]

    called = tiny.sync.chat.completions.parse(model="tiny", messages=USER, tools=[openai.pydantic_function_tool(W)], tool_choice="required")
    check(isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, W))

    async def later():
        async with tiny.later.chat.completions.stream(**ask_point) as stream:
            kinds = [event.type async for event in stream]
            point = (await stream.get_final_completion()).choices[0].message.parsed
        check(isinstance(point, Point) and "content.delta" in kinds and "content.done" in kinds, kinds)
        async with tiny.later.responses.stream(model="tiny", input=QUESTION, text_format=Point) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        check(isinstance(final.output_parsed, Point) and kinds[-1] == "response.completed", kinds)

    runner.run(later())
    function = {"type": "function", "strict": True, **WEATHER["function"]}
    with tiny.sync.responses.stream(model="tiny", input=QUESTION, tools=[function], tool_choice="required") as stream:
        kinds = [event.type for event in stream]
        item = stream.get_final_response().output[0]
    check(kinds.count("response.function_call_arguments.done") == 1 and json.loads(item.arguments)["c"] in "ab", kinds)
    raw = tiny.sync.chat.completions.with_raw_response.create(model="tiny", messages=USER, temperature=0)
    check(raw.headers["content-type"] == "application/json" and raw.parse().choices[0].message.content == "42")
    with tiny.sync.completions.with_streaming_response.create(model="tiny", prompt=RENDERED, stream=True) as raw:
        lines = [line for line in raw.iter_lines() if line]
    check(raw.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]", lines[-1])


def together():
    """Many at once answer as each alone; a client that leaves gives back what it held."""
    async def many(create, parameters):
        return await asyncio.gather(*(create(model="tiny", **parameters, seed=seed) for seed in range(24)))

    asked = dict(messages=USER, temperature=1.5, max_tokens=24)
    alone = [tiny.sync.chat.completions.create(model="tiny", **asked, seed=seed).choices[0].message.content for seed in range(24)]
    check([a.choices[0].message.content for a in runner.run(many(tiny.later.chat.completions.create, asked))] == alone)
    check(len(set(alone)) > 3, alone)

    async def leave():
        create = tiny.later.chat.completions.create
        stream = await create(model="tiny", messages=USER, stream=True, n=32, max_tokens=480, extra_body={"ignore_eos": True})
        async for _ in stream:
            break
        await stream.close()
        seen = tiny.prompts()
        create = tiny.later.completions.create
        asked = asyncio.create_task(create(model="tiny", prompt="a", n=32, max_tokens=480, extra_body={"ignore_eos": True}))
        await until(tiny.prompts, lambda n: n > seen)
        asked.cancel()
        await until(aborted, lambda n: n == before + 64)

    def aborted():
        return tiny.metric("request_success_total", 'finished_reason="abort"')

    before = aborted()
    runner.run(leave())
    check(tiny.metric("num_requests_running") == 0)


# ---- refusals ----------------------------------------------------------------------------------------------------------
REFUSED = {
    "chat": [("functions", [{"name": "f"}]), ("function_call", {"name": "f"}), ("audio", {"voice": "v", "format": "mp3"}),
             ("modalities", ["audio"]), ("web_search_options", {}), ("prompt_logprobs", 0), ("max_completion_tokens", 0),
             ("top_logprobs", 21), ("reasoning_effort", "much"), ("messages", [])],
    "completions": [("suffix", "end"), ("prompt", []), ("logprobs", 21), ("prompt_logprobs", 1)],
    "responses": [("previous_response_id", "r"), ("conversation", "c"), ("background", True), ("temperature", 3),
                  ("top_p", 0), ("max_output_tokens", 0), ("input", [])],
    "both": [("best_of", 3), ("use_beam_search", True), ("temperature", 2.5), ("top_p", 0), ("min_p", 1.5), ("typical_p", 0),
             ("top_k", -2), ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0), ("n", 65),
             ("logit_bias", {"a": 1}), ("min_tokens", 99), ("seed", 1.5), ("stop", [""]), ("priority", -1),
             ("guided_regex", "("), ("response_format", {"type": "xml"}), ("stream_options", {"include_usage": True})],
}


def errors():
    """Each is the client's own class, and says which field is wrong."""
    for endpoint in ["chat", "completions", "responses"]:
        for name, value in REFUSED[endpoint] + (REFUSED["both"] if endpoint != "responses" else []):
            error = refusal(lambda: whole(endpoint, **{name: value}))
            check(error.status_code == 400 and (error.param or "").startswith(name) and name in error.body["message"], name, error)
    error = refusal(lambda: whole("completions", echo=True, stream=True))
    check(error.param == "echo", error)
    error = refusal(lambda: whole("chat", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}}))
    check(error.param == "tool_choice" and error.type == "invalid_request_error", error)
    # Schemas that contradict themselves, or that sampling cannot be held to.
    of = {"type": "array", "items": {"type": "integer"}}
    for schema, word in [({"type": "string", "minLength": 3, "maxLength": 2}, ""), ({"enum": []}, ""), ({"$ref": "#/$defs/a"}, "$defs"),
                         ({**of, "uniqueItems": True}, "uniqueItems"), ({**of, "contains": {"const": 3}}, "contains"),
                         ({"not": {"type": "null"}}, "not"), ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "oneOf"),
                         ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired")]:
        error = refusal(lambda: whole("chat", response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}))
        check(error.param == "response_format" and word in error.body["message"], error)
    error = refusal(lambda: whole("completions", prompt="a" * 30_000))
    check(error.param == "prompt" and "30000 tokens" in error.body["message"], error)
    # A refusal comes before a stream begins, from both clients.
    check(refusal(lambda: pieces("chat", temperature=9)).param == "temperature")
    check(refusal(lambda: runner.run(tiny.later.responses.create(model="tiny", input=[], stream=True))).param == "input")
    for endpoint in ENDPOINTS:
        check("gpt-9" in refusal(lambda: whole(endpoint, model="gpt-9"), openai.NotFoundError).body["message"])
    refusal(lambda: tiny.sync.embeddings.create(model="tiny", input="a"), openai.NotFoundError)
    for key in ["wrong", "secret2"]:
        stranger = tiny.sync.with_options(api_key=key)
        error = refusal(lambda: stranger.chat.completions.create(model="tiny", messages=USER), openai.AuthenticationError)
        check(error.status_code == 401 and "API key" in error.body["message"], error)
        refusal(stranger.models.list, openai.AuthenticationError)
    asked = dict(model="tiny", prompt="a", stream=True)
    stranger = tiny.later.with_options(api_key="wrong")
    refusal(lambda: runner.run(stranger.completions.create(**asked)), openai.AuthenticationError)
    hasty = tiny.sync.with_options(timeout=0.02)
    long = dict(model="tiny", prompt="a", n=64, max_tokens=400, extra_body={"ignore_eos": True})
    refusal(lambda: hasty.completions.create(**long), openai.APITimeoutError)
    gone = openai.OpenAI(base_url=nobody() + "/v1", api_key="a", max_retries=0)
    refusal(gone.models.list, openai.APIConnectionError)


def limits():
    """Who goes first, and what there is no room for."""
    async def queue():
        create, order = narrow.later.chat.completions.create, []
        asked = dict(model="tiny", messages=USER)
        # Long enough that the ends of two are apart.
        long = dict(**asked, max_tokens=400)

        async def named(name, priority):
            await create(**long, extra_body={"priority": priority, "ignore_eos": True})
            order.append(name)

        # A long answer computes and holds a seat; three more wait, the last that came before the others.
        first = await create(**long, n=64, stream=True, extra_body={"ignore_eos": True})
        await anext(aiter(first))
        waiting = []
        for name, priority in [("late", 5), ("last", 9), ("early", 0)]:
            seen = narrow.prompts()
            waiting.append(asyncio.create_task(named(name, priority)))
            await until(narrow.prompts, lambda n: n > seen)
        try:
            await named("one too many", 0)
        except openai.RateLimitError as error:
            check(error.status_code == 429 and int(error.response.headers["retry-after"]) > 0, error)
        check(order == [], order)
        # A client that tries again, as it does by itself, gets in once there is room.
        patient, refused = narrow.retrying()
        again = asyncio.create_task(patient.chat.completions.create(**asked, temperature=0))
        await refused.wait()
        await first.close()
        await asyncio.gather(*waiting)
        check(order == ["early", "late", "last"], order)
        check((await again).choices[0].message.content == "42")

    runner.run(queue())
    huge = [{"role": "user", "content": "a" * 20_000}]
    error = refusal(lambda: narrow.sync.chat.completions.create(model="tiny", messages=huge), openai.APIStatusError)
    check(error.status_code == 413 and "20000 bytes" in error.body["message"], error)
    error = until_refused(lambda: narrow.sync.completions.create(model="tiny", prompt="a", max_tokens=1))
    check(error.type == "rate_limit_error", error)


# ---- many forms --------------------------------------------------------------------------------------------------------
def small(draw):
    """A value without parts."""
    least = draw.randrange(-500, 500)
    low = draw.randrange(-40, 40) / 4
    shortest = draw.randrange(0, 4)
    return draw.choice([
        {"type": "boolean"}, {"type": "null"},
        {"type": "integer", "minimum": least, "maximum": least + draw.randrange(0, 900)},
        {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": least + 2 + draw.randrange(0, 40)},
        {"type": "integer", "minimum": 0, "maximum": 96, "multipleOf": draw.choice([2, 5, 12])},
        {"type": "number", "minimum": low, "maximum": low + 2.5},
        {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": low + 1},
        {"type": "string", "minLength": shortest, "maxLength": shortest + draw.randrange(0, 8)},
        {"type": "string", "pattern": draw.choice(["^[a-z]{2,5}$", "^(north|south)-[0-9]{1,3}$", r"^\+?[0-9]{3}( [0-9]{2}){2}$"])},
        {"type": "string", "format": draw.choice(["date", "time", "date-time", "uuid", "ipv4", "ipv6"])},
        {"type": "number", "minimum": 0, "maximum": 40, "multipleOf": 0.5},
        {"enum": draw.sample(["red", "blé \"ok\"", 7, None, True, -2.5, [1, "a"], {"k": 0}], draw.randrange(1, 6))},
        {"const": draw.choice(["circle", "a\nb", "日本", 0, False, [], {"k": [1]}])},
        {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    ])


def schema(draw, depth):
    if depth == 0 or draw.random() < 0.35:
        return small(draw)
    inner = depth - 1
    most = draw.randrange(0, 4)
    return draw.choice([
        lambda: {"type": "array", "minItems": draw.randrange(0, most + 1), "maxItems": most, "items": schema(draw, inner)},
        lambda: {"type": "array", "prefixItems": [schema(draw, inner), small(draw)], "items": False, "minItems": 2},
        lambda: {"anyOf": [schema(draw, inner), schema(draw, inner)]},
        lambda: {"oneOf": [tagged(draw, "cat", inner), tagged(draw, "dog", inner)]},
        lambda: {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 300}]},
        lambda: {"allOf": [properties(draw, ["a", "b"], inner), {"type": "object", "required": ["b"]}]},
        lambda: {"$ref": "#/$defs/shared"},
        lambda: {"type": ["object", "null"], "properties": {"in": {"$ref": "#/$defs/chain"}}, "required": ["in"], "additionalProperties": False},
        lambda: {"type": "object", "patternProperties": {"^x[0-9]$": small(draw)}, "additionalProperties": False, "required": ["x1"],
                 "maxProperties": 2},
        lambda: {"type": "object", "properties": {"a": small(draw), "b": small(draw)}, "additionalProperties": False,
                 draw.choice(["minProperties", "maxProperties"]): 1},
        lambda: properties(draw, draw.sample(["name", "größe", "point x", "\"", "id"], draw.randrange(1, 4)), inner),
        lambda: properties(draw, draw.sample(["name", "größe", "point x", "\"", "id"], draw.randrange(1, 4)), inner),
    ])()


def tagged(draw, tag, depth):
    return {"type": "object", "properties": {"kind": {"const": tag}, "of": schema(draw, depth)}, "required": ["kind", "of"],
            "additionalProperties": False}


def properties(draw, names, depth):
    """Some of them optional."""
    required = [name for name in names if draw.random() < 0.6]
    of = {name: schema(draw, depth) for name in names}
    return {"type": "object", "properties": of, "required": required, "additionalProperties": False}


def drawn_schema(seed):
    """One whose answers are bounded: a model that knows nothing never ends a list or a text that may go on for ever."""
    draw = random.Random(seed)
    whole = properties(draw, draw.sample(["title", "items", "größe", "of"], draw.randrange(1, 4)), 3)
    link = {"type": "object", "properties": {"v": small(draw), "next": {"anyOf": [{"$ref": "#/$defs/chain"}, {"type": "null"}]}},
            "required": ["v", "next"], "additionalProperties": False}
    shared = {"type": "array", "minItems": 1, "maxItems": 2, "items": {"anyOf": [small(draw), small(draw)]}}
    whole["$defs"] = {"shared": shared, "chain": link}
    # The model's context is short, and white space alone would fill it.
    whole["x-guidance"] = {"whitespace_pattern": "[ \\n]?"}
    return whole


def is_date(value):
    """RFC 3339 has a year 0, which this Python lacks; a format says nothing about what is no text."""
    return not isinstance(value, str) or bool(datetime.date.fromisoformat(value.replace("0000-", "2000-", 1)))


def is_time(value):
    return not isinstance(value, str) or bool(re.search(r"([zZ]|[+-]\d\d:\d\d)$", value) and datetime.time.fromisoformat(value.upper()))


def is_moment(value):
    return not isinstance(value, str) or (is_date(value[:10]) and value[10] in "tT" and is_time(value[11:]))


def schemas():
    """As many answers as were asked for, each under a schema of its own: all are valid, says another's validator."""
    try:
        import jsonschema
    except ImportError:
        return print("SKIPPED: the answers of many forms were not tried; that needs the package jsonschema", file=sys.stderr)
    formats = jsonschema.FormatChecker()
    for name, holds in {"date": is_date, "time": is_time, "date-time": is_moment}.items():
        formats.checks(name, ValueError)(holds)
    # Fractions have any number of digits, and small models like those: what can follow them is made likelier.
    ending = {str(i): 7 for end in " ,}]\"Z" for i in tiny.ids(end)[:1]}
    # Where the vocabulary has it whole, it ends what a schema that contains itself leaves open.
    ending |= {str(ids[0]): 10 for ids in map(tiny.ids, ["null", " null"]) if len(ids) == 1}
    seats, faults, texts = asyncio.Semaphore(8), [], set()

    async def one(seed):
        form = drawn_schema(seed)
        asked = dict(model="tiny", messages=USER, temperature=1, seed=seed, max_tokens=640, logit_bias=ending,
                     response_format={"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": form}})
        try:
            async with seats:
                if seed % 2:
                    stream = tiny.later.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
                    answer = streamed_chat(await all_of(stream))
                else:
                    answer = whole_chat(await tiny.later.chat.completions.create(**asked))
            texts.add(answer.text)
            check(answer.finishes == ["stop"], answer.finishes)
            validator = jsonschema.Draft202012Validator(form, format_checker=formats)
            wrong = [error.message for error in validator.iter_errors(json.loads(answer.text))]
            check(not wrong, wrong, answer.text)
        except (AssertionError, ValueError, openai.APIError) as error:
            faults.append((seed, repr(error), json.dumps(form)))

    async def all_seeds():
        await asyncio.gather(*(one(seed) for seed in range(options.schemas)))

    runner.run(all_seeds())
    check(not faults, len(faults), faults[:3])
    check(len(texts) > 0.7 * options.schemas, len(texts))


AREAS = [models, chat_sampling, completions_sampling, completions, conversations, thoughts, tools, responses, helpers, together,
         errors, limits, schemas]
run(AREAS, openai, options.only)
