"""Block-sparse attention in Triton. Importing this package does not import triton; running it does."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from astbench_kernels.dispatch import TRITON_DTYPES, TRITON_MAX_HEAD_DIM


def device_refusals(device: str) -> list[str]:
    """Every reason why the Triton kernels cannot run on this type of device."""
    reasons = []
    if find_spec("triton") is None:
        reasons.append("package triton is not installed; pip install 'astbench[cuda]'")
    if device != "cuda" and not (device == "cpu" and interpreted()):
        reasons.append("it needs a CUDA device (or, to try it slowly on the CPU, TRITON_INTERPRET=1)")
    return reasons


def call_refusals(dtype: torch.dtype, head_dim: int) -> list[str]:
    """Every reason why the Triton kernels cannot serve a call with these inputs."""
    reasons = []
    name = str(dtype).removeprefix("torch.")
    if name not in TRITON_DTYPES:
        reasons.append(f"it computes in {', '.join(TRITON_DTYPES[:-1])} and {TRITON_DTYPES[-1]}, not {name}")
    if dtype == torch.bfloat16 and interpreted():
        reasons.append("Triton's interpreter multiplies the bits of bfloat16 numbers")
    if head_dim > TRITON_MAX_HEAD_DIM:
        reasons.append(f"head size {head_dim} is above {TRITON_MAX_HEAD_DIM}")
    return reasons


def interpreted() -> bool:
    """Whether Triton is asked to interpret kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`."""
    from astbench_kernels.triton.function import triton_attention as run

    return run(*args, **kwargs)
