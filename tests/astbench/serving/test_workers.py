"""`--workers=2`: the same answers from two processes, and what happens when one of them is killed."""

import inspect
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from astbench.errors import ConfigError
from astbench.serving.options import ServeOptions
from tests.astbench.serving.conftest import TEXTS, listening, sentence, serving, writer

PATH = "/v1/completions"
LONG = {"max_tokens": 300, "ignore_eos": True, "return_token_ids": True, "temperature": 1.0, "seed": 7}


def load(number):
    """The model of one process."""
    return writer("ast", {"block_size": 4, "lists": "carried"})


def starved(number):
    """A process that has no memory for the model."""
    raise ConfigError("no memory for\nthe model")


def dying(number):
    """A model that takes its process along when it sees the token 99."""
    served = writer()
    whole = served.model.forward

    def forward(input_ids, **rest):
        if (input_ids == 99).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(input_ids, **rest)

    forward.__signature__ = inspect.signature(whole)
    served.model.forward = forward
    return served


def workers(load, **options):
    """A server of two processes."""
    from astbench.serving.app import build_app

    options = ServeOptions(port=0, workers=2, **options)
    return listening(*build_app(load(0), options, load=load), options)


@pytest.fixture(scope="module")
def client():
    with workers(load, max_batch=2, queue=64) as found:
        yield found
        pids = found.service.engine.pids
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_processes_write_what_one_does(client):
    bodies = [{"prompt": text, "max_tokens": 8, "return_token_ids": True} for text in TEXTS[:24]]
    replies = client.together(PATH, bodies)
    with serving(load(0), max_batch=1) as alone:
        for body, reply in zip(bodies, replies, strict=True):
            assert reply.status == 200, reply.body
            assert reply.json["choices"] == alone.post(PATH, body).json["choices"]


def test_a_killed_process_is_replaced_and_its_requests_are_answered(client):
    bodies = [{"prompt": sentence(seed, 9), **LONG} for seed in range(4)]
    wanted = [client.post(PATH, body).json["choices"] for body in bodies]
    engine, replies = client.service.engine, []
    thread = threading.Thread(target=lambda: replies.extend(client.together(PATH, bodies)))
    before = set(engine.pids)
    written = client.service.metrics.written._value.get
    begun = written()
    thread.start()
    until(lambda: engine.running == 4 and written() > begun + 40)
    os.kill(engine.pids[0], signal.SIGKILL)
    thread.join(120)
    assert [reply.status for reply in replies] == [200] * 4
    assert [reply.json["choices"] for reply in replies] == wanted
    assert written() == begun + 4 * 300  # no token was sent twice
    until(lambda: len(set(engine.pids) - before) == 1 and all(place.ready for place in engine._places), 120)
    assert client.get("/health").status == 200 and client.idle()


def test_a_client_that_leaves_frees_the_process(client):
    with pytest.raises(TimeoutError):
        client.post(PATH, {"prompt": "the river", **LONG, "max_tokens": 1900}, timeout=0.5)
    assert client.idle(5)
    assert client.post(PATH, {"prompt": "the river", "max_tokens": 2}).status == 200


def test_metrics_count_all_processes(client):
    text = client.get("/metrics").body.decode()
    assert "astbench_workers 2.0" in text
    assert float(re.search(r"^astbench_batch_size_count (\S+)$", text, re.M)[1]) > 0
    rss, own = (
        float(re.search(r"^process_resident_memory_bytes (\S+)$", text, re.M)[1]),
        int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024,
    )
    assert rss > own + 200e6


@pytest.mark.slow
def test_a_request_that_kills_two_processes_fails_and_the_next_is_served():
    with workers(dying, max_batch=1, timeout=300.0) as client:
        reply = client.post(PATH, {"prompt": [99], "max_tokens": 2}, timeout=300)
        assert (reply.status, reply.message) == (500, "the server failed; its log says why")
        assert client.post(PATH, {"prompt": [5], "max_tokens": 2}, timeout=300).status == 200


def test_a_process_that_cannot_load_is_said(capfd):
    from astbench.serving.pool import Pool

    pool = Pool(partial(starved), 2, 1, 1)
    with pytest.raises(ConfigError, match="ended before it had loaded the model"):
        pool.start()
    assert not pool.alive and not pool.pids and "no memory for the model" in capfd.readouterr().err
