"""`/v1/completions` and `/v1/chat/completions`, as OpenAI's clients call them."""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from astbench.serving.bodies import Chat, Completion, parse
from astbench.serving.engine import Done
from astbench.serving.front import Gone
from astbench.serving.refusals import Refused, refusal
from astbench.serving.service import Service
from astbench.serving.text import TextStream
from astbench.serving.writing import Continuation

CHAT_TOKENS = 256
"""Most tokens of a chat's answer where the request does not say."""


@dataclass
class Piece:
    """Some text more.

    Attributes:
        text: What came since the last piece.
        tokens: Likewise, as ids.
        finish: Why it is the last one; None for others.
        written: Tokens so far.
    """

    text: str
    tokens: list[int]
    finish: str | None = None
    written: int = 0


class Generating:
    """The two routes.

    Args:
        service: Behind them.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tokenizer = service.served.tokenizer
        end = self._tokenizer.eos_token_id
        self._ends = frozenset(() if end is None else (end,))
        # A chat model says in its settings which tokens end a turn.
        settings = getattr(service.served.model, "generation_config", None)
        turn = getattr(settings, "eos_token_id", None)
        self._turn_ends = self._ends | frozenset([turn] if isinstance(turn, int) else turn or ())

    async def completions(self, request: Request) -> Response:
        """Goes on with a prompt."""
        body = parse(Completion, request.scope["astbench.body"])
        most = body.max_completion_tokens or body.max_tokens
        deadline = self._service.deadline()
        prompt = await self._service.text(lambda: self._prompt_ids(body.prompt), deadline)
        return await self._respond(request, body, prompt, most, self._ends, _AsCompletion, deadline)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        body = parse(Chat, request.scope["astbench.body"])
        deadline = self._service.deadline()
        prompt = await self._service.text(lambda: self._chat_ids(body), deadline)
        most = body.max_completion_tokens or body.max_tokens
        most = most or max(1, min(CHAT_TOKENS, self._service.limit - len(prompt)))
        return await self._respond(request, body, prompt, most, self._turn_ends, _AsChat, deadline)

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            if not self._ids(prompt, "prompt", add_special_tokens=False):
                raise Refused(400, "prompt: it holds no token", "prompt")
            return self._ids(prompt, "prompt")
        size = self._service.served.model.get_input_embeddings().get_parameter("weight").shape[0]
        if wrong := [token for token in prompt if not 0 <= token < size]:
            raise Refused(400, f"prompt: the model has tokens 0 to {size - 1}, got {wrong[0]}", "prompt")
        return prompt

    def _chat_ids(self, body: Chat) -> list[int]:
        if not self._tokenizer.chat_template:
            raise Refused(
                400, "this model's tokenizer has no chat template; use /v1/completions, or serve with --chat_template"
            )
        turns = [turn.model_dump(exclude_none=True) for turn in body.messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise Refused(400, f"messages: the chat template refuses them: {str(error)[:200]}", "messages") from error
        ids = self._ids(str(text), "messages", add_special_tokens=False)
        if not ids:
            raise Refused(400, "messages: they hold no token", "messages")
        return ids

    def _ids(self, text: str, field: str, **options: bool) -> list[int]:
        """Tokens of a text; a vocabulary of numbers alone has none for words."""
        try:
            return list(self._tokenizer(text, **options)["input_ids"])
        except Exception as error:  # Rust's tokenizers raise nothing more particular
            raise Refused(
                400,
                f"{field}: this model's tokenizer cannot read it ({' '.join(str(error).split())[:100]}); "
                "send /v1/completions token ids",
                field,
            ) from error

    async def _respond(
        self,
        request: Request,
        body: Completion | Chat,
        prompt: list[int],
        most: int,
        ends: frozenset[int],
        form: type[_Form],
        deadline: float,
    ) -> Response:
        served, limit = self._service.served, self._service.limit
        if body.model not in (None, served.name):
            raise Refused(404, f"no model {ascii(body.model)[:100]} is served here; it is '{served.name}'", "model")
        if len(prompt) + most > limit:
            raise Refused(
                400,
                f"the prompt's {len(prompt)} tokens and max_tokens={most} are more than the {limit} that the model "
                "takes; shorten one of them",
                "max_tokens" if len(prompt) < limit else "prompt",
            )
        seed = secrets.randbits(63) if body.seed is None else body.seed
        ends = frozenset() if body.ignore_eos else ends
        work = Continuation(prompt, most, ends, body.temperature, body.top_p, seed)
        self._service.metrics.prompt.inc(len(prompt))
        pieces = self._pieces(work, body.stops, request.receive, deadline)
        told = form(served.name, body, len(prompt))
        first = await anext(pieces)  # what goes wrong before it has a status of its own
        if body.stream:
            return _Events(told, first, pieces, lambda error: refusal(error, self._service.options.timeout))
        text, tokens, last = first.text, first.tokens, first
        async with aclosing(pieces):  # type: ignore[type-var]
            async for last in pieces:
                text += last.text
                tokens = tokens + last.tokens
        return JSONResponse(told.whole(text, tokens, last))

    async def _pieces(
        self, work: Continuation, stop: list[str], receive: Receive, deadline: float
    ) -> AsyncIterator[Piece]:
        metrics, began, before = self._service.metrics, time.perf_counter(), 0.0
        text = TextStream(self._tokenizer, stop)
        async with self._service.events(work, receive, deadline) as next_event:
            finish, shown = None, 0
            while finish is None:
                event = await next_event()
                now = time.perf_counter()
                if isinstance(event, Done):
                    finish, part = event.result, text.finish()
                    finish = "stop" if text.stopped else finish
                else:
                    metrics.written.inc()
                    metrics.between.observe(now - before) if before else metrics.first.observe(now - began)
                    before = now
                    part = text.add(event)
                    finish = "stop" if text.stopped else None
                if part or finish or not shown:
                    yield Piece(part, text.tokens[shown:], finish, len(text.tokens))
                    shown = len(text.tokens)


class _Form:
    """How a piece, or the whole, is written.

    Args:
        model: Its name.
        body: The request.
        prompt: Its tokens.
    """

    prefix = chunk_kind = whole_kind = ""

    def __init__(self, model: str, body: Completion | Chat, prompt: int) -> None:
        self.body, self.prompt = body, prompt
        self.options = body.stream_options
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, tokens: list[int], last: Piece) -> dict[str, Any]:
        """The answer in one."""
        choice = {"index": 0, **self.content(text), "logprobs": None, "finish_reason": last.finish}
        if self.body.return_token_ids:
            choice["token_ids"] = tokens
        return {**self.head, "object": self.whole_kind, "choices": [choice], "usage": self.usage(last)}

    def chunk(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, **self.delta(piece.text, first), "logprobs": None, "finish_reason": piece.finish}
        if self.body.return_token_ids:
            choice["token_ids"] = piece.tokens
        more: dict[str, Any] = {}
        if self.options is not None and self.options.include_usage:
            more["usage"] = self.usage(piece) if self.options.continuous_usage_stats else None
        return {**self.head, "object": self.chunk_kind, "choices": [choice], **more}

    def last_chunk(self, last: Piece) -> dict[str, Any] | None:
        """The event behind the text, where it is asked for."""
        if self.options is None or not self.options.include_usage:
            return None
        return {**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage(last)}

    def usage(self, last: Piece) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": last.written,
            "total_tokens": self.prompt + last.written,
        }

    def content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        raise NotImplementedError


class _AsCompletion(_Form):
    prefix, chunk_kind, whole_kind = "cmpl", "text_completion", "text_completion"

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"text": text}


class _AsChat(_Form):
    prefix, chunk_kind, whole_kind = "chatcmpl", "chat.completion.chunk", "chat.completion"

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}


class _Events(Response):
    """Server-sent events, each sent when there is text; the client's leaving is seen by whoever makes the pieces."""

    media_type = "text/event-stream"

    def __init__(
        self, form: _Form, first: Piece, rest: AsyncIterator[Piece], refused: Callable[[BaseException], Refused]
    ) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._form, self._first, self._rest, self._refused = form, first, rest, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them all."""
        async with aclosing(self._rest):  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            last = self._first
            await _send(send, self._form.chunk(last, first=True))
            try:
                async for last in self._rest:
                    await _send(send, self._form.chunk(last, first=False))
                if (usage := self._form.last_chunk(last)) is not None:
                    await _send(send, usage)
            except Gone:
                raise
            except Exception as error:
                await _send(send, self._refused(error).body)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _send(send: Send, event: dict[str, Any]) -> None:
    data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})
