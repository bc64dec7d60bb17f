"""Tiny models behind a real server, in a thread of this process."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from astbench.backbones.tokenizers import train_bpe, train_byte_tokenizer, train_tokenizer
from astbench.serving.options import ServeOptions
from astbench.tasks.lm.task import LanguageModel
from astbench.tasks.mt.task import Translation
from astbench.tasks.qa.task import SpanQA
from tests.astbench.conftest import tiny_model

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'serve' is not installed")

WORDS = "the river of a town by sea and hill was old in war his book she wrote him it ran north to see".split()


def sentence(seed, length):
    """Some words, the same for a seed."""
    numbers = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[n] for n in numbers)


TEXTS = [sentence(seed, 40) for seed in range(60)]


def writer(attention="dense", options=(), family="llama", **changes):
    """A causal model as `load_pretrained` gives it."""
    from astbench.serving.loading import _served
    from astbench.tasks.trained import equip

    tokenizer = train_byte_tokenizer(TEXTS, 300)
    module = LanguageModel(attention={"name": attention, **dict(options)})
    equip(module, tiny_model(family, vocab_size=len(tokenizer), **changes))
    return _served("tiny", module, tokenizer, {}, [])


def answerer(attention="dense", options=()):
    """A model that answers questions about documents."""
    from astbench.serving.loading import _served
    from astbench.tasks.trained import equip

    tokenizer = train_tokenizer(TEXTS, 200)
    module = SpanQA(attention={"name": attention, **dict(options)})
    model = tiny_model("bert", AutoModelForQuestionAnswering, vocab_size=len(tokenizer), max_position_embeddings=64)
    equip(module, model)
    return _served("tiny-qa", module, tokenizer, {"max_length": 48, "stride": 8, "max_question": 16}, [])


def translator(attention="dense", options=(), texts=TEXTS, size=300, longest=24):
    """A model that translates."""
    from astbench.serving.loading import _served
    from astbench.tasks.trained import equip

    tokenizer = train_bpe(texts, size)
    module = Translation(attention={"name": attention, **dict(options)})
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model("marian", vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.bos_token_id, **tokens)
    equip(module, model)
    return _served("tiny-mt", module, tokenizer, {"max_length": longest}, [])


@dataclass
class Reply:
    """What came back."""

    status: int
    body: bytes
    headers: dict = field(default_factory=dict)

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def message(self):
        return self.json["error"]["message"]


class Client:
    """Requests to one server."""

    def __init__(self, port, service):
        self.port, self.service = port, service

    def ask(self, method, path, body=None, headers=None, timeout=60):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        given = {"Content-Type": "application/json"} if data is not None else {}
        try:
            connection.request(method, path, data, {**given, **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})
        finally:
            connection.close()

    def get(self, path, **options):
        return self.ask("GET", path, **options)

    def post(self, path, body, **options):
        return self.ask("POST", path, body, **options)

    def together(self, path, bodies, threads=32):
        """Many at a time; the replies in the order of the bodies."""
        replies = [None] * len(bodies)
        left = iter(range(len(bodies)))
        lock = threading.Lock()

        def work():
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                replies[number] = self.post(path, bodies[number], timeout=300)

        workers = [threading.Thread(target=work) for _ in range(min(threads, len(bodies)))]
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join()
        return replies

    def idle(self, seconds=20):
        """Whether nothing runs or waits any more, soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.service.engine.running and not self.service.engine.waiting:
                return True
            time.sleep(0.02)
        return False


def closed_after(port, text, seconds=25):
    """How long a server lets a client be that sends this and no more, and what it says."""
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.settimeout(seconds)
        raw.sendall(text)
        began, said = time.monotonic(), b""
        try:
            while part := raw.recv(1000):
                said += part
        except ConnectionResetError:
            pass
        return time.monotonic() - began, said


def saved(folder):
    """A tiny writer as a pretrained folder."""
    served = writer()
    served.handle.undo()
    served.model.save_pretrained(folder)
    served.tokenizer.save_pretrained(folder)
    return folder


def serving(served, key="", **options):
    """A server of a model, on a free port."""
    from astbench.serving.app import build_app

    options = ServeOptions(port=0, **options)
    return listening(*build_app(served, options, key), options)


@contextmanager
def listening(app, service, options):
    """A server of an application."""
    from astbench.serving.server import Server

    server = Server(app, service, options)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    end = time.monotonic() + 60
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    try:
        yield Client(server.servers[0].sockets[0].getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
