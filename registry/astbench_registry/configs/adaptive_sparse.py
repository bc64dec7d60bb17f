"""Options of the Adaptive Sparse Transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from astbench_registry.capabilities import AttentionConfig, Capabilities
from astbench_registry.configs.block_selection import BlockSelectionConfig


@dataclass(frozen=True)
class ASTConfig(BlockSelectionConfig):
    """Adaptive Sparse Transformer: a small learned predictor picks each query group's key blocks.

    Args:
        rank: Width of the predictor's learned term.
        sub_blocks: Means that sum up a block's keys, each of `block_size / sub_blocks` tokens; its score is the
            logarithm of the summed exponentials of theirs. More of them see more of what one mean hides, and the
            predictor costs that many times as much; on a GPU it holds their scores where lists are not carried.
        index_dim: Dimensions of an index of tokens: queries and keys are projected to so many, and a block's score is
            the logarithm of its tokens' summed exponentials. It finds what a mean hides, and costs N M index_dim.
            Random at first; `--backbone.calibrate` starts it from the model's own queries and keys. 0: a block is
            scored by its mean key and the learned term of `rank`.
        index_pool: Consecutive tokens of which only the largest score joins that sum: `block_size` for a block's
            largest alone. The sums of exponentials are most of what an index costs, and they become as much shorter.
        patterns: Predefined patterns that each head may follow beside the content: cosines of the distance with periods
            of 4, 8, 16, ... blocks (long ones are windows, short ones strides), weighed per head, at first with zero.
        global_tokens: Always keep the blocks that hold a token which the task calls global (a question's), as part of
            the budget, and let groups that hold one see everything, beyond it. Only in bidirectional self-attention.
        budget: "fixed" keeps `density` (or `top_k`) blocks a row; "adaptive" the blocks that hold at least `share` of a
            row's predicted mass, so that density differs per head, row and input; "calibrated" the same, with the share
            at which `density` of all is computed: of the tiles where lists are carried, else of the rows' visible
            blocks. `--backbone.calibrate` finds it, on the run's own batches; before that it is `share`.
        share: Least share of that mass, for the adaptive budget (and until a calibrated one is found): of the blocks
            that there is a choice among (the first and the current one, always kept, often hold most of all). At most
            `1 / share` blocks reach it; `min_blocks` are kept in any case.
        mass: Not used; runs of before `share` hold it.
        estimator: How the task loss reaches the predictor. "straight_through": kept blocks carry log p as a
            logit bias whose forward value is zero; "soft": the bias is there in the forward pass too;
            "policy_gradient": blocks are drawn as with `sample`, and a sequence's choices become more probable the
            less it lost, compared with the rest of the batch (REINFORCE; two sequences a batch at least); "none": it
            does not (distillation only).
        temperature: Of the differentiable top-k, in logit units.
        sample: While training, choose by the scores plus logistic noise of `temperature`, so that a block is kept
            about as often as the differentiable top-k says, and blocks that are never kept get their chance.
        detach: What teaches the predictor stops at its inputs; off, it moves the backbone's queries, keys and values
            too. (The gate of "soft" and what `rest` adds are part of the forward pass; their gradient stops nowhere.)
        distill_weight: Weight of the loss that teaches the predictor the layer's own dense attention.
        distill_decay_steps: Training steps over which that weight falls linearly to 0; 0 = it stays.
        distill_fraction: Share of the query rows whose dense attention is computed for that loss.
        density_start: Density at step 0; default: `density` throughout.
        density_hold: Training steps before the schedule leaves `density_start`.
        density_steps: Training steps after which it has reached `density`.
        density_schedule: What happens in between. "linear": the density moves evenly from one to the other;
            "mixed": each step has one or the other, `density` more and more often, so that what was learned at
            `density_start` is kept up while the choice is learned.
        rest: What a row did not choose joins its softmax as one token, of the mass that the scores predict and the mean
            of all values that may be known. Worth it with blocks of a few tokens. It costs sums of exponentials, while
            training (with `detach`) the scores a second time, and on a GPU the fused kernel's choice is not used.
        coarse_stride: Tokens that a coarse token stands for, in the first layer that sees such tokens beside the
            chosen blocks; 0 = none does.
        coarse_from: First layer (from 0) that does.
        coarse_every: Layers after which the stride doubles; 0 = it stays.
        lambda_density: Weight of (predicted density - density)^2; moves it under the adaptive budget, and sharpens the
            scores under a fixed one.
        lambda_entropy: Weight of the entropy of the choice; sharpens it.
    """

    rank: int = 32
    sub_blocks: int = 1
    index_dim: int = 0
    index_pool: int = 1
    patterns: int = 0
    global_tokens: bool = False
    budget: Literal["fixed", "adaptive", "calibrated"] = "fixed"
    share: float = 0.01
    mass: float | None = None
    estimator: Literal["straight_through", "soft", "policy_gradient", "none"] = "straight_through"
    temperature: float = 0.5
    sample: bool = False
    detach: bool = True
    distill_weight: float = 0.1
    distill_decay_steps: int = 0
    distill_fraction: float = 0.125
    density_start: float | None = None
    density_hold: int = 0
    density_steps: int = 0
    density_schedule: Literal["linear", "mixed"] = "linear"
    rest: bool = False
    coarse_stride: int = 0
    coarse_from: int = 0
    coarse_every: int = 0
    lambda_density: float = 0.0
    lambda_entropy: float = 0.0

    capabilities: ClassVar = replace(BlockSelectionConfig.capabilities, owns_parameters=True, any_value_size=False)
    paper: ClassVar = "this project"
    complexity: ClassVar = "N M density + (N / query_group) (M / block_size) sub_blocks"
    full_density_options: ClassVar = {
        **BlockSelectionConfig.full_density_options,
        "budget": "fixed",
        "density_start": None,
        "coarse_stride": 0,
    }

    @property
    def can(self) -> Capabilities:
        """A gate that is felt in the forward pass lets every score move the output.

        With it, and where other tokens than keys join the softmax, there are no weights of keys alone.
        """
        soft = self.estimator == "soft"
        plain = not (soft or self.rest or self.coarse_stride)
        return replace(super().can, soft_choice=soft, yields_probabilities=plain)

    def notes(self, steps: int) -> list[str]:
        """A schedule that the run is too short for: it is tested at a density that it was never trained at."""
        if self.density_start is None or steps >= self.density_steps:
            return []
        way = max(0, steps - self.density_hold) / (self.density_steps - self.density_hold)
        return [
            f"the density schedule ends at step {self.density_steps}, training at step {steps}: {way:.0%} of the way "
            f"from {self.density_start} to {self.density}, at which it is evaluated; set --attention.density_steps to "
            f"at most {steps}, or raise --trainer.max_steps"
        ]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.budget in ("fixed", "adaptive", "calibrated"), "budget", "fixed, adaptive or calibrated")
        estimators = ("straight_through", "soft", "policy_gradient", "none")
        self.require(self.estimator in estimators, "estimator", f"one of {', '.join(estimators)}")
        self.require(
            self.lists == "own" or self.estimator != "soft",
            "estimator",
            "straight_through, policy_gradient or none with --attention.lists=carried: a tile's rows share one bias",
        )
        self.require(self.lists == "own" or not self.rest, "rest", "off with --attention.lists=carried")
        self.require(self.rank >= 1, "rank", "at least 1")
        self.require(
            self.sub_blocks >= 1 and self.block_size % self.sub_blocks == 0,
            "sub_blocks",
            f"a divisor of block_size ({self.block_size})",
        )
        self.require(self.index_dim >= 0, "index_dim", "0 or more")
        self.require(
            not self.index_dim or self.sub_blocks == 1,
            "sub_blocks",
            "1 with --attention.index_dim, which has every token",
        )
        self.require(
            self.index_pool >= 1 and self.block_size % self.index_pool == 0,
            "index_pool",
            f"a divisor of block_size ({self.block_size})",
        )
        self.require(
            self.index_pool == 1 or (self.index_dim > 0 and not self.rest),
            "index_pool",
            "1 without --attention.index_dim, and with --attention.rest, which needs all of the mass",
        )
        self.require(0 <= self.patterns <= 16, "patterns", "0 to 16")
        self.require(0 < self.share <= 1, "share", "above 0 and at most 1")
        self.require(
            self.mass is None or self.budget == "fixed",
            "mass",
            "left out: the adaptive budget goes by --attention.share",
        )
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
        self.require(self.density_schedule in ("linear", "mixed"), "density_schedule", "linear or mixed")
        self.require(
            self.density_start is None or self.density_steps > self.density_hold,
            "density_steps",
            f"above density_hold ({self.density_hold}) when density_start is set",
        )
        self.require(self.coarse_stride != 1 and self.coarse_stride >= 0, "coarse_stride", "0, or 2 tokens and more")
        self.require(self.coarse_from >= 0, "coarse_from", "0 or more")
        self.require(self.coarse_every >= 0, "coarse_every", "0 or more layers")
        self.require(self.lambda_density >= 0, "lambda_density", "0 or more")
        self.require(self.lambda_entropy >= 0, "lambda_entropy", "0 or more")

    def headline(self) -> dict[str, Any]:
        """See the base class; of an adaptive budget what decides it."""
        if self.budget == "fixed":
            return super().headline()
        shown = {*AttentionConfig.headline(self), "share", "min_blocks"} - {"top_k"}
        if self.budget == "calibrated":
            shown.discard("share")
        elif not self.lambda_density:
            shown.discard("density")
        return {name: value for name, value in self.as_dict().items() if name in shown}

    def coarse_stride_at(self, layer: int) -> int:
        """Tokens of a coarse token in a layer; 0 where it sees none."""
        if layer < self.coarse_from:
            return 0
        doublings = (layer - self.coarse_from) // self.coarse_every if self.coarse_every else 0
        return self.coarse_stride * 2**doublings
