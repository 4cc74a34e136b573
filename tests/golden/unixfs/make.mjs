// Makes unixfs.json: content ids and blocks as the IPFS importer of Helia makes them.
//
//     npm install ipfs-unixfs-importer@17.1.1 blockstore-core@7.0.1 && node tests/golden/unixfs/make.mjs > tests/golden/unixfs/unixfs.json
//
// `files` and `directories` are in the shape of `ipfs add --cid-version=1 --raw-leaves --chunker=size-N`: balanced, 174 links.
// `read` are shapes that we only read, with all their blocks: protobuf leaves and version 0 names (Kubo's old default), a
// trickle, a sharded directory, a file with a mode.
import { importer } from 'ipfs-unixfs-importer'
import { balanced, trickle } from 'ipfs-unixfs-importer/layout'
import { fixedSize } from 'ipfs-unixfs-importer/chunker'
import { MemoryBlockstore } from 'blockstore-core'

// Byte i of every file.
const content = n => Uint8Array.from({ length: n }, (_, i) => Math.imul(i, 2654435761) >>> 24)

const add = async (files, options) => {
  const store = new MemoryBlockstore()
  let root
  for await (const entry of importer(files.map(f => ({ ...f, content: [f.bytes] })), store, options)) root = entry.cid
  const blocks = []
  for await (const { bytes } of store.getAll()) {
    const parts = []
    for await (const part of bytes) parts.push(part)
    blocks.push(Buffer.concat(parts).toString('hex'))
  }
  return { cid: root.toString(), blocks: blocks.sort() }
}
const ours = chunk => ({ cidVersion: 1, rawLeaves: true, reduceSingleLeafToSelf: true,
  layout: balanced({ maxChildrenPerNode: 174 }), chunker: fixedSize({ chunkSize: chunk }) })
const old = chunk => ({ ...ours(chunk), cidVersion: 0, rawLeaves: false })

const files = []
for (const [bytes, leaf_bytes] of [[0, 16], [1, 16], [16, 16], [17, 16], [16 * 174, 16], [16 * 174 + 1, 16],
  [174 * 174, 1], [174 * 174 + 1, 1], [3 * 1048576 + 1, 1048576]]) {
  const { cid } = await add([{ bytes: content(bytes) }], ours(leaf_bytes))
  files.push({ bytes, leaf_bytes, cid })
}

const entries = { 'a.bin': 40, 'b/c.bin': 5000, 'b/d/e': 5, 'b.z': 16, 'z': 0 }
const tree = Object.entries(entries).map(([path, n]) => ({ path: 'root/' + path, bytes: content(n) }))
const directories = [{ entries, leaf_bytes: 16, cid: (await add(tree, ours(16))).cid }]

const read = []
const shape = async (name, made, lengths) => read.push({ name, ...made, lengths })
await shape('version 0, protobuf leaves', await add([{ bytes: content(50) }], old(16)), { '': 50 })
await shape('version 0, one leaf', await add([{ bytes: content(5) }], old(16)), { '': 5 })
await shape('version 0, three levels', await add([{ bytes: content(700) }], { ...old(16), layout: balanced({ maxChildrenPerNode: 4 }) }), { '': 700 })
await shape('trickle', await add([{ bytes: content(700) }], { ...ours(16), layout: trickle({ maxChildrenPerNode: 2, layerRepeat: 2 }) }), { '': 700 })
await shape('a mode', await add([{ bytes: content(50), mode: 0o644 }], ours(16)), { '': 50 })
await shape('directory', await add(tree, ours(16)), entries)
const many = Object.fromEntries(Array.from({ length: 300 }, (_, i) => [`file-${i}`, i % 40]))
await shape('sharded directory', await add(Object.entries(many).map(([path, n]) => ({ path: 'root/' + path, bytes: content(n) })),
  { ...ours(16), shardSplitThresholdBytes: 0 }), many)

console.log(JSON.stringify({ files, directories, read }, null, 1))
