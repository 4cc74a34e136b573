"""What the scripts of the client packages share: checks counted by area, a server with a client of each kind, and waiting for
what a server tells instead of for a time."""
import asyncio
import collections
import json
import re
import socket
import sys
import time

QUESTION = "What is 12+30?"
USER = [{"role": "user", "content": QUESTION}]
# As the embedded model's template writes it.
RENDERED = f"<bos><user>{QUESTION}<assistant>"
# For what comes sooner or later.
PATIENCE_S = 60
# Names of a package's clients, and what their addresses end with.
CLIENTS = {"openai": ("OpenAI", "/v1"), "anthropic": ("Anthropic", "")}

runner = asyncio.Runner()
counts = collections.Counter()
area = ""
# The package whose client is tried.
client = None


def check(fact, *seen):
    counts[area] += 1
    assert fact, seen


def run(areas, package, only=None):
    """Runs all areas, or one, and prints how many checks each made."""
    global area, client
    names = [one.__name__ for one in areas]
    if only not in (None, *names):
        sys.exit(f"there is no area {only}; there are {', '.join(names)}")
    client = package
    for one in areas:
        if only in (None, one.__name__):
            area = one.__name__
            one()
    print(json.dumps({"client": package.__version__, "checks": counts}))


def refusal(call, kind=None):
    """The error that a call ends with: the client's own class, by default that of a 400."""
    kind = kind or client.BadRequestError
    try:
        call()
    except kind as error:
        check(type(error) is kind, type(error))
        if client.__name__ == "anthropic":
            check(error.body["type"] == "error", error.body)
        return error
    raise AssertionError(f"nothing was refused, {kind.__name__} was expected")


def until_refused(call):
    """The refusal of one call too many, of which there may be only so many in a minute."""
    def often():
        for _ in range(30):
            call()

    error = refusal(often, client.RateLimitError)
    check(0 < int(error.response.headers["retry-after"]) <= 60, error)
    return error


def nobody():
    """An address where somebody listened a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as left:
        return "http://127.0.0.1:%d" % left.getsockname()[1]


class Server:
    """One server, its model, and a client of each kind."""

    def __init__(self, package, url, model):
        name, end = CLIENTS[package.__name__]
        settings = dict(base_url=url + end, api_key="secret", max_retries=0, timeout=PATIENCE_S)
        self.package, self.url, self.model = package, url, model
        self.sync, self.later = getattr(package, name)(**settings), getattr(package, "Async" + name)(**settings)

    def post(self, path, **body):
        """A route that the client has no method for."""
        return self.sync.post(self.url + path, cast_to=object, body=body)

    def ids(self, text):
        return self.post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]

    def metric(self, name, label=""):
        """The value of `vllm:` `name`, of the series with `label` if there are several."""
        text = self.sync.get(self.url + "/metrics", cast_to=str)
        return float(re.search(rf"^vllm:{name}{{.*{label}.*}} (\S+)$", text, re.M)[1])

    def prompts(self):
        """Tokens of all prompts that the engine has taken on: more, and a request has arrived."""
        return self.metric("prompt_tokens_total")

    def retrying(self):
        """A client that tries again where it is refused, and an event that tells that it was."""
        refused = asyncio.Event()

        async def hear(response):
            if response.status_code == 429:
                refused.set()

        http_client = self.package.DefaultAsyncHttpxClient(event_hooks={"response": [hear]})
        return self.later.with_options(max_retries=5, http_client=http_client), refused


async def until(read, enough):
    """Asks `read`, which asks a server, until it gives what is `enough`."""
    end = time.monotonic() + PATIENCE_S
    while not enough(seen := await asyncio.to_thread(read)):
        assert time.monotonic() < end, seen
