// What the JavaScript peers of `cargo xtask interop` share: one JSON command a line on standard input, one JSON answer each.
import { createInterface } from 'node:readline'

export const PATIENCE_MS = 20_000
// What a command needs is not there yet: who asked asks again.
export const NOT_YET = { wait: true }

// Reads the settings, starts a node with them, and answers commands by name. `start` gives { hello, ops }.
export const run = async start => {
  const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
  const say = answer => process.stdout.write(JSON.stringify(answer) + '\n')
  const { hello, ops } = await start(JSON.parse((await lines.next()).value))
  say(hello)
  for await (const line of lines) {
    const { op, ...args } = JSON.parse(line)
    if (ops[op] === undefined) { say({ skip: `it has no ${op}` }); continue }
    try {
      const late = new Promise((resolve, reject) => setTimeout(reject, PATIENCE_MS, new Error(`nothing within ${PATIENCE_MS} ms`)).unref())
      say(await Promise.race([ops[op](args), late]) ?? {})
    } catch (error) {
      say({ error: `${error.name}: ${error.message}` })
    }
  }
  process.exit(0)
}
