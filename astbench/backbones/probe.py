"""What a model's attention layers are called with, found out by one tiny forward pass."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from astbench.backbones.families import FAMILIES
from astbench.backbones.hooks import PROBE_LENGTHS, RecordedCall, recorded_calls
from astbench_registry import CapabilityError


@torch.no_grad()
def probe_attention(model: PreTrainedModel) -> tuple[list[RecordedCall], dict[nn.Module, int]]:
    """One tiny forward pass that writes down which modules call the interface, how, and the width of their input."""
    inputs = _inputs(model)
    widths: dict[nn.Module, int] = {}
    passes: Counter[nn.Module] = Counter()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passes.update([module])
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(given, Tensor) and given.dim() == 3:
            widths[module] = given.shape[-1]

    # What the layers are really given: a configuration may be nested, or of a model of two widths.
    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in model.modules()]
    training, cpu_state = [m for m in model.modules() if m.training], torch.get_rng_state()
    model.eval()
    try:
        with recorded_calls() as calls:
            model(**inputs, use_cache=False) if _takes_cache(model) else model(**inputs)
    except (AttributeError, TypeError) as error:
        raise CapabilityError(
            f"{type(model).__name__} cannot be probed with token ids ({type(error).__name__}: {error}); models of text "
            f"and classifiers of pictures are served: {', '.join(FAMILIES)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
        torch.set_rng_state(cpu_state)
    per_module = Counter(call.module for call in calls)
    if several := [module for module, count in per_module.items() if count > passes[module]]:
        raise CapabilityError(
            f"{type(several[0]).__name__} of {type(model).__name__} attends {per_module[several[0]]} times in one pass "
            "(differential attention does); an attention that is put in its place is called once a layer"
        )
    if len(per_module) < len(calls):
        raise CapabilityError(
            f"{type(model).__name__} shares one attention module among its layers; each layer needs its own"
        )
    return calls, widths


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A few tokens, or a grey picture."""
    size = getattr(model.config, "image_size", None)
    if model.main_input_name == "pixel_values" and size:
        sides = (size, size) if isinstance(size, int) else size
        return {
            "pixel_values": torch.zeros(1, model.config.num_channels, *sides, device=model.device, dtype=model.dtype)
        }
    encoder, decoder = PROBE_LENGTHS
    inputs = {"input_ids": torch.ones(1, encoder, dtype=torch.long, device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.ones(1, decoder, dtype=torch.long, device=model.device)
    return inputs


def max_positions(model: PreTrainedModel, module: nn.Module) -> int:
    """Longest input of the stack that a module stands in; 0 when its configuration does not say."""
    own = getattr(module, "config", None)
    name = next(name for name, m in model.named_modules() if m is module)
    above = [model.get_submodule(name.rsplit(".", n)[0]) for n in range(1, name.count(".") + 1)]
    configs = [own, *(m.config for m in above if isinstance(m, PreTrainedModel)), model.config]
    found = (getattr(config, "max_position_embeddings", None) for config in configs if config is not None)
    return next((int(n) for n in found if n), 0)


def _takes_cache(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config, "use_cache", False))
