"""Options of the Sparse Transformer's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import SELF, AttentionConfig, Capabilities, SparseBackend


@dataclass(frozen=True)
class SparseConfig(AttentionConfig):
    """Sparse Transformer: a local part and a part that summarises the rest, fixed beforehand.

    Args:
        pattern: "fixed" (text): the query's own window of `stride` tokens and a few blocks of every window;
            "strided" (images): the `stride` tokens around the query (causal: up to it) and every `stride`-th one.
        stride: The paper's l, in tokens; near the square root of the length the pattern is smallest.
        heads: For "strided", who sees what: "merged" (every head both parts), "split" (even heads the local part,
            odd heads the strided one) or "interleaved" (even layers the local part, odd layers the strided one).
            "fixed" is always merged.
        block_size: For "fixed", tokens per block.
        num_verts: For "fixed", how many sets of summary blocks there are; head h reads set h modulo `num_verts`,
            the first being the end of each window, the next the blocks before it.
        vertsize: For "fixed", blocks per set; the paper's c is `vertsize` times `block_size`.
        backend: Kernel of "fixed" and of decoding (`astbench doctor` says which can run here).
    """

    pattern: Literal["strided", "fixed"] = "fixed"
    stride: int = 128
    heads: Literal["merged", "split", "interleaved"] = "merged"
    block_size: int = 16
    num_verts: int = 4
    vertsize: int = 1
    backend: SparseBackend = "auto"

    capabilities: ClassVar = Capabilities(
        patterns=SELF,
        any_value_size=True,
        decode=True,
        exact_at_full_density=True,
        yields_layout=True,
        yields_probabilities=True,
    )
    paper: ClassVar = "Child et al. 2019, arXiv 1904.10509, section 4"
    complexity: ClassVar = "N (stride + N / stride)"
    conformance_options: ClassVar = {"stride": 8, "block_size": 2, "num_verts": 3}
    full_density_options: ClassVar = {
        "stride": 2**20, "heads": "merged", "block_size": 16, "num_verts": 1, "vertsize": 1
    }  # fmt: skip

    def __post_init__(self) -> None:
        self.require(self.pattern in ("strided", "fixed"), "pattern", "strided or fixed")
        self.require(self.heads in ("merged", "split", "interleaved"), "heads", "merged, split or interleaved")
        self.require(self.stride >= 1, "stride", "at least 1 token")
        if self.pattern == "strided":
            return
        self.require(self.heads == "merged", "heads", "merged when --attention.pattern=fixed")
        self.require(self.block_size >= 1, "block_size", "at least 1 token")
        self.require(self.num_verts >= 1, "num_verts", "at least 1")
        self.require(self.vertsize >= 1, "vertsize", "at least 1 block")
        self.require(
            self.stride % self.block_size == 0, "stride", f"a multiple of --attention.block_size={self.block_size}"
        )
        blocks = self.stride // self.block_size
        self.require(
            self.num_verts * self.vertsize <= blocks,
            "num_verts",
            f"at most {blocks // self.vertsize}: a window of {blocks} blocks holds no more sets of {self.vertsize}",
        )

    @property
    def can(self) -> Capabilities:
        """Half of the heads or layers see only the strided part unless both are merged."""
        return replace(self.capabilities, exact_at_full_density=self.heads == "merged")
