"""The original Lattica's wheel, measured as `lattica-node bench` measures ours: two processes on loopback.

Needs `pip install lattica==1.0.21`. It asks public STUN servers when it starts, so run it where there is no way out:

    unshare -n sh -c 'ip link set lo up && python benches/peers/lattica_wheel.py [tcp|quic] [stream MB]'

Prints one JSON object, the fields named as those of `lattica-node bench --json`.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from lattica import ConnectionHandler, Lattica, rpc_method, rpc_stream

TRANSPORT = sys.argv[1] if len(sys.argv) > 1 else "tcp"
STREAM_MB = int(sys.argv[2]) if len(sys.argv) > 2 else 256
BLOCK, BLOCKS_MB, ROUNDS, SECONDS = 1 << 20, 64, 3, 2.0


def address(port):
    return f"/ip4/127.0.0.1/tcp/{port}" if TRANSPORT == "tcp" else f"/ip4/127.0.0.1/udp/{port}/quic-v1"


def peak_rss_mb():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) for l in status if l.startswith("VmHWM:")) * 1024 / 1e6


def node(port, bootstraps=()):
    files = tempfile.mkdtemp()
    builder = Lattica.builder().with_listen_addrs([address(port)])
    builder = builder.with_mdns(False).with_upnp(False).with_autonat(False).with_dcutr(False)
    builder = builder.with_storage_path(files + "/store").with_dht_db_path(files + "/dht").with_key_path(files + "/key")
    return (builder.with_bootstraps(list(bootstraps)) if bootstraps else builder).build()


class Service(ConnectionHandler):
    @rpc_method
    def echo(self, body: bytes):
        return body

    @rpc_stream
    def length(self, body):
        return len(body)

    @rpc_method
    def publish(self, n_blocks):
        return [NODE.put_block(os.urandom(BLOCK)) for _ in range(n_blocks)]

    @rpc_method
    def peak_rss(self, _):
        return peak_rss_mb()


def load(stub, n_bytes, in_flight):
    """Median calls/s and p50 of the rounds, `in_flight` calls at a time."""
    body, rates, middles = b"x" * n_bytes, [], []
    for _ in range(ROUNDS):
        begin, waiting, took = time.perf_counter(), [], []
        while time.perf_counter() - begin < SECONDS or waiting:
            while len(waiting) < in_flight and time.perf_counter() - begin < SECONDS:
                waiting.append((time.perf_counter(), stub.echo(body)))
            if waiting:
                asked, call = waiting.pop(0)
                assert call.result() == body
                took.append(time.perf_counter() - asked)
        rates.append(len(took) / (time.perf_counter() - begin))
        middles.append(statistics.median(took))
    return round(statistics.median(rates), 1), round(statistics.median(middles) * 1e6)


if "server" in sys.argv:
    NODE = node(50181)
    service = Service(NODE)
    print(NODE.peer_id(), flush=True)
    sys.stdin.read()
    os._exit(0)

server = subprocess.Popen(
    [sys.executable, __file__, TRANSPORT, "0", "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
peer = server.stdout.readline().strip()
NODE = node(50182, [f"{address(50181)}/p2p/{peer}"])
time.sleep(2)
stub = Service(NODE).get_stub(peer)
report = {"peer": "lattica 1.0.21", "transport": TRANSPORT, "stream_mb": STREAM_MB}
for _ in range(100):
    stub.echo(b"warm").result()
report["rpc_qps"], report["rpc_p50_us"] = load(stub, 128, 64)
_, report["rpc_sequential_p50_us"] = load(stub, 128, 1)
report["echo_qps"], report["echo_p50_us"] = load(stub, 256 << 10, 64)
report["echo_sequential_qps"], report["echo_sequential_p50_us"] = load(stub, 256 << 10, 1)
rates = []
for _ in range(ROUNDS):
    names = stub.publish(BLOCKS_MB).result()
    begin = time.perf_counter()
    n_bytes = sum(len(NODE.get_block(name)[1]) for name in names)
    rates.append(n_bytes / 1e6 / (time.perf_counter() - begin))
report["blocks_mb_per_s"] = round(statistics.median(rates), 1)
body = b"\xab" * (STREAM_MB * 1_000_000)
begin = time.perf_counter()
assert stub.length(body).result() == len(body)
report["stream_mb_per_s"] = round(STREAM_MB / (time.perf_counter() - begin), 1)
report["stream_rss_mb"] = round(max(peak_rss_mb(), stub.peak_rss(0).result()) )
print(json.dumps(report), flush=True)
server.kill()
os._exit(0)
