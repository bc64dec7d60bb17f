"""The conformance suite's properties of outputs, statistics and declared costs."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from astbench_registry.conformance.cases import (
    HEADS,
    KEY_LENGTH,
    KV_HEADS,
    LENGTH,
    SHORT,
    SHORT_KEYS,
    SIZES,
    Case,
    Subject,
    attend,
    change_after,
    lengths_to_valid,
    more_padding,
    other_padding,
    side_by_side,
)
from astbench_registry.conformance.checks import demand, differ, holds_for, need, same
from astbench_registry.interface import Attention, AttentionOutput
from astbench_registry.leading_padding import attended_tokens
from astbench_registry.mask import AttentionMask


@holds_for()
def interface(subject: Subject) -> None:
    """Shape and dtype of the output follow q; losses come only while training; inputs stay as they were."""
    for dtype in (x for x in ("float64", "float32") if x in subject.can.dtypes):
        case = subject.case(SHORT, SHORT_KEYS, holes=0.2).to(getattr(torch, dtype))
        for training in (False, True):
            got = case.run(subject.build(training=training).to(case.q.dtype))
            demand(got.out.shape == case.q.shape, f"context is {tuple(got.out.shape)}, q {case.q.shape}")
            demand(got.out.dtype == case.q.dtype, f"context is {got.out.dtype}, q is {case.q.dtype}")
            demand(bool(got.out.isfinite().all()), "the output is not finite")
            demand(training or not got.losses, f"losses outside of training: {list(got.losses)}")
            demand(got.stats is None, "statistics although nobody asked for them")
            for name, loss in got.losses.items():
                demand(loss.dim() == 0 and bool(loss.isfinite()), f"loss '{name}' is no finite scalar: {loss}")


@holds_for()
def value_size(subject: Subject) -> None:
    """Values narrower than keys give what they give with zeros behind them; wider ones too, where they are taken."""
    module, case = subject.build(), subject.case(SHORT, SHORT_KEYS, holes=0.2)
    size = case.v.shape[-1]
    if size > 1:
        few = replace(case, v=case.v[..., : size - 1])
        got = few.out(module)
        padded = replace(case, v=torch.nn.functional.pad(few.v, (0, 1))).out(module)[..., : size - 1]
        same(got, padded, "narrow values differ from the same ones padded with zeros")
    if subject.can.any_value_size:
        wide = torch.cat([case.v, case.v.flip(1)], -1)
        same(replace(case, v=wide).out(module)[..., :size], case.out(module), "wide values differ in their first half")


@holds_for("causal_self", "causal_cross")
def causality(subject: Subject) -> None:
    """No output moves when later tokens change (brute force: many cuts, four sizes of change)."""
    need(subject.can.strictly_causal, "not strictly causal")
    g = torch.Generator().manual_seed(3)
    for training, holes, stride in ((False, 0.0, 2), (False, 0.3, 5), (True, 0.0, 5)):
        module = subject.build(training=training)
        case = subject.case(SHORT, SHORT_KEYS, holes=holes)
        real = case.real_rows()
        before = case.out(module) * real
        cuts = [cut for cut in range(1, case.q.shape[2], stride) for _ in SIZES]
        changed = [change_after(case, cut, size, g) for cut, size in zip(cuts, cycle(SIZES), strict=False)]
        # Some variants do more while gradients are recorded; without training they are not.
        with torch.set_grad_enabled(training):
            after = side_by_side(changed).out(module).unflatten(0, (len(cuts), -1))
            if any(differ((x * real)[:, :, :cut], before[:, :, :cut]) for x, cut in zip(after, cuts, strict=True)):
                # A variant that draws draws something else for more sequences: one change at a time.
                for one, cut in zip(changed, cuts, strict=True):
                    what = f"changing tokens from {cut} on moves earlier outputs"
                    same((one.out(module) * real)[:, :, :cut], before[:, :, :cut], what)


@holds_for()
def padding_invariance(subject: Subject) -> None:
    """More padding, and other content in it, change no real row."""
    need(subject.can.padding, "no padding")
    module = subject.build()
    whole = subject.case()
    keys = whole.k.shape[2]
    holes = subject.case(holes=0.3)
    tail = whole.with_mask(key_valid=lengths_to_valid((keys, keys - 24), keys))
    for case, where in ((tail, "at the end"), (holes, "in between")):
        real, before = case.real_rows(), case.out(module)
        after = other_padding(case).out(module)
        same(after * real, before * real, f"other content of padding {where} moves real rows")
    same(whole.out(module)[:1], tail.out(module)[:1], "a mask that hides nothing of a sequence moves it")
    extra = subject.length(keys + 18) - keys
    real, before = tail.real_rows(), tail.out(module)
    longer = more_padding(tail, extra).out(module)[:, :, : before.shape[2]]
    same(longer * real, before * real, "more padding moves real rows")


@holds_for()
def batch_invariance(subject: Subject) -> None:
    """A sequence alone gives what it gives among others, with padding behind it, in front of it, and with holes."""
    module = subject.build()
    case = subject.case(batch=3)
    # One sequence is much larger than the others, as when one user of a server sends something odd.
    size = torch.tensor([1.0, 3.0, 0.3], dtype=case.q.dtype)
    case = case.tensors(lambda x: x * size.view(-1, *[1] * (x.dim() - 1)))
    keys = case.k.shape[2]
    if not subject.can.padding:
        alone(module, case, [slice(0, keys)] * 3, "")
        return
    lengths = [subject.length(n) for n in (keys, 37, 13)]
    behind, front = [slice(0, n) for n in lengths], [slice(keys - n, keys) for n in lengths]
    # Lengths of a variant may be multiples of something, holes are not.
    holes = torch.rand(3, keys, generator=torch.Generator().manual_seed(4)) < 0.2
    for spans, where in ((behind, "behind"), (front, "in front of")):
        valid = torch.stack([within(span, keys) for span in spans])
        alone(module, case.with_mask(key_valid=valid), spans, f", with padding {where} it,")
        holed = valid & ~holes
        starts = [int(row.to(torch.uint8).argmax()) for row in holed]
        if subject.can.length_multiple == 1:
            spans = [slice(start, span.stop) for start, span in zip(starts, spans, strict=True)]
            alone(module, case.with_mask(key_valid=holed), spans, f", with padding {where} it and holes,")


def within(span: slice, length: int) -> Tensor:
    """Bool `(length,)`: the places that lie in the span."""
    return (torch.arange(length) >= span.start) & (torch.arange(length) < span.stop)


def alone(module: Attention, case: Case, spans: list[slice], how: str) -> None:
    """Demand that sequence i of the batch equals the same one in a batch of one, as it is and cut to `spans[i]`."""
    real, together = case.real_rows(), case.out(module)
    for row, span in enumerate(spans):
        single = case.rows(slice(row, row + 1))
        real_row = real[row : row + 1]
        expected = together[row : row + 1] * real_row
        same(single.out(module) * real_row, expected, f"sequence {row}{how} alone differs from it in the batch")
        queries = slice(0, case.q.shape[2]) if case.mask.cross else span
        valid = None if single.mask.key_valid is None else single.mask.key_valid[:, span]
        cut = Case(
            single.q[:, :, queries],
            single.k[:, :, span],
            single.v[:, :, span],
            single.hidden[:, queries],
            AttentionMask(case.mask.pattern, key_valid=None if valid is None or bool(valid.all()) else valid),
        )
        got = cut.out(module) * real_row[:, :, queries]
        same(got, expected[:, :, queries], f"sequence {row}{how} alone without that padding differs")


@holds_for("causal_self", "causal_cross")
def decode(subject: Subject) -> None:
    """Decoding one token, or a few, at a time equals one full pass (in real rows), summaries of blocks kept or not."""
    need(subject.can.decode, "no decoding")
    module = subject.build()
    for holes, chunk, kept in ((0.0, 1, False), (0.2, 1, False), (0.0, 3, False), (0.0, 3, True), (0.2, 1, True)):
        case = subject.case(SHORT, SHORT_KEYS, holes=holes)
        if holes and subject.self_attention:  # and padding in front, as generation from a batch has it
            front = torch.arange(case.k.shape[2]) >= torch.tensor([[9], [0]])
            case = case.with_mask(key_valid=front if case.mask.key_valid is None else case.mask.key_valid & front)
        length = case.q.shape[2]
        summaries = module.new_cache_state() if kept or subject.can.decode_state else None
        with torch.no_grad():
            whole = case.out(module)
            parts = (case.queries(start, min(start + chunk, length)) for start in range(0, length, chunk))
            steps = [part.out(module, summaries=summaries) for part in parts]
        real, how = case.real_rows(), ", with summaries of blocks," if kept else ""
        same(torch.cat(steps, 2) * real, whole * real, f"decoding {chunk} at a time{how} differs from one pass")


@holds_for()
def gqa(subject: Subject) -> None:
    """Fewer key/value heads equal the same heads repeated."""
    need(subject.can.gqa, "no grouped queries")
    need(not subject.can.joint_choice, "grouped heads choose together")
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
    same(case.out(grouped), repeated.out(single), "grouped queries differ from repeated heads")


@holds_for()
def full_density(subject: Subject) -> None:
    """At full density it is dense softmax attention in every real row, padding and scale included."""
    need(subject.can.exact_at_full_density, "not exact at full density")
    module = subject.build(full_density=True)
    for holes, scale in ((0.0, None), (0.3, 0.37)):
        case = subject.case(holes=holes)
        expected = attend(case, case.allowed(), subject.head_dim**-0.5 if scale is None else scale)
        real = case.real_rows()  # what a padded query gets is nobody's business
        same(case.out(module, scale=scale) * real, expected * real, "full density differs from softmax written out")


@holds_for()
def low_precision(subject: Subject) -> None:
    """float16 and bfloat16 err at most twice as much, for their size, as float32 softmax with a rounded output."""
    dtypes = [x for x in ("float16", "bfloat16") if x in subject.can.dtypes]
    need(bool(dtypes), "no half precision")
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
        got, expected = rounded.run(low, collect_stats=True), exact.run(high, collect_stats=True)
        allowed, agree = exact.allowed(), torch.ones(1, dtype=torch.bool)
        if subject.can.yields_layout and not full_density:
            allowed, theirs = (_attended(x, exact) for x in (expected, got))
            agree = (allowed == theirs).all(-1, keepdim=True)
            share = float(agree.double().mean())
            demand(share > 0.95, f"{dtype} chooses other blocks in {1 - share:.0%} of the rows: score in float32")
        scale = subject.head_dim**-0.5
        dense = attend(exact, allowed, scale)
        # Logits and softmax in float32 on the rounded inputs: what a fused kernel does, but for rounded weights.
        plain = attend(rounded.to(torch.float32), allowed, scale).to(dtype).double() - dense
    demand(got.out.dtype == dtype, f"the output of {dtype} inputs is {got.out.dtype}")
    error = float(((got.out.double() - expected.out) * agree).abs().max())
    # Learned mixtures may be larger than any value, and rounding alone errs by more there; by how much depends on
    # how close the largest numbers are to powers of two, and what is rounded as well as can be must pass.
    larger = max(1.0, float(expected.out.abs().max() / dense.abs().max()))
    rounding = float((expected.out.to(dtype).double() - expected.out).abs().max())
    bound = 2 * max(larger * float(plain.abs().max()), rounding) + 1e-5
    demand(error <= bound, f"{dtype} errs by {error:.2e}, twice the error of float32 softmax is {bound:.2e}")


def _attended(got: AttentionOutput, case: Case) -> Tensor:
    demand(got.stats is not None and got.stats.layout is not None, "no layout although one is promised")
    assert got.stats is not None and got.stats.layout is not None, "demanded above"
    return attended_tokens(got.stats, case.mask)


@holds_for()
def save_load(subject: Subject) -> None:
    """A state dict carries everything: another module that loads it gives the same bits."""
    first, second = subject.build(), subject.build(seed=1)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    case = subject.case(SHORT, SHORT_KEYS, holes=0.2)
    demand(torch.equal(case.out(first), case.out(second)), "the output differs after loading")


@holds_for()
def scale(subject: Subject) -> None:
    """The default scale is 1/sqrt(head_dim), and another one is obeyed."""
    module, case = subject.build(), subject.case()
    default = case.out(module)
    explicit = case.out(module, scale=subject.head_dim**-0.5)
    same(default, explicit, "the default scale is not 1/sqrt(head_dim)")
    other = case.out(module, scale=1.7 * subject.head_dim**-0.5)
    demand(float((other - default).detach().abs().max()) > 1e-6, "the scale is ignored")


@holds_for()
def statistics(subject: Subject) -> None:
    """What is reported as attended is what was: with value = identity, where the output is not 0 is the layout."""
    size = subject.head_dim if subject.can.head_dims else subject.length(LENGTH)
    need(size % subject.can.length_multiple == 0, "no length equals a head size")
    # head_dim = key length, so that the values can be the identity matrix
    case = subject.case(size if subject.self_attention else KEY_LENGTH, size, head_dim=size, holes=0.2)
    case = replace(case, v=torch.eye(size, dtype=case.v.dtype).expand_as(case.v))
    got = case.run(subject.build(head_dim=size), collect_stats=True)
    stats = got.stats
    demand(stats is not None, "no statistics although they were asked for")
    assert stats is not None, "demanded above"
    batch, heads = case.q.shape[:2]
    demand(
        stats.attended.shape == (batch, heads),
        f"attended is {tuple(stats.attended.shape)}, not (batch, heads)",
    )
    demand(stats.visible.shape == (batch,), f"visible is {tuple(stats.visible.shape)}, not (batch,)")
    visible = case.allowed().expand(batch, 1, case.q.shape[2], size).sum((1, 2, 3))
    demand(torch.equal(stats.visible.long(), visible), f"visible pairs: {stats.visible}, not {visible}")
    demand(bool((stats.attended <= stats.visible[:, None]).all()), "more pairs attended than visible")
    # Pooled keys stand beside those that they are made of: all of both is more than dense.
    most = 1 if stats.coarse is None else 2
    within = bool(((stats.density > 0) & (stats.density <= most)).all())
    demand(within, f"density {stats.density} is not within (0, {most}]")
    if subject.can.yields_layout:
        support, pattern = got.out != 0, _attended(got, case)  # learned mixtures may be negative
        if stats.coarse is not None:
            support &= pattern  # the pooled keys' part lies outside the layout too
        demand(torch.equal(support, pattern.expand_as(support)), "the layout is not what was attended to")
        counted = support.sum((-1, -2))
        demand(torch.equal(stats.attended.long(), counted), "attended pairs are miscounted")


@holds_for()
def cost(subject: Subject) -> None:
    """Declared FLOPs and state sizes are positive whole numbers that grow with the work."""
    module = subject.build()
    queries, keys = subject.lengths(LENGTH, KEY_LENGTH)
    mask = AttentionMask(subject.pattern)
    one, two = (module.flops(batch, queries, keys, mask) for batch in (1, 2))
    demand(one is None or (isinstance(one, int) and one > 0), f"flops() gives {one!r}")
    demand(one is None or two == 2 * one, f"flops() of two sequences is {two}, of one {one}")
    small, large = module.state_size(1), module.state_size(keys)
    demand(small is None or (isinstance(small, int) and small > 0), f"state_size() gives {small!r}")
    demand(small is None or (isinstance(large, int) and small <= large), f"state shrinks: {small} to {large}")
