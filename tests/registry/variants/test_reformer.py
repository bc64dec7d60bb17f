"""LSH attention against matrices of who meets whom, and against the reformer_pytorch package."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask
from astbench_registry.conformance import check
from astbench_registry.errors import CapabilityError
from astbench_registry.registry import make_config
from astbench_registry.variants.reformer import bucketed_attention, lsh_buckets
from tests import oracles
from tests.oracles import BATCH, DIM, SELF, assert_same, normalised
from tests.registry.building import build

HEADS = 3
draw = partial(oracles.draw, heads=HEADS, kv_heads=HEADS)
draw_padded = partial(oracles.draw_padded, heads=HEADS, kv_heads=HEADS)
PACKAGE = {"backend": "reformer_pytorch", "allow_duplicate_attention": True}
KINDS = {  # the default, the paper's text, the packages
    "distinct": {},
    "same-bucket": {"attend_across_buckets": False},
    "duplicates": {"allow_duplicate_attention": True},
    "same-bucket-duplicates": {"attend_across_buckets": False, "allow_duplicate_attention": True},
}


def reformer(options=None, *, heads=HEADS, **shape):
    return build("reformer", options, heads=heads, kv_heads=heads, **{"train": False, **shape})


def meetings(buckets, valid, size, *, causal, attend_across_buckets=True):
    """How often each pair meets, `(batch, heads, length, length)`, and who was ever in a first chunk; plain loops."""
    batch, heads, rounds, length = buckets.shape
    number = torch.zeros(batch, heads, length, length)
    first = torch.zeros(batch, heads, length, dtype=torch.bool)
    for b, h, r in ((b, h, r) for b in range(batch) for h in range(heads) for r in range(rounds)):
        bucket = buckets[b, h, r].tolist()
        order = sorted(valid[b].nonzero().flatten().tolist(), key=lambda i: (bucket[i], i))
        place = torch.full((length,), -(10**6))
        place[order] = torch.arange(len(order))
        chunk = torch.div(place, size, rounding_mode="floor")
        back = chunk[:, None] - chunk
        meet = valid[b][:, None] & valid[b] & ((back == 0) | (back == 1))
        if not attend_across_buckets:
            meet &= buckets[b, h, r][:, None] == buckets[b, h, r]
        number[b, h] += meet
        first[b, h] |= chunk == 0
    return (number.tril() if causal else number), first


def oracle(q, v, number, valid, *, scale=DIM**-0.5, allow_duplicate_attention=False):
    """One softmax over all pairs that meet, keys as long as sqrt(d), oneself only if nobody else is there."""
    k = q / q.norm(dim=-1, keepdim=True) * q.shape[-1] ** 0.5
    times = number.double() if allow_duplicate_attention else (number > 0).double()
    alone = torch.diag_embed((number > 0).sum(-1) == 1)
    times = torch.where(torch.eye(q.shape[2], dtype=torch.bool), 0.0, times) + alone
    weights = times * (q @ k.transpose(-1, -2) * scale).exp()
    return torch.where(valid[:, None, :, None], normalised(weights) @ v, 0.0)


def random_buckets(length, rounds, most, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, (BATCH, HEADS, rounds, length), generator=g)


# ----- the computation, buckets given


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("length", "rounds", "size"), [(1, 2, 4), (63, 1, 8), (63, 3, 4), (127, 2, 16), (1000, 2, 64)])
def test_given_buckets_it_is_softmax_over_the_pairs_that_meet(length, rounds, size, kind, causal, padding):
    (q, _, v), valid = draw_padded(length, padding=padding, grad=True)
    buckets = random_buckets(length, rounds, 2 * length // size + 2)
    across = kind.get("attend_across_buckets", True)
    number, _ = meetings(buckets, valid, min(size, length), causal=causal, attend_across_buckets=across)
    duplicates = kind.get("allow_duplicate_attention", False)
    expected = oracle(q, v, number, valid, allow_duplicate_attention=duplicates)
    options = {"bucket_size": size, "causal": causal, "scale": DIM**-0.5, "count": True, **kind}
    got, attended = bucketed_attention(q, v, buckets, valid=valid, **options)
    assert_same(got, expected, (q, v))
    torch.testing.assert_close(attended, (number > 0).sum((-1, -2)).double(), rtol=0, atol=1e-6)


def test_given_buckets_nothing_later_moves_what_is_earlier():
    """What leaks the future is the choice alone."""
    (q, k, v), valid = draw_padded(61)
    buckets, options = random_buckets(61, 2, 10), {"bucket_size": 4, "causal": True, "scale": 0.5}
    before, _ = bucketed_attention(q, v, buckets, valid=valid, **options)
    q, v = (torch.cat([x[:, :, :30], k[:, :, 30:]], 2) for x in (q, v))
    after, _ = bucketed_attention(q, v, buckets, valid=valid, **options)
    assert torch.equal(before[:, :, :30], after[:, :, :30])


# ----- the choice


def own_buckets(module, q, valid, size, step=0):
    """As the module hashes, written out: each sequence alone, without its padding."""
    found = torch.zeros(*q.shape[:2], module.config.num_hashes, q.shape[2], dtype=torch.long)
    for b in range(q.shape[0]):
        real = valid[b].nonzero().flatten()
        half = max(1, -(-len(real) // (2 * size)))
        rotations = module.rotations(q.shape[2], step).double()[..., :half]
        rotated = torch.einsum("hnd,rdc->hrnc", q[b, :, real], rotations)
        found[b, :, :, real] = torch.cat([rotated, -rotated], -1).argmax(-1)
    return found


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_pattern_is_exact(kind, pattern, padding):
    """With value = identity, output > 0 is the pattern."""
    size, options = 61, {"num_hashes": 2, "bucket_size": 4, **kind}
    (q, k, _), valid = draw_padded(size, dim=size, padding=padding)
    module = reformer(options, dim=size)
    eye = torch.eye(size, dtype=torch.float64).expand_as(k)
    out = module(q, k, eye, AttentionMask(pattern, key_valid=valid), context=AttentionContext(collect_stats=True))
    across = kind.get("attend_across_buckets", True)
    buckets, causal = own_buckets(module, q, valid, 4), pattern == "causal_self"
    number, _ = meetings(buckets, valid, 4, causal=causal, attend_across_buckets=across)
    alone = torch.diag_embed((number > 0).sum(-1) == 1)
    off_diagonal = (number > 0) & ~torch.eye(size, dtype=torch.bool)
    assert torch.equal(out.out > 0, off_diagonal | alone)
    assert 0.01 < float(out.stats.density.max()) < 0.6, "the case must leave something out"
    torch.testing.assert_close(out.stats.attended, (number > 0).sum((-1, -2)).double(), rtol=0, atol=1e-6)


def test_keys_and_the_removed_padding_do_not_matter():
    (q, k, v), valid = draw_padded(127, padding=0.3)
    module = reformer({"bucket_size": 8})
    got = module(q, k, v, AttentionMask(key_valid=valid)).out
    assert torch.equal(got, module(q, torch.full_like(k, torch.nan), v, AttentionMask(key_valid=valid)).out)
    for b in range(BATCH):
        alone = [x[b : b + 1, :, valid[b]] for x in (q, k, v)]
        expected = module(*alone, AttentionMask()).out
        torch.testing.assert_close(got[b : b + 1, :, valid[b]], expected, rtol=0, atol=1e-12)


def test_rotations_follow_seed_layer_and_step_and_nothing_else():
    first = reformer().rotations(1000, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, reformer().rotations(1000, 3))
    assert torch.equal(first, reformer().rotations(50_000, 3)[..., : first.shape[-1]]), "the longest sequence shows"
    assert torch.equal(state, torch.get_rng_state())
    for other in (
        reformer().rotations(1000, 4),
        reformer(layer=1).rotations(1000, 3),
        reformer({"seed": 1}).rotations(1000, 3),
    ):
        assert abs(float((first * other).mean())) < 0.2


def test_rotations_are_redrawn_while_training_only():
    tensors, _ = draw(127)
    runs = {}
    for train in (True, False):
        module = reformer({"bucket_size": 8, "num_hashes": 1}, train=train)
        for step in (0, 1):
            runs[train, step] = module(*tensors, AttentionMask(), context=AttentionContext(step=step)).out
    assert not torch.equal(runs[True, 0], runs[True, 1])
    assert torch.equal(runs[False, 0], runs[False, 1])


def test_the_choice_is_not_strictly_causal():
    (q, k, v), _ = draw(128)
    module, mask = reformer({"bucket_size": 8, "num_hashes": 2}), AttentionMask("causal_self")
    before = module(q, k, v, mask).out
    later = torch.cat([q[:, :, :100], k[:, :, 100:]], 2)
    moved = (module(later, k, v, mask).out != before)[:, :, :100].any(-1)
    assert float(moved.double().mean()) > 0.3


# ----- cost


@pytest.mark.parametrize(("length", "options"), [(1, {}), (50, {}), (127, {"bucket_size": 8, "num_hashes": 3})])
@pytest.mark.parametrize("pattern", SELF)
def test_flops_are_what_the_counter_sees(pattern, length, options):
    tensors, _ = draw(length)
    mask, module = AttentionMask(pattern), reformer(options)
    with FlopCounterMode(display=False) as counter:
        module(*tensors, mask)
    assert module.flops(BATCH, length, length, mask) == counter.get_total_flops()


def test_memory_is_linear(largest_tensor):
    length = 8192
    tensors, _ = draw(length, batch=1, heads=1, kv_heads=1)
    with largest_tensor() as largest, torch.no_grad():
        reformer(heads=1)(*tensors, AttentionMask())
    assert largest.elements <= length * 2 * 64  # a chunk of 64 and the one before, for every token


# ----- transformers


@pytest.mark.parametrize("causal", [False, True])
def test_within_one_chunk_it_is_transformers(causal):
    """The authors' scale: keys as long as sqrt(d), so that a logit is q . k / |k|."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=24, num_attention_heads=HEADS, attention_head_size=8, lsh_attn_chunk_length=64, num_buckets=2,
        num_hashes=1, is_decoder=causal, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs, x = LSHSelfAttention(config).double().eval(), draw(40, dim=24, heads=1, kv_heads=1)[0][0][:, 0]
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(2))
    expected = theirs(x, num_hashes=1).hidden_states
    q, v = (layer(x).unflatten(-1, (HEADS, 8)).transpose(1, 2) for layer in (theirs.query_key, theirs.value))
    module = reformer({"num_hashes": 1, "bucket_size": 64}, dim=8)
    got = module(q, q, v, AttentionMask(SELF[causal])).out.transpose(1, 2).flatten(2)
    # It normalises with an epsilon of 1e-6.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# ----- the package


@pytest.fixture
def package():
    return pytest.importorskip("reformer_pytorch", reason="reformer-pytorch is not installed")


def run_package(package, q, v, *, size=8, rounds=2, causal=False, seed=0, **options):
    """Its output, and its buckets without the rounds' offsets."""
    theirs = package.LSHAttention(bucket_size=size, n_hashes=rounds, causal=causal, **options).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out, _, buckets = theirs(q.flatten(0, 1), v.flatten(0, 1))
    buckets = buckets.view(*q.shape[:2], rounds, -1)
    return out.view_as(q), buckets - torch.arange(rounds)[:, None] * (q.shape[2] // size)


def test_buckets_are_the_packages_given_its_rotations(package):
    (q, _, v), _ = draw(128)
    _, expected = run_package(package, q, v, rounds=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rotations = torch.randn(1, DIM, 3, 8, dtype=torch.float64)[0].transpose(0, 1)
    assert torch.equal(lsh_buckets(q, rotations, torch.full((BATCH,), 16)), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_given_the_packages_buckets_it_is_the_package(package, kind, causal):
    """In rows that are in no round's first chunk; there the package looks into another round."""
    (q, _, v), valid = draw_padded(256)
    kind = {"allow_duplicate_attention": False, **kind}
    expected, buckets = run_package(package, q, v, causal=causal, **kind)
    # Its keys have length 1, under the same factor 1 / sqrt(d).
    got, _ = bucketed_attention(q, v, buckets, valid=valid, bucket_size=8, causal=causal, scale=1 / DIM, **kind)
    _, first = meetings(buckets, valid, 8, causal=causal)
    assert float(first.double().mean()) < 0.1
    # It divides by N_ij + 1e-9, and its sums of rounds in which a token is alone round at 5e4, to 7e-12.
    atol = (1e-11 if causal else 1e-12) if kind["allow_duplicate_attention"] else 1e-8
    torch.testing.assert_close(got[~first], expected[~first], rtol=0, atol=atol)


def test_fault_first_chunk_looks_into_another_round(package):
    (q, _, _), valid = draw_padded(64, dim=64)
    eye = torch.eye(64, dtype=torch.float64).expand(BATCH, HEADS, 64, 64)
    out, buckets = run_package(package, q, eye)
    number, first = meetings(buckets, valid, 8, causal=False)
    foreign = (out > 0) & (number == 0)
    assert foreign.any(-1)[first].double().mean() > 0.5
    assert not foreign[~first].any()


def test_fault_removal_of_duplicates_boosts_foreign_pairs(package):
    """There a pair counts 0 rounds, and log(0 + 1e-9) is subtracted: its weight grows by e^20.7."""
    (q, _, _), valid = draw_padded(64, dim=64)
    eye = torch.eye(64, dtype=torch.float64).expand(BATCH, HEADS, 64, 64)
    out, buckets = run_package(package, q, eye, allow_duplicate_attention=False)
    number, first = meetings(buckets, valid, 8, causal=False)
    foreign = torch.where(number == 0, out, 0.0).sum(-1)
    hit = first & (foreign > 0)
    assert hit.any() and float(foreign[hit].min()) > 0.999


def test_fault_the_package_is_not_strictly_causal_either(package):
    (q, k, v), _ = draw(128)
    before, _ = run_package(package, q, v, causal=True)
    later = torch.cat([q[:, :, :100], k[:, :, 100:]], 2)
    after, _ = run_package(package, later, v, causal=True)
    assert float((before != after)[:, :, :100].any(-1).double().mean()) > 0.3


def test_backend_is_the_package_and_leaves_the_random_state_alone(package):
    tensors, _ = draw(64, dim=64)
    tensors[2] = torch.eye(64, dtype=torch.float64).expand_as(tensors[1])
    module = reformer({**PACKAGE, "bucket_size": 8, "num_hashes": 2}, dim=64)
    state = torch.get_rng_state()
    out = module(*tensors, AttentionMask("causal_self"), context=AttentionContext(collect_stats=True))
    assert torch.equal(state, torch.get_rng_state())
    assert out.stats.backend == "reformer_pytorch"
    seen = (out.out > 0) | torch.eye(64, dtype=torch.bool)  # oneself is computed, and left out
    assert torch.equal(out.stats.attended, seen.sum((-1, -2)).double())
    with pytest.raises(CapabilityError, match="takes no padding and lengths in multiples of 16, got 63"):
        module(*(x[:, :, :63] for x in tensors), AttentionMask())


def test_backend_conforms_where_it_says_it_can(package):
    failures = [r for r in check("reformer", PACKAGE) if r.status == "fail"]
    assert not failures


def test_backend_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reformer_pytorch", None)
    with pytest.raises(ValueError, match="package reformer_pytorch is not installed; pip install 'astbench"):
        reformer(PACKAGE)


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"allow_duplicate_attention must be true with --attention\.backend=reformer"):
        make_config("reformer", {"backend": "reformer_pytorch"})
    with pytest.raises(ValueError, match=r"--attention\.bucket_size must be at least 1 token, got 0"):
        replace(make_config("reformer", {}), bucket_size=0)
    tensors, _ = draw(9)
    with pytest.raises(ValueError, match="reformer needs all of the queries at once, got 1 of 9"):
        reformer()(tensors[0][:, :, :1], *tensors[1:], AttentionMask("causal_self", query_offset=8))
