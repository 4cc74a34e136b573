#!/usr/bin/env python3
"""Mixed load on a server for some minutes: memory and cache pages over time, and how fast a broken-off answer's pages return.

Start a server, for example `parallax run --model tiny --port 3001`, then this program with the server's process id. Users
ask for chats of all kinds, streamed or whole, one or two answers; some break off in the middle, some ask for what is
refused. Afterwards, under the load of --abort-load streams, clients with long prompts or long answers leave, and the
program waits until the metrics count their abort, which is when their pages are free. Standard library only.

Report (--json): {"url", "minutes", "users", "requests": {"answered", "broken_off", "refused", "failed"}, "samples":
[{"at_s", "rss_mb", "anonymous_mb", "pages_share", "running", "waiting"}], "rss_mb": [after a third, at the end],
"pages_share_after", "aborts": {"n", "load", "median_ms", "p95_ms", "max_ms"}}; memory is null without --pid.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import threading
import time

from client import Metrics, ask, connect, first_token

ABORTED = 'vllm:request_success_total{finished_reason="abort"}'
POLL_S = 0.005
KINDS = ("answered", "broken_off", "refused", "failed")
REFUSED = [{"temperature": 9}, {"messages": []}, {"max_tokens": -1}, {"stop": [7]}, {"model": "nobody"}]


def text(generator, n):
    return " ".join(str(generator.randrange(10**generator.randint(1, 6))) for _ in range(n))


def request(generator):
    """The body of a request, and whether the client leaves in the middle."""
    streamed = generator.random() < 0.7
    body = {
        "messages": [{"role": "user", "content": text(generator, generator.choice([3, 10, 30, 60]))}],
        "max_tokens": generator.choice([4, 16, 48]), "temperature": generator.choice([0, 1]),
        "seed": generator.randrange(10**6), "n": generator.choice([1, 1, 1, 2]),
        "logprobs": generator.random() < 0.2, "stream": streamed,
    }
    if generator.random() < 0.15:
        body.update(generator.choice(REFUSED))
    return body, streamed and generator.random() < 0.2


def one(url, generator):
    body, leaves = request(generator)
    connection = connect(url)
    response = ask(connection, "/v1/chat/completions", body)
    if response.status != 200:
        response.read()
        connection.close()
        return "refused" if 400 <= response.status < 500 else "failed"
    if leaves:
        response.read(300)
        connection.close()
        return "broken_off"
    whole = response.read()
    connection.close()
    return "failed" if b'"error"' in whole else "answered"


class Load:
    """Users that ask without a pause until they are told to stop."""

    def __init__(self, n, work):
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self.user, args=(i, work)) for i in range(n)]
        for thread in self.threads:
            thread.start()

    def user(self, i, work):
        generator = random.Random(i)
        while not self.stopped.is_set():
            work(generator)

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


def memory_mb(pid):
    """Resident and anonymous memory of a process."""
    if pid is None:
        return None, None
    with open(f"/proc/{pid}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))


def soak(options):
    counts, lock = dict.fromkeys(KINDS, 0), threading.Lock()

    def work(generator):
        try:
            kind = one(options.url, generator)
        except OSError as error:
            print(f"request failed: {error!r}", file=sys.stderr)
            kind = "failed"
        with lock:
            counts[kind] += 1

    metrics, samples, started = Metrics(options.url), [], time.perf_counter()
    load = Load(options.users, work)
    end = started + options.minutes * 60
    while time.perf_counter() < end:
        time.sleep(min(options.sample_s, max(end - time.perf_counter(), 0)))
        now, (rss, anonymous) = metrics.read(), memory_mb(options.pid)
        samples.append({
            "at_s": round(time.perf_counter() - started, 1), "rss_mb": rss, "anonymous_mb": anonymous,
            "pages_share": now["vllm:kv_cache_usage_perc"], "running": now["vllm:num_requests_running"],
            "waiting": now["vllm:num_requests_waiting"],
        })
        print(samples[-1], counts, file=sys.stderr)
    load.stop()
    return counts, samples


def settled(metrics, patience_s=10):
    """The share of pages in use once nothing runs."""
    end = time.perf_counter() + patience_s
    while True:
        now = metrics.read()
        idle = now["vllm:num_requests_running"] == now["vllm:num_requests_waiting"] == 0
        if idle or time.perf_counter() > end:
            return now["vllm:kv_cache_usage_perc"]


def stream_whole(url, generator):
    """Load that is never broken off, so that the only aborts are those that are timed."""
    body = {"prompt": text(generator, 40), "max_tokens": 64, "ignore_eos": True, "temperature": 1, "stream": True}
    connection = connect(url)
    ask(connection, "/v1/completions", body).read()
    connection.close()


def abort(url, metrics, generator, prompt_words, after_first_token):
    """Milliseconds from a client's leaving to its pages' being free."""
    before = metrics.read()[ABORTED]
    body = {"prompt": text(generator, prompt_words), "max_tokens": 512, "ignore_eos": True, "stream": True}
    connection = connect(url)
    if after_first_token:
        first_token(ask(connection, "/v1/completions", body))
    else:
        data = json.dumps(body)
        connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        time.sleep(generator.uniform(0.05, 0.4))
    left = time.perf_counter()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    while metrics.read()[ABORTED] == before:
        if time.perf_counter() - left > 60:
            raise SystemExit("no answer was aborted within a minute after its client left: does the model's context hold "
                             "--abort-words and 512 tokens? --aborts 0 leaves this out")
        # Looking without a pause would take a core from the server, and with it the half of every step's speed.
        time.sleep(POLL_S)
    return (time.perf_counter() - left) * 1e3


def aborts(options):
    metrics, generator = Metrics(options.url), random.Random(options.users)
    load = Load(options.abort_load, lambda g: stream_whole(options.url, g))
    time.sleep(1)
    times = []
    for i in range(options.aborts):
        times.append(abort(options.url, metrics, generator, 20 if i % 2 else options.abort_words, bool(i % 2)))
    load.stop()
    times.sort()
    return {
        "n": len(times), "load": options.abort_load, "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(times[min(len(times) - 1, int(len(times) * 0.95))], 1), "max_ms": round(times[-1], 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3001", help="where the server listens")
    parser.add_argument("--pid", type=int, default=None, help="the server's process, to look at its memory")
    parser.add_argument("--minutes", type=float, default=30, help="how long; 0 measures aborts only")
    parser.add_argument("--users", type=int, default=8, help="requests at the same time")
    parser.add_argument("--sample-s", type=float, default=10, help="seconds between two looks at memory and pages")
    parser.add_argument("--aborts", type=int, default=40, help="clients that leave and are timed; 0 skips that")
    parser.add_argument("--abort-load", type=int, default=8, help="streams beside them")
    parser.add_argument("--abort-words", type=int, default=200, help="numbers in the longer prompts of those that leave")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    options = parser.parse_args()
    counts, samples = soak(options) if options.minutes > 0 else (dict.fromkeys(KINDS, 0), [])
    after = settled(Metrics(options.url))
    measured = aborts(options) if options.aborts else None
    third = samples[len(samples) // 3] if samples else {"rss_mb": None}
    last = samples[-1] if samples else {"rss_mb": None}
    report = {"url": options.url, "minutes": options.minutes, "users": options.users, "requests": counts,
              "samples": samples, "rss_mb": [third["rss_mb"], last["rss_mb"]], "pages_share_after": after,
              "aborts": measured}
    print(json.dumps(report) if options.json else f"{counts}, pages in use afterwards {after}, aborts {measured}")


if __name__ == "__main__":
    main()
