"""Every schedule in a CUDA graph: nothing waits for the device, and a replay computes with what inputs hold then."""

import pytest
import torch

from astbench_kernels import BlockLayout, block_sparse_attention
from astbench_registry import AttentionMask, AttentionShape, build_attention

BATCH, HEADS, KV_HEADS, DIM, SIZE = 2, 6, 3, 64, 64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def tensors(queries, keys, seed, **options):
    generator = torch.Generator("cuda").manual_seed(seed)
    made = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(BATCH, HEADS, queries, DIM, **made)
    k, v = (torch.randn(BATCH, KV_HEADS, keys, DIM, **made) for _ in range(2))
    return [x.requires_grad_(**options) if options else x for x in (q, k, v)]


def replayed(call, inputs, fresh):
    """What a graph captured with `inputs` gives once they hold `fresh`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled and loaded at the first call
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    with torch.no_grad():
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    return out


def random_layout(queries, keys, group, offset):
    generator = torch.Generator().manual_seed(3)
    groups = -(-(offset + queries) // group) - offset // group
    keep = torch.rand(BATCH, HEADS, groups, -(-keys // SIZE), generator=generator) < 0.4
    return BlockLayout.from_mask(
        keep.cuda(), block_size=SIZE, query_group=group, query_length=queries, key_length=keys, query_offset=offset
    )


@pytest.mark.parametrize("group", [1, 64], ids=["key-major", "query-major"])
def test_forward_and_backward(group):
    layout, grad = random_layout(500, 500, group, 0), torch.randn(BATCH, HEADS, 500, DIM, device="cuda").bfloat16()
    inputs, fresh = tensors(500, 500, 0, requires_grad=True), tensors(500, 500, 1, requires_grad=True)

    def call(q, k, v):
        out, _ = block_sparse_attention(q, k, v, layout, causal=True, backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    got = replayed(lambda: call(*inputs), inputs, fresh)
    for one, other in zip(got, call(*fresh), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)  # additions to d_q come in any order


def test_decoding_step():
    layout = random_layout(1, 5000, 1, 4999)
    inputs, fresh = tensors(1, 5000, 0), tensors(1, 5000, 1)

    def call(q, k, v):
        return block_sparse_attention(q, k, v, layout, causal=True, backend="triton")[0]

    assert torch.equal(replayed(lambda: call(*inputs), inputs, fresh), call(*fresh))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ast", "pooled_topk"])
@pytest.mark.parametrize("queries", [1, 3000])
def test_layer_with_its_choice(name, queries):
    module = build_attention(name, {"block_size": SIZE}, AttentionShape(HEADS, KV_HEADS, DIM)).cuda().bfloat16().eval()
    mask = AttentionMask("causal_self", query_offset=3000 - queries)
    inputs, fresh = tensors(queries, 3000, 0), tensors(queries, 3000, 1)
    got = replayed(lambda: module(*inputs, mask).context, inputs, fresh)
    torch.testing.assert_close(got, module(*fresh, mask).context, rtol=1e-2, atol=1e-2)
