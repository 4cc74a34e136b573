#!/usr/bin/env python3
"""mistral.rs through its Python wheel, for `cargo xtask bench --peers DIR`: prefill and decode of a GGUF file.

Needs `pip install mistralrs==0.9.5`; its tokenizer must be in the file.

    python benches/peers/mistralrs_wheel.py MODEL.gguf [THREADS]

In DIR, an executable file such as

    #!/bin/sh
    exec VENV/bin/python benches/peers/mistralrs_wheel.py "$@"

Prints the part of what `parallax bench --json` prints that it can. Times are those of whole requests, tokenizing and
sampling included; decoding is the time of 65 tokens less that of 1. The wheel takes no call while another runs, so
sequences at once are choices of one request (it computes them together and answers with the first); their prompt is one
token, because its Llama refuses several prompts of more. What it refuses, or would take longer than a minute for, is
left out, and said on stderr.
"""
import json
import os
import statistics
import sys
import time
from importlib.metadata import version

MODEL = os.path.abspath(sys.argv[1])
# Before it is loaded: its threads are counted once.
os.environ["RAYON_NUM_THREADS"] = sys.argv[2] if len(sys.argv) > 2 else "2"

from mistralrs import CompletionRequest, Runner, Which

PROMPTS, BATCHES, CONTEXT, TOKENS, REPEATS, LIMIT_S = (128, 512), (1, 8, 32), 16, 64, 3, 60
# One token each behind a space, in most vocabularies.
WORDS = "time year people way day man thing woman life child world school state family student group country".split()


def end(kind, error, trace):
    sys.__excepthook__(kind, error, trace)
    os._exit(1)


# The wheel's threads do not end by themselves: whoever called this would wait for ever.
sys.excepthook = end
runner = Runner(
    which=Which.GGUF(quantized_model_id=os.path.dirname(MODEL), quantized_filename=os.path.basename(MODEL)),
    max_seqs=max(BATCHES), prefix_cache_n=0, token_source="none")


def request(n_prompt, n_tokens, turn, batch=1):
    """Seconds of a prompt of so many words and as many answers as `batch` says."""
    text = "".join(" " + WORDS[(i * i + turn * (i + 1)) % len(WORDS)] for i in range(n_prompt))
    asked = CompletionRequest(
        prompt=text, model="default", max_tokens=n_tokens, n_choices=batch, temperature=0.0, top_k=1, ignore_eos=True)
    begin = time.perf_counter()
    answer = runner.send_completion_request(asked)
    seconds = time.perf_counter() - begin
    # Names of works are exact; a token more for the beginning of a text is none.
    counted = answer.usage.prompt_tokens
    assert n_prompt <= counted <= n_prompt + 1, f"{n_prompt} words are {counted} tokens"
    assert answer.usage.completion_tokens == n_tokens, f"{answer.usage.completion_tokens} tokens of {n_tokens}"
    return seconds


def decode_rate(batch, turn):
    context = CONTEXT if batch == 1 else 1
    seconds = request(context, 1 + TOKENS, turn, batch) - request(context, 1, turn, batch)
    if seconds <= 0:
        raise ValueError("65 tokens took no longer than 1: something else runs")
    return batch * TOKENS / seconds


def repeated(work, expected_s, rate):
    """Median, smallest and largest of as many runs as fit into the limit, or None."""
    n_runs = min(REPEATS, int(LIMIT_S / expected_s))
    if n_runs == 0:
        print(f"{work} left out: would take {expected_s:.0f} s", file=sys.stderr)
        return None
    try:
        rates = [rate(turn) for turn in range(n_runs)]
    except ValueError as error:
        print(f"{work} left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    found = [round(r, 2) for r in (statistics.median(rates), min(rates), max(rates))]
    print(f"{work}: {found[0]} tokens/s, {n_runs} runs", file=sys.stderr)
    return found


report = {"engine": "mistral.rs " + version("mistralrs"), "prefill": [], "decode": []}
request(CONTEXT, 2, 0)
rate = CONTEXT / request(CONTEXT, 1, 1)
for n in PROMPTS:
    found = repeated(f"prefill {n}", n / rate, lambda turn: n / request(n, 1, turn))
    if found:
        rate, low, high = found
        report["prefill"].append({"prompt_tokens": n, "tokens_per_s": rate, "min": low, "max": high})
# Of a few tokens, to know how long the others will take.
rate = 4 / max(request(CONTEXT, 5, 2) - request(CONTEXT, 1, 2), 1e-3)
for batch in BATCHES:
    found = repeated(f"batch {batch}", batch * TOKENS / rate, lambda turn: decode_rate(batch, turn))
    if found:
        rate, low, high = found
        report["decode"].append({
            "batch": batch, "context": CONTEXT if batch == 1 else 1, "tokens_per_s": round(rate / batch, 2),
            "aggregate": rate, "aggregate_min": low, "aggregate_max": high})
print(json.dumps(report), flush=True)
os._exit(0)
