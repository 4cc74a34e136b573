"""An environment of this directory over HTTP, so that trainer and workers on many machines ask one server.

    python3 examples/environments/serve.py guess --host 0.0.0.0 --port 8008
    training-swarm --config run.toml          with  environment = "http://192.0.2.1:8008/"
    rollout-fleet --trainer ADDRESS --env http://192.0.2.1:8008/

The body of each POST is one question as JSON, the body of the reply its answer, which repeats the question's "id"; see guess.py
for the questions. Nothing is remembered between them, so there may be several servers, and one may be started again at any
time. A question that cannot be answered is a reply with status 400, 413 or 500 and the reason. It costs a worker a lease; the
learner's own episodes (evaluations, training-swarm solo) are played again a few times, and then the run ends.
"""

import argparse
import importlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_QUESTION_BYTES = 4 * 1024 * 1024
AT_ONCE = 8
# Connections that may wait to be taken; the default of 5 has the system turn away who comes with many others.
WAITING = 128


class Questions(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    # Small replies must not wait for the acknowledgement of their own headers.
    disable_nagle_algorithm = True

    def do_POST(self):
        try:
            length = int(self.headers.get("content-length") or 0)
            if not 0 <= length <= MAX_QUESTION_BYTES:
                self.close_connection = True
                return self.reply(413, f"a question of {length} bytes; at most {MAX_QUESTION_BYTES} are read")
            question = json.loads(self.rfile.read(length))
            number = question["id"]
        except (ValueError, KeyError, TypeError) as error:
            # Some of it may not have been read.
            self.close_connection = True
            return self.reply(400, f"no question: {error!r}")
        try:
            answer = self.server.answer(question)
            if question["op"] == "hello":
                answer = {"at_once": AT_ONCE, **answer}
            body = json.dumps({"id": number, **answer})
        except Exception as error:
            return self.reply(500, f"{error!r}")
        self.reply(200, body)

    def reply(self, status, body):
        body = body.encode()
        self.send_response(status)
        self.send_header("content-type", "application/json" if status == 200 else "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = WAITING
    daemon_threads = True


parser = argparse.ArgumentParser(description="Serve an environment of this directory over HTTP.")
parser.add_argument("environment", help="a module here with a function answer(question), for example guess")
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", type=int, default=0, help="0: any that is free")
options = parser.parse_args()
server = Server((options.host, options.port), Questions)
server.answer = importlib.import_module(options.environment).answer
host, port = server.server_address[:2]
print(json.dumps({"url": f"http://{host}:{port}/"}), flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    sys.exit(0)
