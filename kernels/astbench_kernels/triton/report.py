"""What the compiler makes of the kernels, for a GPU that need not be here.

`python -m astbench_kernels.triton.report --arch=90` writes down every launch of a set of calls, compiles each one
ahead of time and prints registers, spilled bytes, shared memory and matrix instructions, a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astbench_kernels.dispatch.hopper import CAPABILITY
from astbench_kernels.layout import BlockLayout, ceil_div
from astbench_kernels.triton import (
    choose_blocks,
    choose_carried,
    has_gluon,
    interpreted,
    pool_blocks,
    triton_attention,
)
from astbench_kernels.triton.launch import Launch, writing_down
from astbench_kernels.triton.reported import (
    SHORT,
    SHORT_CHOICES,
    SHORT_HOPPER,
    ReportedCall,
    ReportedChoice,
    choices,
    hopper_calls,
    matrix,
)
from astbench_kernels.triton.selection.rule import BlockRule

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """One kernel of one call, compiled.

    Attributes:
        kernel: Module and name.
        arch: Compute capability, 90 for 9.0.
        rows: Query rows of a tile.
        keys: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Loads in flight.
        registers: Of a thread; None where this triton has no cuobjdump to ask.
        spilled: Bytes of local memory of a thread, 0 when everything fits in registers; None likewise.
        shared: Bytes of shared memory of a program.
        wgmma: Matrix instructions of Hopper in the PTX.
        mma: Matrix instructions of Ampere in the PTX.
        serialised: Whether ptxas says that it makes wgmma wait for one another; None where there is no wgmma to ask of.
        call: The call, or the choice, it serves.
    """

    kernel: str
    arch: int
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    registers: int | None
    spilled: int | None
    shared: int
    wgmma: int
    mma: int
    serialised: bool | None
    call: ReportedCall | ReportedChoice


def launches_of_choice(choice: ReportedChoice) -> list[Launch]:
    """What a choice launches, from keys and values to lists. Nothing runs."""
    batch, rows = 2, 128
    length = choice.num_blocks * choice.block_size
    shape = (batch, choice.kv_heads, 2 * choice.block_size, choice.head_dim)
    k = torch.zeros(shape, dtype=_DTYPES[choice.dtype])
    valid = torch.ones(shape[0], shape[2], dtype=torch.bool) if choice.padding else None
    rule = BlockRule(
        choice.block_size,
        choice.query_group,
        rows * choice.query_group,
        length,
        causal=choice.causal,
        local_blocks=0,
        sink_block=True,
    )
    dim = choice.head_dim + choice.rank
    left = torch.zeros(batch, choice.heads, rows, dim)
    right = torch.zeros(batch, choice.kv_heads, choice.num_blocks * choice.columns, dim)
    seen = torch.ones(batch, choice.num_blocks, dtype=torch.bool) if choice.padding else None
    with writing_down() as written:
        pool_blocks(k, k, valid, choice.block_size)
        if choice.tile:
            share, real = 0.1 if choice.by_share else None, valid if valid is None else valid[:, :1].expand(-1, rows)
            options = {"pool": choice.pool, "share": share, "seen": seen, "real": real}
            choose_carried(left, right, rule, choice.tile, lambda visible: visible, **options)
        else:
            choose_blocks(left, right, rule, lambda visible: visible, seen=seen)
    return written


def launches(call: ReportedCall, arch: int) -> list[Launch]:
    """What a call launches on compute capability `arch`. Nothing runs.

    A forward and a backward pass, or two decoding steps: over one block, and over so many that lists are split.
    """
    with writing_down() as written:
        if call.decode:
            for blocks in (1, 64):
                _attention(call, arch, queries=1, keys=blocks * call.block_size)
        else:
            length = 2 * max(call.block_size, call.query_group)
            _attention(call, arch, queries=length, keys=length).sum().backward()
    return written


def _attention(call: ReportedCall, arch: int, *, queries: int, keys: int) -> Tensor:
    batch, gradients = 2, not call.decode
    groups, width = ceil_div(queries, call.query_group), ceil_div(keys, call.block_size)
    dtype = _DTYPES[call.dtype]
    q = torch.zeros(batch, call.heads, queries, call.head_dim, dtype=dtype, requires_grad=gradients)
    k = torch.zeros(batch, call.kv_heads, keys, call.head_dim, dtype=dtype, requires_grad=gradients)
    v = torch.zeros_like(k, requires_grad=gradients)
    table = torch.zeros(batch, call.lists, groups, width, dtype=torch.int32)
    offset = (keys - queries) * call.key_stride
    layout = BlockLayout(
        table,
        table[..., 0],
        call.block_size,
        call.query_group,
        queries,
        keys,
        offset,
        key_stride=call.key_stride,
        since=table if call.carried else None,
    )
    bias = torch.zeros(table.shape, requires_grad=gradients) if call.bias else None
    valid = torch.ones(batch, keys, dtype=torch.bool) if call.padding else None
    return triton_attention(
        q,
        k,
        v,
        layout,
        block_bias=bias,
        scale=1.0,
        causal=call.causal,
        key_valid=valid,
        arch=arch,
        one_pass=call.one_pass,
        hopper=call.hopper,
    )[0]


def compile_launch(launch: Launch, arch: int, call: ReportedCall | ReportedChoice) -> Compiled:
    """Compile what a launch would run for compute capability `arch`."""
    compiled = _compile_gluon(launch, arch) if launch.kernel.is_gluon() else _compile(launch, arch)
    registers, spilled = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        kernel=_name(launch.kernel.fn),
        arch=arch,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        serialised=_serialised(ptx, arch),
        call=call,
        **asdict(launch.tile),
    )


def _name(function: Any) -> str:
    """Module and name; kernels of the Hopper folder have modules of their own name."""
    package, module = function.__module__.rsplit(".", 2)[-2:]
    return f"{'hopper' if package == 'hopper' else module}.{function.__name__}"


class _NoDevice:
    """As much of a driver as compiling asks for, of a device that is not here."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.utils = self

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    @staticmethod
    def launcher_cls(*_: Any) -> Any:
        return None


def _compile_gluon(launch: Launch, arch: int) -> Any:
    """What a launch with these arguments would compile; nothing is loaded. Descriptors are arguments there."""
    from triton.runtime import driver

    before = driver._active  # not `active`, which looks for a device
    driver.set_active(_NoDevice(arch))
    try:
        return launch.kernel.warmup(**launch.arguments, **launch.constants, **launch.options, grid=(1,))
    finally:
        driver.set_active(before)


def _compile(launch: Launch, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", launch.constants[parameter.name]
            continue
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        # As a launch does it: tensors start at multiples of 16 bytes, an integer 1 is a constant.
        if isinstance(value, Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and special:
            signature[parameter.name], constants[(place,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and special:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=launch.options,
    )


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers of a thread, bytes of stack and local memory of a thread) in a compiled kernel."""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError:  # how triton says that it does not find it
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _serialised(ptx: str, arch: int) -> bool | None:
    """Triton swallows what ptxas warns of, so it is asked again: C7510 says that asynchronous products are not."""
    from triton import knobs

    if "wgmma.mma_async" not in ptx:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{arch}a", str(path), "-o", str(path) + ".o"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return "C7510" in text or "serialized" in text


def main() -> None:
    """Print one JSON object for each kernel of each call."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--all", action="store_true", help="every shipped configuration, not a short set")
    for field in fields(ReportedCall):
        parser.add_argument(f"--{field.name}", type=json.loads if field.name != "dtype" else str, default=None)
    options = vars(parser.parse_args())
    archs, everything = options.pop("arch"), options.pop("all")
    if interpreted():
        raise SystemExit("unset TRITON_INTERPRET: it replaces the kernels by interpreted ones")
    changes = {name: value for name, value in options.items() if value is not None}
    calls = list(matrix()) if everything else [ReportedCall(**changes)] if changes else SHORT
    if not changes and has_gluon():
        calls = [*calls, *(hopper_calls() if everything else SHORT_HOPPER)]
    for arch, call in product(archs, calls):
        if call.hopper and arch != CAPABILITY:
            continue
        for launch in launches(call, arch):
            print(json.dumps(asdict(compile_launch(launch, arch, call))), flush=True)
    if changes:
        return
    for arch, choice in product(archs, choices() if everything else SHORT_CHOICES):
        for launch in launches_of_choice(choice):
            print(json.dumps(asdict(compile_launch(launch, arch, choice))), flush=True)


if __name__ == "__main__":
    main()
