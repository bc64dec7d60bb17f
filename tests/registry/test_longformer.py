"""Longformer against a mask written out, transformers' own layer, and the backbones it starts from."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from astbench_registry import AttentionContext, AttentionMask, AttentionShape, CapabilityError, build_attention
from astbench_registry.conformance import PROPERTIES, check

BATCH, HEADS, KV_HEADS, DIM, HIDDEN = 2, 6, 3, 5, 7
PATTERNS = ["bidirectional_self", "causal_self"]
LONG = pytest.param(1000, 0.3, marks=pytest.mark.slow)
OPTIONS = {
    "plain": {"window": 5},
    "dilated": {"window": 3, "dilation": 4, "num_global": 3},
    "two-dilated": {"window": 3, "dilation": 3, "dilated_heads": 2, "num_global": 0},
    "projected": {"window": 5, "num_global": 2, "global_projections": True},
}


def build(options, *, dim=DIM, kv_heads=KV_HEADS, seed=0):
    kv_heads = HEADS if options.get("global_projections") else kv_heads
    shape = AttentionShape(HEADS, kv_heads, dim, hidden_size=HIDDEN)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = build_attention("longformer", options, shape).double()
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def draw(length, *, dim=DIM, padding=0.0, kv_heads=KV_HEADS, seed=0):
    """q, k, v, hidden states (all with gradients), a padding mask and a few tokens that the task names."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, HEADS, length, dim), *[(BATCH, kv_heads, length, dim)] * 2, (BATCH, length, HIDDEN)]
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    valid = torch.rand(BATCH, length, generator=g) >= padding if padding else None
    named = torch.rand(BATCH, length, generator=g) < 5 / length
    named[1] &= torch.rand(length, generator=g) < 0.3  # another number in each sequence
    return tensors, valid, named


def global_tokens(length, options, valid, named):
    """Bool `(batch, length)`, token by token."""
    chosen = torch.zeros(BATCH, length, dtype=torch.bool)
    for b in range(BATCH):
        left = options.get("num_global", 1)
        for i in range(length):
            real = valid is None or bool(valid[b, i])
            if real and (left > 0 or (named is not None and bool(named[b, i]))):
                chosen[b, i] = True
            left -= real
    return chosen


def pattern_mask(length, options, pattern, valid, chosen):
    """Bool `(batch, heads, length, length)`: who sees whom, after section 3.1."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    dilation = options.get("dilation", 1)
    heads = torch.arange(HEADS) < options.get("dilated_heads", HEADS)
    step = torch.where(heads, dilation, 1)[:, None, None]
    window = ((i - j).abs() <= options["window"] * step) & ((i - j) % step == 0)
    allowed = window | chosen[:, None, None, :] | chosen[:, None, :, None]
    if pattern == "causal_self":
        allowed = allowed & (j <= i)
    return allowed if valid is None else allowed & valid[:, None, None, :]


def softmax(q, k, v, allowed, scale):
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    weights = torch.where(allowed, (torch.einsum("bhid,bhjd->bhij", q, k) * scale).exp(), 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), v)


def oracle(module, tensors, options, pattern, valid, named, scale):
    q, k, v, hidden = tensors
    chosen = global_tokens(q.shape[2], options, valid, named)
    allowed = pattern_mask(q.shape[2], options, pattern, valid, chosen)
    out = softmax(q, k, v, allowed, scale)
    if options.get("global_projections"):
        linears = (module.query_global, module.key_global, module.value_global)
        own = [
            (hidden @ x.weight.T + (0 if x.bias is None else x.bias)).view(BATCH, -1, HEADS, DIM).transpose(1, 2)
            for x in linears
        ]
        out = torch.where(chosen[:, None, :, None], softmax(*own, allowed, scale), out)
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("length", "padding"), [(1, 0.0), (63, 0.0), (63, 0.3), (127, 0.0), (127, 0.3), (500, 0.3), LONG]
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_a_masked_softmax(options, length, pattern, padding):
    module = build(options)
    tensors, valid, named = draw(length, padding=padding, kv_heads=module.shape.num_kv_heads)
    context = AttentionContext(hidden_states=tensors[3], global_tokens=named)
    got = module(*tensors[:3], AttentionMask(pattern, key_valid=valid), scale=0.4, context=context).context
    expected = oracle(module, tensors, options, pattern, valid, named, 0.4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    sources = [*tensors[: 4 if module.config.global_projections else 3], *module.parameters()]
    pairs = [torch.autograd.grad((x * weight).sum(), sources, materialize_grads=True) for x in (got, expected)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding", [0.0, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", list(OPTIONS.values())[:3], ids=list(OPTIONS)[:3])
def test_pattern_is_exact(options, pattern, padding):
    """Values are the identity, so that output > 0 is the pattern; the statistics count it."""
    size = 61
    (q, k, _, _), valid, named = draw(size, dim=size, padding=padding)
    eye = torch.eye(size, dtype=torch.float64).expand_as(k)
    context = AttentionContext(listen=True, global_tokens=named)
    out = build(options, dim=size)(q, k, eye, AttentionMask(pattern, key_valid=valid), context=context)
    expected = pattern_mask(size, options, pattern, valid, global_tokens(size, options, valid, named))
    expected = expected.expand(BATCH, HEADS, size, size)
    assert torch.equal(out.context > 0, expected)
    assert torch.equal(out.stats.attended, expected.sum((-1, -2)).double())


@pytest.mark.parametrize("property", PROPERTIES)
@pytest.mark.parametrize("options", list(OPTIONS.values())[1:], ids=list(OPTIONS)[1:])
def test_options_conform(options, property):
    results = check("longformer", options, properties=[property])
    failures = [f"{r.pattern}: {r.detail}" for r in results if r.status == "fail"]
    assert not failures, "\n".join(failures)


def test_named_tokens_move_only_their_own_sequence():
    """The gathered lists are as long as the batch's longest; a sequence alone gives the same."""
    module = build({"window": 4})
    (q, k, v, _), _, named = draw(77)
    named[0, 5:25] = True
    mask = AttentionMask("bidirectional_self")
    together = module(q, k, v, mask, context=AttentionContext(global_tokens=named)).context
    for b in range(BATCH):
        rows = slice(b, b + 1)
        alone = module(q[rows], k[rows], v[rows], mask, context=AttentionContext(global_tokens=named[rows])).context
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-12)


def test_tokens_named_in_the_prompt_stay_global_while_decoding():
    module, length = build({"window": 4}), 41
    (q, k, v, _), _, named = draw(length)
    named[:, 20:] = False
    context = AttentionContext(global_tokens=named[:, :20])
    whole = module(q, k, v, AttentionMask("causal_self"), context=context).context
    for i in range(20, length):
        mask = AttentionMask("causal_self", query_offset=i)
        step = module(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], mask, context=context).context
        torch.testing.assert_close(step, whole[:, :, i : i + 1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"global_tokens must be \(2, 10\), got \(2, 20\)"):
        module(q[:, :, :10], k[:, :, :10], v[:, :, :10], AttentionMask("causal_self"), context=context)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_flops_are_what_the_counter_sees(options, pattern):
    module, length = build(options), 101
    tensors, _, _ = draw(length, kv_heads=module.shape.num_kv_heads)
    mask, context = AttentionMask(pattern), AttentionContext(hidden_states=tensors[3])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*tensors[:3], mask, context=context)
    assert module.flops(BATCH, length, length, mask) == counter.get_total_flops()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{"window": 32}, {"window": 32, "dilation": 4}], ids=["plain", "dilated"])
def test_memory_is_linear_in_the_length(options, pattern):
    found = []
    for length in (4096, 8192):
        module = build_attention("longformer", options, AttentionShape(1, 1, 4))
        q, k, v = torch.randn(3, 1, 1, length, 4, generator=torch.Generator().manual_seed(0)).unbind()
        named = torch.arange(length)[None] % (length // 8) == 0
        context = AttentionContext(global_tokens=named)
        with Largest() as largest, torch.no_grad():
            module(q, k, v, AttentionMask(pattern), context=context)
        found.append(largest.elements)
    assert found[1] <= 2 * found[0] * 1.05 and found[1] < 8192 * 256


# ----- transformers' own layer


def theirs(window, dtype, *, seed=0):
    package = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = package.LongformerConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        layer = package.LongformerSelfAttention(config, layer_id=0).to(dtype)
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return layer


def run_theirs(layer, hidden, valid, chosen):
    """Their mask: -10000 for padding, 0 for a window, 10000 for a global token."""
    mask = torch.where(chosen, 1e4, torch.where(valid, 0.0, -1e4)).to(hidden.dtype)
    return layer(
        hidden,
        attention_mask=mask,
        is_index_masked=mask < 0,
        is_index_global_attn=mask > 0,
        is_global_attn=bool(chosen.any()),
    )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_layer_in_transformers(dtype):
    """Their softmax is in float32 even for float64 inputs, hence one tolerance."""
    window, length = 4, 64  # they want multiples of twice the window
    layer = theirs(window, dtype)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(BATCH, length, HEADS * DIM, generator=g, dtype=dtype)
    valid = torch.rand(BATCH, length, generator=g) >= 0.2
    named = torch.rand(BATCH, length, generator=g) < 0.1
    chosen = global_tokens(length, {}, valid, named)

    shape = AttentionShape(HEADS, HEADS, DIM, hidden_size=HEADS * DIM)
    module = build_attention("longformer", {"window": window, "global_projections": True}, shape).to(dtype)
    own = {name: value for name, value in layer.state_dict().items() if "_global" in name}
    own.pop("key_global.bias")  # softmax takes it away
    module.load_state_dict(own)
    linears = (layer.query, layer.key, layer.value)
    q, k, v = (x(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in linears)
    context = AttentionContext(hidden_states=hidden, global_tokens=named)
    got = module(q, k, v, AttentionMask("bidirectional_self", key_valid=valid), context=context).context
    got = got.transpose(1, 2).flatten(2)
    expected = run_theirs(layer, hidden, valid, chosen)
    torch.testing.assert_close(got[valid], expected[valid], rtol=0, atol=1e-6)


def test_fault_of_theirs_float64_gradients_are_nan_where_a_window_is_all_padding():
    """The reason why the witness is compared forward; the float64 oracle above holds our gradients."""
    layer = theirs(4, torch.float64)
    hidden = torch.randn(1, 64, HEADS * DIM, dtype=torch.float64, requires_grad=True)
    valid = (torch.arange(64) < 32)[None]
    out = run_theirs(layer, hidden, valid, torch.zeros_like(valid))
    assert out.isfinite().all()
    out[:, :32].sum().backward()
    assert hidden.grad.isnan().any()


# ----- backbones

TINY = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
HALF = {"layers": 1, "attention_heads": 2}
BART = {"d_model": 12, "vocab_size": 11, **{f"{x}_{n}": HALF[n] for x in ("encoder", "decoder") for n in HALF}}


def attention_of(model_type, options, name):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModel.from_config(config)
    return next(x for x in model.modules() if type(x).__name__ == name)


def projected():
    shape = AttentionShape(2, 2, 6, hidden_size=12)
    return build_attention("longformer", {"global_projections": True}, shape)


@pytest.mark.parametrize(
    ("model_type", "options", "name", "linears"),
    [
        ("bert", TINY, "BertSelfAttention", "query key value"),
        ("roberta", TINY, "RobertaSelfAttention", "query key value"),
        ("bart", BART, "BartAttention", "q_proj k_proj v_proj"),
        ("distilbert", {"dim": 12, "n_layers": 1, "n_heads": 2, "vocab_size": 11}, None, "q_lin k_lin v_lin"),
    ],
)
def test_projections_start_as_the_backbones(model_type, options, name, linears):
    layer = attention_of(model_type, options, name or "DistilBertSelfAttention")
    module = projected()
    module.adopt(layer)
    for own, theirs in zip(("query_global", "key_global", "value_global"), linears.split(), strict=True):
        mine, copied = getattr(module, own), getattr(layer, theirs)
        assert torch.equal(mine.weight, copied.weight) and mine.weight is not copied.weight
        assert mine.bias is None or torch.equal(mine.bias, copied.bias)


@pytest.mark.parametrize(
    ("model_type", "options", "name", "reason"),
    [
        ("llama", {**TINY, "intermediate_size": 12}, "LlamaAttention", "rotary positions"),
        ("esm", {**TINY, "position_embedding_type": "rotary", "pad_token_id": 0}, "EsmSelfAttention", "rotary"),
        ("modernbert", {**TINY, "pad_token_id": 0}, "ModernBertAttention", "rotary positions"),
        ("gpt2", {"n_embd": 12, "n_layer": 1, "n_head": 2, "vocab_size": 11}, "GPT2Attention", "needs linear layers"),
        ("bert", {**TINY, "hidden_size": 16}, "BertSelfAttention", r"expects projections of \(12, 12\)"),
    ],
)
def test_backbones_without_such_projections_are_refused(model_type, options, name, reason):
    with pytest.raises(CapabilityError, match=reason):
        projected().adopt(attention_of(model_type, options, name))


def test_bad_options_name_their_flags():
    shape = AttentionShape(6, 3, 5)
    for options, flag in (
        ({"window": 0}, "--attention.window"),
        ({"dilation": 0}, "--attention.dilation"),
        ({"dilation": 2, "dilated_heads": 3}, "--attention.dilated_heads must be at most 6 and a multiple of the 2"),
        ({"dilation": 2, "dilated_heads": 8}, "--attention.dilated_heads must be at most 6"),
        ({"num_global": 0, "global_projections": True}, "--attention.num_global"),
    ):
        with pytest.raises(ValueError, match=flag):
            build_attention("longformer", options, shape)


@pytest.mark.parametrize(("model_type", "options"), [("roberta", {**TINY, "pad_token_id": 0}), ("bart", BART)])
def test_a_fresh_swap_with_a_wide_window_is_the_dense_backbone(model_type, options):
    """Copied projections of the layer's own input give the layer's own queries, keys and values."""
    transformers = pytest.importorskip("transformers")
    swapping = pytest.importorskip("astbench.backbones.swap")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **options)).eval()
    real = torch.arange(30) < torch.tensor([[30], [21]])
    inputs = {"input_ids": torch.arange(60).view(2, 30) % 7 + 3, "attention_mask": real.long()}
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        options = {"window": 30, "global_projections": True}
        handle = swapping.swap_attention(model, "longformer", options, where=("encoder_self", "decoder_self"))
        handle.set_global_tokens(torch.arange(30).expand(2, -1) % 5 == 0)
        got = model(**inputs).last_hidden_state
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-5)
