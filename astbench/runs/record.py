"""`record.json`: what ran, on what, and what came out; written at the start and again at the end."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Version of the record's layout; readers refuse what they do not know."""

_PACKAGES = (
    "astbench torch triton transformers tokenizers lightning jsonargparse numpy safetensors datasets xformers "
    "flash-attn performer-pytorch reformer-pytorch sacrebleu"
).split()


def new_record(command: str, config: dict[str, Any], seed: int, words: Sequence[str]) -> dict[str, Any]:
    """The part of a record that is known before anything runs; `words`: what was typed after the command."""
    return {
        "schema": SCHEMA,
        "command": command,
        "argv": ["astbench", command, *words],
        "config": config,
        "config_hash": config_hash(config),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "state": "running",
    }


def read_record(path: Path) -> dict[str, Any] | None:
    """A record as it was last written; None where there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def config_hash(config: dict[str, Any]) -> str:
    """Short digest of everything that decides the result: not where or how often it is written."""
    return _digest(config, "run_dir", "loggers", "checkpoint_every", "keep_every")


def former_config_hash(config: dict[str, Any]) -> str:
    """What records from before 2026-11-24 12:00 hold as their `config_hash`."""
    return _digest(config, "run_dir", "resume", "config")


def _digest(config: dict[str, Any], *without: str) -> str:
    text = json.dumps({k: v for k, v in config.items() if k not in without}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def git_state() -> dict[str, Any] | None:
    """Commit and dirtiness of the source tree that runs; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Python and the packages that could change a number."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, memory, threads and accelerators."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of the process, and of each GPU's allocator."""
    import torch

    peak = {"cpu_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peak["gpu_bytes"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return peak
