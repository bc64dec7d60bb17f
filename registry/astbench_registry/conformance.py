"""The conformance suite: what every attention must do, whoever wrote it.

One implementation for pytest (`tests/registry/test_conformance.py`) and for `astbench check NAME`. It builds
the variant with small options, runs it on short inputs in float64 whose sizes all differ, and compares it
with itself or with attention written out. What a variant declares it cannot do (its capability record) is
skipped, with that reason; nothing else is.

>>> from astbench_registry.conformance import check
>>> {result.status for result in check("dense", properties=["causality"])}
{'pass'}
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from astbench_registry.capabilities import PATTERNS, AttentionConfig, Pattern
from astbench_registry.conformance_cases import (
    HEADS,
    KEY_LENGTH,
    KV_HEADS,
    LENGTH,
    SHORT,
    SHORT_KEYS,
    Case,
    Factory,
    Subject,
    attend,
    change_after,
    lengths_to_valid,
    more_padding,
    noise_at,
    other_padding,
)
from astbench_registry.interface import Attention, AttentionMask, AttentionOutput
from astbench_registry.registry import build_attention, config_class, make_config

TOLERANCE = 1e-10  # float64; sums may be taken in another order, nothing else may differ


@dataclass(frozen=True)
class Result:
    """One property of one variant under one pattern.

    Attributes:
        variant: The attention's name.
        property: A key of :data:`PROPERTIES`.
        pattern: One of the four patterns.
        status: "pass", "fail" or "skip".
        detail: Why it failed or was skipped, in one line.
    """

    variant: str
    property: str
    pattern: str
    status: Literal["pass", "fail", "skip"]
    detail: str = ""


class _Failure(Exception):
    """The property does not hold."""


class _Skip(Exception):
    """The capability record excludes the property."""


Check = Callable[[Subject], None]

PROPERTIES: dict[str, Check] = {}
"""Name to check; the first line of its docstring says what must hold. It returns, or raises."""

_APPLIES: dict[str, tuple[Pattern, ...]] = {}


def _property(*patterns: Pattern) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        PROPERTIES[function.__name__] = function
        _APPLIES[function.__name__] = patterns or PATTERNS
        return function

    return add


def check(
    name: str, options: Mapping[str, Any] | None = None, *, properties: Iterable[str] | None = None
) -> list[Result]:
    """Run the suite on a registered attention, ours or a plugin's.

    Args:
        name: What `--attention` takes.
        options: Laid over the variant's `conformance_options`.
        properties: Some keys of :data:`PROPERTIES`; all by default.

    Raises:
        ValueError: an unknown name, option or property.
    """
    config = make_config(name, {**config_class(name).conformance_options, **(options or {})})
    return check_module(
        lambda config, shape: build_attention(name, config, shape), config, name=name, properties=properties
    )


def buildable(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Build the variant once, as :func:`check` would.

    Raises:
        ValueError: it refuses, for instance because a backend's package is missing.
    """
    config = make_config(name, {**config_class(name).conformance_options, **(options or {})})
    Subject(name, lambda config, shape: build_attention(name, config, shape), config, config.can.patterns[0]).build()


def check_module(
    factory: Factory,
    config: AttentionConfig,
    *,
    name: str = "unregistered",
    properties: Iterable[str] | None = None,
) -> list[Result]:
    """Run the suite on whatever `factory(config, shape)` builds, registered or not."""
    wanted = list(PROPERTIES) if properties is None else list(properties)
    unknown = [x for x in wanted if x not in PROPERTIES]
    if unknown:
        raise ValueError(f"unknown property {unknown[0]!r}; there are: {', '.join(PROPERTIES)}")
    return [
        _try(prop, Subject(name, factory, config, pattern))
        for prop in wanted
        for pattern in config.can.patterns
        if pattern in _APPLIES[prop]
    ]


def _try(name: str, subject: Subject) -> Result:
    status: Literal["pass", "fail", "skip"] = "pass"
    detail = ""
    try:
        PROPERTIES[name](subject)
    except _Skip as skip:
        status, detail = "skip", str(skip)
    except _Failure as failure:
        status, detail = "fail", str(failure)
    except Exception as error:  # whatever a variant raises is a finding about it, not about the suite
        status, detail = "fail", f"{type(error).__name__}: {error}"
    return Result(subject.name, name, subject.pattern, status, " ".join(detail.split()))


# ----- what the checks share


def _need(capability: bool, reason: str) -> None:
    if not capability:
        raise _Skip(reason)


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise _Failure(message)


def _same(actual: Tensor, expected: Tensor, what: str, *, tolerance: float = TOLERANCE) -> None:
    """Equal within float64 rounding; NaN anywhere is a difference."""
    _demand(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if not actual.numel():
        return
    difference = (actual - expected).detach().abs().nan_to_num(nan=torch.inf)
    worst = difference.max()
    moved = int((difference > tolerance).sum())
    _demand(moved == 0, f"{what}: {moved} of {difference.numel()} numbers differ, by up to {worst:.1e}")


# ----- the properties


@_property()
def interface(subject: Subject) -> None:
    """Shape and dtype of the output follow q; losses come only while training; inputs stay as they were."""
    for dtype in (x for x in ("float64", "float32") if x in subject.can.dtypes):
        case = subject.case(SHORT, SHORT_KEYS, holes=0.2).to(getattr(torch, dtype))
        before = [x.clone() for x in (case.q, case.k, case.v)]
        for training in (False, True):
            got = case.run(subject.build(training=training).to(case.q.dtype))
            _demand(got.context.shape == case.q.shape, f"context is {tuple(got.context.shape)}, q {case.q.shape}")
            _demand(got.context.dtype == case.q.dtype, f"context is {got.context.dtype}, q is {case.q.dtype}")
            _demand(bool(got.context.isfinite().all()), "the output is not finite")
            _demand(training or not got.losses, f"losses outside of training: {list(got.losses)}")
            _demand(got.stats is None, "statistics although nobody listens")
            for name, loss in got.losses.items():
                _demand(loss.dim() == 0 and bool(loss.isfinite()), f"loss '{name}' is no finite scalar: {loss}")
        unchanged = all(torch.equal(x, y) for x, y in zip((case.q, case.k, case.v), before, strict=True))
        _demand(unchanged, "the call writes into its inputs")


@_property("causal_self", "causal_cross")
def causality(subject: Subject) -> None:
    """No output moves when later tokens change (brute force: many cuts, four sizes of change)."""
    _need(subject.can.strictly_causal, "not strictly causal")
    g = torch.Generator().manual_seed(3)
    for training, holes, stride in ((False, 0.0, 2), (False, 0.3, 5), (True, 0.0, 5)):
        module = subject.build(training=training)
        case = subject.case(SHORT, SHORT_KEYS, holes=holes)
        real = case.real_rows()
        before = case.out(module) * real
        for cut in range(1, case.q.shape[2], stride):
            for size in (0.25, 1.0, 4.0, None):
                # Some variants do more while gradients are recorded; without training they are not.
                with torch.set_grad_enabled(training):
                    after = change_after(case, cut, size, g).out(module) * real
                what = f"changing tokens from {cut} on moves earlier outputs"
                _same(after[:, :, :cut], before[:, :, :cut], what)


@_property()
def padding_invariance(subject: Subject) -> None:
    """More padding, and other content in it, change no real row."""
    _need(subject.can.padding, "no padding")
    module = subject.build()
    whole = subject.case()
    keys = whole.k.shape[2]
    holes = subject.case(holes=0.3)
    tail = whole.with_mask(key_valid=lengths_to_valid((keys, keys - 24), keys))
    for case, where in ((tail, "at the end"), (holes, "in between")):
        real, before = case.real_rows(), case.out(module)
        after = other_padding(case).out(module)
        _same(after * real, before * real, f"other content of padding {where} moves real rows")
    _same(whole.out(module)[:1], tail.out(module)[:1], "a mask that hides nothing of a sequence moves it")
    extra = subject.length(keys + 18) - keys
    real, before = tail.real_rows(), tail.out(module)
    longer = more_padding(tail, extra).out(module)[:, :, : before.shape[2]]
    _same(longer * real, before * real, "more padding moves real rows")


@_property()
def batch_invariance(subject: Subject) -> None:
    """A sequence alone gives what it gives among others of other lengths."""
    module = subject.build()
    case = subject.case(batch=3)
    lengths = [case.k.shape[2]] * 3
    if subject.can.padding:
        lengths = [subject.length(n) for n in (case.k.shape[2], 37, 13)]
        case = case.with_mask(key_valid=lengths_to_valid(lengths, case.k.shape[2]))
    # One sequence is much larger than the others, as when one user of a server sends something odd.
    size = torch.tensor([1.0, 3.0, 0.3], dtype=case.q.dtype)
    case = case.tensors(lambda x: x * size.view(-1, *[1] * (x.dim() - 1)))
    real = case.real_rows()
    together = case.out(module)
    for row, length in enumerate(lengths):
        alone = case.rows(slice(row, row + 1))
        real_row = real[row : row + 1]
        expected = together[row : row + 1] * real_row
        _same(alone.out(module) * real_row, expected, f"sequence {row} alone differs from it in the batch")
        stop = length if subject.self_attention else case.q.shape[2]
        trimmed = Case(
            alone.q[:, :, :stop],
            alone.k[:, :, :length],
            alone.v[:, :, :length],
            alone.hidden[:, :stop],
            AttentionMask(subject.pattern),
        )
        _same(trimmed.out(module), expected[:, :, :stop], f"sequence {row} alone without padding differs")


@_property()
def empty_batch(subject: Subject) -> None:
    """A batch of none, as the last one of a worker may be, gives an empty output and finite gradients."""
    case = subject.case(SHORT, SHORT_KEYS, holes=0.2).rows(slice(0, 0))
    for training in (False, True):
        module = subject.build(training=training)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        got = case.run(module, listen=True)
        _demand(got.context.shape == case.q.shape, f"context is {tuple(got.context.shape)}, q {tuple(case.q.shape)}")
        _finite_gradients(got.context.sum() + sum(got.losses.values()), inputs, module)


@_property()
def gradients(subject: Subject) -> None:
    """Gradients of q, k, v and of every parameter equal finite differences, in float64."""
    _need("float64" in subject.can.dtypes, "does not compute in float64")
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
        _demand(close, f"gradient of {name} along a direction is {analytic:.6g}, differences say {numeric:.6g}")


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


@_property()
def parameter_gradients(subject: Subject) -> None:
    """While training, the task loss and the variant's own losses reach every parameter."""
    module = subject.build(training=True, trained=False)
    names = [name for name, _ in module.named_parameters()]
    _demand(bool(names) == subject.can.owns_parameters, f"owns_parameters is wrong: it has {names or 'none'}")
    _need(subject.can.owns_parameters, "owns no parameters")
    case = subject.case()
    case.q.requires_grad_()  # as in a model, so that an unused parameter is a finding and not an error
    target = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(5), dtype=case.q.dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):  # a zero-initialised factor hides the other factor's gradient at step 0
        optimizer.zero_grad()
        got = case.run(module, step=step)
        loss = ((got.context - target) ** 2).sum() + sum(got.losses.values())
        loss.backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            _demand(parameter.grad is not None, f"'{name}' gets no gradient")
            grad = parameter.grad
            assert grad is not None, "demanded above"
            _demand(bool(grad.isfinite().all()), f"the gradient of '{name}' is not finite")
            # Not exactly zero: what cancels in theory leaves rounding errors.
            _demand(float(grad.abs().max()) > 1e-9, f"the gradient of '{name}' is zero")


@_property("causal_self", "causal_cross")
def decode(subject: Subject) -> None:
    """Decoding one token, or a few, at a time equals one full pass (in real rows)."""
    _need(subject.can.decode, "no decoding")
    module = subject.build()
    for holes, chunk in ((0.0, 1), (0.2, 1), (0.0, 3)):
        case = subject.case(SHORT, SHORT_KEYS, holes=holes)
        length = case.q.shape[2]
        with torch.no_grad():
            whole = case.out(module)
            steps = [case.queries(start, min(start + chunk, length)).out(module) for start in range(0, length, chunk)]
        real = case.real_rows()
        _same(torch.cat(steps, 2) * real, whole * real, f"decoding {chunk} at a time differs from one pass")


@_property()
def gqa(subject: Subject) -> None:
    """Fewer key/value heads equal the same heads repeated."""
    _need(subject.can.gqa, "no grouped queries")
    case = subject.case(holes=0.2)
    grouped, single = subject.build(), subject.build(kv_heads=HEADS)
    state = grouped.state_dict()
    for name, theirs in single.state_dict().items():
        if theirs.shape != state[name].shape:  # one per key/value head
            state[name] = state[name].repeat_interleave(HEADS // KV_HEADS, 0)
    single.load_state_dict(state)
    repeated = replace(
        case,
        k=case.k.repeat_interleave(HEADS // KV_HEADS, 1),
        v=case.v.repeat_interleave(HEADS // KV_HEADS, 1),
    )
    _same(case.out(grouped), repeated.out(single), "grouped queries differ from repeated heads")


@_property()
def full_density(subject: Subject) -> None:
    """At full density it is dense softmax attention in every real row, padding and scale included."""
    _need(subject.can.exact_at_full_density, "not exact at full density")
    module = subject.build(full_density=True)
    for holes, scale in ((0.0, None), (0.3, 0.37)):
        case = subject.case(holes=holes)
        expected = attend(case, case.allowed(), subject.head_dim**-0.5 if scale is None else scale)
        real = case.real_rows()  # what a padded query gets is nobody's business
        _same(case.out(module, scale=scale) * real, expected * real, "full density differs from softmax written out")


@_property()
def fully_masked(subject: Subject) -> None:
    """Rows that see nothing are zero, with finite gradients everywhere."""
    _need(subject.can.padding, "no padding")
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
        _demand(not bool(got.context[empty].any()), "rows that see nothing are not zero")
        loss = (got.context**2).sum() + sum(got.losses.values())
        _finite_gradients(loss, inputs, module)


def _finite_gradients(loss: Tensor, inputs: list[Tensor], module: Attention) -> None:
    names = ["q", "k", "v", *(name for name, _ in module.named_parameters())]
    grads = torch.autograd.grad(loss, [*inputs, *module.parameters()], allow_unused=True)
    for name, grad in zip(names, grads, strict=True):
        _demand(grad is None or bool(grad.isfinite().all()), f"the gradient of {name} is not finite")


@_property()
def nan_memory(subject: Subject) -> None:
    """NaN in padding reaches neither outputs nor gradients; in padded queries neither real rows nor gradients."""
    _need(subject.can.padding, "no padding")
    clean = subject.case(holes=0.3)
    assert clean.mask.key_valid is not None, "padding was asked for"
    hidden = ~clean.mask.key_valid
    case = replace(clean, k=noise_at(clean.k, hidden, torch.nan), v=noise_at(clean.v, hidden, torch.nan))
    for training in (False, True):
        module = subject.build(training=training)
        inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        got = case.run(module)
        _same(got.context, clean.out(module), "NaN in padding moves the output")
        _finite_gradients((got.context**2).sum() + sum(got.losses.values()), inputs, module)
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
            _same(value, expected[name], f"NaN in padded queries moves {name}")


@_property()
def low_precision(subject: Subject) -> None:
    """float16 and bfloat16 err at most twice as much, for their size, as float32 softmax with a rounded output."""
    dtypes = [x for x in ("float16", "bfloat16") if x in subject.can.dtypes]
    _need(bool(dtypes), "no half precision")
    for name in dtypes:
        _half_precision(subject, getattr(torch, name), full_density=subject.can.exact_at_full_density)
        if subject.can.yields_layout:
            _half_precision(subject, getattr(torch, name), full_density=False)


def _half_precision(subject: Subject, dtype: torch.dtype, *, full_density: bool) -> None:
    """Against the same module in float64 on the rounded inputs, where both chose the same blocks."""
    low = subject.build(full_density=full_density).to(dtype)
    high = copy.deepcopy(low).double()
    rounded = subject.case(holes=0.2).to(dtype)
    exact = rounded.to(torch.float64)
    with torch.no_grad():
        got, expected = rounded.run(low, listen=True), exact.run(high, listen=True)
        allowed, agree = exact.allowed(), torch.ones(1, dtype=torch.bool)
        if subject.can.yields_layout and not full_density:
            allowed, theirs = (_attended(x, exact) for x in (expected, got))
            agree = (allowed == theirs).all(-1, keepdim=True)
            share = float(agree.double().mean())
            _demand(share > 0.95, f"{dtype} chooses other blocks in {1 - share:.0%} of the rows: score in float32")
        scale = subject.head_dim**-0.5
        dense = attend(exact, allowed, scale)
        # Logits and softmax in float32 on the rounded inputs: what a fused kernel does, but for rounded weights.
        plain = attend(rounded.to(torch.float32), allowed, scale).to(dtype).double() - dense
    error = float(((got.context.double() - expected.context) * agree).abs().max())
    # Learned mixtures may be larger than any value, and rounding alone errs by more there; by how much depends on
    # how close the largest numbers are to powers of two, and what is rounded as well as can be must pass.
    larger = max(1.0, float(expected.context.abs().max() / dense.abs().max()))
    rounding = float((expected.context.to(dtype).double() - expected.context).abs().max())
    bound = 2 * max(larger * float(plain.abs().max()), rounding) + 1e-5
    _demand(error <= bound, f"{dtype} errs by {error:.2e}, twice the error of float32 softmax is {bound:.2e}")


def _attended(got: AttentionOutput, case: Case) -> Tensor:
    _demand(got.stats is not None and got.stats.layout is not None, "no layout although one is promised")
    assert got.stats is not None and got.stats.layout is not None, "demanded above"
    return got.stats.layout.token_mask(causal=case.mask.causal, key_valid=case.mask.key_valid)


@_property()
def determinism(subject: Subject) -> None:
    """The same seed gives the same bits: output, losses and gradients, while training too."""
    case = subject.case(SHORT, SHORT_KEYS, holes=0.2)
    for training in (False, True):
        first, second = (_everything(subject.build(training=training), case) for _ in range(2))
        for name, value in first.items():
            _demand(torch.equal(value, second[name]), f"{name} differs between two runs with one seed")


def _everything(module: Attention, case: Case, real: Tensor | None = None) -> dict[str, Tensor]:
    """Output, losses, and the gradients of both; of the rows in `real` alone when it is given."""
    inputs = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    got = replace(case, q=inputs[0], k=inputs[1], v=inputs[2]).run(module)
    out = got.context if real is None else got.context.masked_fill(~real, 0.0)
    sources = dict(zip("qkv", inputs, strict=True)) | dict(module.named_parameters())
    loss = (out**2).sum() + sum(got.losses.values())
    grads = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    found = {f"the gradient of {n}": grad for n, grad in zip(sources, grads, strict=True) if grad is not None}
    return {"the output": out, **got.losses, **found}


@_property()
def save_load(subject: Subject) -> None:
    """A state dict carries everything: another module that loads it gives the same bits."""
    first, second = subject.build(), subject.build(seed=1)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    case = subject.case(SHORT, SHORT_KEYS, holes=0.2)
    _demand(torch.equal(case.out(first), case.out(second)), "the output differs after loading")


@_property()
def scale(subject: Subject) -> None:
    """The default scale is 1/sqrt(head_dim), and another one is obeyed."""
    module, case = subject.build(), subject.case()
    default = case.out(module)
    explicit = case.out(module, scale=subject.head_dim**-0.5)
    _same(default, explicit, "the default scale is not 1/sqrt(head_dim)")
    other = case.out(module, scale=1.7 * subject.head_dim**-0.5)
    _demand(float((other - default).detach().abs().max()) > 1e-6, "the scale is ignored")


@_property()
def statistics(subject: Subject) -> None:
    """What is reported as attended is what was: with value = identity, output > 0 is the layout."""
    size = subject.head_dim if subject.can.head_dims else subject.length(LENGTH)
    _need(size % subject.can.length_multiple == 0, "no length equals a head size")
    # head_dim = key length, so that the values can be the identity matrix
    case = subject.case(size if subject.self_attention else KEY_LENGTH, size, head_dim=size, holes=0.2)
    case = replace(case, v=torch.eye(size, dtype=case.v.dtype).expand_as(case.v))
    got = case.run(subject.build(head_dim=size), listen=True)
    stats = got.stats
    _demand(stats is not None, "no statistics although somebody listens")
    assert stats is not None, "demanded above"
    batch, heads = case.q.shape[:2]
    _demand(
        stats.attended.shape == (batch, heads),
        f"attended is {tuple(stats.attended.shape)}, not (batch, heads)",
    )
    _demand(stats.visible.shape == (batch,), f"visible is {tuple(stats.visible.shape)}, not (batch,)")
    visible = case.allowed().expand(batch, 1, case.q.shape[2], size).sum((1, 2, 3))
    _demand(torch.equal(stats.visible.long(), visible), f"visible pairs: {stats.visible}, not {visible}")
    _demand(bool((stats.attended <= stats.visible[:, None]).all()), "more pairs attended than visible")
    within = bool(((stats.density > 0) & (stats.density <= 1)).all())
    _demand(within, f"density {stats.density} is not within (0, 1]")
    if subject.can.yields_layout:
        support, pattern = got.context > 0, _attended(got, case)
        _demand(torch.equal(support, pattern.expand_as(support)), "the layout is not what was attended to")
        counted = support.sum((-1, -2))
        _demand(torch.equal(stats.attended.long(), counted), "attended pairs are miscounted")


@_property()
def cost(subject: Subject) -> None:
    """Declared FLOPs and state sizes are positive whole numbers that grow with the work."""
    module = subject.build()
    queries, keys = subject.lengths(LENGTH, KEY_LENGTH)
    mask = AttentionMask(subject.pattern)
    one, two = (module.flops(batch, queries, keys, mask) for batch in (1, 2))
    _demand(one is None or (isinstance(one, int) and one > 0), f"flops() gives {one!r}")
    _demand(one is None or two == 2 * one, f"flops() of two sequences is {two}, of one {one}")
    small, large = module.state_size(1), module.state_size(keys)
    _demand(small is None or (isinstance(small, int) and small > 0), f"state_size() gives {small!r}")
    _demand(small is None or (isinstance(large, int) and small <= large), f"state shrinks: {small} to {large}")
