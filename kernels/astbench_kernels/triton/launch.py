"""One door for all launches, so that what is launched can be written down instead of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from astbench_kernels.triton.plan import Tile

OPTIONS = {"enable_fp_fusion": True}
"""A multiplication and an addition are one instruction. Triton's default until 3.9, which asks to say so."""


@dataclass(frozen=True)
class Launch:
    """A launch that was written down: enough to compile the kernel for a device that is not here."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile


_written_down: list[Launch] | None = None


def launch(kernel: Any, programs: int, arguments: dict[str, Any], constants: dict[str, Any], tile: Tile) -> None:
    """Run `kernel` on a grid of `programs` programs, unless :func:`writing_down` is active."""
    if _written_down is not None:
        _written_down.append(Launch(kernel, arguments, constants, tile))
        return
    kernel[(programs,)](**arguments, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS)


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels take any strides but the last, which is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


@contextmanager
def writing_down() -> Iterator[list[Launch]]:
    """Inside, launches are collected and not run; tensors that kernels would fill stay as they were."""
    global _written_down
    before, _written_down = _written_down, []
    try:
        yield _written_down
    finally:
        _written_down = before
