"""TMA descriptors: how the copy engine finds boxes of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

COLUMNS = 64
"""Of a box: 128 bytes, the widest row that shared memory swizzles."""

_ALIGNED = 8
"""Elements of two bytes in the 16 bytes that TMA wants addresses and strides to be multiples of."""


def addressable(x: Tensor) -> Tensor:
    """A `(batch, heads, rows, dim)` tensor as it is where TMA can address it, else a contiguous copy."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    fits = x.stride(-1) == 1 and all(stride > 0 and stride % _ALIGNED == 0 for stride in strides)
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> list[int]:
    """Those of dimensions of size 1 are never used, but looked at."""
    strides = zip(x.stride()[:-1], x.shape, strict=False)
    return [*(stride if size > 1 else x.shape[-1] for stride, size in strides), 1]


def rows_descriptor(x: Tensor, each: int) -> TensorDescriptor:
    """Boxes of 64 rows of a head group, 64 // each positions of `each` heads, of a (batch, heads, rows, dim) tensor."""
    view = x.transpose(1, 2)
    return TensorDescriptor(
        view, list(view.shape), _strides(view), [1, 64 // each, each, COLUMNS], gl.NVMMASharedLayout(128, 16, 4)
    )


def keys_descriptor(x: Tensor, box: int) -> TensorDescriptor:
    """Boxes of `box` rows of a (batch, heads, rows, dim) tensor; rows and columns that there are not come as zeros."""
    return TensorDescriptor(x, list(x.shape), _strides(x), [1, 1, box, COLUMNS], gl.NVMMASharedLayout(128, 16, 4))


def floats_descriptor(x: Tensor) -> TensorDescriptor:
    """Boxes of 64 numbers of the last dimension of a contiguous float32 tensor; its size is a multiple of 64."""
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, 64], gl.NVMMASharedLayout(0, 32, 2))


def gluon_dtype(dtype: torch.dtype) -> gl.dtype:
    """Of float16 and bfloat16."""
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
