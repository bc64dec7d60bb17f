"""The gate: who may come in, with how much, how fast, and how many at a time."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astbench.serving.metrics import Metrics
from astbench.serving.options import OPEN, ServeOptions
from astbench.serving.refusals import Refused, refusal

log = logging.getLogger(__name__)

DISCARDED = 64 << 20
"""Bytes of a body that is too long which are still read, and thrown away: else the client would not see the answer."""


class Front:
    """ASGI around the application: what passes has a whole body within the limits.

    Args:
        app: The application; it finds the body's bytes in `scope["astbench.body"]`.
        options: The limits.
        metrics: Told of every request.
        key: That requests must bring; empty for none.
        posts: Paths that a model has.
        gets: Paths that every server has.
        refuse: Told how many requests are here; refuses one before its body is read, if need be.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServeOptions,
        metrics: Metrics,
        key: str,
        posts: Sequence[str],
        gets: Sequence[str],
        refuse: Callable[[int], None],
    ) -> None:
        self._app, self._options, self._metrics, self._key = app, options, metrics, key
        self._posts, self._known, self._refuse = posts, frozenset([*posts, *gets]), refuse
        self._here = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, answer = time.perf_counter(), _Answer(send)
        self._count(1)
        try:
            self._check_key(scope)
            if scope["method"] not in ("GET", "HEAD"):
                self._refuse(self._here)
                scope["astbench.body"] = await self._body(scope, receive)
            scope["app"] = self._app  # Starlette's sign to raise what it does not find
            await self._app(scope, receive, answer)
        except HTTPException as error:
            await self._fail(self._not_here(scope, error), answer)
        except Exception as error:
            await self._fail(error, answer)
        finally:
            self._count(-1)
        path = scope["path"] if scope["path"] in self._known else "other"
        self._metrics.requests.labels(path, answer.status).inc()
        self._metrics.seconds.observe(time.perf_counter() - began)

    def _count(self, more: int) -> None:
        self._here += more
        self._metrics.inside.set(self._here)

    def _check_key(self, scope: Scope) -> None:
        if not self._key or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
            raise Refused(401, "a key is needed: Authorization: Bearer KEY", headers={"www-authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        length = headers.get(b"content-length", b"0")
        try:
            async with asyncio.timeout(self._options.read_timeout):
                if not length.isdigit() or len(length) > 18 or int(length) > self._options.max_body:
                    if b"expect" not in headers:
                        await _read(receive, DISCARDED, keep=False)
                    raise self._too_long()
                body = await _read(receive, self._options.max_body)
                if body is None:
                    await _read(receive, DISCARDED, keep=False)
                    raise self._too_long()
        except TimeoutError:
            raise Refused(
                408, f"the body did not come within {self._options.read_timeout:g} s", headers={"connection": "close"}
            ) from None
        if kind != b"application/json":
            raise Refused(415, "the body must be JSON: Content-Type: application/json")
        return body

    def _too_long(self) -> Refused:
        return Refused(
            413,
            f"the body has more than {self._options.max_body:,} bytes; --max_body allows more",
            headers={"connection": "close"},
        )

    def _not_here(self, scope: Scope, error: HTTPException) -> Refused:
        what = f"{ascii(scope['method'])[1:-1][:20]} {ascii(scope['path'])[1:-1][:100]}"
        return Refused(
            error.status_code,
            f"no {what} here; this model has POST {' and POST '.join(self._posts)}",
            None,
            error.headers,
        )

    async def _fail(self, error: Exception, answer: _Answer) -> None:
        if isinstance(error, Gone):
            answer.status = "gone"
            return
        refused = refusal(error, self._options.timeout)
        if refused.status == 500:
            log.error("a request failed", exc_info=error)
        if answer.started:
            raise error  # the connection is closed on a half-sent answer
        await answer.refuse(refused)


class Gone(Exception):
    """The client has left."""


class _Answer:
    """`send` of one request, which remembers what was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.status: int | str = "none"

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        headers = {"content-type": "application/json", "content-length": str(len(refused.raw)), **refused.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": refused.status, "headers": raw})
        await self({"type": "http.response.body", "body": refused.raw})


async def _read(receive: Receive, most: int, *, keep: bool = True) -> bytes | None:
    """A request's body; None if it is longer, or is not to be kept.

    Raises:
        Gone: the client left before its end.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        if keep:
            parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts) if keep else None
