#!/usr/bin/env python3
"""First-token times of users who share a long prefix, against one lone request that finds nothing in the cache.

Start a server, for example `parallax run --model FILE.gguf --context 65536 --port 3001`, then this program. Every round
draws a new prefix of token ids, asks once with it alone (cold), once more (warm), and then as many users as wanted at one
instant, each with tokens of its own behind the prefix. Nothing but Python's standard library is needed.

Report (--json): {"url", "users", "prefix_tokens", "own_tokens", "rounds": [{"cold_s", "warm_s", "first_token_s": [...],
"median_s", "max_s", "median_over_cold", "max_over_cold"}]}, seconds from sending to the first token.
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time

from client import ask, connect, first_token, post


def words(generator, n):
    return " ".join("".join(generator.choices("abcdefghijklmnoprstuvw", k=generator.randint(2, 7))) for _ in range(n))


def prefix(url, generator, n):
    """`n` token ids that no earlier prompt began with."""
    ids = []
    while len(ids) < n:
        ids += post(url, "/tokenize", {"prompt": words(generator, n), "add_special_tokens": False})["tokens"]
    return ids[:n]


def time_to_first_token(url, prompt, barrier=None):
    connection = connect(url)
    if barrier:
        barrier.wait()
    started = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "stream": True}
    response = ask(connection, "/v1/completions", body)
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {response.read()[:300]!r}")
    seconds = first_token(response) - started
    response.read()
    connection.close()
    return seconds


def together(url, prompts):
    times, barrier = [None] * len(prompts), threading.Barrier(len(prompts))

    def one(i):
        times[i] = time_to_first_token(url, prompts[i], barrier)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in times:
        raise SystemExit("not every user got an answer")
    return sorted(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3001", help="where the server listens")
    parser.add_argument("--users", type=int, default=32, help="requests at one instant")
    parser.add_argument("--prefix-tokens", type=int, default=2000, help="tokens that all prompts share")
    parser.add_argument("--own-tokens", type=int, default=10, help="tokens of each user's own behind them")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with another prefix")
    parser.add_argument("--seed", type=int, default=None, help="draws the prefixes [default: another each time]")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    # The first request of a server meets cold code and memory.
    time_to_first_token(options.url, prefix(options.url, generator, 64))
    rounds = []
    for _ in range(options.rounds):
        shared = prefix(options.url, generator, options.prefix_tokens)
        pool = prefix(options.url, generator, options.own_tokens * (options.users + 2)) if options.own_tokens else []
        own = [pool[i * options.own_tokens : (i + 1) * options.own_tokens] for i in range(options.users + 2)]
        cold = time_to_first_token(options.url, shared + own[-1])
        warm = time_to_first_token(options.url, shared + own[-2])
        times = together(options.url, [shared + own[i] for i in range(options.users)])
        median = statistics.median(times)
        rounds.append({
            "cold_s": cold, "warm_s": warm, "first_token_s": times, "median_s": median, "max_s": times[-1],
            "median_over_cold": median / cold, "max_over_cold": times[-1] / cold,
        })
        print(f"cold {cold:.3f} s, warm {warm:.3f} ({warm / cold:.3f}); {options.users} at once: median {median:.3f} "
              f"({median / cold:.3f}), slowest {times[-1]:.3f} ({times[-1] / cold:.3f})", file=sys.stderr)
    if options.json:
        print(json.dumps({"url": options.url, "users": options.users, "prefix_tokens": options.prefix_tokens,
                          "own_tokens": options.own_tokens, "rounds": rounds}))


if __name__ == "__main__":
    main()
