"""What the programs of this folder share: plain HTTP to a server of `parallax run` or `parallax serve`."""

import http.client
import json
import time
import urllib.parse

TIMEOUT_S = 300


def connect(url):
    """A connection to the server at `url`, opened."""
    address = urllib.parse.urlparse(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=TIMEOUT_S)
    connection.connect()
    return connection


def ask(connection, path, body):
    """Sends a JSON request; the response, its body not read yet."""
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


def post(url, path, body):
    """A whole answer as JSON; anything but 200 ends the program."""
    connection = connect(url)
    response = ask(connection, path, body)
    text = response.read()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{path} answered {response.status}: {text[:300]!r}")
    return json.loads(text)


def samples(text):
    """Prometheus text as {"name{labels}": value}, without `model_name`."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            base, _, labels = name.partition("{")
            kept = [label for label in labels.rstrip("}").split(",") if label and not label.startswith("model_name=")]
            found[base + ("{" + ",".join(kept) + "}" if kept else "")] = float(value)
    return found


class Metrics:
    """`GET /metrics` over one connection."""

    def __init__(self, url):
        self.connection = connect(url)

    def read(self):
        self.connection.request("GET", "/metrics")
        return samples(self.connection.getresponse().read().decode())


def first_token(response):
    """Reads a stream up to its first event with text; the seconds on the clock then."""
    while True:
        line = response.readline()
        if not line:
            raise SystemExit("the stream ended without a token")
        if line.startswith(b"data: {"):
            return time.perf_counter()
