"""Options of the variants that pick key blocks: what they share, and the controls'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Capabilities, SparseBackend


@dataclass(frozen=True)
class BlockSelectionConfig(AttentionConfig):
    """What every variant that picks key blocks shares: granularity, budget and backend.

    Args:
        block_size: Keys per block, in tokens.
        query_group: Consecutive queries that share a choice; default 1 under a causal mask (where only the
            group's first token may speak for it), 64 without.
        lists: Who sees a block that a row chose under a causal mask. "own": that row (or group of `query_group`).
            "carried": it and all later rows of its tile. A kernel computes whole tiles anyway; so more is seen for
            little more work, and nothing depends on later tokens.
        query_tile: Consecutive rows of a tile that carries a list.
        density: Share of the visible blocks each row chooses, always-kept blocks included; with carried lists a tile
            sees the union of its rows' choices, two to three times as much.
        top_k: Blocks each row keeps, instead of `density`.
        min_blocks: Never fewer blocks than this (or than are visible).
        local_blocks: Blocks kept on each side of the query's own (causal: before it).
        sink_block: Always keep the first block of the keys, where softmax leaves mass that it has no use for (Xiao et
            al. 2023, arXiv 2309.17453).
        backend: Kernel (`astbench doctor` says which can run here).
    """

    block_size: int = 16
    query_group: int | None = None
    lists: Literal["own", "carried"] = "own"
    query_tile: int = 64
    density: float = 0.25
    top_k: int | None = None
    min_blocks: int = 8
    local_blocks: int = 0
    sink_block: bool = True
    backend: SparseBackend = "auto"

    capabilities: ClassVar = Capabilities(
        patterns=PATTERNS,
        any_value_size=True,
        decode=True,
        exact_at_full_density=True,
        yields_layout=True,
        yields_probabilities=True,
    )
    renamed: ClassVar = {"first_block": "sink_block"}
    # Blocks of 16 and a floor of 8 of them would keep everything in the suite's inputs.
    conformance_options: ClassVar = {"block_size": 4, "min_blocks": 2, "density": 0.3, "query_tile": 6}
    full_density_options: ClassVar = {"density": 1.0, "top_k": None}

    def __post_init__(self) -> None:
        self.require(self.block_size >= 1, "block_size", "at least 1 token")
        self.require(self.query_group is None or self.query_group >= 1, "query_group", "at least 1 token")
        self.require(self.lists in ("own", "carried"), "lists", "own or carried")
        self.require(self.query_tile >= 1, "query_tile", "at least 1 token")
        self.require(
            self.lists == "own" or self.query_group in (None, 1),
            "query_group",
            "1 or left out with --attention.lists=carried: every token chooses",
        )
        self.require(0 < self.density <= 1, "density", "above 0 and at most 1")
        self.require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1 block")
        self.require(self.min_blocks >= 1, "min_blocks", "at least 1 block")
        self.require(self.local_blocks >= 0, "local_blocks", "0 or more blocks")

    def headline(self) -> dict[str, Any]:
        """See the base class; not the density where `top_k` stands instead."""
        shown = super().headline()
        if self.top_k is not None:
            shown.pop("density", None)
        return shown

    @property
    def can(self) -> Capabilities:
        """Groups of several queries cannot decode yet: their first token's query is gone from the cache."""
        if self.lists == "carried":
            return replace(self.capabilities, decode_state=True)
        return self.capabilities if self.query_group in (None, 1) else replace(self.capabilities, decode=False)


@dataclass(frozen=True)
class RandomTopKConfig(BlockSelectionConfig):
    """Control: block scores are noise, fixed by seed, layer, head and position.

    Args:
        seed: Another seed, another fixed pattern.
    """

    seed: int = 0

    paper: ClassVar = "control of this project (cf. the random blocks of BigBird, arXiv 2007.14062)"
    complexity: ClassVar = "N M density"


@dataclass(frozen=True)
class PooledTopKConfig(BlockSelectionConfig):
    """Control: block scores are query times mean key, without any parameters."""

    paper: ClassVar = "control of this project (cf. MoBA, arXiv 2502.13189, eq. 6)"
    complexity: ClassVar = "N M density + (N / query_group) (M / block_size)"


@dataclass(frozen=True)
class OracleTopKConfig(BlockSelectionConfig):
    """Control: block scores are the group's true attention mass; quadratic, the selector's ceiling.

    With `query_group` above 1 it looks at all rows of a group, so under a causal mask later rows choose for
    earlier ones: a ceiling, not a model.
    """

    capabilities: ClassVar = replace(BlockSelectionConfig.capabilities, strictly_causal=False)
    paper: ClassVar = "control of this project"
    complexity: ClassVar = "N M"

    @property
    def can(self) -> Capabilities:
        """One query a group looks at nothing but itself."""
        return replace(super().can, strictly_causal=self.query_group in (None, 1))


@dataclass(frozen=True)
class TokenTopKConfig(BlockSelectionConfig):
    """Base of methods in which every token keeps a fixed number of blocks and nothing else is open.

    Their papers fix what the controls leave as options, so those are none here. (Who sees a list is a question of the
    kernel's tiles, which those that choose blocks may ask: they declare `lists` and `query_tile` again.)

    Args:
        top_k: Blocks each token keeps, its own included; all of them where it sees fewer.
    """

    top_k: int = 8

    query_group: ClassVar[int | None] = 1  # type: ignore[misc]
    lists: ClassVar[Literal["own", "carried"]] = "own"  # type: ignore[misc]
    query_tile: ClassVar[int] = 64  # type: ignore[misc]
    density: ClassVar[float] = 1.0  # type: ignore[misc]
    min_blocks: ClassVar[int] = 1  # type: ignore[misc]
    local_blocks: ClassVar[int] = 0  # type: ignore[misc]
    sink_block: ClassVar[bool] = False  # type: ignore[misc]

    complexity: ClassVar = "N top_k block_size + N M / block_size"
    conformance_options: ClassVar = {"block_size": 4, "top_k": 4}
    full_density_options: ClassVar = {"top_k": 2**20}
