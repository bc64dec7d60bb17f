"""A few rows at a time choose what all rows at once would."""

import pytest
import torch

from astbench_registry import AttentionContext, AttentionShape, build_attention
from astbench_registry.block_selection import Call, factored
from astbench_registry.mask import AttentionMask

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=8)
SIZE = {"block_size": 8, "density": 0.3}

MODULES = {
    "ast": ("ast", SIZE),
    "ast, groups": ("ast", {**SIZE, "query_group": 4}),
    "ast, carried": ("ast", {**SIZE, "lists": "carried", "query_tile": 16}),
    "ast, carried, parts of blocks": ("ast", {**SIZE, "sub_blocks": 2, "lists": "carried", "query_tile": 16}),
    "ast, index": ("ast", {**SIZE, "index_dim": 4, "index_pool": 2, "lists": "carried", "query_tile": 16}),
    "ast, adaptive": ("ast", {**SIZE, "budget": "adaptive", "share": 0.1, "patterns": 2}),
    "pooled_topk": ("pooled_topk", SIZE),
    "pooled_topk, groups of 3": ("pooled_topk", {"block_size": 8, "density": 0.3, "query_group": 3}),
    "moba": ("moba", {"block_size": 8, "top_k": 3, "lists": "carried", "query_tile": 16}),
    "quest": ("quest", {"block_size": 8, "top_k": 3, "dense_layers": 0}),
}


def tensors(length, keys, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((4, length), (2, keys), (2, keys))
    return [torch.randn(2, heads, n, 8, generator=g) for heads, n in shapes]


@pytest.mark.parametrize("padded", [None, "in front", "anywhere"])
@pytest.mark.parametrize("offset", [0, 48])
@pytest.mark.parametrize("name", MODULES)
def test_rows_in_parts_choose_what_all_at_once_do(monkeypatch, name, offset, padded):
    torch.manual_seed(0)
    module = build_attention(*MODULES[name], SHAPE).eval()
    for weight in module.parameters():  # else the learned term of an untrained predictor is 0
        torch.nn.init.normal_(weight, std=0.3)
    q, k, v = tensors(101, 101 + offset)
    valid = None
    if padded == "in front":
        valid = torch.ones(2, 101 + offset, dtype=torch.bool)
        valid[0, :37] = False
    if padded == "anywhere":
        valid = torch.rand(2, 101 + offset, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = AttentionMask("causal_self", offset, valid)
    call = Call.of(SHAPE, q, k, v, mask).without_padding()
    parts = []
    selection = module.selection
    monkeypatch.setattr(module, "selection", lambda call: parts.append(call.q.shape[2]) or selection(call))
    groups = 32 // (module.config.query_group or 1)
    monkeypatch.setattr(factored, "SCORES_AT_A_TIME", 2 * 4 * -(-k.shape[2] // 8) * groups)  # 32 rows
    with torch.no_grad():
        found = module.choice(call, "gather").layout
        assert sum(parts) == 101 and len(parts) > 1
        monkeypatch.setattr(module, "needs_no_scores", lambda call: False)
        expected = module.choice(call, "gather").layout
    assert parts[-1] == 101
    assert torch.equal(found.first_rows(), expected.first_rows())
    assert (found.key_length, found.query_length) == (expected.key_length, expected.query_length)


@pytest.mark.parametrize("name", ["ast, carried", "quest"])
def test_a_budget_for_all_needs_no_scores(monkeypatch, name):
    base, options = MODULES[name]
    options = {key: value for key, value in options.items() if key != "density"} | {"top_k": 4}
    options |= {"min_blocks": 1} if base == "ast" else {}
    module = build_attention(base, options, SHAPE).eval()
    scored = []
    products = module._products
    monkeypatch.setattr(module, "_products", lambda *given: scored.append(given[0].k.shape[2]) or products(*given))
    layouts = []
    for length in (32, 40):
        call = Call.of(SHAPE, *tensors(length, length), AttentionMask("causal_self"))
        with torch.no_grad():
            layouts.append(module.choice(call, "gather").layout)
    assert scored == [40]  # of four blocks every row keeps what it sees
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    assert torch.equal(layouts[0].token_mask(causal=True), causal.expand(2, 4, -1, -1))


def test_the_running_list_goes_on_behind_the_last_part(monkeypatch):
    """A prompt that ends inside a tile, in parts; the step behind it knows what the tile chose."""
    module = build_attention(*MODULES["ast, carried"], SHAPE).eval()
    q, k, v = tensors(75, 75)
    outputs = []
    with torch.no_grad():
        whole = module(q, k, v, AttentionMask("causal_self")).out
        for scores in (2 * 4 * 10 * 16, 2**20):
            monkeypatch.setattr(factored, "SCORES_AT_A_TIME", scores)
            state = module.new_cache_state()
            for start, stop in ((0, 71), (71, 74), (74, 75)):
                context = AttentionContext(summaries=state)
                mask = AttentionMask("causal_self", start)
                outputs.append(module(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask, context=context).out)
    for pieces in (outputs[:3], outputs[3:]):
        torch.testing.assert_close(torch.cat(pieces, 2), whole)


@pytest.mark.parametrize(
    "options", [{"estimator": "soft"}, {"rest": True}, {"estimator": "policy_gradient"}], ids=lambda x: next(iter(x))
)
def test_what_is_learned_by_sees_all_scores(options):
    plain, module = (build_attention("ast", {**SIZE, **more}, SHAPE) for more in ({}, options))
    call = Call.of(SHAPE, *tensors(32, 32), AttentionMask("causal_self"))
    whole = Call.of(SHAPE, *tensors(32, 32), AttentionMask())
    assert not plain.eval().needs_no_scores(call)  # with gradients
    with torch.no_grad():
        assert plain.needs_no_scores(call) and not plain.needs_no_scores(whole)
        assert not plain.train().needs_no_scores(call) and not module.needs_no_scores(call)
        assert module.eval().needs_no_scores(call) == (options == {"estimator": "policy_gradient"})


@pytest.mark.parametrize("name", ["choose", "rest_token", "selector_losses"])
def test_a_subclass_that_changes_the_choice_is_asked_for_all_scores(name):
    call = Call.of(SHAPE, *tensors(32, 32), AttentionMask("causal_self"))
    for base in ("pooled_topk", "ast"):
        plain = build_attention(base, SIZE, SHAPE).eval()
        kind = type("Mine", (type(plain),), {name: lambda self, *given: None, "fusible": lambda self, call: False})
        with torch.no_grad():
            assert plain.needs_no_scores(call)
            assert not kind(plain.config, SHAPE).eval().needs_no_scores(call)
