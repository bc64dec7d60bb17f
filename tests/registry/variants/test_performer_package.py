"""The Performer beside the published package: where they agree, what the package does otherwise."""

import math
from functools import partial

import pytest
import torch

from astbench_registry import AttentionMask, CapabilityError
from astbench_registry.conformance import PROPERTIES, check
from astbench_registry.variants import performer
from tests.oracles import BATCH, DIM, PATTERNS, draw
from tests.registry.building import assert_conforms, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*distutils.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*distutils.*:UserWarning"),
]
HEADS, FEATURES = 3, 13


@pytest.fixture
def package():
    pytest.importorskip("distutils", reason="setuptools is not installed")
    return pytest.importorskip("performer_pytorch", reason="performer-pytorch is not installed").performer_pytorch


def layer(**options):
    options = {"num_features": FEATURES, **options}
    return build("performer", options, heads=HEADS, kv_heads=HEADS, train=False, dtype=torch.float32)


def theirs(package, ours, *, causal=False, dtype=torch.float64, **options):
    """The package's module with our features."""
    module = package.FastAttention(DIM, FEATURES, causal=causal, **options)
    module.projection_matrix = ours.projection(torch.device("cpu"), dtype)
    return module


def inputs(length=200, keys=None, size=1.0):
    (q, k, v), _ = draw(length, keys, heads=HEADS, kv_heads=HEADS)
    return q * size, k * size, v


def pattern_of(causal):
    return AttentionMask("causal_self" if causal else "bidirectional_self")


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_kernel_without_the_packages_epsilons(package, monkeypatch, causal):
    monkeypatch.setattr(package, "softmax_kernel", partial(package.softmax_kernel, eps=0.0))
    ours, (q, k, v) = layer(), inputs()
    module = theirs(package, ours, causal=causal)
    if causal:
        module.causal_linear_fn = partial(package.causal_linear_attention_noncuda, eps=0.0)
    torch.testing.assert_close(ours(q, k, v, pattern_of(causal)).out, module(q, k, v), rtol=0, atol=1e-12)


def test_relu_kernel_as_published(package):
    ours, (q, k, v) = layer(kernel="relu"), inputs()
    module = theirs(package, ours, generalized_attention=True)
    torch.testing.assert_close(ours(q, k, v, pattern_of(False)).out, module(q, k, v), rtol=0, atol=1e-12)


def with_epsilons(q, k, v, w, causal):
    """What the package computes by default, written out: 1e-4 on each feature, 1e-6 on the sums when causal."""
    q, k = q * DIM**-0.25, k * DIM**-0.25
    root = math.sqrt(w.shape[0])
    a, b = q @ w.T, k @ w.T
    left = ((a - q.square().sum(-1, keepdim=True) / 2 - a.amax(-1, keepdim=True)).exp() + 1e-4) / root
    right = ((b - k.square().sum(-1, keepdim=True) / 2 - b.amax((-1, -2), keepdim=True)).exp() + 1e-4) / root
    weights = left @ right.mT
    weights = weights.tril() if causal else weights
    extra = 1e-6 * left.sum(-1, keepdim=True) if causal else 0.0
    return weights @ v / (weights.sum(-1, keepdim=True) + extra)


@pytest.mark.parametrize("causal", [True, False])
def test_epsilons_account_for_what_the_package_does_otherwise(package, causal):
    ours, (q, k, v) = layer(), inputs()
    got = theirs(package, ours, causal=causal)(q, k, v)
    expected = with_epsilons(q, k, v, ours.projection(q.device, q.dtype), causal)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    difference = float((got - ours(q, k, v, pattern_of(causal)).out).abs().max())
    assert 1e-5 < difference < 0.5


# ----- its faults


def test_its_causal_mode_sees_the_future_through_the_largest_key(package):
    ours, (q, k, v) = layer(), inputs(100)
    later = k.clone()
    later[:, :, 90:] *= 8
    moved = []
    for attend in (theirs(package, ours, causal=True), lambda q, k, v: ours(q, k, v, pattern_of(True)).out):
        moved.append(float((attend(q, later, v) - attend(q, k, v))[:, :, :90].abs().max()))
    assert moved[0] > 1e-3
    assert moved[1] == 0


def test_it_overflows_in_float16(package):
    ours, (q, k, v) = layer(), (x.half() for x in inputs(1024, size=2.0))
    out = theirs(package, ours, dtype=torch.float16)(q, k, v)
    assert not out.isfinite().all()
    assert ours(q, k, v, pattern_of(False)).out.isfinite().all()


def test_its_padding_is_zeroed_in_the_values_and_still_counted(package):
    """Its SelfAttention zeroes padded values; their keys' weights stay in the denominator."""
    torch.manual_seed(0)
    layer = package.SelfAttention(DIM, heads=1, dim_head=DIM, nb_features=FEATURES, causal=False).double()
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    valid = (torch.arange(20) < 12)[None]
    with torch.no_grad():
        padded, alone = layer(x, mask=valid)[:, :12], layer(x[:, :12])
    assert float((padded - alone).abs().max()) > 1e-2


def test_its_gradients_leave_out_the_maxima(package, monkeypatch):
    """It detaches maxima that its 1e-4 keeps from cancelling; without the 1e-4 the gradients are right."""
    options = {"backend": "performer_pytorch"}
    wrong = check("performer", options, properties=["gradients"])
    assert {r.status for r in wrong if r.pattern != "causal_self"} == {"fail"}
    monkeypatch.setattr(package, "softmax_kernel", partial(package.softmax_kernel, eps=0.0))
    right = check("performer", options, properties=["gradients"])
    assert {r.status for r in right if r.pattern != "causal_self"} == {"pass"}


def test_its_features_are_biased(package):
    """No sign fix after the QR decomposition; ours pass the same test (test_performer.py)."""
    torch.manual_seed(0)
    w = package.gaussian_orthogonal_random_matrix(1000 * 8, 8).double().unflatten(0, (-1, 8))
    x = torch.full((8,), 0.7 / math.sqrt(8), dtype=torch.float64)
    estimates = (2 * (w @ x) - x @ x).exp().mean(-1)
    z = (estimates.mean() - (x @ x).exp()) / (estimates.std() / 1000**0.5)
    assert float(z) < -10


# ----- as a backend


@pytest.mark.parametrize("property", PROPERTIES)
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_backend_conforms_to_what_it_declares(package, kernel, property):
    if (kernel, property) == ("softmax", "gradients"):
        pytest.skip("the package's gradients are wrong: see test_its_gradients_leave_out_the_maxima")
    assert_conforms("performer", {"backend": "performer_pytorch", "kernel": kernel}, property)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_backend_runs_the_package_on_our_features(package, pattern):
    q, k, v = inputs(61, 61 if pattern.endswith("self") else 37)
    ours, backend = (layer(backend=name, kernel="relu") for name in ("auto", "performer_pytorch"))
    outputs = [module(q, k, v, AttentionMask(pattern), scale=0.3).out for module in (ours, backend)]
    # The package adds 1e-6 to causal sums of features that are 1e-3 at least.
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-2 if pattern == "causal_self" else 1e-12)
    assert ours.state_dict().keys() == backend.state_dict().keys()


def test_backend_refuses_padding_and_decoding(package):
    q, k, v = inputs(9)
    valid = torch.arange(9).expand(BATCH, 9) < 5
    masks = (AttentionMask(key_valid=valid), AttentionMask("causal_self", query_offset=3))
    for mask in masks:
        with pytest.raises(CapabilityError, match="takes neither padding nor decoding"):
            layer(backend="performer_pytorch")(q, k, v, mask)
    layer(backend="performer_pytorch")(q, k, v, AttentionMask(key_valid=torch.ones_like(valid)))


def test_backend_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(performer, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package performer-pytorch is not installed; pip install 'astbench"):
        layer(backend="performer_pytorch")


def test_backend_with_another_epsilon_is_refused():
    with pytest.raises(ValueError, match=r"--attention.kernel_epsilon must be 0.001 with backend performer_pytorch"):
        layer(backend="performer_pytorch", kernel_epsilon=0.1)
