"""The Performer against its definition written out, and the laws of its random features."""

import io
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, build_attention
from astbench_registry.toolbox import linear as linear_attention
from astbench_registry.variants.performer import draw_features
from tests.oracles import BATCH, PATTERNS, assert_same, draw, visible
from tests.registry.building import build

FEATURES = 13


def performer(options=None, **shape):
    return build("performer", {"num_features": FEATURES, **(options or {})}, train=False, dtype=torch.float32, **shape)


def features_of(module, dtype=torch.float64):
    return module.projection(torch.device("cpu"), dtype)


def oracle(q, k, v, w, pattern, valid, scale, *, kernel="softmax", epsilon=1e-3):
    """Every weight's logarithm, `log sum_r phi_r(q_i) phi_r(k_j)`, then a softmax over the visible keys."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    q, k = q * math.sqrt(scale), k * math.sqrt(scale)
    if kernel == "relu":
        logits = torch.einsum("bhir,bhjr->bhij", (q @ w.T).relu() + epsilon, (k @ w.T).relu() + epsilon).log()
    else:
        left, right = (x @ w.T - 0.5 * (x * x).sum(-1, keepdim=True) for x in (q, k))
        logits = torch.logsumexp(left[:, :, :, None] + right[:, :, None], -1)
    allowed = visible(*logits.shape[2:], pattern, valid)
    logits = logits.masked_fill(~allowed, -torch.inf).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return logits.softmax(-1).masked_fill(~allowed, 0.0) @ v


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [1, 63, 127, 301])
def test_is_the_definition(length, pattern, padding, kernel):
    tensors, valid = draw(length, length if pattern.endswith("self") else 73, padding=padding, grad=True)
    module = performer({"kernel": kernel})
    mask = AttentionMask(pattern, key_valid=valid)
    got = module(*tensors, mask, scale=0.7).out
    expected = oracle(*tensors, features_of(module), pattern, valid, 0.7, kernel=kernel)
    got, expected = mask.real_queries(got), mask.real_queries(expected)  # a padded query's row is nobody's
    assert_same(got, expected, tensors)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_of_the_sequence_are_the_definition_too(monkeypatch, pattern, kernel):
    """Of 64 rows here; otherwise all lengths above fit into one."""
    monkeypatch.setattr(linear_attention, "PIECE_BYTES", 0)
    test_is_the_definition(301, pattern, 0.3, kernel)


@pytest.mark.parametrize("offset", [64, 150, 300])
def test_pieces_before_the_first_query_are_seen(monkeypatch, offset):
    monkeypatch.setattr(linear_attention, "PIECE_BYTES", 0)
    (q, k, v), valid = draw(301, padding=0.3)
    module, mask = performer(), AttentionMask("causal_self", offset, valid)
    expected = oracle(q, k, v, features_of(module), "causal_self", valid, 0.7)[:, :, offset:]
    got = module(q[:, :, offset:], k, v, mask, scale=0.7).out
    torch.testing.assert_close(mask.real_queries(got), mask.real_queries(expected), rtol=0, atol=1e-12)


# ----- laws of the features


def unfixed_features(count, dim, generator):
    """As published: whatever signs the QR decomposition gives."""
    rotation, _ = torch.linalg.qr(torch.randn(count // dim, dim, dim, generator=generator, dtype=torch.float64))
    length = torch.randn(count, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return rotation.mT.flatten(0, 1) * length


def estimates(w, x, y, m):
    """One estimate of exp(x . y) for each m of the features."""
    product = (w @ x - x @ x / 2).exp() * (w @ y - y @ y / 2).exp()
    return product.unflatten(0, (-1, m)).mean(-1)


def deviations(w, dim):
    """z of the mean estimate, along three directions: all ones, an axis, one at random."""
    directions = [torch.ones(dim), torch.eye(dim)[0], torch.randn(dim, generator=torch.Generator().manual_seed(5))]
    found = []
    for direction in directions:
        x = 0.7 * direction.double() / direction.norm()
        e = estimates(w, x, x, dim)
        found.append(float((e.mean() - (x @ x).exp()) / (e.std() / len(e) ** 0.5)))
    return found


@pytest.mark.parametrize("orthogonal", [True, False])
def test_features_are_unbiased(orthogonal):
    w = draw_features(20_000 * 16, 16, torch.Generator().manual_seed(0), orthogonal=orthogonal)
    assert max(map(abs, deviations(w, 16))) <= 4


def test_features_without_the_sign_fix_are_biased():
    w = unfixed_features(20_000 * 16, 16, torch.Generator().manual_seed(0))
    assert max(map(abs, deviations(w, 16))) > 40
    x = torch.full((16,), 0.7 / 4, dtype=torch.float64)
    assert -0.25 < float(estimates(w, x, x, 16).mean() / (x @ x).exp()) - 1 < -0.15


def test_variance_follows_the_law_and_orthogonality_lowers_it():
    """Independent features: (exp |x + y|^2 - 1) / m, relative to exp(x . y)^2."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(16, generator=g, dtype=torch.float64), dim=0) for _ in range(2))
    x, y = 0.6 * x, 0.5 * y
    law = (((x + y) @ (x + y)).exp() - 1) / 16
    ratio = {}
    for orthogonal in (False, True):
        w = draw_features(20_000 * 16, 16, torch.Generator().manual_seed(1), orthogonal=orthogonal)
        ratio[orthogonal] = float((estimates(w, x, y, 16) / (x @ y).exp()).var() / law)
    assert abs(ratio[False] - 1) < 0.1
    assert ratio[True] < 0.9


def test_orthogonal_features_are_orthogonal_in_blocks_with_gaussian_lengths():
    w = draw_features(1000 * 8 + 3, 8, torch.Generator().manual_seed(0))
    blocks = w[:-3].unflatten(0, (-1, 8))
    products = blocks @ blocks.mT
    off = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < 1e-12
    squares = w.square().sum(-1)  # chi-square with 8 degrees of freedom: mean 8, variance 16
    assert abs(float(squares.mean()) - 8) < 5 * 4 / 8000**0.5
    assert abs(float(squares.var()) / 16 - 1) < 0.1


@pytest.mark.parametrize("size", [0.1, 0.25])
@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_error_falls_with_the_root_of_the_number_of_features(pattern, size):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 128, 16, generator=g, dtype=torch.float64) for _ in range(3))
    q, k, mask = q * size, k * size, AttentionMask(pattern)
    shape = AttentionShape(2, 2, 16)
    dense = build_attention("dense", {}, shape)(q, k, v, mask).out
    numbers, errors = (32, 64, 128, 256, 512, 1024), []
    for m in numbers:
        options = [{"num_features": m, "seed": seed} for seed in range(24)]
        outputs = [performer(o, heads=2, kv_heads=2, dim=16)(q, k, v, mask).out for o in options]
        errors.append(float((torch.stack(outputs) - dense).square().mean().sqrt()))
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (numbers, errors))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert abs(slope + 0.5) <= 0.05, f"slope {slope:.3f}, errors {errors}"


# ----- numerical safety


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [0.25, 1.0, 4.0, 30.0])
def test_no_row_moves_when_later_tokens_change(size, dtype, kernel):
    """Within a chunk and over several; later keys are up to 30 times as large as the rest."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 200, 32, generator=g).to(dtype) for h in (4, 2, 2))
    module = performer({"num_features": 64, "kernel": kernel}, heads=4, kv_heads=2, dim=32)
    mask = AttentionMask("causal_self")
    before = module(q, k, v, mask).out
    for cut in (1, 40, 64, 130, 199):
        late = (torch.arange(200) >= cut)[:, None]
        changed = [torch.where(late, x + size * torch.randn(x.shape, generator=g).to(dtype), x) for x in (q, k, v)]
        after = module(*changed, mask).out
        torch.testing.assert_close(after[:, :, :cut], before[:, :, :cut], rtol=0, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS[:2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 4.0, 10.0, 1000.0])
def test_large_inputs_give_finite_outputs_and_gradients(size, dtype, pattern):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 150, 64, generator=g) * s for s in (size, size, 1.0))
    tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    module = performer({"num_features": 128}, heads=2, kv_heads=2, dim=64)
    got = module(*tensors, AttentionMask(pattern)).out
    assert all(x.isfinite().all() for x in (got, *torch.autograd.grad(got.float().square().sum(), tensors)))
    if size <= 4:  # relative to the values, what rounding the output costs
        exact = oracle(*(x.detach().double() for x in tensors), features_of(module), pattern, None, 1 / 8)
        allowed = 4 * max(torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=allowed)


# ----- which features are in use


def test_features_depend_on_seed_layer_and_redraw_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = features_of(performer())
    assert torch.equal(features_of(performer()), first)
    assert torch.equal(torch.rand(3), expected), "the global random state moved"
    redrawn = performer()
    redrawn.redraw = 1
    for other in (performer({"seed": 1}), performer(layer=1), redrawn):
        assert not torch.isclose(features_of(other), first).any()


def test_redraws_follow_the_training_step_and_evaluation_has_the_last():
    (q, k, v), _ = draw(20)
    mask = AttentionMask("causal_self")

    def run(module, step):
        return module(q, k, v, mask, context=AttentionContext(step=step)).out

    module = performer({"redraw_interval": 10}).train()
    by_step = [run(module, step) for step in (0, 9, 10, 19, 20)]
    assert torch.equal(by_step[0], by_step[1]) and torch.equal(by_step[2], by_step[3])
    assert not torch.isclose(by_step[1], by_step[2]).all() and not torch.isclose(by_step[3], by_step[4]).all()
    assert torch.equal(run(performer({"redraw_interval": 10}).train(), 14), by_step[2]), "a resumed run draws the same"
    assert torch.equal(run(module.eval(), 0), by_step[4])

    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = performer({"redraw_interval": 10})
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(run(loaded, 0), by_step[4])
    never = performer({"redraw_interval": 0}).train()
    assert torch.equal(run(never, 0), run(never, 10**6))


def test_features_drawn_in_inference_mode_serve_training():
    module, mask = performer(), AttentionMask("bidirectional_self")
    tensors, _ = draw(20, grad=True)
    with torch.inference_mode():
        module(*tensors, mask)
    module.train()(*tensors, mask).out.sum().backward()


def test_half_precision_modules_keep_exact_features():
    assert torch.equal(features_of(performer().bfloat16()), features_of(performer()))


# ----- cost


@pytest.mark.parametrize("piece", [0, linear_attention.PIECE_BYTES])
@pytest.mark.parametrize(("pattern", "offset"), [*((pattern, 0) for pattern in PATTERNS), ("causal_self", 90)])
def test_flops_are_what_the_counter_sees(monkeypatch, pattern, offset, piece):
    monkeypatch.setattr(linear_attention, "PIECE_BYTES", piece)
    keys = 191 if pattern.endswith("self") else 53
    (q, k, v), _ = draw(191, keys)
    mask, module = AttentionMask(pattern, query_offset=offset), performer()
    with FlopCounterMode(display=False) as counter:
        module(q[:, :, offset:], k, v, mask)
    assert module.flops(BATCH, 191 - offset, keys, mask) == counter.get_total_flops()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_tensor_grows_with_the_square_of_the_length(pattern, largest_tensor):
    found = []
    for length in (4096, 8192):
        tensors = [torch.randn(1, h, length, 8, requires_grad=True) for h in (2, 1, 1)]
        module = performer({"num_features": 16}, heads=2, kv_heads=1, dim=8)
        with largest_tensor() as largest:
            module(*tensors, AttentionMask(pattern)).out.sum().backward()
        found.append(largest.elements)
    assert found[1] <= 2 * found[0] <= 2 * 2 * 4096 * 64  # a chunk's weights: 64 per query and head
