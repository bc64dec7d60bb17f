"""BigBird against a pattern written out block by block, and transformers' own block-sparse attention."""

from functools import partial

import pytest
import torch

from astbench_kernels.dispatch import rules
from astbench_registry import AttentionContext, AttentionMask
from astbench_registry.conformance import PROPERTIES
from tests.oracles import BATCH, DIM, HEADS, assert_same, draw, softmax_attention
from tests.registry import building
from tests.registry.building import assert_conforms

SMALL = {"block_size": 4, "num_random_blocks": 2}
build = partial(building.build, "bigbird")
OPTIONS = {
    "paper": SMALL,
    "no-random": {"block_size": 5, "num_random_blocks": 0},
    "wide": {"block_size": 3, "window_blocks": 2, "first_blocks": 2, "last_blocks": 0},
    "random-alone": {"block_size": 4, "window_blocks": 0, "first_blocks": 0, "last_blocks": 0},
}
MASK = AttentionMask("bidirectional_self")


def draw_named(length, *, dim=DIM, padding=0.0):
    """q, k, v with gradients, a padding mask with a run of padding at the end, and tokens that the task names."""
    g = torch.Generator().manual_seed(0)
    tensors, _ = draw(length, dim=dim, seed=g, grad=True)
    named = torch.rand(BATCH, length, generator=g) < 2 / length
    if not padding:
        return tensors, None, named
    valid = torch.rand(BATCH, length, generator=g) >= padding
    valid[0, length - length // 4 :] = False
    valid[1, 1 : length // 4] = False
    valid[:, 0] = True  # blocks count from the first real token
    return tensors, valid, named


def layout_of(module, tensors, valid=None, named=None):
    context = AttentionContext(collect_stats=True, global_tokens=named)
    return module(*tensors, AttentionMask(key_valid=valid), context=context).stats.layout.to_mask()


def fixed_blocks(length, options, valid, named):
    """Bool `(batch, blocks, blocks)`: window and global blocks, one pair at a time; and which blocks are real."""
    size = options.get("block_size")
    first, last = options.get("first_blocks", 1), options.get("last_blocks", 1)
    blocks = -(-length // size)
    fixed = torch.zeros(BATCH, blocks, blocks, dtype=torch.bool)
    exist = torch.zeros(BATCH, blocks, dtype=torch.bool)
    for b in range(BATCH):
        here = [i for i in range(length) if valid is None or bool(valid[b, i])]
        real = sorted({i // size for i in here})
        chosen = {*real[:first], *(real[-last:] if last else ())}
        chosen |= {i // size for i in here if named is not None and bool(named[b, i])}
        for i in range(blocks):
            for j in real:
                exist[b, j] = True
                fixed[b, i, j] = abs(i - j) <= options.get("window_blocks", 1) or i in chosen or j in chosen
    return fixed, exist


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("length", [1, 63, 127, 400])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_are_the_papers(options, length, padding):
    """Window and global blocks exactly, the right number of others, and none that holds only padding."""
    tensors, valid, named = draw_named(length, padding=padding)
    keep = layout_of(build(options), tensors, valid, named)
    fixed, exist = fixed_blocks(length, options, valid, named)
    assert (keep | ~fixed[:, None]).all(), "a window or global block is missing"
    extra = keep & ~fixed[:, None]
    assert not (extra & ~exist[:, None, None]).any(), "a random block holds no real token"
    free = (exist[:, None] & ~fixed).sum(-1)
    expected = free.clamp(max=options.get("num_random_blocks", 3))
    assert torch.equal(extra.sum(-1), expected[:, None].expand(-1, HEADS, -1))


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("length", [1, 63, 127, 1000])
@pytest.mark.parametrize("options", list(OPTIONS.values())[:2], ids=list(OPTIONS)[:2])
def test_it_is_a_masked_softmax(options, length, padding):
    options = {**options, "block_size": options["block_size"] * (8 if length == 1000 else 1)}
    tensors, valid, named = draw_named(length, padding=padding)
    module, context = build(options), AttentionContext(global_tokens=named)
    mask = AttentionMask(key_valid=valid)
    got = module(*tensors, mask, context=context).out
    block = torch.arange(length) // options["block_size"]
    allowed = layout_of(module, tensors, valid, named)[:, :, block][..., block]
    allowed = allowed if valid is None else allowed & valid[:, None, None, :]
    expected = softmax_attention(*tensors, allowed)
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    if length == 1000 and not padding:  # one long backward pass is enough
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    else:
        assert_same(got, expected, tensors, gradients=1e-10)


@pytest.mark.parametrize("padding", [0.0, 0.3])
def test_pattern_without_random_blocks_is_exact(padding):
    """Values are the identity, so that output > 0 is the pattern."""
    size, options = 61, OPTIONS["no-random"]
    (q, k, _), valid, named = draw_named(size, dim=size, padding=padding)
    eye, context = torch.eye(size, dtype=torch.float64).expand_as(k), AttentionContext(global_tokens=named)
    out = build(options, dim=size)(q, k, eye, AttentionMask(key_valid=valid), context=context)
    block = torch.arange(size) // options["block_size"]
    allowed = fixed_blocks(size, options, valid, named)[0][:, None, block][..., block]
    allowed = allowed if valid is None else allowed & valid[:, None, None, :]
    assert torch.equal(out.out > 0, allowed.expand(-1, HEADS, -1, -1))


@pytest.mark.parametrize("property", PROPERTIES)
@pytest.mark.parametrize("options", list(OPTIONS.values())[1:], ids=list(OPTIONS)[1:])
def test_options_conform(options, property):
    assert_conforms("bigbird", options, property)


def random_blocks(**changes):
    """Random blocks alone, 4 of 128: `(heads, 128, 128)`."""
    options = {"block_size": 1, "window_blocks": 0, "first_blocks": 0, "last_blocks": 0, "num_random_blocks": 4}
    module = build({**options, "seed": changes.pop("seed", 0)}, **changes)
    tensors, _, _ = draw_named(128)
    return layout_of(module, tensors)[0] & ~torch.eye(128, dtype=torch.bool)


def test_random_blocks_are_reproducible_and_differ_by_seed_layer_head_and_row():
    first = random_blocks()
    state = torch.get_rng_state()
    assert torch.equal(first, random_blocks())
    assert torch.equal(torch.get_rng_state(), state)
    for other in (random_blocks(seed=1), random_blocks(layer=1), first.roll(1, 0), first.roll(1, 1)):
        shared = (first & other).sum(-1).double().mean()
        assert abs(float(shared) - 4 * 4 / 127) < 0.05, "as two independent draws"


def test_random_blocks_are_spread_evenly():
    counts = random_blocks().double().sum((0, 1))
    expected = counts.sum() / 128
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 181.9, "chi-square with 127 degrees of freedom exceeds this once in 1000"


def test_flops_are_those_of_the_pairs_that_are_seen():
    module, tensors = build(SMALL), draw_named(101)[0]
    stats = module(*tensors, MASK, context=AttentionContext(collect_stats=True)).stats
    assert module.flops(BATCH, 101, 101, MASK) == 4 * DIM * int(stats.attended.expand(BATCH, HEADS).sum())


def test_memory_stays_far_below_all_pairs(largest_tensor, monkeypatch):
    monkeypatch.setattr(rules, "FUSED_BYTES", 2**16)
    q, k, v = torch.randn(3, 1, 1, 8192, 64, generator=torch.Generator().manual_seed(0)).unbind()
    with largest_tensor() as largest, torch.no_grad():
        build({}, dim=64, heads=1, kv_heads=1)(q, k, v, MASK)
    assert largest.elements < 8192 * 8192 / 15  # the keys and values of a global block's list, in bytes


def test_wrong_arguments_name_what_was_expected():
    for field in ("block_size", "window_blocks", "num_random_blocks"):
        with pytest.raises(ValueError, match=f"--attention.{field} must be"):
            build({field: -1})
    tensors, _, named = draw_named(20)
    with pytest.raises(ValueError, match=r"global_tokens must be \(2, 20\), got \(2, 19\)"):
        build(SMALL)(*tensors, MASK, context=AttentionContext(global_tokens=named[:, 1:]))


# ----- transformers' own attention


def theirs(monkeypatch=None, rand_attn=None):
    """Their layer in evaluation mode, float64; with `rand_attn` (heads, blocks - 2, r) as its random blocks."""
    package = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    config = package.BigBirdConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        block_size=4,
        num_random_blocks=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = package.BigBirdBlockSparseAttention(config).double().eval()
    if rand_attn is not None:
        monkeypatch.setattr(layer, "_bigbird_block_rand_mask_with_head", lambda **_: list(rand_attn))
    masks = package.BigBirdModel.create_masks_for_block_sparse_attn
    return layer, lambda hidden, valid: run_theirs(layer, hidden, masks(valid.double(), 4))


def run_theirs(layer, hidden, masks):
    blocked, band, rows, keys = masks
    return layer(
        hidden, band_mask=band, from_mask=rows, to_mask=keys, from_blocked_mask=blocked, to_blocked_mask=blocked
    )[0]


def projections(layer, hidden):
    linears = (layer.query, layer.key, layer.value)
    return [x(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in linears]


@pytest.mark.parametrize("padded", [False, True])
def test_against_transformers_given_our_random_blocks(padded, monkeypatch):
    length = 48
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(BATCH, length, HEADS * DIM, generator=g, dtype=torch.float64)
    valid = torch.rand(BATCH, length, generator=g) >= (0.2 if padded else 0.0)
    valid[:, ::4] = True  # every block holds a real token, so that the last block is the same
    module = build(SMALL, kv_heads=HEADS)
    layer, _ = theirs()
    tensors = projections(layer, hidden)
    fixed, _ = fixed_blocks(length, SMALL, valid, None)
    drawn = (layout_of(module, tensors, valid) & ~fixed[:, None])[0, :, 1:-1]
    chosen = drawn.nonzero()[:, -1].view(HEADS, length // 4 - 2, 2)

    layer, run = theirs(monkeypatch, chosen.numpy())
    got = module(*projections(layer, hidden), AttentionMask(key_valid=valid)).out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(got[valid], run(hidden, valid)[valid], rtol=0, atol=1e-12)


def test_fault_of_theirs_evaluation_reads_block_0_again_instead_of_random_blocks():
    """Their random blocks are all block 0 then, which counts three times (once global, twice "random")."""
    length = 48
    layer, run = theirs()
    hidden = torch.randn(1, length, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    everything = torch.ones(1, length, dtype=torch.bool)
    q, k, v = projections(layer, hidden)
    rows = slice(20, 24)  # block 5: sees 0, 4, 5, 6 and 11
    keys = torch.cat([torch.arange(4)] * 3 + [torch.arange(16, 28), torch.arange(44, 48)])
    weights = (q[:, :, rows] @ k[:, :, keys].transpose(-1, -2) * DIM**-0.5).softmax(-1)
    expected = (weights @ v[:, :, keys]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(run(hidden, everything)[:, rows], expected, rtol=0, atol=1e-12)


def test_fault_of_theirs_more_padding_moves_real_rows():
    """Their last global block is the padded tensor's; ours is the last that holds a real token."""
    length, more = 48, 56
    layer, run = theirs()
    hidden = torch.randn(1, more, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = (torch.arange(more) < length)[None]
    with torch.no_grad():
        short, long = run(hidden[:, :length], valid[:, :length]), run(hidden, valid)[:, :length]
    assert float((short - long).abs().max()) > 1e-3
    module = build(SMALL, kv_heads=HEADS)
    ours = [
        module(*projections(layer, hidden[:, :n]), AttentionMask(key_valid=valid[:, :n])).out[:, :, :length]
        for n in (length, more)
    ]
    torch.testing.assert_close(*ours, rtol=0, atol=1e-12)
