"""F: outputs and gradients are finite wherever dense's are, for every attention, dtype, scale and padding."""

from dataclasses import replace

import torch

from astbench_registry import registered
from astbench_registry.capabilities import PATTERNS
from astbench_registry.conformance.cases import Subject
from astbench_registry.registry import build_attention, config_class, make_config
from tests.attack.commands import Child, demand

DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]
SCALES = [0.0, 1e-20, 1e-4, 1.0, 1.0, 30.0, 1e3, 3e4]
SEVERAL = 20
"""Cases of one trial: a process for each would take most of the time."""


def trial(rng, folder, shared):
    cases = [drawn(rng) for _ in range(SEVERAL)]

    def function():
        for case in cases:
            if found := not_finite(**case):
                print(f"{', '.join(f'{key} {value}' for key, value in case.items())}: {', '.join(found)}")

    ended = Child(function, folder).ended()
    demand(ended.code == 0 and not ended.out, ended.out or ended.last)


def drawn(rng):
    """One case; it can be drawn for any attention."""
    return {
        "name": rng.choice(sorted(registered())),
        "pattern": rng.choice(PATTERNS),
        "dtype": rng.choice(DTYPES),
        "scales": tuple(rng.choice(SCALES) for _ in "qkv"),
        "length": rng.choice([1, 2, 3, 17, 40, 71, 200]),
        "padding": rng.choice(["none", "holes", "left", "right", "a whole sequence", "all"]),
        "training": rng.random() < 0.7,
        "step": rng.choice([0, 1, 10_000]),
        "seed": rng.randrange(1000),
    }


def subject_of(name, pattern):
    """The attention with small options."""
    config = make_config(name, config_class(name).conformance_options)
    return Subject(name, lambda config, shape: build_attention(name, config, shape), config, pattern)


def not_finite(name, pattern, dtype, scales, length, padding, training, step, seed):
    """Outputs, losses and gradients that are not finite although dense's are; none where the attention cannot serve."""
    subject = subject_of(name, pattern)
    can = subject.can
    if pattern not in can.patterns or str(dtype).removeprefix("torch.") not in can.dtypes:
        return []
    case = subject.case(length, max(1, length - 3), batch=3, seed=seed)
    if padding != "none" and can.padding:
        case = case.with_mask(key_valid=real(padding, 3, case.k.shape[2], seed))
    case = replace(case, q=case.q * scales[0], k=case.k * scales[1], v=case.v * scales[2]).to(dtype)
    module = subject.build(training=training, seed=seed, max_positions=256).to(dtype)
    dense = subject_of("dense", pattern).build(max_positions=256).to(dtype)
    repeats = case.q.shape[1] // case.k.shape[1]
    wanted = finite(dense, replace(case, k=case.k.repeat_interleave(repeats, 1), v=case.v.repeat_interleave(repeats, 1))
                    if case.k.shape[1] != dense.shape.num_kv_heads else case, 0)  # fmt: skip
    if not all(wanted.values()):
        return []
    return [what for what, good in finite(module, case, step).items() if not good]


def real(padding, batch, keys, seed):
    """Which keys are real."""
    valid = torch.ones(batch, keys, dtype=torch.bool)
    if padding == "holes":
        valid = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    for row in range(batch):
        short = min(keys - 1, row * keys // 2)
        if padding in ("left", "right") and short:
            valid[row, slice(0, short) if padding == "left" else slice(keys - short, keys)] = False
    if padding == "all":
        valid[:] = False
    if padding == "a whole sequence":
        valid[-1] = False
    return valid


def finite(module, case, step):
    """Which of the output, the losses and the gradients of one call are finite."""
    inputs = {name: getattr(case, name).detach().clone().requires_grad_() for name in ("q", "k", "v")}
    got = replace(case, **inputs).run(module, step=step)
    found = {"output": got.out, **{f"loss {name}": loss for name, loss in got.losses.items()}}
    total = got.out.float().mean() + sum(loss.float() for loss in got.losses.values())
    sources = {**inputs, **dict(module.named_parameters())}
    grads = torch.autograd.grad(total, list(sources.values()), allow_unused=True)
    found |= {f"gradient of {name}": grad for name, grad in zip(sources, grads, strict=True) if grad is not None}
    return {name: bool(x.isfinite().all()) for name, x in found.items()}
