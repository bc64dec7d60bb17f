"""Put a registered attention into a Hugging Face model, through the model's own hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from astbench.backbones.cache_watch import watch_cache
from astbench.backbones.families import FAMILIES
from astbench.backbones.hooks import (
    IMPLEMENTATION,
    LEFT_OUT,
    AttentionSlot,
    RecordedCall,
)
from astbench.backbones.probe import max_positions, probe_attention
from astbench.backbones.saved_weights import restore
from astbench.backbones.transforming import Transforming
from astbench_registry import Capabilities, CapabilityError, Pattern, build_attention
from astbench_registry.budget import ShareCounts
from astbench_registry.interface import Attention, AttentionShape
from astbench_registry.registry import make_config

Where = Literal["encoder_self", "decoder_self", "cross"]
WHERE: dict[Pattern, Where] = {
    "bidirectional_self": "encoder_self",
    "causal_self": "decoder_self",
    "bidirectional_cross": "cross",
    "causal_cross": "cross",
}


class SwapHandle:
    """What `swap_attention` returns: read losses and statistics, undo the swap.

    Attributes:
        name: The attention's registered name.
        options: Its options as plain data.
        slots: One per attached layer, pattern by pattern, in the order of the layers.
        notes: What the swap changed on the model, for the user to read.
        transforming: The transform of attention weights at work; None for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        options: dict[str, Any],
        where: tuple[Where, ...],
        layers: tuple[int, ...] | None,
    ) -> None:
        self.model = model
        self.name = name
        self.options = options
        self.where = where
        self.layers = layers
        self.slots: list[AttentionSlot] = []
        self.notes: list[str] = []
        self.transforming: Transforming | None = None
        self._undo: list[Any] = []

    def set_step(self, step: int) -> None:
        """Tell every variant how many optimizer steps were taken."""
        for slot in self.slots:
            slot.step = step

    def set_global_tokens(self, tokens: Tensor | None) -> None:
        """Tell every variant which tokens of the coming batches all others should see: bool `(batch, length)`.

        Only some variants know such tokens (`longformer`, `bigbird`); None takes the tokens back.
        """
        for slot in self.slots:
            slot.global_tokens = tokens

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward pass by name, summed over the layers."""
        total: dict[str, Tensor] = {}
        for slot in self.slots:
            for name, loss in slot.losses.items():
                total[name] = total[name] + loss if name in total else loss
        return total

    def log_prob(self) -> Tensor | None:
        """`(batch,)`: log-probability of all that was drawn in the last forward pass, summed over the layers."""
        drawn = [slot.log_prob for slot in self.slots if slot.log_prob is not None]
        return torch.stack(drawn).sum(0) if drawn else None

    @contextmanager
    def collecting_stats(self) -> Iterator[list[AttentionSlot]]:
        """Within, every call leaves its statistics in `slot.stats`."""
        for slot in self.slots:
            slot.collect_stats = True
        try:
            yield self.slots
        finally:
            for slot in self.slots:
                slot.collect_stats = False
                slot.stats = None

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Inside, the model runs dense and the variants look on; then those that can start from what they saw.

        Call the model a few times inside, on texts of the kind and the length that are to come. It changes nothing for
        variants that do not start from the model's own queries and keys. In a note, how many layers started anew.

        >>> with handle.calibrating(), torch.no_grad():  # doctest: +SKIP
        ...     model(input_ids)
        """
        for slot in self.slots:
            slot.observing = True
        try:
            yield
        except BaseException:
            for slot in self.slots:
                slot.attention.forget()
            raise
        finally:
            for slot in self.slots:
                slot.observing = False
        started = sum(slot.attention.start() for slot in self.slots)
        self.notes.append(f"{started} of {len(self.slots)} layers start from the model's own queries and keys")

    @property
    def budget_is_calibrated(self) -> bool:
        """Whether there are layers whose threshold :meth:`budgeting` finds."""
        return bool(self._calibrated)

    @property
    def calibrated_share(self) -> float | None:
        """The share that layers with a calibrated budget keep; None where there are none."""
        return float(self._calibrated[0].share) if self._calibrated else None

    @property
    def _calibrated(self) -> list[Attention]:
        return [slot.attention for slot in self.slots if slot.attention.budget_is_calibrated]

    @contextmanager
    def budgeting(self) -> Iterator[None]:
        """Inside, layers with a calibrated budget count what they could keep; then they have the share that keeps it.

        Call the model a few times inside, as it will be used. All layers get one share, so that those whose mass is
        spread compute more than the others. What they then see is not quite what was counted: a second time comes
        closer. In a note, what was found.
        """
        counts, layers = ShareCounts(), self._calibrated
        wanting = [slot for slot in self.slots if slot.collect_stats]
        for slot in wanting:  # what is computed to find the share is no part of what is evaluated
            slot.collect_stats = False
        for attention in layers:
            attention.count_shares(counts)
        try:
            yield
        finally:
            for attention in layers:
                attention.count_shares(None)
            for slot in wanting:
                slot.collect_stats = True
        if not layers or not counts.visible:
            return
        wanted = layers[0].config.as_dict()["density"]
        share = counts.share_for(wanted)
        for attention in layers:
            attention.set_share(share)
        self.notes.append(
            f"blocks of at least {share:.3g} of a row's free mass make {counts.density(share):.3f} of what is visible "
            f"({wanted:g} wanted, {counts.always_kept / counts.visible:.3f} is always kept)"
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """The variants' own parameters."""
        for slot in self.slots:
            yield from slot.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The variants' own weights, by their names in the model's state dict."""
        return {f"{s.path}.{IMPLEMENTATION}.{n}": p for s in self.slots for n, p in s.state_dict().items()}

    def undo(self) -> None:
        """Give the model back its own attention."""
        for action in reversed(self._undo):
            action()
        self._undo.clear()
        self.slots.clear()


def swap_attention(
    model: PreTrainedModel,
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    where: Where | Sequence[Where] = ("encoder_self", "decoder_self", "cross"),
    layers: Sequence[int] | None = None,
) -> SwapHandle:
    """Replace the attention of a loaded Hugging Face model by a registered one.

    Load the model first (its pretrained weights stay as they are), then swap: the variant's own parameters
    join the model's state dict under `<attention module>.astbench.`. Attention layers that are not chosen run
    dense. Attention dropout is set to 0 for every variant alike, since sparse kernels have none.

    Args:
        model: Any model whose family calls transformers' attention interface.
        name: Registered attention, or `path/to/file.py:Class`.
        options: The variant's options.
        where: Which attention is replaced.
        layers: Layer numbers within each stack, counted from 0; all by default.

    Raises:
        CapabilityError: a family without the interface (with the list of those that have it), nothing to
            attach to, or a variant that cannot serve the model, with every reason.
        ValueError: an option, a place or a layer that does not exist, or a bad value.
    """
    where = (where,) if isinstance(where, str) else tuple(where)
    if unknown := [w for w in where if w not in WHERE.values()]:
        raise ValueError(f"where={unknown[0]!r} is not one of {', '.join(dict.fromkeys(WHERE.values()))}")
    if not isinstance(model, PreTrainedModel):
        raise CapabilityError(f"{type(model).__name__} is no transformers model: there is nothing to attach to")
    if layers is not None and not (isinstance(layers, Sequence) and all(type(n) is int for n in layers)):
        raise ValueError(f"layers={layers!r} must be a list of layer numbers")
    config = make_config(name, options or {})
    handle = SwapHandle(model, name, config.as_dict(), where, None if layers is None else tuple(layers))
    _enter(model, handle)
    try:
        calls, widths = probe_attention(model)
        chosen = _choose(calls, handle)
        taken = {call.module for call, _, _ in chosen}
        for module in (call.module for call in calls if call.module not in taken):
            setattr(module, LEFT_OUT, True)
            handle._undo.append(lambda m=module: delattr(m, LEFT_OUT))
        for call, index, count in chosen:
            _check(config.can, name, call)
            shape = AttentionShape(
                call.num_heads,
                call.num_kv_heads,
                call.head_dim,
                layer_index=index,
                num_layers=count,
                hidden_size=widths.get(call.module, 0),
                max_positions=max_positions(model, call.module),
            )
            _attach(model, call, build_attention(name, config, shape), config.can, handle)
        _no_dropout([call.module for call in calls], handle)
    except BaseException:
        handle.undo()
        raise
    handle.notes += restore(model, handle.name, handle.state_dict())
    _say_in_config(model, handle)
    return handle


def _say_in_config(model: PreTrainedModel, handle: SwapHandle) -> None:
    """The configuration says what is swapped in, for whoever saves the model, and keeps saying what is true."""
    before = getattr(model.config, IMPLEMENTATION, None)
    said = {"attention": handle.name, "options": handle.options, "where": list(handle.where)}
    setattr(model.config, IMPLEMENTATION, said)
    model.set_attn_implementation = _Refusal(handle.name)  # type: ignore[method-assign, assignment]

    def restore_config() -> None:
        del model.set_attn_implementation
        if before is None:
            delattr(model.config, IMPLEMENTATION)
        else:
            setattr(model.config, IMPLEMENTATION, before)

    handle._undo.append(restore_config)


class _Refusal:
    """In the place of a swapped model's `set_attn_implementation`; a copied or saved model takes it along."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, implementation: Any, **_: Any) -> None:
        raise CapabilityError(
            f"this model runs the swapped attention '{self.name}'; call undo() on its handle before "
            f"set_attn_implementation({implementation!r})"
        )


def _enter(model: PreTrainedModel, handle: SwapHandle) -> None:
    before = model.config._attn_implementation
    if before == IMPLEMENTATION:
        raise CapabilityError("this model's attention is swapped already; call undo() on its handle first")
    if not model._can_set_attn_implementation():
        raise CapabilityError(
            f"{type(model).__name__} ({model.config.model_type}) does not use transformers' attention "
            f"interface; families that do: {', '.join(FAMILIES)}"
        )
    # T5's stacks hold copies of the configuration, which not every release of transformers reaches through the model.
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is not model.config]
    for part in reversed(parts):
        handle._undo.append(lambda p=part, b=part.config._attn_implementation: p.set_attn_implementation(b))
    handle._undo.append(lambda: model.set_attn_implementation(before))
    for part in (model, *(p for p in parts if p._can_set_attn_implementation())):
        part.set_attn_implementation(IMPLEMENTATION)
    # An EncoderDecoderModel's parts were built from configurations that their models no longer hold.
    for config in {
        id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)
    }.values():
        if config._attn_implementation != IMPLEMENTATION:
            handle._undo.append(lambda c=config, b=config._attn_implementation: setattr(c, "_attn_implementation", b))
            config._attn_implementation = IMPLEMENTATION


def _choose(calls: list[RecordedCall], handle: SwapHandle) -> list[tuple[RecordedCall, int, int]]:
    """(call, layer index, number of layers) of the modules to attach to."""
    stacks: dict[Pattern, list[RecordedCall]] = {}
    for call in calls:
        stacks.setdefault(call.pattern, []).append(call)
    deepest = max((len(stack) for p, stack in stacks.items() if WHERE[p] in handle.where), default=0)
    if deepest and (beyond := [n for n in handle.layers or () if not 0 <= n < deepest]):
        raise ValueError(f"layers={list(handle.layers or ())}: there is no layer {beyond[0]}, only 0 to {deepest - 1}")
    chosen = [
        (call, index, len(stack))
        for pattern, stack in stacks.items()
        for index, call in enumerate(stack)
        if WHERE[pattern] in handle.where and (handle.layers is None or index in handle.layers)
    ]
    if not chosen:
        have = ", ".join(f"{len(stack)} {WHERE[p]}" for p, stack in stacks.items()) or "none"
        raise CapabilityError(
            f"no attention layer of {type(handle.model).__name__} matches where={list(handle.where)}, "
            f"layers={handle.layers} (it has: {have}); families known to work: {', '.join(FAMILIES)}"
        )
    return chosen


def _check(can: Capabilities, name: str, call: RecordedCall) -> None:
    can.check(
        name,
        call.pattern,
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        value_dim=call.value_dim,
    )


def _attach(
    model: PreTrainedModel, call: RecordedCall, attention: Attention, can: Capabilities, handle: SwapHandle
) -> None:
    path = next(name for name, module in model.named_modules() if module is call.module)
    parameter = next(call.module.parameters())
    attention.adopt(call.module)
    slot = AttentionSlot(attention.to(parameter.device), call.pattern, path)
    slot.train(model.training)
    call.module.add_module(IMPLEMENTATION, slot)
    handle._undo.append(lambda: delattr(call.module, IMPLEMENTATION))
    handle.slots.append(slot)
    if attention.new_cache_state() is not None:
        hook = call.module.register_forward_pre_hook(_watch_cache, with_kwargs=True)
        handle._undo.append(hook.remove)
    if can.needs_hidden_states:
        hook = call.module.register_forward_pre_hook(_keep_hidden_states, with_kwargs=True)
        handle._undo.append(hook.remove)


def _keep_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    getattr(module, IMPLEMENTATION).hidden_states = args[0] if args else kwargs["hidden_states"]


def _watch_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    slot = getattr(module, IMPLEMENTATION)
    watch_cache(slot, module, args, kwargs, cross=slot.pattern.endswith("cross"))


def _no_dropout(modules: list[nn.Module], handle: SwapHandle) -> None:
    found = 0.0
    for module in modules:
        for name in ("attention_dropout", "dropout", "attn_dropout"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Dropout) and value.p > 0:
                found = max(found, value.p)
                handle._undo.append(lambda d=value, p=value.p: setattr(d, "p", p))
                value.p = 0.0
            elif isinstance(value, float) and value > 0:
                found = max(found, value)
                handle._undo.append(lambda m=module, n=name, p=value: setattr(m, n, p))
                setattr(module, name, 0.0)
    if found:
        handle.notes.append(f"attention dropout {found} -> 0 (the same for every variant)")
