"""Requests that are not served: a status and one line, in the form of OpenAI's errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from astbench.errors import out_of_memory
from astbench.serving.engine import NotFinite, ShuttingDown


class Refused(Exception):
    """Why a request is not served.

    Args:
        status: HTTP status.
        message: One line for whoever sent it.
        param: The field that it is about.
        headers: Further ones.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, " ".join(message.split()), param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    @property
    def raw(self) -> bytes:
        """The body in bytes."""
        return json.dumps(self.body).encode()


def refusal(error: BaseException, timeout: float) -> Refused:
    """What went wrong within, as it is told: never more than one line, and nothing of the server's inside."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, TimeoutError):
        return Refused(504, f"not done after {timeout:g} s; ask for less, or start the server with a larger --timeout")
    if isinstance(error, ShuttingDown):
        return Refused(503, "the server is shutting down", headers={"retry-after": "5", "connection": "close"})
    if isinstance(error, NotFinite):
        return Refused(500, f"{error}: an error of the model, not of the request")
    if out_of_memory(error):
        return Refused(503, "out of memory; ask for less", headers={"retry-after": "5"})
    return Refused(500, "the server failed; its log says why")
