"""The conformance suite's properties of gradients, and of what they are gradients of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from astbench_registry.conformance.cases import HEADS, SHORT, SHORT_KEYS, Case, Subject, noise_at
from astbench_registry.conformance.checks import demand, holds_for, need, same
from astbench_registry.interface import Attention


@holds_for()
def empty_batch(subject: Subject) -> None:
    """A batch of none, as the last one of a worker may be, gives an empty output and finite gradients."""
    case = subject.case(SHORT, SHORT_KEYS, holes=0.2).rows(slice(0, 0))
    for training in (False, True):
        module = subject.build(training=training)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        got = case.run(module, collect_stats=True)
        demand(got.out.shape == case.q.shape, f"context is {tuple(got.out.shape)}, q {tuple(case.q.shape)}")
        _finite_gradients(got.out.sum() + sum(got.losses.values()), inputs, module)


@holds_for()
def gradients(subject: Subject) -> None:
    """Gradients of q, k, v and of every parameter equal finite differences, in float64."""
    need("float64" in subject.can.dtypes, "does not compute in float64")
    module = subject.build()
    case = subject.case(23, 17, holes=0.2)
    inputs = {"q": case.q.requires_grad_(), "k": case.k.requires_grad_(), "v": case.v.requires_grad_()}
    for seed in range(3):
        _check_directions(module, case, {**inputs, **dict(module.named_parameters())}, seed)


def _check_directions(module: Attention, case: Case, tensors: dict[str, Tensor], seed: int) -> None:
    """`w . J d` for random w and d, as gradcheck's fast mode; that one takes 20 s to say what is wrong."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(case.q.shape, generator=g, dtype=case.q.dtype)

    def loss() -> Tensor:
        return (case.out(module) * weight).sum()

    grads = torch.autograd.grad(loss(), list(tensors.values()), allow_unused=True)
    for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
        direction = torch.randn(tensor.shape, generator=g, dtype=tensor.dtype)
        analytic = 0.0 if grad is None else float((grad * direction).sum())
        numeric = _difference(loss, tensor, direction)
        close = abs(numeric - analytic) <= 1e-6 + 1e-5 * abs(numeric)
        demand(close, f"gradient of {name} along a direction is {analytic:.6g}, differences say {numeric:.6g}")


@torch.no_grad()
def _difference(loss: Callable[[], Tensor], tensor: Tensor, direction: Tensor, step: float = 1e-6) -> float:
    """Central difference of `loss` when `tensor` moves along `direction`."""
    start = tensor.clone()
    values = []
    for sign in (1, -1):
        tensor.copy_(start + sign * step * direction)
        values.append(float(loss()))
    tensor.copy_(start)
    return (values[0] - values[1]) / (2 * step)


@holds_for()
def parameter_gradients(subject: Subject) -> None:
    """While training, the task loss and the variant's own losses reach every parameter."""
    module = subject.build(training=True, trained=False)
    names = [name for name, _ in module.named_parameters()]
    demand(bool(names) == subject.can.owns_parameters, f"owns_parameters is wrong: it has {names or 'none'}")
    need(subject.can.owns_parameters, "owns no parameters")
    case = subject.case()
    case.q.requires_grad_()  # as in a model, so that an unused parameter is a finding and not an error
    target = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(5), dtype=case.q.dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):  # a zero-initialised factor hides the other factor's gradient at step 0
        optimizer.zero_grad()
        got = case.run(module, step=step)
        loss = ((got.out - target) ** 2).sum() + sum(got.losses.values())
        loss.backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            demand(parameter.grad is not None, f"'{name}' gets no gradient")
            grad = parameter.grad
            assert grad is not None, "demanded above"
            demand(bool(grad.isfinite().all()), f"the gradient of '{name}' is not finite")
            # Not exactly zero: what cancels in theory leaves rounding errors.
            demand(float(grad.abs().max()) > 1e-9, f"the gradient of '{name}' is zero")


@holds_for()
def fully_masked(subject: Subject) -> None:
    """Rows that see nothing are zero, with finite gradients everywhere."""
    need(subject.can.padding, "no padding")
    case = subject.case(holes=0.2)
    assert case.mask.key_valid is not None, "padding was asked for"
    valid = case.mask.key_valid.clone()
    valid[0], valid[1, :3] = False, False  # a whole sequence, and under a causal mask its first rows
    case = case.with_mask(key_valid=valid)
    empty = ~case.allowed().any(-1).expand(-1, HEADS, case.q.shape[2])
    for training in (False, True):
        module = subject.build(training=training)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        got = case.run(module)
        demand(not bool(got.out[empty].any()), "rows that see nothing are not zero")
        loss = (got.out**2).sum() + sum(got.losses.values())
        _finite_gradients(loss, inputs, module)


@holds_for()
def nan_memory(subject: Subject) -> None:
    """NaN in padding reaches neither outputs nor gradients; in padded queries neither real rows nor gradients."""
    need(subject.can.padding, "no padding")
    clean = subject.case(holes=0.3)
    assert clean.mask.key_valid is not None, "padding was asked for"
    hidden = ~clean.mask.key_valid
    case = replace(clean, k=noise_at(clean.k, hidden, torch.nan), v=noise_at(clean.v, hidden, torch.nan))
    for training in (False, True):
        module = subject.build(training=training)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        got = case.run(module)
        same(got.out, clean.out(module), "NaN in padding moves the output")
        _finite_gradients((got.out**2).sum() + sum(got.losses.values()), inputs, module)
    if not subject.self_attention:
        queries = torch.rand(case.q.shape[0], case.q.shape[2], generator=torch.Generator().manual_seed(4)) >= 0.3
        clean, case = (x.with_mask(query_valid=queries) for x in (clean, case))
    real = case.real_rows()
    hidden = ~real[:, 0, :, 0]
    bad = replace(case, q=noise_at(case.q, hidden, torch.nan), hidden=noise_at(case.hidden, hidden, torch.nan))
    for training in (False, True):
        module = subject.build(training=training)
        expected = _everything(module, clean, real)
        for name, value in _everything(module, bad, real).items():
            same(value, expected[name], f"NaN in padded queries moves {name}")


@holds_for()
def determinism(subject: Subject) -> None:
    """The same seed gives the same bits: output, losses and gradients, while training too."""
    case = subject.case(SHORT, SHORT_KEYS, holes=0.2)
    for training in (False, True):
        first, second = (_everything(subject.build(training=training), case) for _ in range(2))
        for name, value in first.items():
            demand(torch.equal(value, second[name]), f"{name} differs between two runs with one seed")


def _finite_gradients(loss: Tensor, inputs: list[Tensor], module: Attention) -> None:
    names = ["q", "k", "v", *(name for name, _ in module.named_parameters())]
    grads = torch.autograd.grad(loss, [*inputs, *module.parameters()], allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        demand(grad is None or bool(grad.isfinite().all()), f"the gradient of {name} is not finite")


def _everything(module: Attention, case: Case, real: Tensor | None = None) -> dict[str, Tensor]:
    """Output, losses, and the gradients of both; of the rows in `real` alone when it is given."""
    inputs = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    got = replace(case, q=inputs[0], k=inputs[1], v=inputs[2]).run(module)
    out = got.out if real is None else got.out.masked_fill(~real, 0.0)
    sources = dict(zip("qkv", inputs, strict=True)) | dict(module.named_parameters())
    loss = (out**2).sum() + sum(got.losses.values())
    grads = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    found = {f"the gradient of {n}": grad for n, grad in zip(sources, grads, strict=True) if grad is not None}
    return {"the output": out, **got.losses, **found}
