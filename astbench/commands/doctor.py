"""`astbench doctor`: what this machine has, and what can run on it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from astbench.errors import ConfigError

_EXTRAS = {
    "datasets": ("hub", "--data.source=hub, parquet files"),
    "gguf": ("gguf", "GGUF weights"),
    "triton": ("cuda", "Triton kernels"),
    "xformers": ("cuda", "dense baseline"),
    "flash_attn": ("cuda", "dense baseline"),
    "wandb": ("wandb", "--loggers+=wandb"),
    "mlflow": ("mlflow", "--loggers+=mlflow"),
    "ray": ("ray", "sweeps on a cluster"),
    "submitit": ("slurm", "sweeps on SLURM"),
    "litserve": ("serve", "serving"),
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
    from astbench_kernels import backends

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
    for backend in backends().values():
        reasons = backend.refusals(device.type)
        print(f"  {'no ' if reasons else 'yes'} {backend.name:<16} {'; '.join(reasons) or backend.summary}")
    print(f"\nbackends of dense attention (torch SDPA) on {device.type}")
    for name, reason in _sdpa(device):
        print(f"  {'no ' if reason else 'yes'} {name:<16} {reason or 'serves a float32 and a bfloat16 call'}")
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


def _sdpa(device: object) -> list[tuple[str, str]]:
    """(backend, why it cannot serve or nothing), found by trying."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    for label, backend in (
        ("sdpa_math", SDPBackend.MATH),
        ("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        reasons = []
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.zeros(1, 2, 64, 64, dtype=dtype, device=device)  # type: ignore[call-overload]
            try:
                with warnings.catch_warnings(), sdpa_kernel(backend):
                    warnings.simplefilter("ignore")
                    torch.nn.functional.scaled_dot_product_attention(q, q, q)
            except RuntimeError as error:
                reasons.append(f"{str(dtype).removeprefix('torch.')}: {' '.join(str(error).split())[:70]}")
        rows.append((label, "; ".join(reasons)))
    return rows
