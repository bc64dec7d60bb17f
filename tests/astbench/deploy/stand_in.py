"""Stands in for `astbench serve` where only the deployment test is tested: answers as a server does, in no time.

`stand_in.py PARENT serve MODEL --attention=local --attention.window=N ...`; what it does is said by the window:
1 serves, 2 refuses to start, 3 is killed by its 18th request, 5 by its 7th, 4 answers slowly, one after another.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = sys.argv[2:]
given = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
kind = given.get("attention.window", "1")
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
with open(os.environ["STAND_IN_LOG"], "a") as file:
    file.write(f"{os.getpid()} {kind}\n")
if kind == "2":
    print("astbench: error: out of memory on the CPU", file=sys.stderr)
    sys.exit(7)
seen, one = [], threading.Lock()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = given.get("attention", "dense")
        texts = {"/ready": {"ready": True}, "/health": {"model": "m", "attention": {"name": name}}}
        self.say(b"" if self.path == "/metrics" else json.dumps(texts[self.path]).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen.append(body)
        if len(seen) >= {"3": 18, "5": 7}.get(kind, 10**6):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "4":
            with one:
                time.sleep(0.2)
        events = [{"choices": [{"text": "a", "token_ids": [1]}]}] * body.get("max_tokens", 0)
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self.say(stream.encode(), "text/event-stream")


server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
print(f"serving on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
