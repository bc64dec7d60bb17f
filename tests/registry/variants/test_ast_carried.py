"""What a carried list's choice learns by: the row that chose a block first."""

import pytest
import torch

from astbench_kernels import soft_top_k
from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.block_selection import Call
from astbench_registry.variants.ast import attention

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=8)
OPTIONS = {"block_size": 4, "top_k": 5, "min_blocks": 1, "lists": "carried", "query_tile": 8}


def layer(**options):
    torch.manual_seed(0)
    module = build_attention("ast", {**OPTIONS, **options}, SHAPE).double().train()
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return module


def inputs(length, keys, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((4, length), (2, keys), (2, keys))
    return [torch.randn(2, heads, n, 8, generator=g, dtype=torch.float64) for heads, n in shapes]


@pytest.mark.parametrize("offset", [0, 13])
def test_an_entry_has_the_log_probability_of_its_first_row(offset):
    module, (q, k, v) = layer(), inputs(50 - offset, 50)
    context, mask = AttentionContext(summaries=module.new_cache_state()), AttentionMask("causal_self", offset)
    if offset:  # the first rows of the tile came in a call before
        with torch.no_grad():
            before = [x[:, :, :offset] for x in inputs(50, 50)]
            module.eval()(before[0], k[:, :, :offset], v[:, :, :offset], AttentionMask("causal_self"), context=context)
        module.train()
    call = Call.of(SHAPE, q, k, v, mask, None, context)
    selection = module.selection(call)
    scores = module.scores(call, selection)
    keep = module.choose(scores.detach(), call, selection)
    layout = module.layout(keep, call, selection)
    bias = module._gate(scores, keep, layout, selection)
    learned = module.selector_losses(scores, keep, layout, call, selection).bias
    weight = torch.randn(learned.shape, generator=torch.Generator().manual_seed(1), dtype=learned.dtype)
    wanted = torch.zeros((), dtype=bias.dtype)
    number = 0
    for place in layout.slots.nonzero().tolist():
        batch, head, tile, _ = place
        row = (offset // 8 + tile) * 8 + int(layout.since[tuple(place)]) - offset
        if row >= 0:
            wanted = wanted + weight[tuple(place)] * bias[batch, head, row, int(layout.indices[tuple(place)])]
            number += 1
    assert number > 100
    for parameter in module.parameters():
        got, expected = (
            torch.autograd.grad(x, parameter, retain_graph=True, allow_unused=True)[0]
            for x in ((learned * weight).sum(), wanted)
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [{}, {"index_dim": 4}, {"budget": "adaptive", "share": 0.1, "top_k": None}])
@pytest.mark.parametrize("length", [50, 3])
def test_rows_that_chose_nothing_first_need_no_threshold(monkeypatch, options, length):
    """In all rows, and in those alone that chose a block first: the same output, losses and gradients."""
    seen = []

    def watched(scores, *rest, **more):
        seen.append(scores.numel())
        return soft_top_k(scores, *rest, **more)

    monkeypatch.setattr(attention, "soft_top_k", watched)
    found = []
    for chosen_in in (attention._chosen_in, lambda row, layout, scores: None):
        monkeypatch.setattr(attention, "_chosen_in", chosen_in)
        module = layer(**options)
        leaves = [x.requires_grad_() for x in inputs(length, length)]
        output = module(*leaves, AttentionMask("causal_self"))
        loss = output.out.square().sum() + sum(output.losses.values())
        wanted = [*leaves, *module.parameters()]
        found.append((output.out, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(found[0], found[1])
    assert seen[0] < seen[1]
    assert length == 3 or any((grad != 0).any() for grad in found[0][4:])
