"""AST's blocks summed up by several means: one a token is the true mass; pieces, padding and the fused choice."""

import math

import pytest
import torch

from astbench_registry.block_selection import Call, scores
from astbench_registry.interface import AttentionContext
from astbench_registry.mask import AttentionMask
from tests.oracles import HEADS, KV_HEADS, draw
from tests.registry.building import build

DIM, TOKENS = 8, 61


def layer(name, **options):
    given = {"block_size": 8, "min_blocks": 1, "density": 0.4, "sink_block": False, "query_group": 1}
    return build(name, {**given, **options}, dim=DIM)


@pytest.mark.parametrize("pattern", ["causal_self", "bidirectional_self", "causal_cross"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_a_mean_a_token_chooses_as_the_oracle(pattern, padding):
    (q, k, v), _ = draw(TOKENS, dim=DIM)
    valid = None
    if padding:
        valid = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.7
        valid[:, 16:24] = False  # a block that is all padding
        valid[:, 0] = True  # blocks count from the first real token
    mask = AttentionMask(pattern, 0, valid)
    kept = []
    for module in (layer("ast", sub_blocks=8), layer("oracle_topk"), layer("ast")):
        out = module.eval()(q, k, v, mask, context=AttentionContext(collect_stats=True))
        assert out.out.isfinite().all()
        keep = out.stats.layout.to_mask()
        kept.append(keep if valid is None or pattern == "causal_cross" else keep & valid[:, None, :, None])
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2]), "one mean a block must not find the same"


def test_the_score_is_the_mass_of_the_means():
    (q, k, v), _ = draw(64, dim=DIM)
    module, mask = layer("ast", sub_blocks=2, patterns=2), AttentionMask("causal_self")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    one = layer("ast", patterns=2)
    one.load_state_dict(module.state_dict())
    call = Call.of(module.shape, q, k, v, mask, 0.3)
    selection = module.selection(call)
    got = module.scores(call, selection)
    means = k.unflatten(2, (16, 4)).mean(3).repeat_interleave(HEADS // KV_HEADS, 1)
    gain = 0.3 * module.gain.exp()[:, None, None]
    mass = (gain * q @ means.transpose(-1, -2)).unflatten(-1, (8, 2)).add(math.log(4.0)).logsumexp(-1)
    block = k.unflatten(2, (8, 8)).mean(3).repeat_interleave(HEADS // KV_HEADS, 1)
    learned = one.scores(call, selection) - gain * q @ block.transpose(-1, -2)
    seen = selection.visible  # scores of blocks in the future mean nothing
    torch.testing.assert_close(got * seen, (mass + learned) * seen, rtol=1e-9, atol=1e-9)


def test_in_pieces_the_same_with_gradients(monkeypatch):
    results = []
    for rows, keys in ((scores.ROWS, scores.KEYS), (4, 8)):
        monkeypatch.setattr(scores, "ROWS", rows)
        monkeypatch.setattr(scores, "KEYS", keys)
        module = layer("ast", sub_blocks=4).train()
        (q, k, v), _ = draw(TOKENS, dim=DIM)
        call = Call.of(module.shape, q, k, v, AttentionMask("causal_self"), 0.3)
        selection = module.selection(call)
        # Of blocks in the future scores mean nothing: a piece does not compute those that none of its rows sees.
        found = module.scores(call, selection).masked_fill(~selection.candidates, 0.0)
        results.append((found, *torch.autograd.grad(found.square().sum(), (module.gain, module.key_weight))))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)
    assert all(grad.abs().sum() > 0 for grad in results[0][1:])


def test_several_means_are_not_fused():
    q, k, v = (x.float() for x in draw(64, dim=DIM)[0])
    module, mask = layer("ast", sub_blocks=2).float().eval(), AttentionMask("causal_self")
    assert not module.fusible(Call.of(module.shape, q, k, v, mask, 0.3))


def test_sub_blocks_divide_the_block():
    with pytest.raises(ValueError, match=r"sub_blocks must be a divisor of block_size \(8\)"):
        layer("ast", sub_blocks=3)
