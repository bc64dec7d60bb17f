"""The layers of a swapped model, as a depth policy chooses among them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from astbench.backbones.families import FAMILIES
from astbench.backbones.hooks import AttentionSlot
from astbench.backbones.swap import SwapHandle
from astbench_registry import CapabilityError
from astbench_registry.depth.interface import StackShape


@dataclass(frozen=True)
class Stack:
    """A model's layers in their order.

    Attributes:
        layers: The modules.
        slots: Those on the attention of each layer.
        causal: Whether no token may depend on later ones.
        shape: What a policy is built for.
    """

    layers: list[nn.Module]
    slots: list[list[AttentionSlot]]
    causal: bool
    shape: StackShape


def find_stack(handle: SwapHandle) -> Stack:
    """The one stack of layers of an encoder or of a decoder.

    A layer's share of the operations is that of its matrices: attention itself costs the same in every layer.

    Raises:
        CapabilityError: an encoder-decoder, or a model whose layers are not found.
    """
    model = handle.model
    if model.config.is_encoder_decoder:
        raise CapabilityError(
            f"--depth works on encoders and on decoders; {type(model).__name__} is an encoder-decoder: leave it out"
        )
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(lists) != 1:
        raise CapabilityError(
            f"--depth finds {len(lists)} stacks of layers in {type(model).__name__} and needs one; families known to "
            f"work: {', '.join(f for f in FAMILIES if f not in ('bart', 'marian', 'mbart', 'pegasus'))}"
        )
    layers = list(lists[0])
    slots = [[slot for slot in handle.slots if _inside(slot, layer)] for layer in layers]
    sizes = [sum(p.numel() for p in layer.parameters() if p.dim() >= 2) for layer in layers]
    costs = tuple(size / sum(sizes) for size in sizes)
    shape = StackShape(len(layers), model.config.hidden_size, costs)
    return Stack(layers, slots, any(slot.pattern == "causal_self" for slot in handle.slots), shape)


def _inside(slot: AttentionSlot, layer: nn.Module) -> bool:
    return any(module is slot for module in layer.modules())
