"""How a model is served. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields

from astbench.errors import ConfigError

KEY = "ASTBENCH_API_KEY"
"""Environment variable with the key that requests must bring; without it none is asked for."""

OPEN = ("/health", "/ready")
"""Paths that need no key: whoever keeps the server running asks them."""


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, and what it allows.

    Attributes:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        workers: Processes that have the model; with 1 it is in the process that listens.
        max_batch: Requests that run together (windows, for question answering), in each process.
        queue: Requests that may wait; one more is refused with 429.
        max_length: Most tokens of a prompt and what is written to it; None for what the model has positions for.
        max_body: Most bytes of a request's body.
        timeout: Seconds a request may take in all, waiting included.
        read_timeout: Seconds in which a client has to send its request, and to take what is sent to it.
        drain: Seconds that running requests get after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    max_batch: int = 8
    queue: int = 64
    max_length: int | None = None
    max_body: int = 1_000_000
    timeout: float = 120.0
    read_timeout: float = 10.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, got {self.port}")
        for name, least in (("workers", 1), ("max_batch", 1), ("queue", 0), ("max_body", 1000)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"--max_length must be at least 2 tokens, got {self.max_length}")
        for name in ("timeout", "read_timeout", "drain"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"--{name} must be above 0 seconds, got {getattr(self, name):g}")

    @property
    def most_connections(self) -> int:
        """More than can wait and run: those refused, slow ones, and people who look at `/metrics`."""
        return 4 * (self.queue + self.together) + 256

    @property
    def together(self) -> int:
        """Requests that run together in all processes."""
        return self.workers * self.max_batch


DEFAULTS = {field.name: field.default for field in fields(ServeOptions)}
