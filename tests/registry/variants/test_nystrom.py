"""Nyströmformer against its equations written out, the `nystrom_attention` package and Hugging Face's model."""

from itertools import pairwise
from math import ceil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask
from astbench_registry.registry import make_config
from astbench_registry.variants.nystrom import pseudo_inverse
from tests.oracles import BATCH, DIM, HEADS, assert_same, draw
from tests.registry.building import assert_conforms, build


def softmax(logits):
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def inverse_written_out(a, iterations):
    z = a.T / (a.abs().sum(0).max() * a.abs().sum(1).max())
    one = torch.eye(len(a), dtype=a.dtype)
    for _ in range(iterations):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


def head_written_out(q, k, v, landmarks, iterations, scale):
    """Eq. 13 for one head of one sequence without padding."""
    n = len(q)
    if n <= landmarks:
        return softmax(q @ k.T * scale) @ v
    edges = [ceil(s * n / landmarks) for s in range(landmarks + 1)]
    q_marks, k_marks = (torch.stack([x[a:b].mean(0) for a, b in pairwise(edges)]) for x in (q, k))
    middle = inverse_written_out(softmax(q_marks @ k_marks.T * scale), iterations)
    return softmax(q @ k_marks.T * scale) @ (middle @ (softmax(q_marks @ k.T * scale) @ v))


def convolved_written_out(v, weight):
    half = len(weight) // 2
    rows = []
    for i in range(len(v)):
        near = [weight[j + half] * v[i + j] for j in range(-half, half + 1) if 0 <= i + j < len(v)]
        rows.append(sum(near))
    return torch.stack(rows)


def written_out(q, k, v, valid, landmarks, *, iterations=6, scale=None, conv=None):
    """The rows of real tokens, one head and one sequence at a time; the others are zero."""
    group = q.shape[1] // k.shape[1]
    whole = torch.zeros_like(q)
    for b in range(q.shape[0]):
        real = torch.arange(q.shape[2]) if valid is None else valid[b].nonzero()[:, 0]
        for h in range(q.shape[1]):
            head = q[b, h, real], k[b, h // group, real], v[b, h // group, real]
            out = head_written_out(*head, landmarks, iterations, DIM**-0.5 if scale is None else scale)
            if conv is not None:
                out = out + convolved_written_out(head[2], conv[h // group].flatten())
            whole[b, h] = whole[b, h].index_copy(0, real, out)
    return whole


def assert_parity(module, tensors, valid, **options):
    real = 1.0 if valid is None else valid[:, None, :, None]
    got = module(*tensors, AttentionMask(key_valid=valid)).out * real
    expected = written_out(*tensors, valid, module.config.num_landmarks, **options)
    assert_same(got, expected, [*tensors, *module.parameters()], rtol=1e-11)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize(("length", "landmarks"), [(1, 7), (6, 7), (7, 7), (9, 8), (63, 1), (127, 16), (1000, 13)])
def test_nystrom_is_its_equations_written_out(length, landmarks, padding):
    tensors, valid = draw(length, padding=padding, grad=True)
    assert_parity(build("nystrom", {"num_landmarks": landmarks}), tensors, valid)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("length", [1, 5, 63])
def test_the_convolution_runs_over_real_tokens(length, padding):
    tensors, valid = draw(length, padding=padding, grad=True)
    module = build("nystrom", {"num_landmarks": 7, "conv_kernel_size": 5})
    assert_parity(module, tensors, valid, conv=module.conv.weight)


@pytest.mark.parametrize("conv", [0, 5])
def test_a_sequence_is_its_real_tokens_wherever_the_padding_is(conv):
    tensors, _ = draw(40)
    module = build("nystrom", {"num_landmarks": 7, "conv_kernel_size": conv})
    expected = module(*tensors, AttentionMask()).out
    places = torch.randperm(97, generator=torch.Generator().manual_seed(1))[:40].sort().values
    spread = [torch.full((*x.shape[:2], 97, DIM), torch.nan, dtype=x.dtype).index_copy(2, places, x) for x in tensors]
    valid = torch.zeros(BATCH, 97, dtype=torch.bool).index_fill(1, places, True)
    got = module(*spread, AttentionMask(key_valid=valid)).out[:, :, places]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_short_and_long_sequences_in_one_batch():
    tensors, _ = draw(63)
    valid = torch.arange(63) < torch.tensor([[63], [5]])
    assert_parity(build("nystrom", {"num_landmarks": 8}), [x.requires_grad_() for x in tensors], valid)


def test_the_pseudo_inverse_converges():
    a = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    exact = torch.linalg.pinv(a)
    error = [float((pseudo_inverse(a, n) - exact).abs().max() / exact.abs().max()) for n in (6, 40)]
    assert error[0] > 1e-3, "else the iterations do not show"
    assert error[1] < 1e-9
    # Zero rows and columns, for landmarks that are not in use, stay zero and change nothing.
    larger = torch.nn.functional.pad(a, (0, 3, 0, 3))
    padded = torch.nn.functional.pad(pseudo_inverse(a, 6), (0, 3, 0, 3))
    torch.testing.assert_close(pseudo_inverse(larger, 6), padded, rtol=1e-12, atol=1e-12)


# ----- the witnesses


def package_and_ours(landmarks, *, batch=1, heads=1, length=64, iterations=6, conv=0):
    package = pytest.importorskip("nystrom_attention", reason="nystrom-attention is not installed")
    width = heads * DIM
    options = {"num_landmarks": landmarks, "pinv_iterations": iterations, "conv_kernel_size": conv}
    ours = build("nystrom", options, heads=heads, kv_heads=heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = package.NystromAttention(
            width, DIM, heads, landmarks, iterations, residual=conv > 0, residual_conv_kernel=conv or 33
        ).double()
        x = 4 * torch.randn(batch, length, width, dtype=torch.float64)
    if conv:
        ours.load_state_dict({"conv.weight": theirs.res_conv.weight})

    def our_rows(x, valid=None):
        q, k, v = (y.unflatten(-1, (heads, DIM)).transpose(1, 2) for y in theirs.to_qkv(x).chunk(3, -1))
        out = ours(q, k, v, AttentionMask(key_valid=valid)).out
        return theirs.to_out(out.transpose(1, 2).flatten(2))

    return theirs, our_rows, x


@pytest.mark.parametrize("conv", [0, 5])
@pytest.mark.parametrize("landmarks", [1, 8, 32])
def test_nystrom_against_the_package(landmarks, conv):
    theirs, ours, x = package_and_ours(landmarks, conv=conv)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-11)


def test_the_package_at_one_landmark_per_token_approaches_dense_attention():
    """Ours is dense there; theirs inverts a matrix, and comes as near as its iterations."""
    errors = []
    for iterations in (6, 30):
        theirs, ours, x = package_and_ours(64, batch=2, heads=3, iterations=iterations)
        errors.append(float((ours(x) - theirs(x)).detach().abs().max()))
    assert errors[0] > 1e-2
    assert errors[1] < 1e-7


def test_the_packages_output_depends_on_the_batch():
    theirs, ours, x = package_and_ours(8, batch=2)
    x = x * torch.tensor([1.0, 3.0]).view(2, 1, 1)
    assert float((theirs(x)[:1] - theirs(x[:1])).detach().abs().max()) > 0.1
    torch.testing.assert_close(ours(x)[:1], ours(x[:1]), rtol=0, atol=1e-13)


def test_the_package_takes_its_own_padding_for_tokens():
    """A length that does not divide is filled up with zeros, which are averaged in unless a mask is given."""
    theirs, ours, x = package_and_ours(8, length=60)
    everything = torch.ones(1, 60, dtype=torch.bool)
    assert float((theirs(x) - theirs(x, mask=everything)).detach().abs().max()) > 1e-3
    torch.testing.assert_close(ours(x), ours(x, everything), rtol=0, atol=0)


def test_more_padding_moves_the_packages_rows():
    theirs, ours, x = package_and_ours(8)

    def padded(extra):
        valid = (torch.arange(64 + extra) < 64)[None]
        return torch.nn.functional.pad(x, (0, 0, 0, extra)), valid

    assert float((theirs(padded(8)[0], mask=padded(8)[1])[:, :64] - theirs(x)).detach().abs().max()) > 1e-3
    torch.testing.assert_close(ours(*padded(8))[:, :64], ours(x), rtol=0, atol=1e-13)


def test_nystrom_against_hugging_face():
    """One head of one sequence, where its batch-wide start is the matrix's own; with its convolution."""
    model = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    config = model.NystromformerConfig(
        hidden_size=DIM, num_attention_heads=1, num_landmarks=8, segment_means_seq_len=64, conv_kernel_size=5
    )
    theirs = model.NystromformerSelfAttention(config).double().eval()
    ours = build("nystrom", {"num_landmarks": 8, "conv_kernel_size": 5}, heads=1, kv_heads=1)
    ours.load_state_dict({"conv.weight": theirs.conv.weight})
    x = torch.randn(1, 64, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = (linear(x)[:, None] for linear in (theirs.query, theirs.key, theirs.value))
    torch.testing.assert_close(ours(q, k, v, AttentionMask()).out[:, 0], theirs(x)[0], rtol=0, atol=1e-11)


# ----- options, cost and memory


def test_it_conforms_with_the_convolution():
    assert_conforms("nystrom", {"conv_kernel_size": 5})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_landmarks": 0}, "--attention.num_landmarks must be at least 1, got 0"),
        ({"pinv_iterations": 0}, "--attention.pinv_iterations must be at least 1, got 0"),
        ({"conv_kernel_size": 4}, "--attention.conv_kernel_size must be 0 or an odd number of tokens, got 4"),
    ],
)
def test_bad_values_name_the_flag(options, expected):
    with pytest.raises(ValueError) as error:
        make_config("nystrom", options)
    assert str(error.value) == expected


@pytest.mark.parametrize("options", [{"num_landmarks": 7}, {"num_landmarks": 64, "conv_kernel_size": 3}])
def test_flops_are_what_the_counter_sees(options):
    tensors, _ = draw(37)
    mask, module = AttentionMask(), build("nystrom", options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*tensors, mask)
    assert module.flops(BATCH, 37, 37, mask) == counter.get_total_flops()


def test_statistics_count_every_pair():
    tensors, valid = draw(37, padding=0.3)
    stats = build("nystrom")(
        *tensors, AttentionMask(key_valid=valid), context=AttentionContext(collect_stats=True)
    ).stats
    assert torch.equal(stats.attended, (37 * valid.sum(-1, keepdim=True)).expand(-1, HEADS).double())


def test_memory_is_linear(largest_tensor):
    length, landmarks = 8192, 16
    module = build(
        "nystrom", {"num_landmarks": landmarks, "conv_kernel_size": 3}, heads=2, kv_heads=1, dtype=torch.float32
    )
    q, key = torch.randn(1, 2, length, DIM), torch.randn(1, 1, length, DIM)
    valid = (torch.arange(length) % 3 > 0)[None]
    with sdpa_kernel(SDPBackend.MATH), largest_tensor() as largest:
        module(q, key, key, AttentionMask(key_valid=valid)).out.sum().backward()
    assert length * landmarks <= largest.elements <= 2 * length * landmarks
