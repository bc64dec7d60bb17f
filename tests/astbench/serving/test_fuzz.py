"""Requests that may be anything: none is answered with a 500, and the server goes on."""

import json
import random
import re
import resource

import pytest

from tests.astbench.serving.conftest import closed_after, serving, writer

PATH = "/v1/completions"
GOOD = {"prompt": "the river of a town", "max_tokens": 4}
VALUES = [None, True, -1, 0, 3, 1e308, "", "a", "\u0000", [], {}, [[]], "x" * 300, 2**70, 0.5, ["a"], {"a": 1}]


def fuzzed(rng):
    """A request that may be anything: method, path, headers, body."""
    body = dict(GOOD)
    for _ in range(rng.randrange(3)):
        names = [
            "prompt",
            "max_tokens",
            "temperature",
            "top_p",
            "stop",
            "stream",
            "n",
            "seed",
            "user",
            "stream_options",
        ]
        body[rng.choice([*names, "unknown"])] = rng.choice(VALUES)
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.4:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    if rng.random() < 0.1:
        raw = raw[: rng.randrange(len(raw) or 1)]
    method = rng.choice([b"POST"] * 12 + [b"GET", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"P\x00ST"])
    path = rng.choice([b"/v1/completions"] * 12 + [b"/v1/chat/completions", b"/", b"/%ff", b"/health", b"//", b"*"])
    kind = rng.choice([b"application/json"] * 9 + [b"text/plain", b"application/json; charset=latin-1"])
    length = rng.choice([b"%d" % len(raw)] * 14 + [b"-1", b"x", b"9" * 30, b"0", b"%d" % (len(raw) + 5)])
    head = b"%b %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: %b\r\nContent-Length: %b\r\n\r\n"
    return head % (method, path, kind, length) + bytes(raw)


def fuzz(client, count, seed):
    rng, statuses = random.Random(seed), {}
    for number in range(count):
        request = fuzzed(rng)
        _, said = closed_after(client.port, request)
        found = re.match(rb"HTTP/1.1 (\d{3}) ", said)
        status = int(found[1]) if found else 0
        assert 200 <= status < 500, (number, request, said)
        statuses[status] = statuses.get(status, 0) + 1
    assert client.idle() and client.post(PATH, GOOD).status == 200
    assert not client.get("/metrics").body.decode().count('status="500"')
    return statuses


def test_fuzzed_requests():
    with serving(writer(), read_timeout=0.4, max_body=20_000) as client:
        assert {200, 400, 404, 405, 408, 415} <= fuzz(client, 250, seed=0).keys()


@pytest.mark.slow
def test_ten_thousand_fuzzed_requests():
    with serving(writer(), read_timeout=0.4, max_body=20_000) as client:
        fuzz(client, 500, seed=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        fuzz(client, 9_500, seed=2)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
