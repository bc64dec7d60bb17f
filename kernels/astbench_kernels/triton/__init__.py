"""Block-sparse attention and the choice of blocks in Triton. Importing this package does not import triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from astbench_kernels.dispatch import TRITON_DTYPES, TRITON_MAX_HEAD_DIM
from astbench_kernels.dispatch.hopper import BLOCK_SIZES, CAPABILITY, ROWS, refusals
from astbench_kernels.layout import BlockLayout
from astbench_kernels.triton.selection.rule import BlockRule

if TYPE_CHECKING:
    from astbench_kernels.triton.selection.pool import PooledBlocks


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


def is_hopper(device: torch.device) -> bool:
    """Whether a device has compute capability 9.0."""
    return device.type == "cuda" and _capability(device.index) == CAPABILITY


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def hopper_device_refusals(device: str) -> list[str]:
    """Every reason why the Hopper kernels cannot run on this type of device."""
    if device != "cuda":
        return ["it needs a CUDA device of compute capability 9.0: Gluon, which it is written in, has no interpreter"]
    reasons = device_refusals(device)
    if not reasons and torch.cuda.is_available() and not is_hopper(torch.device("cuda")):
        reasons.append("it needs compute capability 9.0 (H100, H200)")
    if not reasons and not has_gluon():
        reasons.append("this triton has no Gluon (triton.experimental.gluon); pip install 'astbench[cuda]'")
    return reasons


def hopper_call_refusals(dtype: torch.dtype, head_dim: int, block_size: int | None) -> list[str]:
    """Every reason why they cannot serve a call with these inputs; what rows share lists is asked of the plan."""
    return refusals(
        capability=CAPABILITY,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        value_dim=head_dim,
        block_size=BLOCK_SIZES[0] if block_size is None else block_size,
        rows=ROWS,
        heads_per_list=1,
        padded=False,
    )


@cache
def has_gluon() -> bool:
    """Whether the installed triton has Gluon for Hopper; looked up without importing it."""
    package = find_spec("triton")
    folders = [] if package is None else package.submodule_search_locations or []
    return any(Path(folder, "experimental", "gluon", "nvidia", "hopper.py").is_file() for folder in folders)


def one_pass_refusals() -> list[str]:
    """Why the backward pass may not be one that adds up the queries' gradients."""
    if torch.are_deterministic_algorithms_enabled():
        return ["torch is asked for deterministic algorithms, and its additions come in any order; take triton"]
    return []


def interpreted() -> bool:
    """Whether Triton is asked to interpret kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """See :func:`astbench_kernels.block_sparse_attention`."""
    from astbench_kernels.triton.attention.function import triton_attention as run

    return run(*args, **kwargs)


def pool_blocks(k: Tensor, v: Tensor, key_valid: Tensor | None, block_size: int) -> PooledBlocks:
    """See :func:`astbench_kernels.triton.selection.pool.pool_blocks`."""
    from astbench_kernels.triton.selection.pool import pool_blocks as run

    return run(k, v, key_valid, block_size)


def choose_blocks(
    rows: Tensor,
    blocks: Tensor,
    rule: BlockRule,
    budget: Callable[[Tensor], Tensor],
    *,
    seen: Tensor | None = None,
) -> BlockLayout:
    """See :func:`astbench_kernels.triton.selection.choose.choose_blocks`."""
    from astbench_kernels.triton.selection.choose import choose_blocks as run

    return run(rows, blocks, rule, budget, seen=seen)


def choose_carried(*args: Any, **kwargs: Any) -> BlockLayout:
    """See :func:`astbench_kernels.triton.selection.carried.choose_carried`."""
    from astbench_kernels.triton.selection.carried import choose_carried as run

    return run(*args, **kwargs)


def carried_refusals(*args: Any, **kwargs: Any) -> list[str]:
    """See :func:`astbench_kernels.triton.selection.carried.carried_refusals`."""
    from astbench_kernels.triton.selection.carried import carried_refusals as ask

    return ask(*args, **kwargs)
