"""The process that measures: `python -m astbench.bench.worker`, a cell as a line of JSON on standard input.

On the CPU a process takes one cell, because peak memory is a process's, and so that one that runs out of it takes
none along; on CUDA, where the allocator counts and a start costs seconds, it takes one after the other.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from astbench.bench.analysis import layer_mode
from astbench.bench.clocks import clock
from astbench.bench.config import CPU_MEMORY_GIB
from astbench.bench.gates import wrong
from astbench.bench.lists import every_block, random_lists, work
from astbench.bench.processes import ANSWER, lost
from astbench_kernels import BlockLayout, block_sparse_attention, choose_backend, what_runs
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention, load_plugin
from astbench_registry.block_selection import BlockSelector, Call
from astbench_registry.interface import AttentionStats

Tensors = tuple[Tensor, Tensor, Tensor]


class Layer:
    """The attention of a cell, and calls of it."""

    def __init__(self, cell: dict[str, Any]) -> None:
        self.cell = cell
        self.device, self.dtype = cell["device"], getattr(torch, cell["dtype"])
        heads, dim, length = cell["heads"], cell["head_dim"], cell["length"]
        shape = AttentionShape(heads, cell["kv_heads"], dim, hidden_size=heads * dim, max_positions=length)
        self.module = build_attention(cell["attention"], cell["options"], shape).to(self.device, self.dtype)
        self.backend = ""  # what ran, once it is known

    def mask(self, mode: str, length: int) -> AttentionMask:
        """Of a call with `length` keys."""
        if mode == "decode":
            return AttentionMask("causal_self", query_offset=length - 1)
        return AttentionMask(self.cell["pattern"])

    def inputs(self, mode: str, length: int) -> tuple[Tensors, Tensor | None]:
        """q, k, v of a call with `length` keys, and hidden states for attentions that read them."""
        cell, rows = self.cell, 1 if mode == "decode" else length
        made = {"dtype": self.dtype, "device": self.device}
        q = torch.randn(cell["batch"], cell["heads"], rows, cell["head_dim"], **made)
        k, v = (torch.randn(cell["batch"], cell["kv_heads"], length, cell["head_dim"], **made) for _ in range(2))
        needed = self.module.config.can.needs_hidden_states
        hidden = torch.randn(cell["batch"], rows, cell["heads"] * cell["head_dim"], **made) if needed else None
        return (q, k, v), hidden

    def statistics(self, mode: str, tensors: Tensors, hidden: Tensor | None) -> AttentionStats | None:
        """What the attention says of a call."""
        context = AttentionContext(collect_stats=True, hidden_states=hidden)
        mask = self.mask(mode, tensors[1].shape[2])
        with torch.no_grad():
            stats: AttentionStats | None = self.module.eval()(*tensors, mask, context=context).stats
        return stats

    def call(self, mode: str, tensors: Tensors, hidden: Tensor | None) -> Callable[[], Tensor]:
        """A timed call: forward alone, or in training mode forward and backward with the attention's own losses."""
        self.module.train(mode == "training")
        # As generation keeps them: the first call, which is not timed, makes them. (Nor is the block timed that
        # generation completes every block_size steps.)
        summaries = self.module.new_cache_state() if mode == "decode" else None
        mask = self.mask(mode, tensors[1].shape[2])
        context = AttentionContext(hidden_states=hidden, summaries=summaries)
        leaves = [x.detach().requires_grad_(mode == "training") for x in tensors]
        q, k, v = leaves
        grad = torch.randn_like(q)

        def forward() -> Tensor:
            with torch.no_grad():
                return self.module(q, k, v, mask, context=context).out

        def forward_backward() -> Tensor:
            for x in (*leaves, *self.module.parameters()):
                x.grad = None
            out = self.module(q, k, v, mask, context=context)
            total = (out.out * grad).sum() + sum(out.losses.values())
            total.backward()
            return out.out.detach() if q.grad is None else q.grad

        return forward_backward if mode == "training" else forward


class Case:
    """A layer in one mode: its inputs, the lists of its kernel, and what may be timed."""

    def __init__(self, layer: Layer, mode: str) -> None:
        self.layer, self.mode = layer, mode
        self.length = layer.cell["length"]
        self.mask = layer.mask(mode, self.length)
        self.tensors, self.hidden = layer.inputs(mode, self.length)
        self.layout = self._layout()
        if self.layout is not None and layer.cell["lists"]:
            backend = self._backend("")
            layer.backend = what_runs(backend, *self.tensors, self.layout, causal=self.mask.causal)
        self.worth = {} if self.layout is None else work(mode, *self.tensors[:2], self.layout, self.mask)
        self._gates: dict[str, str] = {}

    def _layout(self) -> BlockLayout | None:
        lists, module = self.layer.cell["lists"], self.layer.module
        if lists == "layer":
            stats = self.layer.statistics(self.mode, self.tensors, self.hidden)
            return None if stats is None else stats.layout
        q, k, v = self.tensors
        if lists:
            selector = getattr(module, "selector", None)
            assert isinstance(selector, BlockSelector)
            with torch.no_grad():
                return random_lists(selector, Call.of(module.shape, q, k, v, self.mask), uneven=lists == "uneven")
        return every_block(q, k, self.mask.query_offset) if self.layer.cell["attention"] == "dense" else None

    def _backend(self, peer: str) -> str:
        """The kernel's: a peer's, or the one that the layer would take."""
        wanted = peer or getattr(self.layer.module.config, "backend", "auto")
        q = self.tensors[0]
        return choose_backend(wanted, q.device, dtype=q.dtype, head_dim=q.shape[-1])

    def attend(self, peer: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What the gate looks at: dense attention, or the block-sparse kernel that a layer rests on."""
        layout, module = self.layout, self.layer.module
        if not self.layer.cell["lists"]:
            return lambda q, k, v: module(q, k, v, self.mask).out
        assert layout is not None
        backend = self._backend(peer)
        return lambda q, k, v: block_sparse_attention(q, k, v, layout, causal=self.mask.causal, backend=backend)[0]

    def red(self, peer: str) -> str:
        """Why there may be no number; empty when the call gives what the reference gives, or has none."""
        if self.layout is None or not self.layer.cell["gate"]:
            return ""
        if peer not in self._gates:
            self._gates[peer] = wrong(
                self.attend(peer),
                self.tensors,
                self.layout,
                causal=self.mask.causal,
                training=self.mode == "training",
            )
        return self._gates[peer]

    def time(self, name: str) -> dict[str, Any]:
        """The numbers of one mode, its kernel's or a peer's."""
        peer = name.partition("@")[2]
        try:
            if self.layout is None and name != self.mode:
                return {"error": "it reports no lists of blocks"}
            if red := self.red(peer):
                return {"error": red}
            if name == self.mode:
                if self.layer.device == "cpu":  # what is loaded at the first call
                    self.layer.call(self.mode, *self.layer.inputs(self.mode, min(self.length, 64)))()
                call = self.layer.call(self.mode, self.tensors, self.hidden)
            else:
                call = kernel_call(self.attend(peer), self.tensors, training=self.mode == "training")
            return clock(call, self.layer.cell["repeats"], self.layer.device) | self.worth
        except (RuntimeError, MemoryError, ValueError) as error:
            return {"error": refusal(error)}


def kernel_call(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: Tensors, *, training: bool
) -> Callable[[], Tensor]:
    """A timed call of the kernel on lists that are there."""
    leaves = [x.detach().requires_grad_(training) for x in tensors]
    grad = torch.randn_like(leaves[0])

    def call() -> Tensor:
        with torch.set_grad_enabled(training):
            out = attend(*leaves)
        return torch.autograd.grad(out, leaves, grad)[0] if training else out

    return call


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Time and peak memory of one layer in every mode that is asked for, and of its kernel alone.

    Args:
        cell: attention, options, pattern, batch, heads, kv_heads, head_dim, length, dtype, device, repeats, seed,
            modes, asked, lists, peers, and gate: whether to hold the calls against the reference before they are
            timed.

    Returns: for every mode that is asked for (`forward`, `training`, `decode`; for attentions that choose key blocks
        also `kernel...`, the same without the choice, and `kernel...@PEER`) `seconds` (a list), `peak_bytes` above
        what was there before, and where pairs are counted `density`, `work_flops` and `least_bytes`; or `error`.
        Beside them `flops` as declared, `parameters`, `state_size` and `backend`.
    """
    torch.manual_seed(cell["seed"])
    found: dict[str, Any] = {}
    try:
        layer = Layer(cell)
        module, length, first = layer.module, cell["length"], cell["modes"][0]
        found["parameters"] = sum(p.numel() for p in module.parameters())
        found["flops"] = module.flops(cell["batch"], length, length, layer.mask("forward", length))
        found["state_size"] = module.state_size(length)
        stats = layer.statistics(first, *layer.inputs(first, min(length, 64)))
        layer.backend = "" if stats is None else stats.backend
    except (RuntimeError, MemoryError, ValueError) as error:
        return found | {name: {"error": refusal(error)} for name in cell["asked"]}
    failed = ""
    for mode in cell["modes"]:
        names = [name for name in cell["asked"] if layer_mode(name) == mode]
        # Training needs more of everything than what failed.
        here = {name: {"error": failed} for name in names} if failed else _measure_mode(layer, mode, names)
        if all("error" in one for one in here.values()):
            failed = here[names[0]]["error"]
        found |= here
        if layer.device == "cuda":
            torch.cuda.empty_cache()  # what was too large may have left the rest in pieces
    return found | {"backend": layer.backend}


def _measure_mode(layer: Layer, mode: str, names: list[str]) -> dict[str, Any]:
    try:
        case = Case(layer, mode)
    except (RuntimeError, MemoryError, ValueError) as error:
        return {name: {"error": refusal(error)} for name in names}
    return {name: case.time(name) for name in names}


def refusal(error: BaseException) -> str:
    """One line; what torch says when memory is short is long."""
    text = " ".join(str(error).split())
    short = isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in text or "memory" in text
    return "out of memory" if short and not lost(text) else text[:200]


def main() -> None:
    """Read cells, print the measurement of each as one line of JSON."""
    for line in sys.stdin:
        cell = json.loads(line)
        torch.set_num_threads(cell["threads"])
        for plugin in cell["plugins"]:
            load_plugin(plugin)
        limit_memory(cell["device"], cell["max_memory_gib"])
        print(ANSWER + json.dumps(measure(cell)), flush=True)


def limit_memory(device: str, gib: float | None) -> None:
    """What needs more is out of memory, instead of the machine."""
    if device == "cpu":
        limit = int((gib or CPU_MEMORY_GIB) * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    elif gib is not None:
        share = gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


if __name__ == "__main__":
    main()
