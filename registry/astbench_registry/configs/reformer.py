"""Options of LSH attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from astbench_registry.capabilities import SELF, AttentionConfig, Capabilities


@dataclass(frozen=True)
class ReformerConfig(AttentionConfig):
    """LSH attention: tokens are sorted into buckets of similar queries and attend within chunks of that order.

    Args:
        num_hashes: Rounds of hashing, each with other random rotations; the paper trains with up to 8.
        bucket_size: Tokens per chunk of the sorted order, and on average per bucket; a token sees its own chunk
            and the one before.
        attend_across_buckets: See all of both chunks; false: only the tokens of the same bucket (the paper's P_i).
        allow_duplicate_attention: Count a pair once per round in which it meets; false: once (the paper's N_ij).
        seed: Another seed, other rotations.
        backend: auto (this library's own) or reformer_pytorch (the package, for comparison: no padding, lengths in
            multiples of twice bucket_size, and it lets each round's first chunk look into another round's last).
    """

    num_hashes: int = 4
    bucket_size: int = 64
    attend_across_buckets: bool = True
    allow_duplicate_attention: bool = False
    seed: int = 0
    backend: Literal["auto", "reformer_pytorch"] = "auto"

    capabilities: ClassVar = Capabilities(patterns=SELF, any_value_size=True, gqa=False, strictly_causal=False)
    paper: ClassVar = "Kitaev et al. 2020, arXiv 2001.04451, eq. 2-6 and appendix A"
    complexity: ClassVar = "num_hashes N (num_hashes bucket_size + N / bucket_size)"
    conformance_options: ClassVar = {"num_hashes": 2, "bucket_size": 4}

    def __post_init__(self) -> None:
        self.require(self.num_hashes >= 1, "num_hashes", "at least 1 round")
        self.require(self.bucket_size >= 1, "bucket_size", "at least 1 token")
        self.require(
            self.backend == "auto" or self.allow_duplicate_attention,
            "allow_duplicate_attention",
            "true with --attention.backend=reformer_pytorch (its removal of duplicates multiplies some pairs by 1e9)",
        )

    @property
    def can(self) -> Capabilities:
        """What the package can, when it is asked for."""
        if self.backend == "auto":
            return self.capabilities
        return replace(
            self.capabilities,
            padding=False,
            any_value_size=False,
            dtypes=("float64", "float32"),
            length_multiple=2 * self.bucket_size,
            remedy="set --attention.backend=auto",
        )
