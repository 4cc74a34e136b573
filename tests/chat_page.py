"""The chat page and the cluster page in a real browser, over WebDriver; prints what it saw as JSON.

Arguments: the chromedriver program, the server's address, and perhaps a folder for screenshots. Standard library only.
"""
import atexit
import base64
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import urllib.request

DRIVER, SERVER = sys.argv[1:3]
SHOTS = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
TIMEOUT_S = 30
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1100,800"]

driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
atexit.register(driver.kill)
# One that says nothing must not be waited for.
patience = threading.Timer(TIMEOUT_S, driver.kill)
patience.start()
profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
for line in driver.stdout:
    if "successfully on port" in line:
        BASE = "http://127.0.0.1:" + line.rsplit("port ", 1)[1].strip(" .\n")
        break
else:
    patience.cancel()
    sys.exit(f"{DRIVER} did not start")
patience.cancel()


def call(method, path, body=None):
    request = urllib.request.Request(BASE + path, json.dumps(body or {}).encode() if method == "POST" else None,
                                     {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return json.loads(response.read())["value"]


def run(script, *values):
    return call("POST", session + "/execute/sync", {"script": script, "args": values})


def wait(script, what):
    look = """const done = arguments[1], end = Date.now() + arguments[0];
        (function look() { if (%s) done(true); else if (Date.now() > end) done(false); else setTimeout(look, 20); })()"""
    if not call("POST", session + "/execute/async", {"script": look % script, "args": [(TIMEOUT_S - 5) * 1000]}):
        sys.exit(f"{what} did not come: {run('return document.body.innerText')!r}")


def element(selector):
    found = call("POST", session + "/element", {"using": "css selector", "value": selector})
    return session + "/element/" + next(iter(found.values()))


def click(selector):
    call("POST", element(selector) + "/click")


def type_into(selector, text):
    call("POST", element(selector) + "/value", {"text": text})


def shot(name):
    if SHOTS:
        (SHOTS / name).write_bytes(base64.b64decode(call("GET", session + "/screenshot")))


options = {"args": QUIET + ["--user-data-dir=" + profile.name]}
wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
session = "/session/" + call("POST", "/session", wanted)["sessionId"]
out = {}
LAST = "document.querySelector('.turn:last-child')"
DONE = "!running && " + LAST + ".classList.contains('assistant')"
try:
    call("POST", session + "/url", {"url": SERVER + "/"})
    # The server wants a key: the page says so, and takes one in its settings.
    wait("$('model').textContent.includes('API key')", "the wish for a key")
    click("#options")
    type_into("#key", "secret")
    run("$('max_tokens').value = 40; $('seed').value = 7")
    click("#settings button.main")
    wait("$('model').textContent.includes('of context')", "the name of the model")
    # Ask, by the keyboard.
    type_into("#input", "hello there\ue007")
    wait("current.turns.length === 2 && " + DONE, "an answer")
    first = run("return current.turns[1]")
    out["answer"] = [first["finish"], first["tokens"], len(first["content"])]
    out["speed"] = run("return " + LAST + ".querySelector('.speed').textContent.includes('tok/s')")
    shot("chat.png")
    # The same seed gives the same answer again.
    click(".turn:last-child [aria-label=Regenerate]")
    wait("current.turns.length === 2 && " + DONE, "the answer again")
    out["regenerated_equal"] = run("return current.turns[1].content") == first["content"]
    # Stop, before the first token can be there.
    run("ask('and now'); $('send').click()")
    wait(DONE, "the end of a stopped answer")
    out["stopped"] = run("return [current.turns[3].finish, " + LAST + ".querySelector('.speed').textContent]")
    # Another question in the place of the first one.
    click(".turn.user [aria-label='Edit and ask again']")
    type_into(".turn textarea", " you\ue007")
    wait("current.turns.length === 2 && " + DONE, "the answer to the changed question")
    out["edited"] = run("return current.turns[0].content")
    # It is all there after a reload.
    call("POST", session + "/refresh")
    wait("document.querySelectorAll('.turn').length === 2", "the conversation after a reload")
    out["listed"] = run("return [...document.querySelectorAll('#list .open')].map(node => node.textContent)")
    # What models write: reasoning is folded, markdown is drawn, nothing of it is HTML.
    text = "# Head\n\n- one\n- **two**\n\n| a | b |\n|---|---|\n| 1 | `2` |\n\n```rust\nfn main() {}\n```\n<img src=x onerror=alert(1)> [l](javascript:alert(1))"
    run("current.turns.push({role: 'user', content: 'show'}, {role: 'assistant', content: arguments[0], reasoning: 'let me see'}); draw()", text)
    drawn = ["h1", "li strong", "td code", ".code pre code", "details.thought:not([open]) summary", "img", ".body a"]
    out["drawn"] = run("return arguments[0].map(s => " + LAST + ".querySelectorAll(s).length)", drawn)
    out["code"] = run("return " + LAST + ".querySelector('.code pre').textContent")
    click(".turn:last-child details.thought summary")
    out["unfolded"] = run("return " + LAST + ".querySelector('details.thought').open")
    shot("markdown.png")
    # A refusal is shown as what the server said.
    run("sessionStorage.setItem('key', 'wrong'); ask('who')")
    wait(DONE, "the refusal")
    out["refused"] = run("return " + LAST + ".querySelector('[role=alert]').textContent")
    call("POST", session + "/url", {"url": SERVER + "/cluster"})
    wait("document.body.innerText.length > 40", "the cluster page")
    out["cluster"] = run("return document.title")
    shot("cluster.png")
    print(json.dumps(out))
finally:
    # The browser goes with its session; the driver in any case.
    call("DELETE", session)
