"""FlexAttention: the lists that its kernels read, what dynamo makes of it, what is refused, and the check at first use.

Its results are compared with the oracle in test_block_sparse.py; on CUDA they have not been run yet.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import pad

from astbench_kernels import BlockLayout, attention, block_sparse_attention, choose_backend
from astbench_kernels.backends import flex, self_check
from astbench_kernels.backends.reference import reference_attention

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 3, 5

CASES = [
    # queries, keys, block_size, query_group, query_offset, causal, padding
    pytest.param(64, 64, 16, 16, 0, True, "none", id="causal"),
    pytest.param(61, 59, 8, 16, 0, False, "none", id="cross-short-last-block"),
    pytest.param(41, 97, 16, 32, 56, True, "tail", id="from-mid-group-padded"),
    pytest.param(47, 47, 8, 16, 0, True, "holes", id="holes"),
]


def case(queries, keys, size, group, offset, padding, lists, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, queries, DIM, generator=g)
    k, v = (torch.randn(BATCH, KV_HEADS, keys, DIM, generator=g) for _ in "kv")
    groups = (offset + queries - 1) // group - offset // group + 1
    keep = torch.rand(BATCH, lists, groups, -(-keys // size), generator=g) < 0.5
    layout = BlockLayout.from_mask(
        keep, block_size=size, query_group=group, query_length=queries, key_length=keys, query_offset=offset
    )
    bias = torch.randn(layout.indices.shape, generator=g)
    valid = None
    if padding == "tail":
        valid = torch.arange(keys) < torch.tensor([[keys], [keys - 3 * size + 2]])
    if padding == "holes":
        valid = torch.rand(BATCH, keys, generator=g) < 0.9
    return q, k, v, layout, bias, valid


def as_kernels_read(mask, rows, keys):
    """Bool (batch, heads, rows, keys): all pairs of full blocks, of partial ones those that the mask_mod allows."""
    group, size = mask.BLOCK_SIZE
    pairs = torch.zeros(BATCH, HEADS, rows, keys, dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(BATCH), torch.arange(HEADS)).tolist():
        listing = h % mask.kv_indices.shape[1]  # as its kernels find it
        for number in range(mask.kv_indices.shape[2]):
            row = torch.arange(number * group, min((number + 1) * group, rows))
            at = (b, listing, number)
            lists = [(mask.full_kv_indices[at], mask.full_kv_num_blocks[at], True)]
            lists.append((mask.kv_indices[at], mask.kv_num_blocks[at], False))
            for indices, count, full in lists:
                for block in indices[: int(count)].tolist():
                    key = torch.arange(block * size, min((block + 1) * size, keys))
                    seen = full or mask.mask_mod(torch.tensor(b), torch.tensor(h), row[:, None], key[None])
                    pairs[b, h, row[:, None], key[None]] = seen
    return pairs


@pytest.mark.parametrize("lists", [1, KV_HEADS, HEADS])
@pytest.mark.parametrize(("queries", "keys", "size", "group", "offset", "causal", "padding"), CASES)
def test_the_lists_are_the_pattern(queries, keys, size, group, offset, causal, padding, lists):
    q, _, _, layout, _, valid = case(queries, keys, size, group, offset, padding, lists)
    lead = offset % group
    mask = flex.block_mask(pad(q, (0, 0, lead, 0)), layout, causal=causal, key_valid=valid)
    expected = layout.expand_heads(HEADS).token_mask(causal=causal, key_valid=valid)
    assert expected.any() and not expected.all()
    assert torch.equal(as_kernels_read(mask, lead + queries, keys)[:, :, lead:], expected)
    assert mask.full_kv_num_blocks.any() and (mask.kv_num_blocks.any() or not causal)
    # The backward pass reads the lists by key block.
    for counts, indices, by_key_counts, by_key in (
        (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        assert torch.equal(
            members(by_key_counts, by_key, indices.shape[2]).mT, members(counts, indices, by_key.shape[2])
        )


def members(counts, indices, number):
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    index = torch.where(listed, indices, number).long()
    found = torch.zeros(*indices.shape[:3], max(number, int(index.max())) + 1, dtype=torch.bool)
    return found.scatter(-1, index, listed)[..., :number]


@pytest.fixture
def traced(monkeypatch):
    """What runs on CUDA, with torch's compiler up to code generation; the operator itself runs as on the CPU."""
    counter = CompileCounter()
    compiled = torch.compile(torch.nn.attention.flex_attention.flex_attention, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)

    def run(q, k, v, layout, *, block_bias, causal, key_valid):
        mask = flex.block_mask(q, layout, causal=causal, key_valid=key_valid, lists_in_mask=True)
        table = None if block_bias is None else flex._bias_table(block_bias, layout)
        options = flex.kernel_options(layout, (9, 0))
        return flex._run_compiled(q, k, v, table, flex._add_bias(q, layout), mask, DIM**-0.5, options)

    yield run, counter
    torch._dynamo.reset()


@pytest.mark.parametrize("biased", [False, True])
def test_dynamo_traces_it_once_for_all_lengths(traced, biased):
    run, counter = traced
    for number, length in enumerate((64, 80, 112, 176, 240)):
        q, k, v, layout, bias, valid = case(length, length, 16, 16, 0, "holes", KV_HEADS, seed=number)
        options = {"block_bias": bias if biased else None, "causal": True, "key_valid": valid}
        got = run(q, k, v, layout, **options)
        expected = reference_attention(q, k, v, layout, scale=DIM**-0.5, **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2, "one for the first length, one for all others"


def test_tiles_divide_blocks():
    def options(group, size, capability=(9, 0)):
        layout = BlockLayout(
            torch.zeros(1, 1, 1, 1, dtype=torch.int32),
            torch.zeros(1, 1, 1, dtype=torch.int32),
            size,
            group,
            group,
            size,
        )
        return flex.kernel_options(layout, capability)

    own = {"FORCE_USE_FLEX_ATTENTION": True}
    assert options(128, 64, (8, 0)) == own
    assert options(128, 64) == {**own, "fwd_USE_TMA": True}
    assert options(48, 96, (8, 0)) == {**own, "fwd_BLOCK_M": 16, "fwd_BLOCK_N": 32}


# ----- what it refuses


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def layout_of(size, group):
    return case(96, 96, size, group, 0, "none", 1)[3]


def test_refusals_name_every_reason():
    with pytest.raises(ValueError, match=r"not float64; it takes multiples of 16 as query_group, got 1; .*got 24"):
        choose_backend("flex", CUDA, dtype=torch.float64, layout=layout_of(24, 1))
    with pytest.raises(ValueError, match="backward pass takes multiples of 32 as block_size, got 16"):
        choose_backend("flex", CUDA, dtype=torch.bfloat16, layout=layout_of(16, 64), gradients=True)
    with pytest.raises(ValueError, match="needs a CPU or a CUDA device"):
        choose_backend("flex", torch.device("meta"))
    assert choose_backend("flex", CUDA, dtype=torch.bfloat16, layout=layout_of(16, 64)) == "flex"
    assert choose_backend("flex", CUDA, dtype=torch.bfloat16, layout=layout_of(32, 64), gradients=True) == "flex"
    assert choose_backend("flex", CPU, dtype=torch.float64, layout=layout_of(7, 1), gradients=True) == "flex"


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_auto_never_takes_it(device):
    assert choose_backend("auto", device, dtype=torch.float64, head_dim=999, layout=layout_of(32, 64)) == "gather"


# ----- the check at first use


def test_the_check_holds_what_it_says():
    inputs, layout, valid = self_check._call(CPU, torch.float32)
    pairs = layout.token_mask(causal=True, key_valid=valid)
    assert not pairs.any(-1).all(), "some rows see nothing"
    assert layout.query_offset % layout.query_group and layout.key_length % layout.block_size
    assert all(x.isnan().any() for x in inputs[1:3])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda q, out, lse: (out * 1.001, lse), "out is off by 1.0e-03.*d q is off.*allowed is 1e-05"),
        (lambda q, out, lse: (out, lse + 0.1), "lse is off by"),
        (lambda q, out, lse: (out.detach() + 0 * q.sum(), lse), "d q is off by"),
        (lambda q, out, lse: (out, lse.masked_fill(lse == -torch.inf, -1e30)), "row that sees nothing is off by inf"),
        (lambda q, out, lse: (out * torch.nan, lse), "row that sees nothing"),
    ],
    ids=["output", "lse", "gradient", "empty-rows", "nan"],
)
def test_a_wrong_backend_is_refused_before_its_first_call(monkeypatch, damage, named):
    def wrong(q, *args, **kwargs):
        return damage(q, *reference_attention(q, *args, **kwargs))

    monkeypatch.setitem(attention._BACKENDS, "flex", attention.Backend("flex", "", wrong, foreign=True))
    q, k, v, layout, *_ = case(16, 16, 8, 16, 0, "none", 1)
    with pytest.raises(ValueError, match=f"'flex' is refused on cpu in float32: against the reference .*{named}"):
        block_sparse_attention(q, k, v, layout, backend="flex")


def test_a_right_backend_is_checked_once(monkeypatch):
    calls = []

    def right(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return reference_attention(*args, **kwargs)

    monkeypatch.setitem(attention._BACKENDS, "flex", attention.Backend("flex", "", right, foreign=True))
    q, k, v, layout, *_ = case(16, 16, 8, 16, 0, "none", 1)
    with torch.inference_mode():
        for _ in range(3):
            block_sparse_attention(q, k, v, layout, backend="flex")
    assert calls == [True, False, False, False]
