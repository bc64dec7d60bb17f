"""`astbench doctor`: what this machine has, and what can run on it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from astbench.errors import ConfigError

if TYPE_CHECKING:
    import torch

_EXTRAS = {
    "datasets": ("hub", "--data.source=hub, parquet files"),
    "gguf": ("gguf", "GGUF weights"),
    "triton": ("cuda", "Triton kernels"),
    "xformers": ("cuda", "dense baseline"),
    "flash_attn": ("cuda", "dense baseline"),
    "starlette": ("serve", "astbench serve"),
    "aiohttp": ("loadtest", "astbench loadtest"),
    "wandb": ("wandb", "--loggers+=wandb"),
    "mlflow": ("mlflow", "--loggers+=mlflow"),
}


def run(words: list[str]) -> int:
    """Print the environment; 0 when the main job can run."""
    if words and words[0] in ("-h", "--help"):
        print("usage: astbench doctor")
        return 0
    if words:
        raise ConfigError(f"astbench doctor takes no {words[0]}")
    import torch

    from astbench.runs.record import hardware, versions
    from astbench_kernels import sparse_backends

    print("packages")
    for name, version in versions().items():
        print(f"  {name:<20} {version}")
    print("\nhardware")
    for name, value in hardware().items():
        print(f"  {name:<20} {value}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    print(f"  {'free disk':<20} {free:.1f} GiB at {Path.cwd().name}/")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\nbackends of block_sparse_attention on {device.type}")
    for backend in sparse_backends().values():
        reasons = backend.refusals(device.type)
        print(f"  {'no ' if reasons else 'yes'} {backend.name:<16} {'; '.join(reasons) or backend.summary}")
    print(f"\nbackends of dense attention on {device.type} (--attention=dense --attention.backend=...)")
    for name, serves, reasons in _dense(device):
        print(f"  {'yes' if serves else 'no '} {name:<16} {'; '.join([*serves, *reasons])}")
    print("\noptional packages")
    for module, (extra, use) in _EXTRAS.items():
        there = find_spec(module) is not None
        state = metadata.version(module.replace("_", "-")) if there else f"pip install 'astbench[{extra}]'"
        print(f"  {'yes' if there else 'no '} {module:<16} {use}: {state}")
    threads = os.environ.get("OMP_NUM_THREADS")
    print(
        f"\nPython {platform.python_version()}, torch threads {torch.get_num_threads()}"
        + (f" (OMP_NUM_THREADS={threads})" if threads else "")
    )
    return 0


def _dense(device: torch.device) -> list[tuple[str, list[str], list[str]]]:
    """(backend, what it serves, why it cannot serve the rest), found by trying."""
    import warnings

    import torch

    from astbench_kernels import dense_attention, dense_backends

    rows = []
    for name, backend in dense_backends().items():
        reasons, served = backend.device_refusals(device.type), []
        for dtype in () if reasons else (torch.float32, torch.bfloat16):
            q = torch.zeros(1, 2, 64, 64, dtype=dtype, device=device)
            label = str(dtype).removeprefix("torch.")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dense_attention(q, q, q, backend=name)
                served.append(label)
            # A package may be there and not fit this torch or this GPU.
            except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
                reasons.append(f"{label}: {' '.join(str(error).split())[:100]}")
        rows.append((name, [f"serves a {' and a '.join(served)} call"] if served else [], reasons))
    return rows
