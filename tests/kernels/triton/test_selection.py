"""The predictor's kernels against what the layers do in torch: pooled blocks, and lists equal block by block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from astbench_kernels.triton import choose_blocks, pool_blocks
from astbench_kernels.triton.launch import writing_down
from astbench_kernels.triton.selection.rule import BlockRule
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call, FactoredBlockSelection, block_scores, factored
from astbench_registry.variants.pooled_topk import PooledTopKAttention
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


# ----- pooled blocks


@pytest.mark.parametrize(
    ("length", "block", "dim", "value_dim", "dtype", "padding"),
    [
        (1, 4, 5, 3, torch.float32, False),
        (29, 3, 24, 16, torch.float32, True),
        (53, 16, 16, 40, torch.float16, False),
        (53, 16, 16, 40, torch.bfloat16, True),
        (150, 100, 96, 128, torch.float32, False),
        (150, 100, 96, 128, torch.bfloat16, True),
    ],
)
def test_pooled_blocks(length, block, dim, value_dim, dtype, padding):
    g = torch.Generator().manual_seed(length)
    # Heads behind positions, as a projection makes them: strides are any but the last.
    k = torch.randn(2, length, 3, dim, generator=g).to(DEVICE, dtype).transpose(1, 2)
    v = torch.randn(2, length, 3, value_dim, generator=g).to(DEVICE, dtype).transpose(1, 2)
    valid = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    if padding:
        valid = (torch.rand(2, length, generator=g) < 0.5).to(DEVICE)
        valid[0, :block] = False  # a block without a single key
        k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v))
    got = pool_blocks(k, v, valid if padding else None, block)
    assert {x.dtype for x in got} == {torch.float32, torch.int32}
    for b in range(2):
        for j in range(-(-length // block)):
            here = valid[b, j * block : (j + 1) * block]
            assert int(got.counts[b, j]) == int(here.sum())
            keys, values = (x[b, :, j * block : (j + 1) * block][:, here].double() for x in (k, v))
            zero = torch.zeros(3, 1, dim, dtype=torch.float64, device=DEVICE)
            expected = {
                "mean_key": keys.sum(1) / max(1, len(keys[0])),
                "max_key": (keys if here.any() else zero).amax(1),
                "min_key": (keys if here.any() else zero).amin(1),
                "mean_value": values.sum(1) / max(1, len(values[0])),
            }
            for name, value in expected.items():
                torch.testing.assert_close(getattr(got, name)[b, :, j].double(), value, rtol=1e-6, atol=1e-6)


def test_pooling_no_keys():
    pooled = pool_blocks(torch.ones(2, 3, 0, 5, device=DEVICE), torch.ones(2, 3, 0, 7, device=DEVICE), None, 4)
    assert pooled.max_key.shape == (2, 3, 0, 5) and pooled.mean_value.shape == (2, 3, 0, 7)


# ----- lists


@dataclass(frozen=True)
class Case:
    queries: int = 29
    keys: int = 29
    block: int = 4
    pattern: str = "causal_self"
    offset: int = 0
    padding: float = 0.0
    heads: int = 4
    kv_heads: int = 2
    dim: int = 21
    options: dict = field(default_factory=dict)


CASES = {
    "causal": Case(),
    "one-token": Case(1, 1),
    "causal-groups-of-4": Case(options={"query_group": 4}),
    "causal-groups-of-64": Case(150, 150, 8, options={"query_group": 64}),
    "bidirectional": Case(pattern="bidirectional_self", options={"query_group": 1}),
    "bidirectional-groups-of-64": Case(150, 150, 8, pattern="bidirectional_self"),
    "cross": Case(37, 61, pattern="bidirectional_cross", options={"query_group": 4}),
    "cross-per-token": Case(13, 61, pattern="causal_cross"),
    "decode": Case(1, 61, offset=60),
    "chunk": Case(11, 55, offset=44, options={"query_group": 4}),
    "more-queries-than-keys": Case(31, 13),
    "padded": Case(padding=0.6),
    "padded-bidirectional": Case(pattern="bidirectional_self", padding=0.8, options={"query_group": 4}),
    "all-padding": Case(23, 23, padding=1.0),
    "first-block-competes": Case(options={"sink_block": False}),
    "nothing-forced": Case(
        19, 37, pattern="bidirectional_cross", options={"query_group": 1, "sink_block": False, "min_blocks": 1}
    ),
    "local-blocks": Case(options={"local_blocks": 2, "sink_block": False}),
    "local-blocks-both-sides": Case(pattern="bidirectional_self", options={"local_blocks": 1, "query_group": 4}),
    "more-forced-than-budget": Case(37, 37, options={"local_blocks": 5, "top_k": 2, "min_blocks": 1}),
    "local-blocks-beyond-32-bits": Case(29, 29, options={"local_blocks": 2**31}),
    "top-k": Case(options={"top_k": 5}),
    "min-blocks": Case(options={"min_blocks": 7, "density": 0.01}),
    "everything": Case(options={"density": 1.0}),
    "density-of-a-tenth": Case(60, 60, 2, options={"density": 0.1, "min_blocks": 1}),
    "heads-of-their-own": Case(heads=3, kv_heads=3),
    "one-key-head": Case(heads=5, kv_heads=1, dim=16),
    "uneven-blocks": Case(50, 50, 7, dim=40),
}
SMALL = {"block_size": 4, "min_blocks": 2, "density": 0.3}


def factors(case, values):
    """Rows and blocks whose products and sums are exact in float32, and even in tf32, in any order."""
    g = torch.Generator().manual_seed(case.queries)
    group = case.options.get("query_group") or (64 if case.pattern.startswith("bi") else 1)
    groups, blocks = -(-case.queries // group), -(-case.keys // case.block)
    rows = torch.randint(-values, values + 1, (2, case.heads, groups, case.dim), generator=g)
    columns = torch.randint(-values, values + 1, (2, case.kv_heads, blocks, case.dim), generator=g)
    return rows.float().to(DEVICE), columns.float().to(DEVICE)


def both(case, rows, blocks):
    """The list mask that the layer keeps in torch, and the layout of the kernel."""
    options = {**SMALL, **case.options, "block_size": case.block}
    module = build_attention("pooled_topk", options, AttentionShape(case.heads, case.kv_heads, 1))
    valid = None
    if case.padding:
        valid = torch.rand(2, case.keys, generator=torch.Generator().manual_seed(1)) >= case.padding
        valid[:, : case.block] = False
        valid = valid.to(DEVICE)
    mask = AttentionMask(case.pattern, case.offset, valid)
    q, k = torch.zeros(2, 1, case.queries, 1, device=DEVICE), torch.zeros(2, 1, case.keys, 1, device=DEVICE)
    call = Call(q, k, k, mask, 1.0, AttentionContext())
    selection = module.selection(call)
    keep = module.choose(block_scores(rows, blocks), call, selection)
    module.factors = lambda *args, **kwargs: (rows, blocks)
    return keep, module.fused_layout(call), selection


def check(case, values):
    keep, layout, selection = both(case, *factors(case, values))
    assert torch.equal(layout.to_mask(), keep)
    assert torch.equal(layout.counts, keep.sum(-1, dtype=torch.int32))
    rising = layout.indices.diff(dim=-1) > 0
    assert (rising | ~layout.slots[..., 1:]).all()
    assert (layout.indices[~layout.slots] == 0).all()
    if case.pattern == "causal_self" and not case.padding and not case.options.get("local_blocks"):
        assert layout.indices.shape[-1] <= max(int(layout.counts.max()), 1 + int(selection.always_kept.sum(-1).max()))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_lists_are_those_of_the_layer(case):
    """With scores that are small integers: every row holds ties."""
    check(case, 1)


@pytest.mark.parametrize("name", ["causal", "cross", "padded", "uneven-blocks"])
def test_lists_by_all_bits_of_the_scores(name):
    check(CASES[name], 255)


@pytest.mark.parametrize("name", ["causal", "padded-bidirectional", "nothing-forced", "uneven-blocks"])
def test_lists_through_the_scratch(monkeypatch, name):
    """In several steps over the blocks, the last one short, and with several tiles for each program."""
    from astbench_kernels.triton.selection import choose

    case = CASES[name]
    tile = choose.Tile(rows=32, keys=8, num_warps=4, num_stages=1)
    monkeypatch.setattr(choose, "MAX_BLOCKS", 2)
    monkeypatch.setattr(choose, "choose_tile", lambda rows, blocks: tile)
    monkeypatch.setattr(choose, "SCRATCH_BYTES", 3 * 4 * tile.rows * -(-case.keys // case.block))
    check(case, 1)


def test_ties_of_both_zeros_go_to_the_lower_block():
    rows = torch.tensor([[[[1.0], [-1.0]]]], device=DEVICE)
    blocks = torch.tensor([[[[-0.0], [0.0], [-0.0], [-1.0], [0.0]]]], device=DEVICE)
    rule = BlockRule(block_size=2, query_group=1, query_length=2, key_length=10)
    layout = choose_blocks(rows, blocks, rule, lambda visible: visible.clamp(max=2))
    assert layout.indices.tolist() == [[[[0, 1], [0, 3]]]]


def test_scores_are_float32():
    """Against float64, on every row whose last kept and first dropped block are a float32's error apart."""
    g = torch.Generator().manual_seed(0)
    rows, blocks = torch.randn(1, 2, 70, 150, generator=g), torch.randn(1, 1, 90, 150, generator=g)
    rule = BlockRule(block_size=8, query_group=1, query_length=70, key_length=720)
    layout = choose_blocks(rows.to(DEVICE), blocks.to(DEVICE), rule, lambda visible: visible.clamp(max=20))
    ranked, order = block_scores(rows.double(), blocks.double()).sort(descending=True)
    clear = ranked[..., 19] - ranked[..., 20] > 1e-4
    assert clear.float().mean() > 0.95
    expected = order[..., :20].sort().values
    assert torch.equal(layout.indices.cpu().long()[clear], expected[clear])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FFFFFFF, -1], ids=["inf", "nan", "all-ones", "negative"])
def test_what_is_not_finite_stays_inside(bits):
    """Nobody promises a choice, but a list names blocks that exist, once each. GPUs write NaN as 0x7FFFFFFF."""
    rows = torch.full((1, 1, 3, 2), bits, dtype=torch.int32, device=DEVICE).view(torch.float32)
    blocks = torch.tensor([1.0, -1.0, 0.0, 2.0, 3.0], device=DEVICE)[None, None, :, None].expand(-1, -1, -1, 2)
    rule = BlockRule(block_size=4, query_group=1, query_length=3, key_length=18)
    layout = choose_blocks(rows, blocks, rule, lambda visible: visible.clamp(max=3))
    assert (layout.counts == 3).all()
    assert (layout.indices.diff(dim=-1) > 0).all() and int(layout.indices.max()) < 5 and int(layout.indices.min()) >= 0


def test_no_queries_and_no_keys():
    none = torch.zeros(2, 3, 0, 5, device=DEVICE)
    some = torch.zeros(2, 3, 4, 5, device=DEVICE)
    layout = choose_blocks(some, none, BlockRule(8, 1, 4, 0), lambda visible: visible)
    assert layout.counts.shape == (2, 3, 4) and not layout.counts.any()
    layout = choose_blocks(none, some, BlockRule(8, 1, 0, 32), lambda visible: visible)
    assert layout.counts.shape == (2, 3, 0)


def test_refusals():
    rule = BlockRule(8, 1, 4, 32)
    rows, blocks = torch.zeros(2, 6, 4, 5, device=DEVICE), torch.zeros(2, 3, 4, 5, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"must be float32, got torch.float64 .*; the rule is for 4 groups and 4 blocks"
    ):
        choose_blocks(rows.double(), blocks[:, :, :3], rule, lambda visible: visible)
    with pytest.raises(ValueError, match="kv heads must divide heads"):
        choose_blocks(rows[:, :4], blocks, rule, lambda visible: visible)
    with pytest.raises(ValueError, match=r"seen must be \(2, 4\), got \(2, 5\)"):
        choose_blocks(rows, blocks, rule, lambda visible: visible, seen=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="a causal rule needs local_blocks of 0 or more, got None"):
        BlockRule(8, 4, 4, 32, causal=True)
    with pytest.raises(ValueError, match="query_offset must be a multiple of query_group 4, got 6"):
        BlockRule(8, 4, 4, 32, query_offset=6)


# ----- in the layer


def drawn(queries, keys, *, padding=0.0, dtype=torch.float32, dim=16):
    sizes = {"heads": 4, "kv_heads": 2, "dim": dim}
    tensors, valid = draw(queries, keys, **sizes, padding=padding, seed=queries + keys)
    return [x.to(DEVICE, dtype) for x in tensors], None if valid is None else valid.to(DEVICE)


def layer(name, backend, options=None, dim=16):
    """Weights away from zero, so that every term of the score counts."""
    options = {**SMALL, **(options or {}), "backend": backend}
    return build(name, options, heads=4, kv_heads=2, dim=dim, weights=1.0, seed=3, dtype=torch.float32).to(DEVICE)


def never(*args, **kwargs):
    raise AssertionError("this path was not to be taken")


@pytest.mark.parametrize("padding", [0.0, 0.4], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["ast", "pooled_topk"])
@pytest.mark.parametrize(
    ("pattern", "offset", "options"),
    [
        ("causal_self", 0, {}),
        ("causal_self", 40, {"query_group": 4, "local_blocks": 1}),
        ("bidirectional_self", 0, {"query_group": 8}),
        ("bidirectional_cross", 0, {"top_k": 3}),
        ("causal_cross", 0, {"sink_block": False}),
    ],
)
def test_fused_layer_chooses_the_same(monkeypatch, pattern, offset, options, name, padding):
    keys = 53 if pattern.endswith("self") else 37
    tensors, valid = drawn(53 - offset, keys, padding=padding)
    if valid is not None:
        for x in tensors[1:]:
            x.masked_fill_(~valid[:, None, :, None], torch.nan)
    mask, context = AttentionMask(pattern, offset, valid), AttentionContext(collect_stats=True)
    expected = layer(name, "gather", options).eval()(*tensors, mask, context=context).stats.layout
    module = layer(name, "triton", options).eval()
    call = Call.of(module.shape, *tensors, mask).without_padding()
    assert module.fusible(call)
    for method in ("_products", "selection"):
        monkeypatch.setattr(FactoredBlockSelection, method, never)
    got = module.fused_layout(call)
    assert torch.equal(got.to_mask(), expected.to_mask())


@pytest.mark.parametrize("pattern", ["causal_self", "bidirectional_cross"])
@pytest.mark.parametrize("name", ["ast", "pooled_topk"])
def test_fused_layer_computes_the_same(monkeypatch, name, pattern):
    tensors, valid = drawn(13, 13 if pattern == "causal_self" else 23, padding=0.3)
    mask, context = AttentionMask(pattern, key_valid=valid), AttentionContext(collect_stats=True)
    options = {"query_group": 1}
    expected = layer(name, "gather", options).eval()(*tensors, mask, context=context)
    for method in ("_products", "selection"):
        monkeypatch.setattr(FactoredBlockSelection, method, never)
    got = layer(name, "triton", options).eval()(*tensors, mask, context=context)
    assert torch.equal(got.stats.layout.to_mask(), expected.stats.layout.to_mask())
    assert torch.equal(got.stats.attended, expected.stats.attended)
    torch.testing.assert_close(got.out, expected.out, rtol=1e-5, atol=1e-5)
    assert got.stats.backend.startswith("triton (") and not got.losses


def test_half_precision_pools_what_torch_pools():
    tensors, _ = drawn(53, 53, dtype=torch.float16)
    mask, context = AttentionMask("causal_self"), AttentionContext(collect_stats=True)
    expected = layer("ast", "gather").eval()(*tensors, mask, context=context).stats.layout
    module = layer("ast", "triton").eval()
    got = module.fused_layout(Call.of(module.shape, *tensors, mask))
    assert torch.equal(got.to_mask(), expected.to_mask())


def test_the_learned_term_moves_the_choice():
    """Else the comparisons above would hold without it."""
    tensors, _ = drawn(53, 53)
    modules = [layer(name, "triton").eval() for name in ("ast", "pooled_topk")]
    call = Call.of(modules[0].shape, *tensors, AttentionMask("causal_self"))
    ours, pooled = (module.fused_layout(call).to_mask() for module in modules)
    assert not torch.equal(ours, pooled)


@pytest.mark.parametrize(
    ("name", "options", "train"),
    [
        ("ast", {}, True),
        ("ast", {"budget": "adaptive"}, False),
        ("ast", {"estimator": "soft"}, False),
        ("random_topk", {}, False),
        ("oracle_topk", {}, False),
    ],
)
def test_scores_are_made_where_they_are_needed(monkeypatch, name, options, train):
    monkeypatch.setattr(factored, "choose_blocks", never)
    tensors, _ = drawn(17, 17)
    mask, context = AttentionMask("causal_self"), AttentionContext(collect_stats=True)
    options = {**options, "top_k": 3} | ({"distill_weight": 0.0} if name == "ast" else {})
    outs = [
        layer(name, backend, options).train(train)(*tensors, mask, context=context) for backend in ("gather", "triton")
    ]
    torch.testing.assert_close(outs[0].out, outs[1].out, rtol=1e-5, atol=1e-5)
    assert torch.equal(*(out.stats.layout.to_mask() for out in outs))


def test_sampling_needs_scores_even_without_a_gradient():
    module = layer("ast", "triton", {"sample": True}).train()
    call = Call.of(module.shape, *drawn(17, 17)[0], AttentionMask("causal_self"))
    with torch.no_grad():
        assert not module.fusible(call)
    assert module.eval().fusible(call)


def test_fused_layer_follows_patterns():
    tensors, _ = drawn(53, 53)
    mask, context = AttentionMask("causal_self"), AttentionContext(collect_stats=True)
    expected, plain = (
        layer("ast", "gather", options).eval()(*tensors, mask, context=context).stats.layout.to_mask()
        for options in ({"patterns": 3}, {})
    )
    module = layer("ast", "triton", {"patterns": 3}).eval()
    got = module.fused_layout(Call.of(module.shape, *tensors, mask))
    assert torch.equal(got.to_mask(), expected)
    assert not torch.equal(expected, plain)


def test_global_tokens_are_not_fused():
    tensors, _ = drawn(33, 33)
    mask, named = AttentionMask("bidirectional_self"), torch.arange(33).expand(2, -1) == 20
    options, context = (
        {"global_tokens": True, "query_group": 8},
        AttentionContext(collect_stats=True, global_tokens=named),
    )
    outs = [layer("ast", backend, options).eval()(*tensors, mask, context=context) for backend in ("gather", "triton")]
    assert torch.equal(*(out.stats.layout.to_mask() for out in outs))
    torch.testing.assert_close(outs[0].out, outs[1].out, rtol=1e-5, atol=1e-5)
    module = layer("ast", "triton", options).eval()
    assert not module.fusible(Call.of(module.shape, *tensors, mask, context=context))
    assert module.fusible(Call.of(module.shape, *tensors, mask))


def test_a_changed_choice_is_not_fused():
    """Whoever changes the choice of a variant with factors has to say when that matters, and then it counts."""

    class Reversed(PooledTopKAttention):
        def choose(self, scores, call, selection):
            return super().choose(-scores, call, selection)

        def fusible(self, call):
            return False

    tensors, _ = drawn(17, 17)
    mask, context = AttentionMask("causal_self"), AttentionContext(collect_stats=True)
    plain = layer("pooled_topk", "triton", {"top_k": 3}).eval()
    changed = Reversed(plain.config, plain.shape).to(DEVICE).eval()
    kept = [module(*tensors, mask, context=context).stats.layout.to_mask() for module in (plain, changed)]
    assert not torch.equal(*kept)


def test_a_change_that_the_kernels_would_not_see_is_refused():
    for method, reason in (
        ("choose", r"changes choose\(\)"),
        ("selection", "fusible"),
        ("scores", "BlockSelectingAttention"),
    ):
        with pytest.raises(TypeError, match=reason):
            type("Changed", (PooledTopKAttention,), {method: lambda self, *args: None})


def test_schedule_of_the_density_is_followed_without_a_gradient():
    tensors, _ = drawn(33, 33)
    options = {"density_start": 1.0, "density_steps": 10, "density": 0.3}
    mask = AttentionMask("causal_self")
    module = layer("ast", "triton", options).train()
    with torch.no_grad():
        calls = [Call(*tensors, mask, 1.0, AttentionContext(step=step)) for step in (0, 10)]
        counts = [module.fused_layout(call).counts for call in calls]
    assert int(counts[0][..., -1].min()) == 9 and int(counts[1][..., -1].max()) == 3


class Made(TorchDispatchMode):
    """Elements of the largest tensor made meanwhile."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_nothing_is_waited_for_and_no_table_of_scores_is_made(padding):
    """Tensors of the meta device hold no values: whatever asks for one raises."""
    length, dim = 4096, 16
    module = layer("ast", "triton", {"top_k": 8}, dim=dim).to("meta").eval()
    q, k = torch.zeros(1, 4, length, dim, device="meta"), torch.zeros(1, 2, length, dim, device="meta")
    valid = torch.ones(1, length, dtype=torch.bool, device="meta") if padding else None
    mask = AttentionMask("causal_self", key_valid=valid)
    with writing_down() as launches, Made() as made:
        layout = module.fused_layout(Call(q, k, k, mask, 1.0, AttentionContext()))
    assert len(launches) == 2 and layout.indices.shape == (1, 4, length, 8)
    assert made.largest <= 4 * length * (2 * dim + 33) < length * length // 4


def test_scratch_is_bounded():
    from astbench_kernels.triton.selection import choose

    rows, blocks = torch.zeros(1, 4, 9000, 8, device="meta"), torch.zeros(1, 2, 3000, 8, device="meta")
    rule = BlockRule(block_size=3, query_group=1, query_length=9000, key_length=9000, causal=True, local_blocks=0)
    with writing_down() as launches:
        choose_blocks(rows, blocks, rule, lambda visible: visible.clamp(max=9))
    (launch,) = launches
    scratch = launch.arguments["scratch"]
    assert 0.9 * choose.SCRATCH_BYTES < scratch.numel() * 4 <= choose.SCRATCH_BYTES
    assert launch.arguments["programs"] == scratch.shape[0] < launch.arguments["all_tiles"]
