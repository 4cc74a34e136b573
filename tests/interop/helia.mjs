// Helia with js-libp2p, on TCP and QUIC, as `cargo xtask interop` starts it.
import { noise } from '@chainsafe/libp2p-noise'
import { quic } from '@chainsafe/libp2p-quic'
import { yamux } from '@chainsafe/libp2p-yamux'
import { withBitswap } from '@helia/bitswap'
import { withLibp2pLight } from '@helia/libp2p'
import { unixfs } from '@helia/unixfs'
import { circuitRelayServer, circuitRelayTransport } from '@libp2p/circuit-relay-v2'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createHeliaLight } from 'helia'
import { CID } from 'multiformats/cid'
import { readdirSync, readFileSync, statSync, mkdirSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { NOT_YET, run } from './lines.mjs'

run(async settings => {
  const helia = withBitswap(withLibp2pLight(createHeliaLight(), {
    addresses: { listen: ['/ip4/127.0.0.1/tcp/0', '/ip4/127.0.0.1/udp/0/quic-v1', ...(settings.via ?? []).map(a => `${a}/p2p-circuit`)] },
    transports: [tcp(), quic(), circuitRelayTransport()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    // Everything here has a loopback address.
    connectionGater: { denyDialMultiaddr: () => false },
    services: {
      identify: identify(),
      ping: ping(),
      relay: circuitRelayServer({ reservations: { applyDefaultLimit: false } }),
      pubsub: gossipsub({ globalSignaturePolicy: 'StrictSign', allowPublishToZeroTopicPeers: false, doPX: false }),
      dht: kadDHT({
        protocol: settings.dht_protocol, clientMode: false, peerInfoMapper: passthroughMapper, allowQueryWithZeroPeers: false,
        validators: { interop: async () => {} }, selectors: { interop: () => 0 }
      })
    }
  }))
  await helia.start()
  const { libp2p } = helia
  const fs = unixfs(helia)
  const received = new Map()
  const waiting = new Map()
  libp2p.services.pubsub.addEventListener('message', ({ detail: { topic, data, from } }) => {
    const message = { data: new TextDecoder().decode(data), from: from.toString() }
    const waiter = waiting.get(topic)
    if (waiter === undefined) received.set(topic, message)
    else waiter(message)
  })
  const connection = peer => libp2p.getConnections().find(c => c.remotePeer.toString() === peer)
  const bytes = text => new TextEncoder().encode(text)

  return {
    hello: { peer: libp2p.peerId.toString(), addresses: libp2p.getMultiaddrs().map(String) },
    ops: {
      dial: async ({ addr }) => ({ peer: (await libp2p.dial(multiaddr(addr))).remotePeer.toString() }),
      ping: async ({ peer }) => {
        try {
          return { ms: await libp2p.services.ping.ping(connection(peer).remotePeer) }
        } catch (error) {
          // One ping at a time, and libp2p's own watch over its connections sends some.
          if (error.name !== 'TooManyOutboundProtocolStreamsError') throw error
          return NOT_YET
        }
      },
      identify: async ({ peer }) => {
        const { agentVersion, protocols } = await libp2p.services.identify.identify(connection(peer))
        return { agent: agentVersion, protocols }
      },
      connected: async ({ peer }) => ({ connected: connection(peer) !== undefined, paths: libp2p.getConnections().map(c => c.remoteAddr.toString()) }),
      add: async ({ path }) => {
        if (!statSync(path).isDirectory()) return { cid: (await fs.addBytes(readFileSync(path))).toString() }
        const files = readdirSync(path, { recursive: true, withFileTypes: true }).filter(e => e.isFile())
        let cid
        for await (const entry of fs.addAll(files.map(e => ({
          path: relative(path, join(e.parentPath, e.name)), content: [readFileSync(join(e.parentPath, e.name))]
        })), { wrapWithDirectory: true })) cid = entry.cid
        return { cid: cid.toString() }
      },
      get: async ({ cid, path }) => {
        const start = performance.now()
        const signal = AbortSignal.timeout(15_000)
        const write = async (cid, path) => {
          const stat = await fs.stat(cid, { signal })
          if (stat.type !== 'directory') {
            const parts = []
            for await (const part of fs.cat(cid, { signal })) parts.push(part)
            writeFileSync(path, Buffer.concat(parts))
            return
          }
          mkdirSync(path)
          for await (const entry of fs.ls(cid, { signal })) await write(entry.cid, join(path, entry.name))
        }
        await write(CID.parse(cid), path)
        return { ms: performance.now() - start }
      },
      provide: async ({ key: cid }) => {
        for await (const event of libp2p.services.dht.provide(CID.parse(cid))) if (event.name === 'QUERY_ERROR') throw event.error
      },
      providers: async ({ key: cid }) => {
        const peers = new Set()
        for await (const event of libp2p.services.dht.findProviders(CID.parse(cid))) {
          if (event.name === 'PROVIDER' || event.name === 'PEER_RESPONSE') for (const p of event.providers) peers.add(p.id.toString())
        }
        return { peers: [...peers] }
      },
      put: async ({ key, value }) => { for await (const event of libp2p.services.dht.put(bytes(key), bytes(value))) void event },
      find: async ({ key }) => {
        for await (const event of libp2p.services.dht.get(bytes(key))) if (event.name === 'VALUE') return { value: new TextDecoder().decode(event.value) }
        throw new Error('not found')
      },
      subscribe: async ({ topic }) => libp2p.services.pubsub.subscribe(topic),
      publish: async ({ topic, data }) => {
        if (libp2p.services.pubsub.getSubscribers(topic).length === 0) return NOT_YET
        await libp2p.services.pubsub.publish(topic, bytes(data))
      },
      received: async ({ topic }) => received.get(topic) ?? await new Promise(resolve => waiting.set(topic, resolve)),
      relayed: async () => {
        const addresses = libp2p.getMultiaddrs().map(String).filter(a => a.includes('/p2p-circuit'))
        return addresses.length === 0 ? NOT_YET : { addresses }
      },
      disconnect: async ({ peer }) => libp2p.hangUp(connection(peer).remotePeer)
    }
  }
})
