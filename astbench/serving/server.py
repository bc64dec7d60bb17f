"""Runs the application until it is told to stop, and then until what is running is done."""

from __future__ import annotations

import logging
import socket
import time
from types import FrameType

import uvicorn

from astbench import console
from astbench.errors import ConfigError
from astbench.serving.connections import GuardedProtocol
from astbench.serving.front import Front
from astbench.serving.options import ServeOptions
from astbench.serving.service import Service

_AT_THE_END = 2
"""Seconds for connections that are left when all is done, or the time for it is over."""


class Server(uvicorn.Server):
    """uvicorn's, which on SIGTERM and Ctrl-C stays until running requests are done, and tells new ones to go elsewhere.

    Args:
        app: The application.
        service: Behind it.
        options: The limits.
    """

    def __init__(self, app: Front, service: Service, options: ServeOptions) -> None:
        config = uvicorn.Config(
            app,
            host=options.host,
            port=options.port,
            http=GuardedProtocol.within(options.read_timeout),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=options.most_connections,
            timeout_graceful_shutdown=_AT_THE_END,
        )
        super().__init__(config)
        self._service, self._drain = service, options.drain
        self._until: float | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Say where, when it listens."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            name = self.servers[0].sockets[0].getsockname()
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            console.say(f"serving on http://{host}:{name[1]}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal: no new requests. A second one: no waiting either."""
        self._captured_signals.append(sig)
        if self._until is None:
            self._service.draining = True
            self._until = time.monotonic() + self._drain
            count = len(self.server_state.tasks)
            console.say(f"stopping: {count} request{'s'[: count != 1]} running, for {self._drain:g} s at most")
        else:
            self._until = 0.0
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn: several times a second."""
        if self._until is not None and (not self.server_state.tasks or time.monotonic() > self._until):
            self._service.engine.stop(0)  # whoever still waits is told
            self.should_exit = True
        return await super().on_tick(counter)


def run(app: Front, service: Service, options: ServeOptions) -> None:
    """Serve until a signal comes, which is raised again at the end.

    Raises:
        ConfigError: nobody can listen there, or a process of several could not load the model.
    """
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # bad requests are answered, and are no news
    with _bound(options) as listener:
        try:
            service.start()
            Server(app, service, options).run(sockets=[listener])
        finally:
            service.stop()


def _bound(options: ServeOptions) -> socket.socket:
    """What to listen on; uvicorn would leave with an exit code and no word."""
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        raise ConfigError(f"--host={options.host} --port={options.port}: nobody can listen there: {why}") from error
    return listener
