"""What the conformance suite runs a policy in: an encoder and a decoder of four layers in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from astbench.backbones.depth.adaptive import DEPTH
from astbench.backbones.depth.folding import Folded, Folding
from astbench.backbones.depth.stack import Stack, find_stack
from astbench.backbones.swap import SwapHandle, swap_attention
from astbench_registry.depth.config import DepthConfig
from astbench_registry.depth.interface import DepthPolicy, StackShape
from astbench_registry.findings import Failure

# Sizes differ, so that a swapped axis shows.
BATCH, LENGTH, LAYERS, HIDDEN, VOCABULARY = 5, 29, 4, 24, 61
EXACT = 1e-10
SHIFTED = 1e-6
"""Where padding in front shifts positions: models compute rotary angles in float32."""

Factory = Callable[[DepthConfig, StackShape], DepthPolicy]
Kind = Literal["encoder", "decoder"]
KINDS: tuple[Kind, ...] = ("encoder", "decoder")


class At:
    """A policy at work in a model.

    Args:
        kind: Of the model.
        policy: Built for its layers.
        folding: What runs them.
    """

    def __init__(self, kind: Kind, subject: Subject, attention: str) -> None:
        self.kind = kind
        self.model, handle = _model(kind, attention)
        self.plain = copy.deepcopy(self.model)
        self.stack: Stack = find_stack(handle)
        torch.manual_seed(3)
        self.policy = subject.factory(subject.config, self.stack.shape).eval()
        self.model.add_module(DEPTH, self.policy)
        self.folding = subject.folding(self.stack, self.policy)

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Hidden states of an encoder, logits of a decoder."""
        if self.kind == "decoder":
            return self.model(input_ids=ids, attention_mask=mask, **{"use_cache": False, **options}).logits
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    def without(self, path: tuple[int, ...], ids: Tensor, mask: Tensor | None) -> Tensor:
        """What a model gives that was built with the layers of a path alone."""
        model = copy.deepcopy(self.plain)
        for parent in model.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == LAYERS:
                    setattr(parent, name, nn.ModuleList(child[layer] for layer in path))
        model.config.num_hidden_layers = len(path)
        if self.kind == "decoder":
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    @property
    def last(self) -> Folded:
        """Of the last pass."""
        if self.folding.last is None:
            raise Failure("the policy was not asked")
        return self.folding.last


@dataclass(frozen=True)
class Subject:
    """What is under test."""

    factory: Factory
    config: DepthConfig
    folding: Callable[[Stack, DepthPolicy], Folding] = Folding
    attention: str = "dense"

    def at(self, kind: Kind) -> At:
        """In a model."""
        return At(kind, self, self.attention)


def _model(kind: Kind, attention: str) -> tuple[PreTrainedModel, SwapHandle]:
    shape = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "vocab_size": VOCABULARY,
        **{f"{token}_token_id": number for number, token in enumerate(("pad", "bos", "eos", "cls", "sep"))},
    }
    torch.manual_seed(1)
    if kind == "encoder":
        config = AutoConfig.for_model("modernbert", **shape, layer_types=["full_attention"] * LAYERS)
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    else:
        config = AutoConfig.for_model("llama", **shape)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.15)  # wide enough for a layer to show
    model = model.double().eval()
    return model, swap_attention(model, attention)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids `(batch, length)`, and a mask: sequences of several lengths, the padding behind them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=g)
    lengths = torch.tensor([LENGTH, 23, LENGTH, 19, 27])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return ids * mask, mask


def demand(condition: bool, message: str) -> None:
    """Raise :class:`Failure` unless a condition holds."""
    if not condition:
        raise Failure(message)


def same(actual: Tensor, expected: Tensor, what: str, limit: float = EXACT) -> None:
    """Raise :class:`Failure` unless two tensors agree to within a limit."""
    demand(actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    worst = (actual - expected).abs().nan_to_num(nan=torch.inf).max()
    demand(bool(worst <= limit), f"{what}, by up to {float(worst):.1e}")
