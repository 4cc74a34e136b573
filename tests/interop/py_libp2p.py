"""py-libp2p, on TCP and QUIC, as `cargo xtask interop` starts it."""
import os
import sys
import time

import trio
from lines import NOT_YET, answer, say, settings

from libp2p import new_host
from libp2p.bitswap import BitswapClient
from libp2p.bitswap.cid import cid_to_text, cid_to_bytes
from libp2p.bitswap.dag import MerkleDag
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import PingService
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

PORT = 14003
ADDRESSES = [f"/ip4/127.0.0.1/tcp/{PORT}", f"/ip4/127.0.0.1/udp/{PORT}/quic-v1"]
PATIENCE_S = 15


async def main():
    settings()
    listen = [Multiaddr(address) for address in ADDRESSES]
    host = new_host(key_pair=create_new_key_pair(os.urandom(32)), listen_addrs=listen)
    router = GossipSub([TProtocol("/meshsub/1.1.0"), TProtocol("/meshsub/1.0.0")], degree=3, degree_low=1, degree_high=8)
    pubsub = Pubsub(host, router, strict_signing=True)
    topics = {}
    async with host.run(listen_addrs=listen), trio.open_nursery() as nursery:
        bitswap = BitswapClient(host)
        bitswap.set_nursery(nursery)
        await bitswap.start()
        dag = MerkleDag(bitswap)
        dht = KadDHT(host, DHTMode.SERVER)

        async def dial(addr):
            info = info_from_p2p_addr(Multiaddr(addr))
            await host.connect(info)
            return {"peer": str(info.peer_id)}

        async def ping(peer):
            # A connection that came in counts a moment later.
            if peer not in (str(known) for known in host.get_connected_peers()):
                return NOT_YET
            times = await PingService(host).ping(ID.from_base58(peer), 1)
            return {"ms": times[0] / 1e3}

        async def connected(peer):
            peers = [str(peer) for peer in host.get_connected_peers()]
            return {"connected": peer in peers, "paths": peers}

        async def add(path):
            if os.path.isdir(path):
                return {"skip": "it fetches files only"}
            with open(path, "rb") as file:
                return {"cid": cid_to_text(await dag.add_bytes(file.read(), chunk_size=262144))}

        async def get(cid, path, peer):
            if os.path.isdir(path.removesuffix(".copy")):
                return {"skip": "it fetches files only"}
            start = time.monotonic()
            data, _ = await dag.fetch_file(cid_to_bytes(cid), ID.from_base58(peer), timeout=PATIENCE_S)
            with open(path, "wb") as file:
                file.write(data)
            return {"ms": (time.monotonic() - start) * 1e3}

        async def provide(key):
            await dht.provide(key)

        async def providers(key):
            return {"peers": [str(info.peer_id) for info in await dht.find_providers(key)]}

        async def subscribe(topic):
            topics[topic] = await pubsub.subscribe(topic)

        async def publish(topic, data):
            if not pubsub.peer_topics.get(topic):
                return NOT_YET
            await pubsub.publish(topic, data.encode())

        async def received(topic):
            own = host.get_id()
            while True:
                message = await topics[topic].get()
                if ID(message.from_id) != own:
                    return {"data": message.data.decode(), "from": str(ID(message.from_id))}

        functions = dict(dial=dial, ping=ping, connected=connected, add=add, get=get, provide=provide, providers=providers,
                         subscribe=subscribe, publish=publish, received=received)

        async def run(op, command):
            with trio.fail_after(PATIENCE_S):
                return await functions[op](**command)

        ops = {op: (lambda op: lambda **command: trio.from_thread.run(run, op, command))(op) for op in functions}
        async with background_trio_service(pubsub), background_trio_service(router), background_trio_service(dht):
            await pubsub.wait_until_ready()
            peer = str(host.get_id())
            say({"peer": peer, "addresses": [f"{address}/p2p/{peer}" for address in ADDRESSES]})
            while line := await trio.to_thread.run_sync(sys.stdin.readline):
                say(await trio.to_thread.run_sync(answer, ops, line))
            os._exit(0)


trio.run(main)
