"""Options of `astbench bench`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field

from astbench.errors import ConfigError
from astbench_registry import Pattern
from astbench_registry.capabilities import PATTERNS

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class BenchConfig:
    """One shape of layer, several attentions, several lengths.

    Args:
        attention: Names, separated by commas; `all` for every registered one. `dense` is always measured too.
        lengths: Tokens per sequence.
        densities: Measure attentions that take a density at each of these, under names like `ast 0.125`; empty for
            their own default. The kernel alone is timed beside the layer.
        pattern: bidirectional_self or causal_self.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key/value heads; 0 for as many as query heads.
        head_dim: Size of a head.
        dtype: float32, bfloat16, float16 or float64.
        threads: CPU threads of the measured process.
        rounds: How often the whole list is gone through, every time in another order.
        repeats: Timed calls a cell and round, fewer when they take long.
        max_seconds: Cells whose call would take longer, by the length before, are left out, and say so.
        max_memory_gib: Address space of the measured process; a cell that needs more is out of memory.
        options: Options by attention, laid over the defaults: `{"ast": {"density": 0.125}}`.
        plugins: Files and modules that register more attentions; they are code, and run.
        seed: Of inputs, parameters and the order of the cells.
        run_dir: Where the record, the CSV and the plot go; default: a new folder in runs/.
    """

    attention: str = "all"
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096, 8192, 16384])
    densities: list[float] = field(default_factory=list)
    pattern: Pattern = "bidirectional_self"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 64
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 3
    repeats: int = 5
    max_seconds: float = 60.0
    max_memory_gib: float = 16.0
    options: dict[str, dict] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    seed: int = 0
    run_dir: str | None = None

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS[:2]:
            raise ConfigError(f"--pattern must be bidirectional_self or causal_self, got {self.pattern}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        for name in ("batch", "heads", "head_dim", "threads", "rounds", "repeats", "max_seconds", "max_memory_gib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name} must be above 0, got {getattr(self, name)}")
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"--lengths must be positive whole numbers, got {self.lengths}")
        if any(not 0 < density <= 1 for density in self.densities):
            raise ConfigError(f"--densities must be above 0 and at most 1, got {self.densities}")
        if self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"--kv_heads must divide --heads={self.heads}, got {self.kv_heads}")
