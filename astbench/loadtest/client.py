"""An open loop: requests are sent when they are due, however many are not answered yet.

A closed loop, which waits for answers before it asks again, asks a slow server less: it hides what it should measure.
So times count from when a request was due, not from when this client got to send it; how late it was is reported.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sent:
    """One request, in seconds from the start.

    Attributes:
        due: When it should be sent.
        sent: When it was.
        done: When its answer was there, or it had failed.
        outcome: HTTP status, or what went wrong.
    """

    due: float
    sent: float
    done: float
    outcome: str

    @property
    def ok(self) -> bool:
        """It was answered."""
        return self.outcome == "200"


async def send_all(
    url: str, bodies: Sequence[Mapping[str, Any]], due: Sequence[float], timeout: float, key: str = ""
) -> list[Sent]:
    """Send one body at each of these times, in turn; returns when all are answered, or are given up.

    Args:
        url: Where to.
        bodies: JSON; used again from the first when there are more times.
        due: Seconds from now, ascending.
        timeout: Seconds after which a request has failed.
        key: Of the server.
    """
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    start = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - start

    async def one(session: aiohttp.ClientSession, at: float, body: Mapping[str, Any]) -> Sent:
        began = now()
        try:
            async with session.post(url, json=body) as answer:
                await answer.read()
                outcome = str(answer.status)
        except TimeoutError:
            outcome = "timed out"
        except aiohttp.ClientError as error:
            outcome = type(error).__name__
        return Sent(at, began, now(), outcome)

    # Without a limit of connections, which would close the loop.
    connector, most = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=most, headers=headers) as session:
        tasks = []
        for number, at in enumerate(due):
            await asyncio.sleep(max(0.0, at - now()))
            tasks.append(asyncio.create_task(one(session, at, bodies[number % len(bodies)])))
        return list(await asyncio.gather(*tasks))
