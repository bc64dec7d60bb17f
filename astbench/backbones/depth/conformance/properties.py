"""What every depth policy must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from astbench.backbones.depth.conformance.models import (
    BATCH,
    EXACT,
    HIDDEN,
    KINDS,
    LAYERS,
    LENGTH,
    SHIFTED,
    VOCABULARY,
    Subject,
    batch,
    demand,
    same,
)
from astbench_registry import CapabilityError
from astbench_registry.depth.interface import Choice, Outcome
from astbench_registry.findings import Skip

Property = Callable[[Subject], None]


def interface(subject: Subject) -> None:
    """A path is bool, for every input and layer; the given hidden states are not written into."""
    for kind in KINDS:
        at = subject.at(kind)
        hidden = torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(4))
        seen, before = batch()[1].bool(), hidden.clone()
        choice = at.policy.choose(hidden, seen)
        demand(isinstance(choice, Choice), f"choose() returns {type(choice).__name__}, not a Choice")
        wanted = (BATCH, LAYERS)
        found = tuple(choice.paths.shape)
        demand(found == wanted, f"paths are {found} and not (batch, layers) = {wanted}")
        demand(choice.paths.dtype == torch.bool, f"paths are {choice.paths.dtype}, not bool")
        demand(torch.equal(hidden, before), "choose() writes into the hidden states that it was given")


@torch.no_grad()
def full_depth(subject: Subject) -> None:
    """A path of all layers gives bitwise what the plain model gives."""
    ids, mask = batch()
    for kind in KINDS:
        at = subject.at(kind)
        plain = at.without(tuple(range(LAYERS)), ids, mask)
        at.policy.choose = lambda hidden, seen: Choice(  # type: ignore[method-assign]
            torch.ones(len(hidden), LAYERS, dtype=torch.bool)
        )
        at.policy.stops = lambda *_: None  # type: ignore[method-assign]
        demand(torch.equal(at(ids, mask), plain), f"{kind}: all layers give something else than the plain model")


@torch.no_grad()
def paths(subject: Subject) -> None:
    """Each input's output is that of a model that has the layers of its path and no others."""
    ids, mask = batch()
    for kind in KINDS:
        at = subject.at(kind)
        out = at(ids, mask)
        for row, ran in enumerate(at.last.ran.tolist()):
            path, one = tuple(i for i, runs in enumerate(ran) if runs), slice(row, row + 1)
            real = mask[row].bool()
            wanted = at.without(path, ids[one], mask[one])[0][real]
            same(out[row][real], wanted, f"{kind}: input {row} on path {path} differs from a model of these layers")


@torch.no_grad()
def folded(subject: Subject) -> None:
    """A layer is called with the inputs whose path it is on, and with no others."""
    ids, mask = batch()
    for kind in KINDS:
        at = subject.at(kind)
        rows = [0] * LAYERS
        for number, layer in enumerate(at.stack.layers):

            def count(module: Any, args: Any, kwargs: Any, number: int = number, rows: list[int] = rows) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                rows[number] += len(hidden)

            attention = next(m for m in layer.modules() if hasattr(m, "astbench"))
            attention.register_forward_pre_hook(count, with_kwargs=True)
        at(ids, mask)
        wanted = at.last.ran.sum(0).tolist()
        demand(rows == wanted, f"{kind}: layers ran for {rows} inputs, and were on the paths of {wanted}")


@torch.no_grad()
def no_empty_path(subject: Subject) -> None:
    """Every path has a layer, whatever the input."""
    for kind in KINDS:
        at = subject.at(kind)
        for seed in range(8):
            at(*batch(seed))
            demand(bool(at.last.ran.any(-1).all()), f"{kind}: a path of no layers")


@torch.no_grad()
def one_by_one(subject: Subject) -> None:
    """A batch gives what its inputs give one by one, on the same paths."""
    ids, mask = batch()
    for kind in KINDS:
        at = subject.at(kind)
        out, ran = at(ids, mask), at.last.ran
        for row in range(BATCH):
            one, real = slice(row, row + 1), mask[row].bool()
            alone = at(ids[one], mask[one])
            demand(torch.equal(at.last.ran[0], ran[row]), f"{kind}: input {row} alone takes another path")
            same(alone[0][real], out[row][real], f"{kind}: input {row} alone gives something else")


@torch.no_grad()
def padding(subject: Subject) -> None:
    """Padding in front or behind moves neither the path nor the output."""
    ids, mask = batch()
    for kind in KINDS:
        at = subject.at(kind)
        out, ran = at(ids, mask), at.last.ran
        for side, more, limit in (("behind", (0, 7), EXACT), ("in front", (7, 0), SHIFTED)):
            longer, seen = (nn.functional.pad(x, more) for x in (ids, mask))
            found = at(longer, seen)
            demand(torch.equal(at.last.ran, ran), f"{kind}: padding {side} moves a path")
            same(found[seen.bool()], out[mask.bool()], f"{kind}: padding {side} moves an output", limit)


@torch.no_grad()
def determinism(subject: Subject) -> None:
    """Twice the same gives the same, and no random numbers are drawn outside of training."""
    ids, mask = batch()
    at = subject.at("decoder")
    state = torch.get_rng_state()
    out, ran = at(ids, mask), at.last.ran
    demand(torch.equal(torch.get_rng_state(), state), "it draws random numbers in an evaluation")
    at(*batch(9))
    again = at(ids, mask)
    demand(torch.equal(at.last.ran, ran), "the same inputs take another path after others")
    demand(torch.equal(again, out), "the same inputs give something else after others")


@torch.no_grad()
def causality(subject: Subject) -> None:
    """In a decoder, tokens behind the first `prompt` ones move neither the path nor anything before them."""
    ids, _ = batch()
    ids = ids.clamp(min=5)
    at, cut = subject.at("decoder"), subject.config.prompt
    if cut >= LENGTH:
        raise Skip(f"--depth.prompt={cut} is the whole sequence here")
    out, ran = at(ids), at.last.ran
    other = torch.cat([ids[:, :cut], 5 + (ids[:, cut:] + 11) % (VOCABULARY - 5)], 1)
    found = at(other)
    demand(torch.equal(at.last.ran, ran), f"tokens from {cut} on move a path")
    same(found[:, :cut], out[:, :cut], f"tokens from {cut} on move earlier outputs")


def gradients(subject: Subject) -> None:
    """Training reaches every parameter of a policy that learns, and one that does not learn has none."""
    ids, mask = batch()
    for kind in KINDS:
        at = subject.at(kind)
        own = list(at.policy.parameters())
        demand(bool(own) == subject.config.learns, f"declares learns={subject.config.learns}, has {len(own)} tensors")
        if not own:
            continue
        at.model.train()
        torch.manual_seed(7)
        each = at(ids, mask).float().square().mean((1, 2))
        last = at.last
        outcome = Outcome(each.detach(), at.policy.spent(last.ran), last.distance)
        found = at.policy.losses(last.choice, outcome)
        loss = each.mean() + sum(found.values())
        demand(bool(torch.as_tensor(loss).isfinite()), f"{kind}: a loss is not finite: {found}")
        torch.as_tensor(loss).backward()
        for name, parameter in at.policy.named_parameters():
            grad = parameter.grad
            demand(grad is not None and bool(grad.isfinite().all()), f"{kind}: no finite gradient reaches {name}")
            demand(grad is not None and bool((grad != 0).any()), f"{kind}: no gradient reaches {name}")
    if not subject.config.learns:
        raise Skip("learns nothing")


@torch.no_grad()
def decoding(subject: Subject) -> None:
    """With a KV cache the path is chosen from the prompt and kept, and steps give what a full pass gives."""
    ids, _ = batch()
    at = subject.at("decoder")
    ids, cut = ids[:1].clamp(min=5), max(subject.config.prompt, LENGTH - 6)
    if cut >= LENGTH:
        raise Skip(f"--depth.prompt={subject.config.prompt} is the whole sequence here")
    cache = DynamicCache(config=at.model.config)
    try:
        steps = [at(ids[:, :cut], use_cache=True, past_key_values=cache)]
    except CapabilityError as error:
        if at.policy.watches:
            raise Skip("decides on the way, and is refused with a cache") from error
        raise
    demand(not at.policy.watches, "decides on the way, and nobody refuses it with a cache")
    ran = at.last.ran
    for token in range(cut, LENGTH):
        steps.append(at(ids[:, token : token + 1], use_cache=True, past_key_values=cache))
        demand(torch.equal(at.last.ran, ran), f"token {token} goes another way than the prompt")
    same(torch.cat(steps, 1), at(ids), "decoding gives something else than a full pass")
    for layer, runs in enumerate(ran[0].tolist()):
        held = cache.get_seq_length(layer) if layer < len(cache.layers) else 0
        demand(
            held == (LENGTH if runs else 0), f"layer {layer}, {'on' if runs else 'off'} the path, holds {held} tokens"
        )


DEPTH_PROPERTIES: dict[str, Property] = {
    function.__name__: function
    for function in (
        interface,
        full_depth,
        paths,
        folded,
        no_empty_path,
        one_by_one,
        padding,
        determinism,
        causality,
        gradients,
        decoding,
    )
}
"""Name to check, in the order in which they run."""
