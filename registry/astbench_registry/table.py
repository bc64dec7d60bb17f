"""The table: every built-in attention, its options, what it can do, and where its code is.

Importing this file imports no torch, so that `astbench list` and `--help` answer at once. To add a variant:
its options here, its row in `BUILTIN` below, its file under `variants/`, its parity case in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Capabilities, Pattern

SELF: tuple[Pattern, ...] = ("bidirectional_self", "causal_self")


@dataclass(frozen=True)
class DenseConfig(AttentionConfig):
    """Softmax attention over everything visible, by torch's scaled_dot_product_attention."""

    capabilities: ClassVar = Capabilities(patterns=PATTERNS, decode=True, exact_at_full_density=True)
    paper: ClassVar = "Vaswani et al. 2017, arXiv 1706.03762"


@dataclass(frozen=True)
class LocalConfig(AttentionConfig):
    """Sliding window: each query sees the keys at most `window` positions away, in linear memory.

    Args:
        window: Keys seen on each side, beside the query's own position (causal: on the left only).
    """

    window: int = 64

    capabilities: ClassVar = Capabilities(patterns=SELF, decode=True, exact_at_full_density=True)
    paper: ClassVar = "Beltagy et al. 2020, arXiv 2004.05150, section 3.1 (window only)"
    conformance_options: ClassVar = {"window": 5}
    full_density_options: ClassVar = {"window": 2**20}

    def __post_init__(self) -> None:
        self.require(self.window >= 1, "window", "at least 1 key")


@dataclass(frozen=True)
class BlockSelectionConfig(AttentionConfig):
    """What every variant that picks key blocks shares: granularity, budget and backend.

    Args:
        block_size: Keys per block, in tokens.
        query_group: Consecutive queries that share a choice; default 1 under a causal mask (where only the
            group's first token may speak for it), 64 without.
        density: Share of the visible blocks each row keeps, always-kept blocks included.
        top_k: Blocks each row keeps, instead of `density`.
        min_blocks: Never fewer blocks than this (or than are visible).
        local_blocks: Blocks kept on each side of the query's own (causal: before it).
        first_block: Always keep the first block of the keys.
        backend: Kernel: auto, reference or gather (`astbench doctor` says which can run here).
    """

    block_size: int = 16
    query_group: int | None = None
    density: float = 0.25
    top_k: int | None = None
    min_blocks: int = 8
    local_blocks: int = 0
    first_block: bool = True
    backend: Literal["auto", "reference", "gather"] = "auto"

    capabilities: ClassVar = Capabilities(
        patterns=PATTERNS, decode=True, exact_at_full_density=True, yields_layout=True
    )
    # Blocks of 16 and a floor of 8 of them would keep everything in the suite's inputs.
    conformance_options: ClassVar = {"block_size": 4, "min_blocks": 2, "density": 0.3}
    full_density_options: ClassVar = {"density": 1.0, "top_k": None}

    def __post_init__(self) -> None:
        self.require(self.block_size >= 1, "block_size", "at least 1 token")
        self.require(self.query_group is None or self.query_group >= 1, "query_group", "at least 1 token")
        self.require(0 < self.density <= 1, "density", "above 0 and at most 1")
        self.require(self.top_k is None or self.top_k >= 1, "top_k", "at least 1 block")
        self.require(self.min_blocks >= 1, "min_blocks", "at least 1 block")
        self.require(self.local_blocks >= 0, "local_blocks", "0 or more blocks")

    @property
    def can(self) -> Capabilities:
        """Groups of several queries cannot decode yet: their first token's query is gone from the cache."""
        return self.capabilities if self.query_group in (None, 1) else replace(self.capabilities, decode=False)


@dataclass(frozen=True)
class RandomTopKConfig(BlockSelectionConfig):
    """Control: block scores are noise, fixed by seed, layer, head and position.

    Args:
        seed: Another seed, another fixed pattern.
    """

    seed: int = 0

    paper: ClassVar = "control of this project (cf. the random blocks of BigBird, arXiv 2007.14062)"


@dataclass(frozen=True)
class PooledTopKConfig(BlockSelectionConfig):
    """Control: block scores are query times mean key, without any parameters."""

    paper: ClassVar = "control of this project (cf. MoBA, arXiv 2502.13189, eq. 6)"


@dataclass(frozen=True)
class OracleTopKConfig(BlockSelectionConfig):
    """Control: block scores are the group's true attention mass; quadratic, the selector's ceiling.

    With `query_group` above 1 it looks at all rows of a group, so under a causal mask later rows choose for
    earlier ones: a ceiling, not a model.
    """

    capabilities: ClassVar = replace(BlockSelectionConfig.capabilities, strictly_causal=False)
    paper: ClassVar = "control of this project"

    @property
    def can(self) -> Capabilities:
        """One query a group looks at nothing but itself."""
        return replace(super().can, strictly_causal=self.query_group in (None, 1))


@dataclass(frozen=True)
class ASTConfig(BlockSelectionConfig):
    """Adaptive Sparse Transformer: a small learned predictor picks each query group's key blocks.

    Args:
        rank: Width of the predictor's learned term.
        budget: "fixed" keeps `density` (or `top_k`) blocks a row; "adaptive" the fewest blocks whose
            predicted mass reaches `mass`, so that density differs per head, row and input.
        mass: Predicted attention mass to reach, for the adaptive budget.
        estimator: How the task loss reaches the predictor. "straight_through": kept blocks carry log p as a
            logit bias whose forward value is zero; "soft": the bias is there in the forward pass too;
            "none": it does not (distillation only).
        temperature: Of the differentiable top-k, in logit units.
        distill_weight: Weight of the loss that teaches the predictor the layer's own dense attention.
        distill_decay_steps: Training steps over which that weight falls linearly to 0; 0 = it stays.
        distill_fraction: Share of the query rows whose dense attention is computed for that loss.
        density_start: Density at step 0, moved linearly to `density`; default: `density` throughout.
        density_hold: Training steps before that schedule leaves `density_start`.
        density_steps: Training steps after which it has reached `density`.
        lambda_density: Weight of (predicted density - density)^2; moves it under the adaptive budget.
        lambda_entropy: Weight of the entropy of the choice; sharpens it.
    """

    rank: int = 32
    budget: Literal["fixed", "adaptive"] = "fixed"
    mass: float = 0.9
    estimator: Literal["straight_through", "soft", "none"] = "straight_through"
    temperature: float = 0.5
    distill_weight: float = 0.1
    distill_decay_steps: int = 0
    distill_fraction: float = 0.125
    density_start: float | None = None
    density_hold: int = 0
    density_steps: int = 0
    lambda_density: float = 0.0
    lambda_entropy: float = 0.0

    capabilities: ClassVar = replace(BlockSelectionConfig.capabilities, owns_parameters=True)
    paper: ClassVar = "this project"
    full_density_options: ClassVar = {
        **BlockSelectionConfig.full_density_options,
        "budget": "fixed",
        "density_start": None,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.budget in ("fixed", "adaptive"), "budget", "fixed or adaptive")
        estimators = ("straight_through", "soft", "none")
        self.require(self.estimator in estimators, "estimator", f"one of {', '.join(estimators)}")
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(0 < self.mass <= 1, "mass", "above 0 and at most 1")
        self.require(self.temperature > 0, "temperature", "above 0")
        self.require(self.distill_weight >= 0, "distill_weight", "0 or more")
        self.require(self.distill_decay_steps >= 0, "distill_decay_steps", "0 or more steps")
        self.require(0 < self.distill_fraction <= 1, "distill_fraction", "above 0 and at most 1")
        self.require(
            self.density_start is None or 0 < self.density_start <= 1,
            "density_start",
            "above 0 and at most 1",
        )
        self.require(self.density_hold >= 0, "density_hold", "0 or more steps")
        self.require(self.density_steps >= 0, "density_steps", "0 or more steps")
        self.require(
            self.density_start is None or self.density_steps > self.density_hold,
            "density_steps",
            f"above density_hold ({self.density_hold}) when density_start is set",
        )
        self.require(self.lambda_density >= 0, "lambda_density", "0 or more")
        self.require(self.lambda_entropy >= 0, "lambda_entropy", "0 or more")


@dataclass(frozen=True)
class Row:
    """One line of the table: the code (`module:Class`) and the options."""

    target: str
    config: type[AttentionConfig]


_VARIANTS = "astbench_registry.variants"

BUILTIN: dict[str, Row] = {
    "ast": Row(f"{_VARIANTS}.adaptive_sparse:AdaptiveSparseAttention", ASTConfig),
    "dense": Row(f"{_VARIANTS}.dense:DenseAttention", DenseConfig),
    "local": Row(f"{_VARIANTS}.local:LocalAttention", LocalConfig),
    "oracle_topk": Row(f"{_VARIANTS}.oracle_topk:OracleTopKAttention", OracleTopKConfig),
    "pooled_topk": Row(f"{_VARIANTS}.pooled_topk:PooledTopKAttention", PooledTopKConfig),
    "random_topk": Row(f"{_VARIANTS}.random_topk:RandomTopKAttention", RandomTopKConfig),
}
