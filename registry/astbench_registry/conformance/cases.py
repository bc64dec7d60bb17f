"""The conformance suite's inputs: short, in float64, every size another; and how they are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from astbench_registry.capabilities import AttentionConfig, Capabilities, Pattern
from astbench_registry.findings import Failure
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape, CacheState
from astbench_registry.mask import AttentionMask

# Sizes differ and lengths are multiples of nothing, so that a swapped axis or a forgotten remainder shows.
HEADS, KV_HEADS, HEAD_DIM, HIDDEN_SIZE, BATCH = 6, 3, 5, 7, 2
LENGTH, KEY_LENGTH = 71, 53  # LENGTH crosses the edge of a group of 64 queries
MAX_POSITIONS = 97  # of what a variant has parameters for; the longest of these cases has LENGTH + 18 tokens
SHORT, SHORT_KEYS = 41, 29  # for properties that run the variant hundreds of times


Factory = Callable[[Any, AttentionShape], Attention]
"""Builds a module from (config, shape); an :class:`Attention` class is one."""


def seed_cpu(seed: int) -> None:
    """The CPU's generator alone: torch.manual_seed also notes a traceback for each kind of device, for 5 ms."""
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """One call's inputs. `hidden` is the layer's input, which only some variants read."""

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    mask: AttentionMask

    def run(
        self,
        module: Attention,
        *,
        scale: float | None = None,
        collect_stats: bool = False,
        step: int = 0,
        summaries: CacheState | None = None,
    ) -> AttentionOutput:
        """Call the module under a fixed seed, leaving the caller's random state alone."""
        context = AttentionContext(
            step=step, collect_stats=collect_stats, hidden_states=self.hidden, summaries=summaries
        )
        given = {"q": self.q, "k": self.k, "v": self.v, "hidden_states": self.hidden, "key_valid": self.mask.key_valid}
        versions = {name: x._version for name, x in given.items() if x is not None}
        with torch.random.fork_rng(devices=[]):
            seed_cpu(0)
            output = module(self.q, self.k, self.v, self.mask, scale=scale, context=context)
        written = [name for name, before in versions.items() if given[name]._version != before]  # type: ignore[union-attr]
        if written:
            raise Failure(f"the call writes into its inputs: {', '.join(written)}")
        return output

    def out(self, module: Attention, **options: Any) -> Tensor:
        """The context vectors alone."""
        return self.run(module, **options).out

    def with_mask(self, **changes: Any) -> Case:
        """The same tensors under another mask."""
        return replace(self, mask=replace(self.mask, **changes))

    def tensors(self, change: Callable[[Tensor], Tensor]) -> Case:
        """`change` applied to q, k, v and hidden."""
        return replace(self, q=change(self.q), k=change(self.k), v=change(self.v), hidden=change(self.hidden))

    def to(self, dtype: torch.dtype) -> Case:
        """In another floating-point type."""
        return self.tensors(lambda x: x.to(dtype))

    def rows(self, rows: slice) -> Case:
        """Some sequences of the batch."""
        key_valid, query_valid = (None if x is None else x[rows] for x in (self.mask.key_valid, self.mask.query_valid))
        return self.tensors(lambda x: x[rows]).with_mask(key_valid=key_valid, query_valid=query_valid)

    def queries(self, start: int, stop: int) -> Case:
        """Decoding: queries `start` to `stop`, and for self-attention only the keys that exist by then."""
        seen = self.k.shape[2] if self.mask.cross else stop
        valid = None if self.mask.key_valid is None else self.mask.key_valid[:, :seen]
        return Case(
            self.q[:, :, start:stop],
            self.k[:, :, :seen],
            self.v[:, :, :seen],
            self.hidden[:, start:stop],
            replace(self.mask, query_offset=start, key_valid=valid),
        )

    def allowed(self) -> Tensor:
        """Bool, broadcastable to `(batch, heads, queries, keys)`: what dense attention would see."""
        dense = self.mask.dense(self.q.shape[2], self.k.shape[2], self.q.device)
        return torch.ones(1, 1, 1, 1, dtype=torch.bool) if dense is None else dense

    def real_rows(self) -> Tensor:
        """Bool `(batch, 1, queries, 1)`: rows that are no padding."""
        valid = self.mask.valid_queries(self.q.shape[2])
        valid = torch.ones(self.q.shape[0], self.q.shape[2], dtype=torch.bool) if valid is None else valid
        return valid[:, None, :, None]


@dataclass(frozen=True)
class Subject:
    """What is under test: how to build it, and one pattern."""

    name: str
    factory: Factory
    config: AttentionConfig
    pattern: Pattern

    @property
    def can(self) -> Capabilities:
        """The capability record for these options."""
        return self.config.can

    @property
    def self_attention(self) -> bool:
        """Keys are the queries' own sequence."""
        return self.pattern.endswith("self")

    @property
    def head_dim(self) -> int:
        """A head size that the variant accepts."""
        return self.can.head_dims[0] if self.can.head_dims else HEAD_DIM

    def length(self, length: int) -> int:
        """The length itself, or the next one that the variant accepts."""
        return -(-length // self.can.length_multiple) * self.can.length_multiple

    def lengths(self, queries: int, keys: int) -> tuple[int, int]:
        """Accepted query and key lengths; for self-attention one and the same."""
        queries = self.length(queries)
        return queries, queries if self.self_attention else self.length(keys)

    def build(
        self,
        *,
        full_density: bool = False,
        training: bool = False,
        trained: bool = True,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        max_positions: int = MAX_POSITIONS,
        seed: int = 0,
    ) -> Attention:
        """A float64 module for one layer, by default with random parameters, as if trained."""
        config = replace(self.config, **self.config.full_density_options) if full_density else self.config
        shape = AttentionShape(
            num_heads=HEADS,
            num_kv_heads=kv_heads or (KV_HEADS if self.can.gqa else HEADS),
            head_dim=head_dim or self.head_dim,
            layer_index=1,
            num_layers=3,
            hidden_size=HIDDEN_SIZE,
            max_positions=max_positions,
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            seed_cpu(seed)
            module = self.factory(config, shape).double()
            if trained:
                for parameter in module.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
        return module.train(training)

    def case(
        self,
        queries: int = LENGTH,
        keys: int = KEY_LENGTH,
        *,
        batch: int = BATCH,
        head_dim: int | None = None,
        holes: float = 0.0,
        seed: int = 1,
    ) -> Case:
        """Random inputs in float64; `holes` is the share of keys that are padding (none if it cannot)."""
        queries, keys = self.lengths(queries, keys)
        g = torch.Generator().manual_seed(seed)
        kv_heads = KV_HEADS if self.can.gqa else HEADS

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        dim = head_dim or self.head_dim
        q, k, v = (draw(batch, heads, n, dim) for heads, n in ((HEADS, queries), (kv_heads, keys), (kv_heads, keys)))
        valid = torch.rand(batch, keys, generator=g) >= holes if holes and self.can.padding else None
        return Case(q, k, v, draw(batch, queries, HIDDEN_SIZE), AttentionMask(self.pattern, key_valid=valid))


def attend(case: Case, allowed: Tensor, scale: float) -> Tensor:
    """Softmax attention written out, in the dtype of the inputs; rows that see nothing are zero."""
    repeats = case.q.shape[1] // case.k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (case.k, case.v))
    logits = (case.q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    weights = logits.masked_fill(~allowed.any(-1, keepdim=True), 0.0).softmax(-1)
    return weights.masked_fill(~allowed, 0.0) @ v


def lengths_to_valid(lengths: Iterable[int], total: int) -> Tensor:
    """Bool `(batch, total)`: the first `lengths` tokens are real."""
    return torch.arange(total) < torch.tensor(list(lengths))[:, None]


def noise_at(x: Tensor, where: Tensor, value: float | None = None) -> Tensor:
    """`x` with other content where `where` `(batch, length)` is True: noise, or `value`."""
    where = where[:, None, :, None] if x.dim() == 4 else where[:, :, None]
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype) * 3
    return torch.where(where, other if value is None else torch.full_like(x, value), x)


def longer_by(x: Tensor, extra: int) -> Tensor:
    """More rows along the length, holding noise."""
    pad = torch.nn.functional.pad(x, (0, 0, 0, extra))
    added = torch.arange(pad.shape[-2]) >= x.shape[-2]
    return noise_at(pad, added.expand(x.shape[0], -1))


SIZES = (0.25, 1.0, 4.0, None)
"""Of changes that :func:`change_after` makes: a leak may show with small ones only, or with large ones."""


def change_after(case: Case, cut: int, size: float | None, g: torch.Generator) -> Case:
    """Other tokens from `cut` on: noise of that size added, or (None) something else altogether."""

    def change(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
        noise[..., :cut, :] = 0
        if size is not None:
            return x + size * noise
        kept = x.clone()
        kept[..., cut:, :] = 0
        return kept + 5 * noise

    changed = case.tensors(change)
    return replace(changed, k=case.k, v=case.v) if case.mask.cross else changed


def side_by_side(cases: list[Case]) -> Case:
    """One batch of several cases under one mask."""
    valid = cases[0].mask.key_valid
    together = Case(
        torch.cat([case.q for case in cases]),
        torch.cat([case.k for case in cases]),
        torch.cat([case.v for case in cases]),
        torch.cat([case.hidden for case in cases]),
        cases[0].mask,
    )
    return together.with_mask(key_valid=None if valid is None else valid.repeat(len(cases), 1))


def other_padding(case: Case) -> Case:
    """Other content where the mask says padding; for self-attention in the queries too."""
    assert case.mask.key_valid is not None, "the case must hold padding"
    hidden = ~case.mask.key_valid
    changed = replace(case, k=noise_at(case.k, hidden), v=noise_at(case.v, hidden))
    if case.mask.cross:
        return changed
    return replace(changed, q=noise_at(case.q, hidden), hidden=noise_at(case.hidden, hidden))


def more_padding(case: Case, extra: int) -> Case:
    """`extra` padded keys and queries at the end."""
    assert case.mask.key_valid is not None, "the case must hold padding"
    longer = case.tensors(lambda x: longer_by(x, extra))
    valid = torch.nn.functional.pad(case.mask.key_valid, (0, extra))
    queries = None
    if case.mask.cross:
        rows = case.q.shape[2]
        queries = lengths_to_valid([rows] * case.q.shape[0], rows + extra)
    return longer.with_mask(key_valid=valid, query_valid=queries)
