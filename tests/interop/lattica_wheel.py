"""The original Lattica's wheel, as `cargo xtask interop` starts it. Its handlers' arguments and results are pickled; its client
sends and gives bytes."""
import os
import sys
import tempfile
import time

from lines import NOT_YET, answer, say, settings

from lattica import ConnectionHandler, Lattica, rpc_method

PORT = 14002
ADDRESSES = [f"/ip4/127.0.0.1/tcp/{PORT}", f"/ip4/127.0.0.1/udp/{PORT}/quic-v1"]


class Interop(ConnectionHandler):
    @rpc_method
    def echo(self, body):
        return body


def main():
    told = settings()
    files = tempfile.mkdtemp()
    builder = Lattica.builder().with_listen_addrs(ADDRESSES).with_protocol(told["identify_version"])
    builder = builder.with_mdns(False).with_upnp(False).with_autonat(False).with_dcutr(False)
    builder = builder.with_storage_path(files + "/store").with_dht_db_path(files + "/dht").with_key_path(files + "/key")
    if told.get("dial"):
        builder = builder.with_bootstraps([told["dial"]])
    node = builder.build()

    Interop(node)

    def call_v1(peer, method, data):
        return {"data": bytes(node.get_client(peer).call(method, data.encode()).result(timeout=15)).decode()}

    def dial(addr):
        # It dials when it starts.
        peer = addr.rsplit("/p2p/", 1)[1]
        return {"peer": peer} if peer in node.get_all_peers() else NOT_YET

    def connected(peer):
        return {"connected": peer in node.get_all_peers(), "paths": node.get_peer_addresses(peer)}

    def ping(peer):
        rtt = node.get_peer_rtt(peer)
        return {"ms": rtt * 1e3} if rtt else NOT_YET

    def add(path):
        if os.path.isdir(path) or os.path.getsize(path) > 262144:
            return {"skip": "it has single blocks only"}
        with open(path, "rb") as file:
            return {"cid": node.put_block(file.read())}

    def get(cid, path, peer):
        if not cid.startswith("bafkrei"):
            return {"skip": "it has single blocks only"}
        start = time.monotonic()
        _, data = node.get_block(cid, 15)
        with open(path, "wb") as file:
            file.write(bytes(data))
        return {"ms": (time.monotonic() - start) * 1e3}

    ops = dict(dial=dial, connected=connected, ping=ping, add=add, get=get, call_v1=call_v1)
    peer = node.peer_id()
    say({"peer": peer, "addresses": [f"{address}/p2p/{peer}" for address in ADDRESSES]})
    for line in sys.stdin:
        say(answer(ops, line))
    os._exit(0)


main()
