"""Requests to one server, and the part of a record that comes of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from astbench.deploy.cells import Calibration, Cell, rate_of
from astbench.deploy.recipe import Recipe
from astbench.deploy.server import Server, ServerFailed, Watch
from astbench.deploy.workload import Workload
from astbench.loadtest.arrivals import poisson_count
from astbench.loadtest.client import Sent, send_all
from astbench.loadtest.kept import load_part, rows
from astbench.loadtest.objective import Objective

ALONE = 3
"""Requests that are sent one by one, each when the one before is answered."""

_LOOK = 0.2

Found = tuple[dict[str, Any], dict[str, Any]]
"""Of a record, and of the file of requests beside it."""


class Measure:
    """Sends what a recipe asks for.

    Args:
        recipe: What was asked for.
        workload: Its requests.
        key: Of the servers.
    """

    def __init__(self, recipe: Recipe, workload: Workload, key: str) -> None:
        self._recipe, self._workload, self._key = recipe, workload, key

    def warm(self, cell: Cell, server: Server) -> None:
        """One request that is not counted: the first of a length may compile, or fill caches.

        Raises:
            ServerFailed: it was not answered.
        """
        (row,) = self._send(server, self._workload.bodies(cell.load, 1), [0.0])
        if not row.ok:
            hint = "; is it longer than the model takes?" if row.outcome in ("400", "413") else ""
            raise ServerFailed(f"a request of {cell.load.length} tokens ended with {row.outcome}{hint}")

    def capacity(self, cell: Cell, server: Server) -> Found:
        """What one request takes alone, and how many a second are answered when as many come as run together.

        Raises:
            ServerFailed: it died, or did not answer them all.
        """
        together = int(self._recipe.serve["max_batch"])
        bodies = self._workload.bodies(cell.load, max(ALONE, together))
        alone = [self._send(server, [body], [0.0])[0] for body in bodies[:ALONE]]
        watch = Watch(server)
        burst = self._send(server, bodies[:together], [0.0] * together)
        if failed := [row.outcome for row in (*alone, *burst) if not row.ok]:
            raise ServerFailed(f"a request of {cell.load.length} tokens ended with {failed[0]}")
        return self._found(server, watch, {"alone": rows(alone), "load": rows(burst)}, Objective(), cell)

    def rate(self, cell: Cell, server: Server, calibration: Calibration | None) -> Found:
        """A cell's requests, at their times.

        Raises:
            ServerFailed: it died.
        """
        rate, objective = rate_of(self._recipe, cell, calibration)
        due = poisson_count(rate, cell.load.requests, self._recipe.seed)
        bodies = self._workload.bodies(cell.load, cell.load.requests)
        watch = Watch(server)
        return self._found(server, watch, {"load": rows(self._send(server, bodies, due))}, objective, cell)

    def _send(self, server: Server, bodies: Sequence[Mapping[str, Any]], due: Sequence[float]) -> list[Sent]:
        return asyncio.run(self._while_alive(server, bodies, due))

    async def _while_alive(
        self, server: Server, bodies: Sequence[Mapping[str, Any]], due: Sequence[float]
    ) -> list[Sent]:
        """Do not go on asking a server that is gone."""
        url = server.url + self._recipe.route
        sending = asyncio.create_task(send_all(url, bodies, due, self._recipe.timeout, self._key))
        while not sending.done():
            await asyncio.wait({sending}, timeout=_LOOK)
            if why := server.died():
                sending.cancel()
                raise ServerFailed(why)
        return sending.result()

    def _found(self, server: Server, watch: Watch, items: dict[str, Any], objective: Objective, cell: Cell) -> Found:
        took = watch.found()
        about = json.loads(server.get("/health"))
        if about["attention"]["name"] != cell.served.attention["name"]:
            raise ServerFailed(f"{about['attention']['name']} was served, not {cell.served.attention['name']}")
        # From the requests as they are written, so that whoever reads them finds the same.
        part = {
            **load_part(items, objective, self._recipe.seed),
            "served": {"model": about["model"], "attention": about["attention"]},
            "server": took,
            "peak_memory": {
                "cpu_bytes": took["peak_resident_bytes"],
                "gpu_bytes": took["gpu_peak_bytes"],
            },
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return part, items
