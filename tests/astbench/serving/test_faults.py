"""What users, clients and models can do wrong: one clear line each, and the next request is served."""

import json
import re
import resource
import socket
import struct
import threading
import time

import pytest

from astbench.backbones.tokenizers import id_tokenizer
from tests.astbench.serving.conftest import answerer, closed_after, sentence, serving, translator, writer

PATH = "/v1/completions"
GOOD = {"prompt": "the river of a town", "max_tokens": 4}


@pytest.fixture(scope="module")
def client():
    """Short limits: nothing here should wait."""
    with serving(writer(), read_timeout=1.0, max_body=20_000, queue=4, max_batch=4) as found:
        yield found
        assert found.idle()
        assert found.post(PATH, GOOD).status == 200


WRONG = {
    "no JSON": (b'{"prompt": "the"', 400, "no JSON in UTF-8: EOF while parsing"),
    "nothing": (b"", 400, "no JSON in UTF-8"),
    "no UTF-8": (b'{"prompt": "\xff\xfe"}', 400, "no JSON in UTF-8: invalid unicode"),
    "half a surrogate pair": (rb'{"prompt": "\ud800"}', 400, "no JSON in UTF-8: "),
    "nested": (b"[" * 10_000, 400, "no JSON in UTF-8: recursion limit exceeded"),
    "a list": ([1, 2], 400, "the body: Input should be an object"),
    "unknown field": ({**GOOD, "promt": 1}, 400, "unknown field 'promt'; known are model, "),
    "missing field": ({"max_tokens": 3}, 400, "prompt: Field required"),
    "prompt of another kind": ({"prompt": 7}, 400, "prompt: must be a text, or a list of at least one token id, got 7"),
    "several prompts": ({"prompt": ["a", "b"]}, 400, "prompt: must be a text, or a list of at least one token id"),
    "empty prompt": ({"prompt": ""}, 400, "prompt: it holds no token"),
    "token that is none": ({"prompt": [1, 10**6]}, 400, "prompt: the model has tokens 0 to "),
    "no tokens": ({"prompt": []}, 400, "prompt: must be a text, or a list of at least one token id, got []"),
    "too hot": ({**GOOD, "temperature": 3}, 400, "temperature: Input should be less than or equal to 2, got 3"),
    "text for a number": ({**GOOD, "temperature": "hot"}, 400, "temperature: Input should be a valid number"),
    "no number": (b'{"prompt": "a", "temperature": NaN}', 400, "temperature: "),
    "true for a number": ({**GOOD, "max_tokens": True}, 400, "max_tokens: Input should be a valid integer"),
    "none to write": ({**GOOD, "max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
    "huge number": ({**GOOD, "max_tokens": 10**30}, 400, "max_tokens"),
    "what is not honoured": ({**GOOD, "n": 2}, 400, "n: Input should be 1, got 2"),
    "empty stop": ({**GOOD, "stop": [""]}, 400, "stop.0: must be a text of 1 to 200 characters, or"),
    "stop of another kind": ({**GOOD, "stop": 5}, 400, "stop: must be a text of 1 to 200 characters, or"),
    "another model": ({**GOOD, "model": "gpt-4"}, 404, "no model 'gpt-4' is served here; it is 'tiny'"),
    "too long for the model": (
        {"prompt": [5] * 2100, "max_tokens": 4},
        400,
        "the prompt's 2100 tokens and max_tokens=4",
    ),
    "too much to write": ({**GOOD, "max_tokens": 5000}, 400, "max_tokens=5000 are more than the 2048"),
    "too long a body": (json.dumps({"prompt": "a" * 30_000}).encode(), 413, "more than 20,000 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_bodies(client, name):
    body, status, message = WRONG[name]
    reply = client.post(PATH, body)
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json")
    assert message in reply.message and "\n" not in reply.message


def test_what_a_turn_may_hold_is_named(client):
    for content, message in (
        ({"content": [{"type": "text", "text": "a"}]}, "messages.0.content: must be a text; parts of one (images"),
        ({"content": None}, "messages.0.content: must be a text"),
        ({}, "messages.0.content: Field required"),
    ):
        reply = client.post("/v1/chat/completions", {"messages": [{"role": "user", **content}]})
        assert reply.status == 400 and message in reply.message, reply.message


def test_a_vocabulary_without_words_is_told():
    """A model of numbers, as the recall probes train: its tokenizer has no token for words."""
    served = writer()
    served.tokenizer = id_tokenizer(40, ("<pad>",))
    with serving(served) as client:
        reply = client.post(PATH, {**GOOD, "prompt": "The river"})
        assert reply.status == 400 and "prompt: this model's tokenizer cannot read it" in reply.message
        assert "send /v1/completions token ids" in reply.message
        assert client.post(PATH, {**GOOD, "prompt": [1, 2, 3]}).status == 200


def test_wrong_requests(client):
    assert "Content-Type: application/json" in client.post(PATH, GOOD, headers={"Content-Type": "text/plain"}).message
    assert client.get(PATH).status == 405
    reply = client.post("/translate", {"text": "a"})
    assert reply.status == 404
    assert reply.message == "no POST /translate here; this model has POST /v1/completions and POST /v1/chat/completions"
    assert (
        "no chat template"
        in client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}).message
    )
    with socket.create_connection(("127.0.0.1", client.port)) as raw:
        raw.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_fifty_megabytes_are_refused_and_not_kept(client):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for head in (b"Content-Length: 50000000", b"Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", client.port)) as raw:
            raw.settimeout(20)
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n%b\r\n\r\n" % head
            )
            part = b"x" * 100_000
            for _ in range(500):
                raw.sendall(part if b"Length" in head else b"%x\r\n%b\r\n" % (len(part), part))
            raw.sendall(b"" if b"Length" in head else b"0\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 413")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("text", [b"", b"POST /v1/comple", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "], ids=repr)
def test_who_sends_no_head_is_cut_off(client, text):
    seconds, said = closed_after(client.port, text)
    assert 0.5 < seconds < 20 and not said


def test_who_sends_no_body_is_told(client):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
    seconds, said = closed_after(client.port, head)
    assert 0.5 < seconds < 20 and said.startswith(b"HTTP/1.1 408") and b"did not come within 1 s" in said


def test_who_takes_no_answer_is_cut_off(client):
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", client.port))
        raw.settimeout(8)
        began = time.monotonic()
        with pytest.raises((ConnectionError, TimeoutError)) as cut:
            while time.monotonic() - began < 30:
                raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
        assert not isinstance(cut.value, TimeoutError)


def stream(port, body):
    raw = socket.create_connection(("127.0.0.1", port))
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    raw.sendall(head.encode() + data)
    return raw


def tokens_written(client):
    found = re.search(r"^astbench_generated_tokens_total (\S+)", client.get("/metrics").body.decode(), re.MULTILINE)
    return float(found[1])


@pytest.mark.parametrize("how", ["mid-stream", "reset", "before anything"])
def test_what_nobody_waits_for_is_not_computed(client, how):
    before = tokens_written(client)
    raw = stream(client.port, {"prompt": "the", "max_tokens": 2000, "ignore_eos": True})
    if how != "before anything":
        while b"data: " not in raw.recv(1000):
            pass
        assert client.service.engine.running == 1
    if how == "reset":
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
    assert client.idle()
    assert tokens_written(client) - before < 1900


def slowed(served_client, seconds):
    """Every step of the model takes so long."""
    step = served_client.service.engine.worker.step
    served_client.service.engine.worker.step = lambda: (time.sleep(seconds), step())


def test_overload_is_told_at_once_and_nothing_is_lost():
    with serving(writer(), queue=2, max_batch=2) as client:
        slowed(client, 0.15)
        replies, times = [], []

        def ask():
            began = time.monotonic()
            reply = client.post(PATH, {**GOOD, "ignore_eos": True})
            times.append((reply.status, time.monotonic() - began))
            replies.append(reply)

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(replies) == 40 and {reply.status for reply in replies} == {200, 429}
        assert all(reply.json["usage"]["completion_tokens"] == 4 for reply in replies if reply.status == 200)
        assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in replies if reply.status == 429)
        assert "requests wait already; try again in " in next(r.message for r in replies if r.status == 429)
        refused = sorted(seconds for status, seconds in times if status == 429)
        assert refused[len(refused) // 2] < max(seconds for status, seconds in times if status == 200)
        assert client.idle() and client.post(PATH, GOOD).status == 200


def test_late_is_told():
    with serving(writer(), timeout=2) as client:
        slowed(client, 0.2)
        reply = client.post(PATH, {**GOOD, "max_tokens": 50, "ignore_eos": True})
        assert reply.status == 504 and "not done after 2 s" in reply.message
        assert client.idle()
        streamed = client.post(PATH, {**GOOD, "max_tokens": 50, "ignore_eos": True, "stream": True})
        assert streamed.status == 200 and b"not done after 2 s" in streamed.body
        assert streamed.body.endswith(b"data: [DONE]\n\n")


def broken_for(served, token):
    """The model gives no numbers for inputs with this token."""

    def spoil(module, args, kwargs, out):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        spoiled = (ids == token).any(1)[:, None, None]
        return out.__class__(**{**out, "last_hidden_state": out.last_hidden_state.masked_fill(spoiled, float("nan"))})

    base = served.model.get_encoder() if served.head == "seq2seq" else served.model.base_model
    base.register_forward_hook(spoil, with_kwargs=True)


@pytest.mark.parametrize(
    ("make", "path", "good", "broken"),
    [
        (writer, PATH, GOOD, {**GOOD, "prompt": "the river Z"}),
        (
            answerer,
            "/answer",
            {"question": "the river", "document": sentence(3, 60)},
            {"question": "the river", "document": "a town qz"},
        ),
        (translator, "/translate", {"text": "the river"}, {"text": "the river Z"}),
    ],
    ids=["writer", "answerer", "translator"],
)
def test_no_numbers_from_the_model(make, path, good, broken):
    """Whoever brings what the model fails on gets the error; the others in the batch get their answers."""
    served = make()
    text = broken.get("prompt") or broken.get("document") or broken.get("text")
    broken_for(served, served.tokenizer(text.split()[-1], add_special_tokens=False)["input_ids"][-1])
    with serving(served) as client:
        assert client.post(path, good).status == 200
        slowed(client, 0.02)
        replies = client.together(path, [good, broken, good, broken, good])
        assert [reply.status for reply in replies] == [200, 500, 200, 500, 200]
        assert replies[1].message == "the model's output is not finite: an error of the model, not of the request"
        assert client.get("/health").status == 200


def test_a_step_that_fails_ends_those_in_it_and_nobody_else(caplog):
    with serving(writer()) as client:
        worker, step = client.service.engine.worker, client.service.engine.worker.step
        worker.step = lambda: 1 / 0
        reply = client.post(PATH, GOOD)
        assert (reply.status, reply.message) == (500, "the server failed; its log says why")
        assert "ZeroDivisionError" in caplog.text
        worker.step = lambda: [][0] if False else (_ for _ in ()).throw(RuntimeError("out of memory"))
        assert client.post(PATH, GOOD).status == 503
        worker.step = step
        assert client.post(PATH, GOOD).status == 200
        worker.step = lambda: (_ for _ in ()).throw(SystemExit)  # nothing that a model may raise
        assert client.post(PATH, GOOD).status == 503
        assert client.get("/health").status == client.get("/ready").status == 503
        assert "has stopped" in client.post(PATH, GOOD).message


def test_the_key():
    with serving(writer(), key="geheim") as client:
        assert client.get("/health").status == client.get("/ready").status == 200
        for given in ({}, {"Authorization": "Bearer falsch"}, {"Authorization": "geheim"}):
            reply = client.post(PATH, GOOD, headers=given)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
            assert client.get("/metrics", headers=given).status == 401
        assert client.post(PATH, GOOD, headers={"Authorization": "Bearer geheim"}).status == 200


@pytest.mark.slow
def test_a_minute_of_ten_times_what_can_be_served():
    with serving(writer(), queue=8, max_batch=4) as client:
        slowed(client, 0.02)
        end, lock, statuses, late = time.monotonic() + 60, threading.Lock(), {}, []

        def ask():
            while time.monotonic() < end:
                began = time.monotonic()
                reply = client.post(PATH, {**GOOD, "ignore_eos": True})
                with lock:
                    statuses[reply.status] = statuses.get(reply.status, 0) + 1
                    if reply.status == 429:
                        late.append(time.monotonic() - began)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        threads = [threading.Thread(target=ask) for _ in range(120)]  # 12 are served or wait
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses.keys() == {200, 429} and statuses[429] > 10 * statuses[200] / 4
        assert sorted(late)[len(late) // 2] < 0.1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
        assert client.idle()
