"""CIFAR-10's version for Python, read without running what a pickle may hold.

A pickle names functions and calls them. Here the four names that these files need stand for objects that only keep what
they are given, and any other name is refused. No function of numpy or of another package is called.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import torch
from torch import Tensor

from astbench.errors import DataError
from astbench.files.reading import one_line

_ARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
"""Where numpy keeps what rebuilds an array, before and since its version 2."""

_PIXELS = 3 * 32 * 32


class _Kept:
    """Stands for an array or a dtype: arguments and state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (*((m, "_reconstruct") for m in _ARRAY), ("numpy", "dtype")):
            return _Kept
        if (module, name) == ("numpy", "ndarray"):
            return None  # only named, as the kind of array
        if (module, name) == ("_codecs", "encode"):
            return _encoded
        raise pickle.UnpicklingError(f"it names {module}.{name}, which CIFAR-10's files do not")


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into an old pickle."""
    return text.encode("latin-1")


def read_pickle(data: bytes, place: str) -> tuple[Tensor, list[int]]:
    """Pixels `(images, 3072)`, uint8, and labels of one batch file.

    Raises:
        DataError: damaged, or anything else than such a batch.
    """
    try:
        _check_size(data)
        batch = _Reader(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise DataError(f"{place} is no batch of CIFAR-10 for Python: {one_line(error)}") from error
    if not isinstance(batch, dict):
        raise DataError(f"{place} is no batch of CIFAR-10 for Python: it holds no dictionary")
    named = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    pixels, labels = named.get("data"), named.get("labels")
    state = pixels.state if isinstance(pixels, _Kept) else ()
    # Version, shape, dtype, whether columns come first, bytes.
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Kept)):
        raise DataError(f"{place} is no batch of CIFAR-10 for Python: its 'data' is no array")
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise DataError(f"{place} is no batch of CIFAR-10 for Python: its 'labels' are no list of numbers")
    _, shape, dtype, by_columns, content = state
    plain = isinstance(content, bytes) and dtype.arguments[:1] in ((b"u1",), ("u1",)) and not by_columns
    if not plain or shape != (len(labels), _PIXELS) or len(content) != len(labels) * _PIXELS or not labels:
        raise DataError(
            f"{place}: expected {len(labels)} images of {_PIXELS} bytes, as many as labels, got an array of {shape}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape), labels


def _check_size(data: bytes) -> None:
    """Refuse numbers that the reader would make room for before it looks at what is there."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError("it numbers more objects than it can hold")
