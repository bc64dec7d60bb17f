"""Options of `astbench bench`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from astbench.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda")
MODES = ("forward", "training", "decode")
LISTS = ("layer", "random", "uneven")
CPU_MEMORY_GIB = 16.0

_MOST = 1_000_000_000
"""Of any number of things."""


@dataclass(frozen=True)
class BenchConfig:
    """One shape of layer, several attentions, several lengths.

    Args:
        attention: Names, separated by commas; `all` for every registered one. `dense` is always measured too, on
            CUDA by every kernel that serves the call (rows `dense:NAME`); comparisons are with the fastest of them.
        modes: Some of forward, training and decode, separated by commas. forward is prefill, all tokens at once;
            training adds the backward pass and the attention's own losses; decode is one new token per sequence with
            a KV cache of `length` keys, causal, for attentions that decode.
        lists: Some of layer, random and uneven, separated by commas: the lists of key blocks that the kernel runs on.
            layer: those that the attention chose, with the whole layer timed beside the kernel. random: random ones
            of the same budget, the kernel alone. uneven: the same, with the budget spread unevenly over the lists.
        peers: Other backends of the block-sparse kernel (flex, say), separated by commas: timed on the same lists.
        device: cpu or cuda.
        lengths: Tokens per sequence.
        densities: Measure attentions that take a density at each of these, under names like `ast 0.125`; empty for
            their own default. The kernel alone is timed beside the layer.
        pattern: bidirectional_self or causal_self.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key/value heads; 0 for as many as query heads. Several ratios are a run each.
        head_dim: Size of a head.
        dtype: float32, bfloat16, float16 or float64.
        threads: CPU threads of the measured process.
        rounds: How often the whole list is gone through, every time in another order.
        repeats: Timed calls a cell and round, fewer when they take long.
        max_seconds: Cells whose call would take longer, by the length before, are left out, and say so.
        max_memory_gib: Address space of the measured process on the CPU (default 16), memory of the device on CUDA
            (default all of it); a cell that needs more is out of memory.
        time_limit: Seconds for all cells together, after which the rest is left out, and says so; 0 for none.
        options: Options by attention, laid over the defaults: `{"ast": {"block_size": 128, "query_group": 64}}`.
            Several block sizes are a run each.
        plugins: Files and modules that register more attentions; they are code, and run.
        seed: Of inputs, parameters, random lists and the order of the cells.
        run_dir: Where the record, the CSV and the plots go; default: a new folder in runs/.
    """

    attention: str = "all"
    modes: str = "forward,training"
    lists: str = "layer"
    peers: str = ""
    device: str = "cpu"
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096, 8192, 16384])
    densities: list[float] = field(default_factory=list)
    pattern: Literal["bidirectional_self", "causal_self"] = "bidirectional_self"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 3
    repeats: int = 5
    max_seconds: float = 60.0
    max_memory_gib: float | None = None
    time_limit: float = 0.0
    options: dict[str, dict] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    seed: int = 0
    run_dir: str | None = None

    def __post_init__(self) -> None:
        if self.pattern not in ("bidirectional_self", "causal_self"):
            raise ConfigError(f"--pattern must be bidirectional_self or causal_self, got {self.pattern}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.device not in DEVICES:
            raise ConfigError(f"--device must be one of {', '.join(DEVICES)}, got {self.device}")
        for name, value, allowed in (("modes", self.modes, MODES), ("lists", self.lists, LISTS)):
            if not words(value) or not set(words(value)) <= set(allowed):
                raise ConfigError(f"--{name} must be some of {', '.join(allowed)}, separated by commas, got {value!r}")
        for name in ("batch", "heads", "head_dim", "threads", "rounds", "repeats", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name} must be above 0, got {getattr(self, name)}")
            if getattr(self, name) > _MOST:
                raise ConfigError(f"--{name} must be at most {_MOST:,}, got {getattr(self, name)}")
        if self.max_memory_gib is not None and self.max_memory_gib <= 0:
            raise ConfigError(f"--max_memory_gib must be above 0, got {self.max_memory_gib}")
        if self.time_limit < 0:
            raise ConfigError(f"--time_limit must be 0 (none) or more seconds, got {self.time_limit}")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"--lengths must be positive whole numbers, got {self.lengths}")
        if any(not 0 < density <= 1 for density in self.densities):
            raise ConfigError(f"--densities must be above 0 and at most 1, got {self.densities}")
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"--kv_heads must divide --heads={self.heads}, got {self.kv_heads}")


def words(text: str) -> list[str]:
    """The words of an option that takes several, separated by commas, each once."""
    return list(dict.fromkeys(word for word in text.split(",") if word))
