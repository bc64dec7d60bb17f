"""SIGTERM while requests run."""

import os
import re
import signal
import threading
import time
from pathlib import Path

from tests.astbench.processes import child
from tests.astbench.serving.conftest import Client, saved

PATH = "/v1/completions"
GOOD = {"prompt": "the river of a town", "max_tokens": 4}


def test_sigterm_under_load(run, tmp_path):
    """Who is here gets the whole answer, who comes later is sent away, and nothing stays."""
    files = [tmp_path / "out.txt", tmp_path / "err.txt"]
    words = ["serve", str(saved(tmp_path / "model")), "--attention=local", "--port=0", "--max_batch=2", "--drain=100"]
    process = run.context.Process(target=child, args=(words, [str(file) for file in files], None))
    process.start()
    try:
        end = time.monotonic() + 280
        while not (
            found := re.search(r"serving on http://127.0.0.1:(\d+)", files[0].read_text() if files[0].exists() else "")
        ):
            assert process.is_alive() and time.monotonic() < end, files[1]
            time.sleep(0.05)
        client = Client(int(found[1]), None)
        replies = []
        body = {**GOOD, "max_tokens": 60, "ignore_eos": True}
        threads = [threading.Thread(target=lambda: replies.append(client.post(PATH, body))) for _ in range(4)]
        for thread in threads:
            thread.start()
        while not {b"astbench_running 2.0", b"astbench_waiting 2.0"} <= {*client.get("/metrics").body.splitlines()}:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid, signal.SIGTERM)
        while "stopping: " not in files[0].read_text():
            time.sleep(0.01)
        late = client.post(PATH, GOOD)
        assert (late.status, late.message) == (503, "the server is shutting down")
        assert client.get("/ready").status == 503 and client.get("/health").status == 200
        for thread in threads:
            thread.join()
        assert [reply.json["usage"]["completion_tokens"] for reply in replies] == [60] * 4
        process.join(30)
        assert process.exitcode == 143, files[1].read_text()
        assert "terminated by SIGTERM" in files[1].read_text()
        assert not children  # one process: none is left behind
    finally:
        process.kill()
