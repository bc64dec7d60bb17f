"""An open loop: requests are sent when they are due, however many are not answered yet.

A closed loop, which waits for answers before it asks again, asks a slow server less: it hides what it should measure.
So times count from when a request was due, not from when this client got to send it; how late it was is reported.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp


@dataclass(frozen=True)
class Sent:
    """One request, in seconds from the start.

    Attributes:
        due: When it should be sent.
        sent: When it was.
        done: When its answer was there, or it had failed.
        outcome: HTTP status, or what went wrong.
        tokens: When each token was there, of an answer that was streamed.
    """

    due: float
    sent: float
    done: float
    outcome: str
    tokens: tuple[float, ...] = ()

    @property
    def ok(self) -> bool:
        """It was answered."""
        return self.outcome == "200"

    @property
    def latency(self) -> float:
        """Seconds from when it was due to the end of its answer; infinite if it failed."""
        return self.done - self.due if self.ok else float("inf")

    @property
    def first_token(self) -> float | None:
        """Seconds from when it was due to its first token (TTFT); infinite if it failed, None without tokens."""
        if not self.ok:
            return float("inf")
        return self.tokens[0] - self.due if self.tokens else None

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first one (TPOT); infinite if it failed, None of fewer than two tokens."""
        if not self.ok:
            return float("inf")
        count = len(self.tokens) - 1
        return (self.tokens[-1] - self.tokens[0]) / count if count > 0 else None


async def send_all(
    url: str, bodies: Sequence[Mapping[str, Any]], due: Sequence[float], timeout: float, key: str = ""
) -> list[Sent]:
    """Send one body at each of these times, in turn; returns when all are answered, or are given up.

    Args:
        url: Where to.
        bodies: JSON; used again from the first when there are more times. One with `"stream": true` is read token by
            token.
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
        began, tokens, outcome = now(), list[float](), ""
        try:
            async with session.post(url, json=body) as answer:
                outcome = str(answer.status)
                if body.get("stream") and answer.status == 200:
                    outcome = await _streamed(answer.content, tokens, now)
                else:
                    await answer.read()
        except TimeoutError:
            outcome = "timed out"
        except aiohttp.ClientError as error:
            outcome = type(error).__name__
        return Sent(at, began, now(), outcome, tuple(tokens))

    # Without a limit of connections, which would close the loop.
    connector, most = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=most, headers=headers) as session:
        tasks = []
        for number, at in enumerate(due):
            await asyncio.sleep(max(0.0, at - now()))
            tasks.append(asyncio.create_task(one(session, at, bodies[number % len(bodies)])))
        return list(await asyncio.gather(*tasks))


async def _streamed(content: aiohttp.StreamReader, tokens: list[float], now: Callable[[], float]) -> str:
    """Read server-sent events to their end, noting when tokens came; the outcome."""
    async for line in content:
        event = line.strip().removeprefix(b"data: ")
        if not event:
            continue
        if event == b"[DONE]":
            return "200"
        try:
            said = json.loads(event)
        except ValueError:
            break
        if "error" in said:  # the status was sent before it went wrong
            return f"failed after {len(tokens)} tokens"
        tokens += [now()] * sum(len(choice.get("token_ids", ("",))) for choice in said["choices"])
    return "cut off"
