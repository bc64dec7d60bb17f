"""What a group may and must see, from positions."""

import pytest
import torch

from astbench_registry.block_selection.call import Call
from astbench_registry.block_selection.selector import BlockSelector
from astbench_registry.interface import AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.registry import make_config


@pytest.mark.parametrize("local", [0, 1, 3])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("room", [0, 9])
def test_a_step_of_decoding_is_a_row_of_the_whole(local, sink, room):
    config = make_config("pooled_topk", {"block_size": 4, "local_blocks": local, "sink_block": sink})
    selector, shape = BlockSelector(config), AttentionShape(1, 1, 2)
    for position in range(23):
        keys = torch.zeros(1, 1, position + 1 + room, 2)
        query, real = keys[:, :, :1], torch.ones(1, keys.shape[2], dtype=torch.bool)
        step, padded = (
            selector.selection(Call.of(shape, query, keys, keys, AttentionMask("causal_self", position, valid)))
            for valid in (None, real)
        )
        for name in ("visible", "always_kept", "candidates", "first"):
            assert torch.equal(getattr(step, name), getattr(padded, name)), (position, name)
