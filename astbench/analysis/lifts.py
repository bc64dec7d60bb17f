"""How often tokens of a class are chosen beside other tokens at the same distances, with intervals over sequences.

Only blocks that compete count: what is always kept (a row's own block, the first one) is no choice. A key that is near
is kept more often than one that is far, whatever it is. So a key's count is compared with what rows at these distances
keep of all keys, in the same call: expected = sum over rows of the share of pairs at that distance that is kept. Lift =
kept / expected, over all tokens of a class. The same of dense attention's mass on these pairs.

Tokens of one sequence are no independent draws. So intervals are those of a bootstrap over sequences: percentiles 2.5
and 97.5 of the statistic over resampled sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from astbench.analysis.rows import DISTANCES, distances, visible
from astbench.analysis.watch import Seen
from astbench_registry.block_selection.dense_weights import dense_weights

RESAMPLED = 2000
PARTS = ("kept", "expected", "mass", "expected_mass")
FEW = 5
"""A class that stands in fewer sequences than this has no interval."""


@dataclass
class OfKeys:
    """Of every token as a key, by sequence, summed over rows and heads: float64 `(tokens,)` each."""

    kept: Tensor
    expected: Tensor
    mass: Tensor
    expected_mass: Tensor


@dataclass
class Lifts:
    """Collects what is seen of tokens, by sequence and layer.

    Attributes:
        keys: By sequence, then layer.
    """

    keys: list[dict[str, OfKeys]] = field(default_factory=list)
    _first: int = 0

    def begin(self, batch_size: int) -> None:
        """A batch is about to run."""
        self._first = len(self.keys)
        self.keys += [{} for _ in range(batch_size)]

    def __call__(self, seen: Seen) -> None:
        """Take a call in."""
        facts, keys = seen.facts, seen.call.k.shape[2]
        if len(facts.real) != len(self.keys) - self._first:
            return  # a part of the batch, whose padding in front was taken off
        block = torch.arange(keys, device=seen.rows.device) // seen.layout.block_size
        free = seen.free[:, 0][..., block]  # (batch or 1, rows, keys)
        pairs = (visible(seen.call, seen.rows) & free & facts.real[..., None]).double()  # (batch, rows, keys)
        of_kept = pairs * facts.chosen.double().mean(1)[..., block]  # means over heads
        of_mass = pairs * dense_weights(seen.call.without_padding(), seen.rows).double().mean(1)
        apart = distances(seen.call, seen.rows)
        kept, mass = of_kept.sum(1).cpu(), of_mass.sum(1).cpu()
        expected, expected_mass = (_expected(pairs, of, apart).cpu() for of in (of_kept, of_mass))
        for row in range(len(kept)):
            found = OfKeys(kept[row], expected[row], mass[row], expected_mass[row])
            self.keys[self._first + row][seen.slot.path] = found


def _expected(pairs: Tensor, of_pairs: Tensor, apart: Tensor) -> Tensor:
    """float64 `(batch, keys)`: what each key would have, if pairs at the same distance had the same."""
    sums, there = (
        torch.zeros(DISTANCES, dtype=torch.float64, device=apart.device).index_add_(
            0, apart.flatten(), x.sum(0).flatten()
        )
        for x in (of_pairs, pairs)
    )
    return (pairs * (sums / there.clamp(min=1))[apart]).sum(1)


def lifts(keys: Sequence[Mapping[str, OfKeys]], classes: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    """What is said of each class of one family.

    Args:
        keys: From :class:`Lifts`, a sequence each.
        classes: int64 `(tokens,)` of each sequence: its place in `names`, -1 for none.
        names: Of the classes.

    Returns:
        By name: `tokens`; `kept` and `mass`: lift with its interval; `r`: Pearson's correlation over tokens of being in
        the class with kept / expected, with its interval; `layers`: lift of what is kept by layer. Classes of no token
        are left out.
    """
    layers = [path for path in (keys[0] if keys else {}) if all(path in one for one in keys)]
    pairs = list(zip(keys, classes, strict=True))
    of_layers = {path: torch.stack([_sums(one[path], held, len(names)) for one, held in pairs]) for path in layers}
    if not of_layers:
        return {}
    # (sequences, classes, parts)
    total = torch.stack(list(of_layers.values())).sum(0)
    moments = torch.stack([_moments([one[path] for path in layers], held, len(names)) for one, held in pairs])
    draws = _draws(len(keys))
    found = {}
    for place, name in enumerate(names):
        number = sum(int((held == place).sum()) for held in classes)
        if not number:
            continue
        sums = total[:, place]
        found[name] = {
            "tokens": number,
            "sequences": int((sums[:, 1] > 0).sum()),
            "kept": _with_interval(sums[:, :2], draws, _ratio),
            "mass": _with_interval(sums[:, 2:], draws, _ratio),
            "r": _with_interval(moments[:, place], draws, _correlation),
            "layers": {path: _rounded(_ratio(of_layers[path][:, place, :2].sum(0))) for path in layers},
        }
    return found


def _sums(of_keys: OfKeys, held: Tensor, number: int) -> Tensor:
    """float64 `(classes, parts)`."""
    known = held >= 0
    parts = torch.stack([getattr(of_keys, part)[known] for part in PARTS], -1)
    return parts.new_zeros(number, len(PARTS)).index_add_(0, held[known], parts)


def _moments(layers: Sequence[OfKeys], held: Tensor, number: int) -> Tensor:
    """float64 `(classes, 5)`: tokens, those in the class, sums of y, of y squared, and of y in the class.

    y is kept / expected of a token, over all layers. Tokens that no row could see are left out.
    """
    kept = torch.stack([one.kept for one in layers]).sum(0)
    expected = torch.stack([one.expected for one in layers]).sum(0)
    known = (held >= 0) & (expected > 0)
    y, held = kept[known] / expected[known], held[known]
    inside = torch.nn.functional.one_hot(held, number).double()  # (tokens, classes)
    common = torch.stack([torch.tensor(float(len(y)), dtype=torch.float64), y.sum(), y.square().sum()])
    count, total, squared = common.expand(number, 3).unbind(-1)
    return torch.stack([count, inside.sum(0), total, squared, inside.T @ y], -1)


def _ratio(sums: Tensor) -> Tensor:
    """Of sums along the last axis, kept and expected; NaN where nothing was expected."""
    return sums[..., 0] / sums[..., 1].where(sums[..., 1] > 0, torch.nan)


def _correlation(sums: Tensor) -> Tensor:
    """Pearson's, of sums as of :func:`_moments`; NaN where one of the two does not vary."""
    count, inside, total, squared, both = sums.unbind(-1)
    above = count * both - inside * total
    below = (count * inside - inside.square()) * (count * squared - total.square())
    return above / below.where(below > 0, torch.nan).sqrt()


def _draws(sequences: int) -> Tensor:
    """float64 `(RESAMPLED, sequences)`: how often each was drawn; the same for all classes and runs."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(sequences, (RESAMPLED, sequences), generator=generator)
    return torch.nn.functional.one_hot(drawn, sequences).sum(1).double()


def _with_interval(sums: Tensor, draws: Tensor, statistic: Callable[[Tensor], Tensor]) -> list[float | None]:
    """The statistic of all sequences, and the ends of its interval; None where there is none."""
    value = _rounded(statistic(sums.sum(0)))
    if value is None or int((sums[:, 1] > 0).sum()) < FEW:
        return [value, None, None]
    many = statistic(draws @ sums)
    many = many[~many.isnan()]
    ends = many.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [value, *(_rounded(end) for end in ends)]


def _rounded(value: Tensor) -> float | None:
    number = float(value)
    return None if number != number else round(number, 6)
