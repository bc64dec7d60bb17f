"""What goes with the tensors of a call, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from astbench_kernels import BlockLayout


class CacheState:
    """Base of what a variant keeps of one KV cache from call to call, such as summaries of its blocks."""

    @cached_property
    def parts(self) -> dict[tuple[int, ...], CacheState]:
        """What is kept of parts of the batch, where sequences behind different paddings are computed apart."""
        return {}

    def part(self, front: int, rows: list[int], new: Callable[[], CacheState]) -> CacheState:
        """What is kept of some sequences of the batch, those behind `front` padded rows.

        Args:
            front: Padded rows.
            rows: Of the batch.
            new: Makes an empty state, where nothing is kept of just these sequences yet. It begins with what is known
                of them together with others: a sequence of which no token has come yet counts as one without padding.
        """
        key = (front, *rows)
        if key not in self.parts:
            kept = new()
            together = [(x[1:], state) for x, state in self.parts.items() if x[0] == front and {*rows} <= {*x[1:]}]
            if together:
                others, state = together[-1]
                kept.take(state, [others.index(row) for row in rows])
            elif not front:
                kept.take(self, rows)
            self.parts[key] = kept
        return self.parts[key]

    def take(self, other: CacheState, rows: list[int]) -> None:
        """Begin with what another state knows of some of its sequences and nobody else can tell; nothing by default."""

    def doubt(self) -> None:
        """The cache may hold other sequences than it did, or less of them: what is kept has to be verified or go."""
        for part in self.parts.values():
            part.doubt()


@dataclass(frozen=True)
class AttentionContext:
    """What a variant may need beside the tensors.

    Attributes:
        step: Optimizer steps taken so far, for schedules.
        collect_stats: Return :class:`AttentionStats` too; when False they are not computed.
        hidden_states: The layer's input `(batch, query_length, hidden_size)`, only for variants whose
            capability record asks for it.
        global_tokens: Bool `(batch, key_length)`: tokens that the task wants seen by all and seeing all (the
            question's, in question answering), for variants that know such tokens; None when it names none.
        transform: Changes explicit weights before they sum values; None for the variant's own kernels. It is called
            with weights `(batch, heads, rows, keys)` of some query rows, and bool `(batch, 1, rows, keys)`, True for
            the pairs that the mask shows.
        summaries: What earlier calls on the same KV cache found out about its key blocks, and this one adds to; None
            when nobody keeps it. It changes no result, only what has to be computed, without gradients; but a variant
            whose capability record says `decode_state` cannot go on without it.
    """

    step: int = 0
    collect_stats: bool = False
    hidden_states: Tensor | None = None
    global_tokens: Tensor | None = None
    summaries: CacheState | None = None
    transform: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class AttentionStats:
    """What was attended to in one call.

    Attributes:
        attended: float64 `(batch, heads)`: (query, key) pairs attended to; a kernel may compute more, see `backend`.
        visible: float64 `(batch,)`: pairs a dense attention would compute.
        backend: The kernel that ran.
        layout: The chosen blocks, for variants that choose blocks; counted from each sequence's first real token, see
            `leading`. None where sequences behind different paddings decode together: their grids differ.
        coarse: float64 `(batch, heads)`: pairs computed beside those, with pooled keys or in another branch; None where
            there are none.
        leading: int64 `(batch,)`: padded rows in front of each sequence, from behind which `layout` counts its keys
            (and, for self-attention, its queries); None: from row 0.
        tiles: float64 `(batch, heads)`: pairs in the tiles that a kernel has to compute which works tile by tile, 64
            rows or more by one block, for variants whose rows share lists; None for others.
    """

    attended: Tensor
    visible: Tensor
    backend: str
    layout: BlockLayout | None = None
    coarse: Tensor | None = None
    leading: Tensor | None = None
    tiles: Tensor | None = None

    @property
    def computed(self) -> Tensor:
        """float64 `(batch, heads)`: pairs attended to, and those in `coarse`."""
        return self.attended if self.coarse is None else self.attended + self.coarse

    @property
    def density(self) -> Tensor:
        """float64 `(heads,)`: computed pairs over visible pairs, over the batch."""
        return self.computed.sum(0) / self.visible.sum().clamp(min=1)


class ExplicitWeights(NamedTuple):
    """What a call's values are summed by, for variants whose capability record says `yields_probabilities`.

    Attributes:
        rows: Gives the weights of some query rows, int64 `(rows,)`: `(batch, heads, rows, key_length)`, float32 or
            more, zero for pairs that are not attended to and in rows of padding.
        stats: Filled when `collect_stats` is set.
        values: What they sum, `(batch, kv_heads, key_length, value_dim)`; None: the call's own values.
    """

    rows: Callable[[Tensor], Tensor]
    stats: AttentionStats | None = None
    values: Tensor | None = None


class AttentionOutput(NamedTuple):
    """What every call returns.

    Attributes:
        out: `(batch, heads, query_length, head_dim)`; rows that see nothing are zero.
        losses: Auxiliary losses by name, already weighted, to be added to the task's; only while training.
        stats: Filled when `collect_stats` is set.
        log_prob: `(batch,)`, with gradient: log-probability of what was drawn at random for each sequence, of a variant
            that learns by policy gradient; only while training.
    """

    out: Tensor
    losses: Mapping[str, Tensor] = MappingProxyType({})
    stats: AttentionStats | None = None
    log_prob: Tensor | None = None
