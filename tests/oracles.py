"""What tests of attention share: random inputs, who sees whom, softmax written out, and when two results are one.

Everything is seeded and in float64, and every size is another number, so that a swapped axis shows.
"""

import torch
from torch.utils.flop_counter import sdpa_flop

BATCH, HEADS, KV_HEADS, DIM, HIDDEN = 2, 6, 3, 5, 7
SELF = ["bidirectional_self", "causal_self"]
PATTERNS = [*SELF, "bidirectional_cross", "causal_cross"]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative root mean square of an error. A wrong window is only 3.6e-2 off in that measure."""


def draw(
    length, keys=None, *, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, hidden=0, padding=0.0, seed=0,
    grad=False,
):  # fmt: skip
    """Random inputs of one call.

    Args:
        length: Queries.
        keys: Keys; as many as queries when left out.
        batch, heads, kv_heads, dim: The other sizes.
        hidden: Width of the layer's own input, drawn as a fourth tensor; none at 0.
        padding: Share of keys that are padding.
        seed: Of the generator, or the generator itself; `None`: the length.
        grad: Whether the tensors take gradients.

    Returns: `[q, k, v]` or `[q, k, v, hidden]`, and which keys are real: bool `(batch, keys)`, `None` without padding.
    """
    keys = keys or length
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(length if seed is None else seed)
    shapes = [(heads, length, dim), (kv_heads, keys, dim), (kv_heads, keys, dim), *([(length, hidden)] * bool(hidden))]
    tensors = [torch.randn(batch, *shape, generator=g, dtype=torch.float64) for shape in shapes]
    valid = torch.rand(batch, keys, generator=g) >= padding if padding else None
    if valid is not None:
        valid[:, 0] = True  # variants count from the first real token, oracles from row 0
    return [x.requires_grad_(grad) for x in tensors], valid


def real_keys(valid, k):
    """`valid` itself, or without padding that every key of `k` is real: bool `(batch, keys)`."""
    return torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if valid is None else valid


def draw_padded(length, *, padding=0.0, **options):
    """As :func:`draw`, with a run of padding at the end of the first sequence; a mask is there without padding too."""
    tensors, valid = draw(length, padding=padding, **options)
    if padding:
        valid[0, -length // 4 :] = False
    return tensors, real_keys(valid, tensors[1])


def visible(length, keys, pattern, valid=None, offset=0):
    """Who may see whom, bool `(batch or 1, 1, length, keys)`, the first query standing at `offset`."""
    allowed = torch.ones(length, keys, dtype=torch.bool)
    allowed = (allowed.tril(offset) if pattern == "causal_self" else allowed)[None, None]
    return allowed if valid is None else allowed & valid[:, None, None, :]


def normalised(weights):
    """Each row divided by its sum; rows of zeros stay."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def attention_weights(q, k, allowed, scale=None):
    """The definition, `(batch, heads, queries, keys)`: exp(logits) over the allowed pairs; rows of nothing are zero."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return normalised(torch.where(allowed, logits.exp(), 0.0))


def softmax_attention(q, k, v, allowed, scale=None):
    """Softmax attention over the allowed pairs, bool broadcastable to `(batch, heads, queries, keys)`."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("bhij,bhjd->bhid", attention_weights(q, k, allowed, scale), v)


def relative_error(got, expected):
    """Root mean square of the difference over that of what was expected, the measure of :data:`TOLERANCE`."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_same(got, expected, sources, *, gradients=1e-11, rtol=0.0):
    """Two outputs agree within 1e-12, and so do, within `gradients`, those of one random sum over each."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    found, wanted = (
        torch.autograd.grad((x * weight).sum(), sources, allow_unused=True, materialize_grads=True)
        for x in (got, expected)
    )
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=gradients)


FUSED_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v)
}
"""For :class:`FlopCounterMode`, which does not know this name."""
