"""Carried lists by the kernels against what each row keeps in torch, block by block and row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from astbench_kernels import BlockLayout, select_blocks
from astbench_kernels.triton import choose_carried
from astbench_kernels.triton.selection.rule import BlockRule
from astbench_registry import AttentionContext, AttentionMask
from astbench_registry.block_selection import FactoredBlockSelection
from tests.kernels.conftest import DEVICE
from tests.oracles import draw
from tests.registry.building import build

triton = pytest.importorskip("triton", reason="triton is not installed")

# As in test_triton.py: the interpreter of triton 3.6 does not go with numpy 2.4.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.usefixtures("interpreter"),
]
if DEVICE == "cpu" and (triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"):
    pytest.skip("the interpreter of this triton needs numpy below 2.4", allow_module_level=True)


@dataclass(frozen=True)
class Case:
    length: int = 29
    block: int = 4
    tile: int = 8
    parts: int = 1
    pool: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 11
    offset: int = 0
    keep: int = 4
    share: float | None = None
    padding: float = 0.0
    rule: dict = field(default_factory=dict)


CASES = {
    "means": Case(),
    "tokens": Case(parts=4),
    "largest-of-two-tokens": Case(parts=4, pool=2),
    "largest-token": Case(parts=4, pool=4, dim=16),
    "a-row": Case(length=1),
    "tile-not-a-power-of-two": Case(tile=6, length=31),
    "one-tile": Case(tile=64, parts=4),
    "chunk": Case(offset=16, length=13),
    "no-sink": Case(rule={"sink_block": False}),
    "local-blocks": Case(rule={"local_blocks": 2}, keep=2),
    "more-kept-than-budget": Case(rule={"local_blocks": 3}, keep=1),
    "everything": Case(keep=1000),
    "two-key-heads": Case(heads=4, kv_heads=2, length=13),
    "by-share": Case(parts=4, share=0.2, keep=2, length=41),
    "by-share-of-means": Case(share=0.05, keep=3),
    "nothing-reaches-the-share": Case(share=1.0, keep=3),
    "padding": Case(padding=0.5, parts=4),
    "all-padding": Case(padding=1.0),
    "long-blocks-of-many": Case(length=200, block=64, tile=64, parts=64, pool=16, dim=16, keep=2, heads=1),
    "many-blocks": Case(length=70, block=1, tile=16, keep=9),
}


def expected(case, rows, columns, rule, seen, real, share):
    """By torch: each row's choice, carried."""
    blocks, length = rule.num_blocks, case.length
    each = case.heads // case.kv_heads
    scores = torch.einsum("bhnd,bhmd->bhnm", rows.double(), columns.repeat_interleave(each, 1).double())
    scores = scores.unflatten(-1, (blocks, case.parts // case.pool, case.pool)).amax(-1)
    scores = scores.logsumexp(-1) if case.parts > 1 else scores.squeeze(-1)
    position = torch.arange(length)[:, None] + case.offset
    start = torch.arange(blocks) * case.block
    visible = (start <= position)[None, None]
    if seen is not None:
        visible = visible & seen[:, None, None, :]
    reach = (rule.local_blocks or 0) * case.block
    always = (start + case.block > position - reach) & visible
    if rule.sink_block:
        always = always | (visible & (start == 0))
    candidates = visible & (start + case.block <= position)
    count = visible.sum(-1).expand(len(rows), case.heads, length)
    budget = torch.minimum(torch.full_like(count, case.keep), count)
    if share is not None:
        free = (candidates & ~always).expand_as(scores)
        mass = scores.masked_fill(~free, -torch.inf).softmax(-1).nan_to_num()
        enough = (mass >= share) & free
        budget = torch.maximum(budget, (enough | always).sum(-1))
    keep = select_blocks(scores.float(), always_kept=always, candidates=candidates, budget=budget)
    if real is not None:
        keep = keep & real[:, None, :, None]
    return BlockLayout.carried(
        keep,
        block_size=case.block,
        query_group=case.tile,
        query_length=length,
        key_length=rule.key_length,
        query_offset=case.offset,
    )


def drawn(case):
    """Integers, whose products and sums are exact in float32, even in tf32; nearly so are logarithms of their sums."""
    g = torch.Generator().manual_seed(case.length)
    keys = case.length + case.offset
    rule = BlockRule(
        case.block,
        1,
        case.length,
        keys,
        case.offset,
        causal=True,
        **{"local_blocks": 0, "sink_block": True} | case.rule,
    )
    rows = torch.randint(-3, 4, (2, case.heads, case.length, case.dim), generator=g).float()
    columns = torch.randint(-3, 4, (2, case.kv_heads, rule.num_blocks * case.parts, case.dim), generator=g).float()
    if case.parts > case.pool or case.share:  # ties of sums would hang on the last bit
        rows = rows + torch.rand(rows.shape, generator=g)
    seen = real = None
    if case.padding:
        seen = torch.rand(2, rule.num_blocks, generator=g) >= case.padding
        real = torch.rand(2, case.length, generator=g) >= case.padding
    return rule, rows, columns, seen, real


def chosen(case, rule, rows, columns, seen, real, share):
    def there(x):
        return x.to(DEVICE) if isinstance(x, torch.Tensor) else x

    return choose_carried(
        there(rows),
        there(columns),
        rule,
        case.tile,
        lambda visible: visible.clamp(max=case.keep),
        pool=case.pool,
        share=there(share),
        seen=there(seen),
        real=there(real),
    )


@pytest.mark.parametrize("name", CASES)
def test_lists_are_those_of_torch(name):
    case = CASES[name]
    rule, rows, columns, seen, real = drawn(case)
    got = chosen(case, rule, rows, columns, seen, real, case.share)
    want = expected(case, rows, columns, rule, seen, real, case.share)
    assert torch.equal(got.counts.cpu(), want.counts)
    assert torch.equal(got.first_rows().cpu(), want.first_rows())
    listed = got.indices.cpu().masked_fill(~got.slots.cpu(), 2**30)
    assert bool((listed.diff(dim=-1)[got.slots.cpu()[..., 1:]] > 0).all()), "a list is not in ascending order"
    if name != "all-padding":
        assert int(want.counts.sum()) > 0


def test_a_calibrated_share_stays_a_tensor():
    case = CASES["by-share"]
    rule, *given = drawn(case)
    by_number, by_tensor = (chosen(case, rule, *given, x) for x in (case.share, torch.tensor(case.share)))
    assert torch.equal(by_number.first_rows(), by_tensor.first_rows())


def test_stretches_change_nothing(monkeypatch):
    from astbench_kernels.triton.selection import carried

    case = CASES["tokens"]
    rule, *given = drawn(case)
    whole = chosen(case, rule, *given, None)
    monkeypatch.setattr(carried, "STRETCH_BYTES", 3 * 4 * case.tile * rule.num_blocks)
    assert torch.equal(chosen(case, rule, *given, None).first_rows(), whole.first_rows())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(offset=3), "row 3 stands inside a tile of 8"),
        (Case(length=5000, block=1), "5,000 blocks are more than 4,096"),
        (Case(parts=3), "3 columns a block and a pool of 1 must be powers of two"),
    ],
)
def test_what_is_not_served(case, message):
    rule, rows, columns, *_ = drawn(case)
    with pytest.raises(ValueError, match=message):
        chosen(case, rule, rows, columns, None, None, None)


def test_what_does_not_fit_together_is_refused():
    rule, rows, columns, *_ = drawn(Case())
    with pytest.raises(ValueError, match=r"rows and blocks must be float32, got torch\.float64"):
        chosen(Case(), rule, rows.double(), columns, None, None, None)
    with pytest.raises(ValueError, match=r"got \d+ and \d+"):
        chosen(Case(), rule, rows, columns[:, :, 1:], None, None, None)
    with pytest.raises(ValueError, match="seen must be"):
        chosen(Case(), rule, rows, columns, torch.ones(2, 1, dtype=torch.bool), None, None)


# ----- in the layer

SMALL = {"block_size": 4, "min_blocks": 2, "density": 0.3, "lists": "carried", "query_tile": 8}


def layer(name, backend, **options):
    given = {**SMALL, **options, "backend": backend}
    return build(name, given, heads=4, kv_heads=2, dim=16, weights=1.0, seed=3, dtype=torch.float32).to(DEVICE).eval()


def never(*args, **kwargs):
    raise AssertionError("this path was not to be taken")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pooled_topk", {}),
        ("ast", {}),
        ("ast", {"index_dim": 8}),
        ("ast", {"index_dim": 8, "index_pool": 2, "local_blocks": 1}),
        ("ast", {"index_dim": 8, "budget": "adaptive", "share": 0.1}),
        ("ast", {"index_dim": 8, "budget": "calibrated", "share": 0.1, "patterns": 2}),
        ("ast", {"sub_blocks": 2, "budget": "adaptive", "share": 0.2}),
    ],
)
@pytest.mark.parametrize("padding", [0.0, 0.4], ids=["whole", "padded"])
def test_the_layer_computes_the_same(monkeypatch, name, options, padding):
    tensors, valid = draw(21, 21, heads=4, kv_heads=2, dim=16, padding=padding, seed=1)
    tensors = [x.to(DEVICE, torch.float32) for x in tensors]
    mask = AttentionMask("causal_self", key_valid=None if valid is None else valid.to(DEVICE))
    context = AttentionContext(collect_stats=True)
    expected = layer(name, "gather", **options)(*tensors, mask, context=context)
    for method in ("_products", "selection"):
        monkeypatch.setattr(FactoredBlockSelection, method, never)
    got = layer(name, "triton", **options)(*tensors, mask, context=context)
    assert torch.equal(got.stats.layout.first_rows(), expected.stats.layout.first_rows())
    assert torch.equal(got.stats.attended, expected.stats.attended)
    assert torch.equal(got.stats.tiles, expected.stats.tiles)
    torch.testing.assert_close(got.out, expected.out, rtol=1e-5, atol=1e-5)


def test_decoding_goes_on_with_what_the_kernels_chose():
    tensors, _ = draw(21, 21, heads=4, kv_heads=2, dim=16, seed=2)
    q, k, v = (x.to(DEVICE, torch.float32) for x in tensors)
    module = layer("ast", "triton", index_dim=8)
    with torch.no_grad():
        whole = module(q, k, v, AttentionMask("causal_self")).out
        context, outs = AttentionContext(summaries=module.new_cache_state()), []
        for start, stop in [(0, 19), (19, 20), (20, 21)]:  # the first call ends inside a tile
            mask = AttentionMask("causal_self", start)
            outs.append(module(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask, context=context).out)
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"index_dim": 8}, {"sub_blocks": 2}])
def test_a_step_inside_a_tile_computes_its_factors_once(monkeypatch, options):
    """The kernels do not serve it: they are asked before anything is computed for them."""
    tensors, _ = draw(21, 21, heads=4, kv_heads=2, dim=16, seed=2)
    q, k, v = (x.to(DEVICE, torch.float32) for x in tensors)
    module, calls = layer("ast", "triton", **options), []
    factors = type(module).factors
    monkeypatch.setattr(type(module), "factors", lambda self, *given: calls.append(1) or factors(self, *given))
    with torch.no_grad():
        context = AttentionContext(summaries=module.new_cache_state())
        module(q[:, :, :19], k[:, :, :19], v[:, :, :19], AttentionMask("causal_self"), context=context)
        calls.clear()
        module(q[:, :, 19:20], k[:, :, :20], v[:, :, :20], AttentionMask("causal_self", 19), context=context)
    assert len(calls) == 1
