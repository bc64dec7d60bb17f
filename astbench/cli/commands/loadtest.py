"""`astbench loadtest`: requests at random times to a running server, and what they took."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from astbench import console
from astbench.cli.own_parser import OwnParser
from astbench.errors import ConfigError, MissingPackageError
from astbench.serving.options import KEY

_USAGE = f"""usage: astbench loadtest URL [--path PATH] [--rate N] [--seconds N] [options]

Sends requests made of the tasks' demo data to a server of `astbench serve`, at random times that do not wait for
answers (a Poisson process), and writes a record. Times count from when a request was due. What fails or is late counts
as a request that took for ever.

  URL                the server, such as http://127.0.0.1:8000
  --path PATH        /answer, /translate or /v1/completions (default: what the server has)
  --rate N           requests a second on average (default: 1)
  --seconds N        for how long requests are due (default: 30)
  --slo SECONDS      within which an answer is good: what goodput counts (default: 1)
  --timeout SECONDS  after which a request has failed (default: 60)
  --max_tokens N     for /v1/completions: tokens to write (default: 32)
  --seed N           of the times (default: 0)
  --out FILE         the record (default: loadtest.json)

{KEY} in the environment is sent as the server's key. See docs/serve.md."""

_REQUESTS = 200
"""Different ones, used again from the first."""


def run(words: list[str]) -> int:
    """Send, wait, write the record and its main numbers; 0 when something was answered, 1 when nothing was."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given = _parse(words)
    if find_spec("aiohttp") is None:
        raise MissingPackageError("astbench loadtest needs aiohttp: pip install 'astbench[loadtest]'")
    key = os.environ.get(KEY, "")
    server = json.loads(_get(given.url, "/health", key))
    from astbench.loadtest.prompts import PATHS, bodies

    there = [path for path in PATHS if path in server.get("paths", ())]
    path = given.path or next(iter(there), None)
    if path not in there:
        able = f"--path must be {' or '.join(there)}" if there else f"astbench loadtest sends to {', '.join(PATHS)}"
        raise ConfigError(f"{given.url} has {', '.join(server.get('paths', ())) or 'no paths'}; {able}")
    from astbench.files.writing import write_json
    from astbench.loadtest.arrivals import poisson
    from astbench.loadtest.client import send_all
    from astbench.loadtest.objective import Objective
    from astbench.loadtest.resources import resources
    from astbench.loadtest.summary import summary
    from astbench.runs.record import new_record

    if given.out.exists():
        raise ConfigError(f"{given.out} exists already; name another file with --out=FILE")
    config = {name: value for name, value in vars(given).items() if name != "out"} | {"path": path}
    record = new_record("loadtest", config, given.seed, words)
    due = poisson(given.rate, given.seconds, given.seed)
    if not due:
        raise ConfigError(
            f"no request is due in --seconds={given.seconds:g} at --rate={given.rate:g}; raise one of them"
        )
    console.say(f"{len(due)} requests to {given.url}{path} in {given.seconds:g} s")
    before = resources(_get(given.url, "/metrics", key))
    sent = asyncio.run(send_all(given.url + path, bodies(path, _REQUESTS, given.max_tokens), due, given.timeout, key))
    after = resources(_get(given.url, "/metrics", key))
    found = summary(sent, given.seconds, Objective(latency=given.slo))
    found["server"] = {
        "model": server.get("model"),
        "attention": server.get("attention"),
        "cpu_seconds": after["cpu"] - before["cpu"] if "cpu" in after and "cpu" in before else None,
        "resident_bytes": after.get("rss"),
        "gpu_peak_bytes": after.get("gpu_peak"),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, {**record, "state": "done", "loadtest": found})
    _say(found, given.out)
    if not found["answered"]:
        console.say(f"note: nothing was answered; the log of {given.url} says why")
    return 0 if found["answered"] else 1


def _parse(words: list[str]) -> argparse.Namespace:
    parser = OwnParser("loadtest")
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--path", default=None)
    for name, default in (("rate", 1.0), ("seconds", 30.0), ("slo", 1.0), ("timeout", 60.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, number in (("max_tokens", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--out", type=Path, default=Path("loadtest.json"))
    given = parser.parse_args(words)
    given.url = given.url.rstrip("/")
    if not re.match(r"https?://[^/]+$", given.url):
        raise ConfigError(f"astbench loadtest takes the server's URL, such as http://127.0.0.1:8000, got {given.url}")
    for name in ("rate", "seconds", "slo", "timeout", "max_tokens"):
        if not 0 < getattr(given, name) <= 1e6:
            raise ConfigError(f"--{name} must be above 0, got {getattr(given, name):g}")
    if given.rate * given.seconds > 1e6:
        raise ConfigError(f"--rate={given.rate:g} for --seconds={given.seconds:g} are more than a million requests")
    return given


def _get(url: str, path: str, key: str) -> str:
    request = urllib.request.Request(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError(f"{url}{path} gives no answer: {' '.join(str(reason).split())[:200]}") from error


def _say(found: dict[str, Any], out: Path) -> None:
    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:.3f} s"

    latency = {
        f"{what} {q}": f"{seconds(x['value'])} (95%: {seconds(x['low'])} to {seconds(x['high'])})"
        for key, what in (("latency", "latency"), ("ttft", "first token"), ("tpot", "a token"))
        for q, x in found.get(f"{key}_seconds", {}).items()
    }
    lag = found["client_lag_seconds"]
    console.table(
        {
            "answered": f"{found['answered']} of {found['requests']}: "
            + ", ".join(f"{n} x {outcome}" for outcome, n in found["outcomes"].items()),
            **latency,
            "throughput": f"{found['throughput_per_second']:.2f} a second, {found['offered_per_second']:.2f} asked for",
            "goodput": f"{found['goodput_per_second']:.2f} a second within {found['slo_seconds']['latency']:g} s",
            "client's lag": f"{seconds(lag['p50'])} in the middle, {seconds(lag['max'])} at most",
            "record": out,
        }
    )
