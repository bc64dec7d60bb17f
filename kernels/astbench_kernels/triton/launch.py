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
    options: dict[str, Any]


_written_down: list[Launch] | None = None


def launch(kernel: Any, programs: int, arguments: dict[str, Any], constants: dict[str, Any], tile: Tile) -> None:
    """Run `kernel` on a grid of `programs` programs, unless :func:`writing_down` is active."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **OPTIONS}
    _launch(Launch(kernel, arguments, constants, tile, options), programs)


def launch_gluon(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    tile: Tile,
    most_registers: int | None,
) -> None:
    """The same for a kernel in Gluon, which holds its stages itself; `most_registers` of a thread, None for any."""
    options = {"num_warps": tile.num_warps, **OPTIONS} | ({"maxnreg": most_registers} if most_registers else {})
    _launch(Launch(kernel, arguments, constants, tile, options), programs)


def _launch(one: Launch, programs: int) -> None:
    if _written_down is not None:
        _written_down.append(one)
        return
    one.kernel[(programs,)](**one.arguments, **one.constants, **one.options)


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
