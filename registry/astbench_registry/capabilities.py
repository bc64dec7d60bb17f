"""What a variant can do, and the base of its options. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from astbench_registry.errors import CapabilityError

Pattern = Literal["bidirectional_self", "causal_self", "bidirectional_cross", "causal_cross"]
"""The four ways attention is used: does a token see later ones, and are keys the queries' own sequence."""

PATTERNS: tuple[Pattern, ...] = ("bidirectional_self", "causal_self", "bidirectional_cross", "causal_cross")
SELF: tuple[Pattern, ...] = ("bidirectional_self", "causal_self")

SparseBackend = Literal["auto", "reference", "gather", "triton", "triton_hopper", "triton_plain", "flex"]
"""What `--attention.backend` takes where key blocks are chosen: names of :func:`astbench_kernels.sparse_backends`."""


@dataclass(frozen=True)
class Capabilities:
    """Declared once per variant, checked in one place (:meth:`check`), before any data is loaded.

    Attributes:
        patterns: Which of the four patterns it computes.
        gqa: Accepts fewer key/value heads than query heads.
        joint_choice: Query heads that share a key/value head choose keys together, so grouped heads are another
            method than the same heads repeated.
        padding: Honours a key padding mask.
        decode: One step at a time with a KV cache equals one full pass (query offset > 0).
        decode_state: Such a step needs what the variant keeps beside the cache (`new_cache_state`) when it begins
            elsewhere than at a multiple of some length; without it, it is refused.
        any_value_size: Takes values of another size than keys as they are. Without it, narrower ones come padded with
            zeros, which the output is cut from, and wider ones are refused.
        shift_invariant: Padding in front of a sequence changes nothing, whatever its length. Without it the variant is
            never given any: sequences begin at row 0 of what it is called with.
        soft_choice: The scores that keys are chosen by weigh what is attended to, so that keys that were not chosen
            move the output as well.
        strictly_causal: Under a causal mask no output depends on the future, nor does any choice of keys.
        exact_at_full_density: Has a setting at which it equals dense attention.
        yields_layout: Reports which key blocks it attends to.
        yields_probabilities: Its output is a sum of values by weights that it can give explicitly (`explicit_weights`),
            so that a transform of attention weights can change them.
        owns_parameters: Has trainable parameters of its own.
        needs_hidden_states: Reads the layer's input, not only q, k and v.
        dtypes: Floating-point types it computes in.
        head_dims: Head sizes it accepts; empty for any.
        length_multiple: Lengths must be multiples of this; 1 for any.
        max_length: Longest sequence in tokens; None for any.
        remedy: Where options limit padding or lengths: which flag lifts that, as part of a message.
    """

    patterns: tuple[Pattern, ...]
    gqa: bool = True
    joint_choice: bool = False
    padding: bool = True
    decode: bool = False
    decode_state: bool = False
    any_value_size: bool = False
    shift_invariant: bool = False
    soft_choice: bool = False
    strictly_causal: bool = True
    exact_at_full_density: bool = False
    yields_layout: bool = False
    yields_probabilities: bool = False
    owns_parameters: bool = False
    needs_hidden_states: bool = False
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    head_dims: tuple[int, ...] = ()
    length_multiple: int = 1
    max_length: int | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        unknown = [pattern for pattern in self.patterns if pattern not in PATTERNS]
        if unknown or not self.patterns:
            raise ValueError(f"patterns must be some of {', '.join(PATTERNS)}; got {', '.join(unknown) or 'none'}")

    def problems(
        self,
        pattern: Pattern,
        *,
        num_heads: int = 1,
        num_kv_heads: int = 1,
        head_dim: int | None = None,
        value_dim: int | None = None,
        dtype: str | None = None,
        length: int | None = None,
        length_flag: str = "the length",
        padded: bool = False,
        decode: bool = False,
    ) -> list[str]:
        """Every reason why the variant cannot serve such a layer; empty when it can.

        Args:
            pattern: How the layer attends.
            num_heads: Query heads.
            num_kv_heads: Key/value heads.
            head_dim: Of queries and keys.
            value_dim: Of values; as `head_dim` when left out.
            dtype: It computes in.
            length: Longest input in tokens.
            length_flag: What to call it in a reason.
            padded: Inputs may hold padding.
            decode: It will be called one step at a time with a KV cache.
        """
        reasons = []
        if pattern not in self.patterns:
            reasons.append(f"no {pattern.replace('_', ' ')} attention (it has: {', '.join(self.patterns)})")
        if num_heads != num_kv_heads and not self.gqa:
            reasons.append(f"needs as many key as query heads, got {num_kv_heads} and {num_heads}")
        if self.head_dims and head_dim is not None and head_dim not in self.head_dims:
            reasons.append(f"head_dim must be one of {self.head_dims}, got {head_dim}")
        if value_dim is not None and head_dim is not None and value_dim > head_dim and not self.any_value_size:
            reasons.append(f"takes values no wider than keys, got {value_dim} and {head_dim} numbers")
        if dtype is not None and dtype not in self.dtypes:
            reasons.append(f"computes in {', '.join(self.dtypes)}, not {dtype}")
        remedy = f" ({self.remedy})" if self.remedy else ""
        if padded and not self.padding:
            reasons.append(f"takes no padding, and the task's batches hold some{remedy}")
        if decode and not self.decode:
            reasons.append("cannot decode: a step with a KV cache is not what one full pass gives")
        if length is not None and self.max_length is not None and length > self.max_length:
            reasons.append(f"takes at most {self.max_length} tokens, {length_flag} is {length}{remedy}")
        if length is not None and length % self.length_multiple:
            reasons.append(f"takes multiples of {self.length_multiple} tokens, {length_flag} is {length}{remedy}")
        return reasons

    def check(self, name: str, pattern: Pattern, **layer: Any) -> None:
        """Raise :class:`CapabilityError` with every reason, or return."""
        reasons = self.problems(pattern, **layer)
        if reasons:
            raise CapabilityError(f"attention '{name}' cannot serve this model: {'; '.join(reasons)}")


@dataclass(frozen=True)
class AttentionConfig:
    """Base of every variant's options: a frozen dataclass of plain values with defaults.

    Subclasses set the class attributes below, and check their fields in `__post_init__` with messages that
    name the flag (:meth:`require`).

    Attributes:
        capabilities: What the variant can do.
        paper: Where it comes from.
        complexity: Time of one forward call in N queries and M keys (bidirectional self-attention: M = N), as
            the paper counts it: "N window", "N M".
        conformance_options: Options under which the conformance suite's short inputs (tens of tokens) show
            what the variant does: with a window or a budget wider than they are, it would be dense there.
        full_density_options: Options at which it equals dense attention, whatever the others are; read when
            `capabilities.exact_at_full_density`.
        always_shown: Options that :meth:`headline` shows even at their defaults.
        renamed: Former name of an option -> its name. Both are taken, so that old records and checkpoints load.
    """

    capabilities: ClassVar[Capabilities]
    paper: ClassVar[str] = ""
    complexity: ClassVar[str] = ""
    conformance_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    full_density_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    always_shown: ClassVar[tuple[str, ...]] = ("block_size", "query_group", "density", "window")
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @classmethod
    def current(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The same options, former names replaced; of both the last one counts."""
        return {cls.renamed.get(key, key): value for key, value in options.items()}

    def headline(self) -> dict[str, Any]:
        """The options that a run's first lines show: what decides where is attended, and all that is not default."""
        plain = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in self.as_dict().items() if k in self.always_shown or v != plain[k]}

    @property
    def can(self) -> Capabilities:
        """The capability record for these very options (most variants: the class's own)."""
        return self.capabilities

    def notes(self, steps: int) -> list[str]:
        """What a user should know of these options in a training run of that many steps; nothing for most."""
        return []

    def require(self, condition: bool, field: str, expected: str) -> None:
        """Raise `ValueError` naming the option, what was expected and what was given."""
        if not condition:
            raise ValueError(f"--attention.{field} must be {expected}, got {getattr(self, field)!r}")

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what checkpoints and records hold."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
