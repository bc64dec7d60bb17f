"""Connections that wait for no client for ever."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class GuardedProtocol(H11Protocol):
    """uvicorn's, which times idle connections only; here also who sends no head of a request, or takes no answer.

    The body of a request is timed by :class:`astbench.serving.front.Front`.
    """

    seconds: ClassVar[float] = 10.0
    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    @classmethod
    def within(cls, seconds: float) -> type[GuardedProtocol]:
        """The same, with so much time."""
        return type(cls.__name__, (cls,), {"seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head must come now."""
        super().connection_made(transport)
        self._head = self.loop.call_later(self.seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        super().data_received(data)
        answered = self.cycle is None or self.cycle.response_complete
        # The rest of a body whose request was refused is thrown away, and timed as a head is.
        if answered and self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing():
            self._head = self._head or self.loop.call_later(self.seconds, self._give_up)
        elif self._head is not None:
            self._head.cancel()
            self._head = None

    def pause_writing(self) -> None:
        """The client takes nothing, and what waits for it grows no further."""
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self.seconds, self._give_up)

    def resume_writing(self) -> None:
        """It goes on."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        self.transport.abort()
