"""Arguments outside the contract: a ValueError that names the argument, the same for every backend."""

from dataclasses import replace

import pytest
import torch

from astbench_kernels import BlockLayout, block_sparse_attention, sparse_backends
from astbench_registry.mask import AttentionMask

HEADS, LENGTH, SIZE = 2, 12, 4


def call(**changes):
    """The keyword arguments of a right call, some replaced."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, 8, generator=g) for _ in range(3))
    keep = torch.ones(1, HEADS, LENGTH, LENGTH // SIZE, dtype=torch.bool)
    layout = BlockLayout.from_mask(keep, block_size=SIZE, query_group=1, query_length=LENGTH, key_length=LENGTH)
    right = {"q": q, "k": k, "v": v, "layout": layout, "key_valid": None, "block_bias": None}
    return {name: changes.get(name, value) for name, value in right.items()}


def lists(*blocks):
    """The right layout with other lists, the same in every row."""
    layout = call()["layout"]
    indices = torch.tensor(blocks, dtype=torch.int32).expand(1, HEADS, LENGTH, -1).contiguous()
    return replace(layout, indices=indices, counts=torch.full_like(layout.counts, len(blocks)))


VALID = torch.ones(1, LENGTH)
WRONG = {
    "repeated": ({"layout": lists(1, 1)}, "layout.indices must name each block of a list once"),
    "repeated-apart": ({"layout": lists(0, 1, 0)}, "layout.indices must name each block of a list once"),
    "beyond": ({"layout": lists(0, 3)}, "layout.indices must name blocks 0 to 2"),
    "float-lists": ({"layout": replace(lists(0), indices=lists(0).indices.float())}, "layout.indices must be int32"),
    "integer-mask": ({"key_valid": VALID.long()}, "key_valid must be bool"),
    "float-mask": ({"key_valid": VALID}, "key_valid must be bool"),
    "integer-bias": ({"block_bias": torch.zeros(1, HEADS, LENGTH, 3, dtype=torch.long)}, "block_bias must be floating"),
    "integers": ({n: torch.ones(1, HEADS, LENGTH, 8, dtype=torch.long) for n in "qkv"}, "q, k and v must be float"),
    "complex": ({n: torch.ones(1, HEADS, LENGTH, 8, dtype=torch.cfloat) for n in "qkv"}, "q, k and v must be float"),
    "meta-q": ({"q": torch.empty(1, HEADS, LENGTH, 8, device="meta")}, "q is on the meta device"),
    "meta-mask": ({"key_valid": VALID.bool().to("meta")}, "key_valid is on the meta device"),
    "three-dimensions": ({"k": torch.zeros(HEADS, LENGTH, 8), "key_valid": VALID.bool()}, "q, k and v must be"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", *sparse_backends()])
@pytest.mark.parametrize(("changes", "reason"), WRONG.values(), ids=WRONG)
def test_is_refused_by_name(backend, changes, reason):
    with pytest.raises(ValueError, match=reason):
        block_sparse_attention(**call(**changes), backend=backend)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_lists_that_were_written_into_are_looked_at_again(mode):
    """Those that a layout made itself are not, as long as nobody changes them."""
    with mode():
        _look_again()


def _look_again():
    layout = call()["layout"]
    assert layout.sound and layout.expand_heads(2 * HEADS).sound and not replace(layout, query_offset=0).sound
    for name, value in (("indices", 3), ("counts", 9)):
        spoilt = call()["layout"]
        getattr(spoilt, name).fill_(value)
        with pytest.raises(ValueError, match=f"layout.{name} must"):
            block_sparse_attention(**call(layout=spoilt))


def test_padding_of_lists_is_never_looked_at():
    layout = lists(0, 2)
    padded = replace(layout, indices=torch.nn.functional.pad(layout.indices, (0, 1), value=-7))
    plain, _ = block_sparse_attention(**call(layout=layout))
    assert torch.equal(block_sparse_attention(**call(layout=padded))[0], plain)


@pytest.mark.parametrize("backend", ["reference", "gather", "flex"])
def test_the_order_of_a_list_does_not_matter(backend):
    plain, other = call(layout=lists(0, 2)), call(layout=lists(2, 0))
    for one, two in zip(*(block_sparse_attention(**x, backend=backend) for x in (plain, other)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("backend", ["reference", "gather", "flex"])
def test_a_second_derivative_is_refused(backend):
    given = call()
    inputs = [given[name].requires_grad_() for name in "qkv"]
    out, lse = block_sparse_attention(**given, backend=backend)
    for what in (out.sum(), lse.sum()):
        with pytest.raises(ValueError, match="create_graph"):
            torch.autograd.grad(what, inputs, create_graph=True, allow_unused=True)
    torch.autograd.grad(out.sum() + lse.sum(), inputs)


@pytest.mark.parametrize("valid", [VALID, VALID.long(), VALID[0].bool()])
@pytest.mark.parametrize("name", ["key_valid", "query_valid"])
def test_a_mask_of_other_values_is_refused(name, valid):
    with pytest.raises(ValueError, match=f"{name} must be bool"):
        AttentionMask(**{name: valid})
