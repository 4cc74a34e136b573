"""The chat page and the cluster page in a real browser, over WebDriver; prints what it saw as JSON.

Arguments: the chromedriver program, the address of a server, that of a swarm's head, and perhaps a folder for screenshots.
With `--pictures` before them it checks nothing and takes the pictures of the documentation instead, of servers with a model
that can talk. Standard library only.
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

PICTURES = "--pictures" in sys.argv
DRIVER, SERVER, CLUSTER, *folder = [argument for argument in sys.argv[1:] if argument != "--pictures"]
SHOTS = pathlib.Path(folder[0]) if folder else None
TIMEOUT_S = 120 if PICTURES else 30
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1180,860"]
LAST = "document.querySelector('.turn:last-child')"
DONE = "!running && " + LAST + ".classList.contains('assistant')"


# ---- the browser -------------------------------------------------------------------------------------------------------
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


def run_until_done(script, *values):
    """Of a script that calls `done` with its value."""
    script = "const done = arguments[arguments.length - 1];" + script
    return call("POST", session + "/execute/async", {"script": script, "args": values})


def wait(script, what):
    look = """const end = Date.now() + arguments[0];
        (function look() { if (%s) done(true); else if (Date.now() > end) done(false); else setTimeout(look, 20); })()"""
    if not run_until_done(look % script, (TIMEOUT_S - 5) * 1000):
        sys.exit(f"{what} did not come: {run('return document.body.innerText')!r}")


def element(selector):
    found = call("POST", session + "/element", {"using": "css selector", "value": selector})
    return session + "/element/" + next(iter(found.values()))


def click(selector):
    call("POST", element(selector) + "/click")


def type_into(selector, text):
    call("POST", element(selector) + "/value", {"text": text})


def open_page(url):
    call("POST", session + "/url", {"url": url})


def reload_page():
    call("POST", session + "/refresh")


def shot(name):
    if SHOTS:
        SHOTS.mkdir(parents=True, exist_ok=True)
        (SHOTS / name).write_bytes(base64.b64decode(call("GET", session + "/screenshot")))


def seen_as(selector):
    """The text of a node that a person can see: it has a size, is inside the window and not transparent."""
    return run("""const node = document.querySelector(arguments[0]), box = node.getBoundingClientRect();
        const inside = box.width > 0 && box.height > 0 && box.top >= 0 && box.bottom <= innerHeight;
        return inside && node.checkVisibility({opacityProperty: true}) ? node.textContent : null""", selector)


# ---- the checks --------------------------------------------------------------------------------------------------------
def ask_and_regenerate(out):
    open_page(SERVER + "/")
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
    out["speed"] = seen_as(".turn:last-child .speed")
    shot("chat.png")
    # The same seed gives the same answer again.
    click(".turn:last-child [aria-label=Regenerate]")
    wait("current.turns.length === 2 && " + DONE, "the answer again")
    out["regenerated_equal"] = run("return current.turns[1].content") == first["content"]


def stop(out):
    # Before the first token can be there.
    run("ask('and now'); $('send').click()")
    wait(DONE, "the end of a stopped answer")
    out["stopped"] = run("return [current.turns[3].finish, current.turns[3].content.length, " + LAST
                         + ".querySelector('.speed').textContent]")
    # In the middle, by the button and by the keyboard: what came stays, also after a reload, and is how the answer begins.
    # This model is too fast for that: its events come as slowly as a large one's, and most of them not before the stop.
    slow = """const real = window.fetch;
        window.fetch = async (...asked) => {
            const answer = await real(...asked), reader = new TextDecoder(), writer = new TextEncoder();
            const stopped = asked[1].signal;
            let events = 0;
            const slower = new TransformStream({async transform(bytes, out) {
                for (const event of reader.decode(bytes, {stream: true}).split(/(?<=\\n\\n)/)) {
                    await new Promise(done => {
                        if (events++ < 60 || stopped.aborted) setTimeout(done, 8);
                        else stopped.addEventListener('abort', done);
                    });
                    out.enqueue(writer.encode(event));
                }
            }});
            return new Response(answer.body.pipeThrough(slower), answer);
        };"""
    out["stopped_midway"] = []
    run("current.settings.max_tokens = 180")
    for way in ["$('send').click()", "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"]:
        run(slow)
        midway = run_until_done("""current.turns.length = 2; ask('and now');
            (function look() {
                const turn = current.turns[3];
                if (!running) return done(null);
                if (turn.content.length < 8 || !turn.rate) return setTimeout(look, 0);
                const seen = [$('send').getAttribute('aria-label')];
                requestAnimationFrame(() => {
                    seen.push(%s.querySelector('.speed').textContent, %s.querySelector('.cursor') !== null);
                    %s;
                    done(seen);
                });
            })()""" % (LAST, LAST, way))
        wait(DONE, "the end of an answer that was stopped midway")
        turn = run("return current.turns[3]")
        told = seen_as(".turn:last-child .speed")
        reload_page()
        wait("document.querySelectorAll('.turn').length === 4", "the stopped answer after a reload")
        kept = run("return current.turns[3].content")
        run("current.settings.max_tokens = 180")
        click(".turn:last-child [aria-label=Regenerate]")
        wait("current.turns.length === 4 && " + DONE, "the whole answer")
        whole = run("return current.turns[3].content")
        out["stopped_midway"].append({
            "live": midway, "finish": turn["finish"], "told": told, "kept": kept == turn["content"], "length": len(kept),
            "is_beginning": whole.startswith(kept), "whole": len(whole), "button": run("return $('send').getAttribute('aria-label')")})


def edit_and_reload(out):
    run("current.settings.max_tokens = 40")
    click(".turn.user [aria-label='Edit and ask again']")
    type_into(".turn textarea", " you\ue007")
    wait("current.turns.length === 2 && " + DONE, "the answer to the changed question")
    out["edited"] = run("return current.turns[0].content")
    # It is all there after a reload.
    reload_page()
    wait("document.querySelectorAll('.turn').length === 2", "the conversation after a reload")
    out["listed"] = run("return [...document.querySelectorAll('#list .open')].map(node => node.textContent)")


def thoughts(out):
    # The template opens thoughts where it is told to: they come in a field of their own, and are folded.
    run("""const real = window.fetch;
        window.fetch = (url, asked) => {
            window.fetch = real;
            return real(url, {...asked, body: JSON.stringify({...JSON.parse(asked.body), chat_template_kwargs: {enable_thinking: true}})});
        };
        ask('think')""")
    wait(DONE, "an answer of thoughts")
    turn = run("return current.turns.at(-1)")
    folded = "details.thought:not([open])"
    out["thoughts"] = [len(turn["reasoning"]), turn["content"], run(f"return {LAST}.querySelector('{folded} summary')?.textContent")]
    click(".turn:last-child details.thought summary")
    said = run(f"return {LAST}.querySelector('details.thought > div').textContent")
    out["unfolded"] = [run(f"return {LAST}.querySelector('details.thought').open"), said == turn["reasoning"].strip()]


def markdown(out):
    # What models write is drawn, and nothing of it is HTML.
    text = ("# Head\n\n- one\n- **two**\n\n| a | b |\n|---|---|\n| 1 | `2` |\n\n```rust\nfn main() {}\n```\n"
            "<img src=x onerror=alert(1)> [l](javascript:alert(1))")
    run("current.turns.push({role: 'user', content: 'show'}, {role: 'assistant', content: arguments[0]}); draw()", text)
    drawn = ["h1", "li strong", "td code", ".code pre code", "img", ".body a"]
    out["drawn"] = run("return arguments[0].map(s => " + LAST + ".querySelectorAll(s).length)", drawn)
    out["code"] = run("return " + LAST + ".querySelector('.code pre').textContent")
    shot("markdown.png")


def refusal(out):
    # It is shown as what the server said.
    run("sessionStorage.setItem('key', 'wrong'); ask('who')")
    wait(DONE, "the refusal")
    out["refused"] = run("return " + LAST + ".querySelector('[role=alert]').textContent")
    run("sessionStorage.setItem('key', 'secret')")


def one_machine(out):
    open_page(SERVER + "/cluster")
    wait("document.querySelector('.seg') !== null", "the cluster page of one machine")
    out["one_machine"] = run("return [document.title, $('where').textContent, $('lanes').innerText, $('nodes-part').hidden]")


def cluster(out):
    """What the page shows of a swarm beside what the status says."""
    open_page(CLUSTER + "/cluster")
    wait("document.querySelectorAll('#nodes tr').length > 0 && $('state-text').textContent === 'serving'", "the cluster page")
    # An answer, so that there is something to count.
    made = "[...document.querySelectorAll('.tile')].find(tile => tile.innerText.endsWith('tokens made')).querySelector('b').textContent"
    before = int(run("return " + made).replace(",", ""))
    run_until_done("""fetch('/v1/completions', {method: 'POST', headers: {'content-type': 'application/json'},
        body: JSON.stringify({prompt: 'w1 w2', max_tokens: 20, ignore_eos: true})}).then(answer => answer.json()).then(done)""")
    wait(f"{made} === '{before + 20:,}'", "twenty tokens on the page")
    status = run_until_done("fetch('/cluster/status').then(answer => answer.json()).then(done)")
    out["title"] = [run("return document.title"), run("return $('model').textContent"), status["model"]]
    out["where"] = [run("return $('where').textContent"), status["swarm"]["swarm"], len(status["swarm"]["nodes"])]
    rows = run("""return [...document.querySelectorAll('#nodes tr')].map(row => [row.cells[0].title,
        row.cells[0].querySelector('small').textContent, row.cells[1].textContent, row.cells[2].firstChild.textContent])""")
    out["rows"] = rows
    by_layers = sorted(status["swarm"]["nodes"], key=lambda node: node["layers"][0])
    out["nodes"] = [[node["peer"], ("head, " if node["head"] else "") + node["device"],
                     f"{node['layers'][0]}–{node['layers'][1] - 1}", node["state"]] for node in by_layers]
    lanes = run("""return [...document.querySelectorAll('.lane .bar')].map(bar => [...bar.children].map(seg =>
        [seg.querySelector('b').textContent, seg.querySelector('div').textContent.split(' · ')[0], seg.getBoundingClientRect().width]))""")
    heads = {node["peer"]: node["head"] for node in status["swarm"]["nodes"]}
    out["lanes"], out["stages"], out["widths"] = [], [], []
    for lane, pipeline in zip(lanes, status["swarm"]["pipelines"], strict=True):
        stages = [(stage["peer"], *stage["layers"]) for stage in pipeline["stages"]]
        out["lanes"].append([segment[:2] for segment in lane])
        out["stages"].append([[("head · " if heads[peer] else "") + peer[:4] + "…" + peer[-6:], f"{begin}–{end - 1}"]
                              for peer, begin, end in stages])
        whole = sum(width for *_, width in lane)
        out["widths"] += [abs(width / whole - (end - begin) / status["layers"]) for (*_, width), (_, begin, end) in zip(lane, stages)]
    shot("cluster.png")


# ---- the pictures ------------------------------------------------------------------------------------------------------
def theme(name):
    run("localStorage.setItem('theme', JSON.stringify(arguments[0]))", name)
    reload_page()


def window(height):
    call("POST", session + "/window/rect", {"width": 1180, "height": height})


def pictures():
    """What the documentation shows: answers with their speed, one that grows, one that was stopped, and a swarm at work."""
    window(1000)
    open_page(SERVER + "/")
    wait("$('model').textContent.includes('of context')", "the name of the model")
    theme("light")
    run("Object.assign(current.settings, {temperature: 0, max_tokens: 300})")
    for question in ["Write a Python function that adds two numbers.", "Why is the sky blue?"]:
        run("ask(arguments[0])", question)
        wait(DONE, "an answer")
    run("toEnd()")
    shot("chat.png")
    theme("dark")
    run("Object.assign(current.settings, {temperature: 0, max_tokens: 300}); current.turns.length = 2; ask('Why is the sky blue?')")
    wait("current.turns.at(-1).content.length > 240", "half an answer")
    shot("chat-dark.png")
    click("#send")
    wait(DONE, "the end of the stopped answer")
    theme("light")
    run("toEnd()")
    shot("chat-stopped.png")
    window(1130)
    open_page(CLUSTER + "/cluster")
    for name, picture in [("light", "cluster.png"), ("dark", "cluster-dark.png")]:
        theme(name)
        run("""const things = ['a swarm', 'the sea', 'two trees'];
            const tell = async (thing, i) => { for (let seed = 0;; seed++) await fetch('/v1/chat/completions', {method: 'POST',
                headers: {'content-type': 'application/json'}, body: JSON.stringify({max_tokens: 60 + 20 * i, seed,
                    messages: [{role: 'user', content: 'Tell me a story about ' + thing}]})}); };
            things.forEach(tell)""")
        wait("samples.length > 60 && samples.at(-1).made > 0", "a minute of work")
        shot(picture)


wanted = {"args": QUIET + ["--user-data-dir=" + profile.name]}
wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": wanted, "timeouts": {"script": TIMEOUT_S * 1000}}}}
session = "/session/" + call("POST", "/session", wanted)["sessionId"]
try:
    if PICTURES:
        pictures()
    else:
        seen = {}
        for part in [ask_and_regenerate, stop, edit_and_reload, thoughts, markdown, refusal, one_machine, cluster]:
            part(seen)
        print(json.dumps(seen))
finally:
    # The browser goes with its session; the driver in any case.
    call("DELETE", session)
