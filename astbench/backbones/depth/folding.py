"""Layer folding: inputs grouped by path, each group through its own layers alone.

The model calls its layers one after the other as always. All but the last only note what they were called with and
return what they were given; the last one runs everything. So every family's own loop stays as it is, and a skipped
layer costs nothing: none of its weights are touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from astbench.backbones.depth.programs import Program, Programs
from astbench.backbones.depth.rows import take_rows
from astbench.backbones.depth.stack import Stack
from astbench.backbones.hooks import AttentionSlot
from astbench.backbones.side_by_side import SideBySide
from astbench_registry import CapabilityError
from astbench_registry.depth.interface import Choice, DepthPolicy
from astbench_registry.mask import AttentionMask

_PATH = "_astbench_path"
"""Attribute of a KV cache: the path that its sequences were begun with."""


@dataclass
class Call:
    """What a layer was called with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def rows(self, rows: Tensor, batch: int) -> Call:
        """The same for some rows of the batch."""
        return Call(take_rows(self.args, rows, batch), take_rows(self.kwargs, rows, batch))


@dataclass
class Folded:
    """What one pass did.

    Attributes:
        choice: What the policy said.
        ran: Bool `(batch, num_layers)`: the layers that each input went through.
        distance: `(batch,)`: see :class:`~astbench_registry.depth.interface.Outcome`; None where nobody asked.
    """

    choice: Choice
    ran: Tensor
    distance: Tensor | None = None


@dataclass
class _Reports:
    """What a layer's attention reported of the groups of a batch, put together again."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    log_prob: Tensor | None = None


class Folding:
    """Takes the place of the layers' `forward`.

    Args:
        stack: The layers.
        policy: Chooses among them.

    Attributes:
        programs: What runs a path, kept.
        last: Of the last pass.
        seen: Called after every pass.
        full: Run all layers and ask nobody.
    """

    def __init__(self, stack: Stack, policy: DepthPolicy) -> None:
        self.stack, self.policy = stack, policy
        self.programs = Programs(policy.config.programs, self._program)
        self.last: Folded | None = None
        self.seen: Callable[[Folded], None] | None = None
        self.full = False
        self._given: Tensor | None = None
        self._calls: list[Call] = []
        self._batch = 0
        self._reports: dict[AttentionSlot, _Reports] = {}
        self._reporting = True
        self._forward = [layer.forward for layer in stack.layers]
        for number, layer in enumerate(stack.layers):
            layer.forward = self._stand_in(number)

    def undo(self) -> None:
        """Give the layers back their own `forward`."""
        for layer in self.stack.layers:
            layer.__dict__.pop("forward", None)

    def _stand_in(self, number: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
            args = args[1:]
            if number == 0:
                self._given, self._calls = hidden, []
            if len(self._calls) != number or hidden is not self._given:
                raise CapabilityError(
                    f"--depth: {type(self.stack.layers[number]).__name__} {number} is not called with what the layer "
                    "before it gave; this model does something between its layers"
                )
            self._calls.append(Call(args, kwargs))
            if len(self._calls) < len(self.stack.layers):
                return hidden
            calls, self._calls, self._given = self._calls, [], None
            return self._run(hidden, calls)

        return forward

    # -- one pass ---------------------------------------------------------------------------------------

    def _run(self, hidden: Tensor, calls: list[Call]) -> Tensor:
        for slots in self.stack.slots:  # of layers that do not run nothing may be left of the pass before
            for slot in slots:
                slot.losses, slot.log_prob, slot.stats = {}, None, None
        self._batch, self._reports = len(hidden), {}
        layers = len(self.stack.layers)
        everything = torch.arange(len(hidden), device=hidden.device)
        if self.full:
            out = self._through(tuple(range(layers)), hidden, calls, everything, None)
            self._put_reports_back()
            return out
        cache = _cache_of(calls[0])
        begun_before = cache is not None and cache.get_seq_length() > 0  # asked before the first layers write to it
        first = self.policy.config.first_layers
        begun = self._through(tuple(range(first)), hidden, calls, everything, None)
        seen = self._seen(hidden, calls[0])
        choice = self._kept(cache, len(hidden)) if begun_before else self.policy.choose(begun, seen)
        ran = choice.paths.clone()
        ran[:, :first] = True
        if not bool(ran.any(-1).all()):
            row = int((~ran.any(-1)).nonzero()[0])
            raise CapabilityError(
                f"depth '{self.policy.name}' chose a path of no layers for input {row} of a batch; a path has at "
                "least one layer"
            )
        if cache is not None:
            self._check_cache(cache, ran)
        if self.policy.watches:
            out = self._watched(begun, calls, ran, seen)
        else:
            out = self._grouped(begun, calls, ran, choice.gates, first)
        folded = Folded(choice, ran)
        if self.policy.training and self.policy.config.distills:
            folded.distance = self._distance(begun, calls, out, first)
        self._put_reports_back()
        self.last = folded
        if self.seen is not None:
            self.seen(folded)
        return out

    def _kept(self, cache: Cache | None, batch: int) -> Choice:
        """The path that a KV cache was begun with."""
        kept = getattr(cache, _PATH, None)
        if kept is None:
            raise CapabilityError(
                f"--depth={self.policy.name}: this KV cache was not begun with it, so no path is kept there; start "
                "from the prompt"
            )
        return Choice(kept.expand(batch, -1))

    def _seen(self, hidden: Tensor, call: Call) -> Tensor:
        """Bool `(batch, length)`: tokens that the policy may look at."""
        valid = self._valid(hidden, call)
        return valid & (valid.cumsum(-1) <= self.policy.config.prompt) if self.stack.causal else valid

    @staticmethod
    def _valid(hidden: Tensor, call: Call) -> Tensor:
        """Bool `(batch, length)`: tokens that are no padding."""
        masks = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, AttentionMask)]
        valid = masks[0].valid_queries(hidden.shape[1]) if masks else None
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if valid is None else valid

    def _check_cache(self, cache: Cache, ran: Tensor) -> None:
        """A path is chosen once, with the prompt, and kept with its cache: a skipped layer has no entries there.

        Raises:
            CapabilityError: sequences that share a cache and not a path, or a policy that decides on the way.
        """
        if isinstance(cache, SideBySide):
            raise CapabilityError(
                f"--depth={self.policy.name} does not run several caches side by side: their paths differ; generate "
                "one sequence at a time"
            )
        if not bool((ran == ran[:1]).all()):
            raise CapabilityError(
                f"--depth={self.policy.name} with a KV cache takes one sequence at a time: these {len(ran)} have "
                "different paths, and one cache holds them all; for a full pass call the model with use_cache=False"
            )
        if not bool(ran[0, 0]):
            raise CapabilityError(
                f"--depth={self.policy.name} with a KV cache needs the first layer in every path: its entries say how "
                "many tokens the cache holds"
            )
        if self.policy.watches:
            raise CapabilityError(
                f"--depth={self.policy.name} decides on the way and cannot write with a KV cache: later tokens would "
                "miss entries of layers that earlier ones left out; choose a policy that chooses from the prompt"
            )
        setattr(cache, _PATH, ran[:1].clone())

    # -- groups -----------------------------------------------------------------------------------------

    def _grouped(self, hidden: Tensor, calls: list[Call], ran: Tensor, gates: Tensor | None, first: int) -> Tensor:
        """Each path's inputs together, through its layers behind the first ones."""
        parts: list[tuple[Tensor, Tensor]] = []
        for path, rows in _groups(ran):
            chosen = None if gates is None else gates[rows]
            tail = tuple(layer for layer in path if layer >= first)
            parts.append((rows, self._through(tail, _rows(hidden, rows), calls, rows, chosen)))
        return _together(parts)

    def _watched(self, hidden: Tensor, calls: list[Call], ran: Tensor, seen: Tensor) -> Tensor:
        """Layer by layer, and after each the policy says which inputs go no further; `ran` is corrected."""
        parts: list[tuple[Tensor, Tensor]] = []
        layers = len(self.stack.layers)
        for path, rows in _groups(ran):
            inside = _rows(hidden, rows)
            for layer in path:
                before, inside = inside, self._through((layer,), inside, calls, rows, None)
                done = self.policy.stops(layer, before, inside, seen[rows])
                if done is None or not bool(done.any()) or layer == layers - 1:
                    continue
                ran[rows[done], layer + 1 :] = False
                parts.append((rows[done], inside[done]))
                rows, inside = rows[~done], inside[~done]
                if not len(rows):
                    break
            if len(rows):
                parts.append((rows, inside))
        return _together(parts)

    def _through(
        self, path: tuple[int, ...], hidden: Tensor, calls: list[Call], rows: Tensor, gates: Tensor | None
    ) -> Tensor:
        """Some inputs through some layers."""
        if not path:
            return hidden
        program = self.programs.get(path, tuple(hidden.shape[:2]))
        return program(hidden, calls, rows, gates)

    def _program(self, path: tuple[int, ...]) -> Program:
        """Runs the layers of a path."""
        steps = [(number, self._forward[number], self.stack.slots[number]) for number in path]

        def run(hidden: Tensor, calls: list[Call], rows: Tensor, gates: Tensor | None) -> Tensor:
            for number, forward, slots in steps:
                call = calls[number] if len(rows) == self._batch else calls[number].rows(rows, self._batch)
                before, tokens = hidden, [slot.global_tokens for slot in slots]
                for slot, marked in zip(slots, tokens, strict=True):
                    if marked is not None and len(marked) != len(rows):
                        slot.global_tokens = marked[rows]
                hidden = forward(hidden, *call.args, **call.kwargs)
                for slot, marked in zip(slots, tokens, strict=True):
                    slot.global_tokens = marked
                    self._report(slot, rows)
                if gates is not None:
                    gate = gates[:, number, None, None].to(hidden.dtype)
                    # One in value, so nothing changes but the gradient, which goes to the gate.
                    hidden = hidden + (gate - gate.detach()) * (hidden - before).detach()
            return hidden

        return run

    def _distance(self, hidden: Tensor, calls: list[Call], out: Tensor, first: int) -> Tensor:
        """`(batch,)`: squared distance of the outputs to the full depth's, over its square; real tokens alone."""
        everything, layers = torch.arange(self._batch, device=hidden.device), len(self.stack.layers)
        self._reporting = False
        try:
            with torch.no_grad():
                whole = self._through(tuple(range(first, layers)), hidden, calls, everything, None)
        finally:
            self._reporting = True
        real = self._valid(hidden, calls[0])[..., None]
        away = ((out - whole).float() ** 2 * real).sum((1, 2))
        return away / (whole.float() ** 2 * real).sum((1, 2)).clamp(min=1e-12)

    # -- what attention reports -------------------------------------------------------------------------

    def _report(self, slot: AttentionSlot, rows: Tensor) -> None:
        """Keep what a slot says of a group; the next group would overwrite it."""
        if not self._reporting:
            return
        kept = self._reports.setdefault(slot, _Reports())
        for name, loss in slot.losses.items():
            part = loss * len(rows)
            kept.losses[name] = kept.losses[name] + part if name in kept.losses else part
        if slot.log_prob is not None:
            whole = slot.log_prob.new_zeros(self._batch) if kept.log_prob is None else kept.log_prob
            kept.log_prob = whole.index_add(0, rows, slot.log_prob)

    def _put_reports_back(self) -> None:
        for slot, kept in self._reports.items():
            slot.losses = {name: loss / self._batch for name, loss in kept.losses.items()}
            slot.log_prob = kept.log_prob
        self._reports = {}


def _cache_of(call: Call) -> Cache | None:
    return next((value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Cache)), None)


def _groups(ran: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """(layers, rows) of every path in a batch; that of the first input last, so that its traces are what is left."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, path in enumerate(ran.tolist()):
        groups.setdefault(tuple(layer for layer, runs in enumerate(path) if runs), []).append(row)
    return [(path, torch.tensor(rows, device=ran.device)) for path, rows in reversed(groups.items())]


def _rows(hidden: Tensor, rows: Tensor) -> Tensor:
    return hidden if len(rows) == len(hidden) else hidden[rows]


def _together(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The outputs of groups in the order of the batch."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([out for _, out in parts])[order]
