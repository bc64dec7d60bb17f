"""Looks on while a model runs: each call of each attention that chooses blocks, with the facts of some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from astbench.analysis.rows import RowFacts, row_facts, sampled_rows
from astbench.backbones.hooks import AttentionSlot
from astbench.errors import ConfigError
from astbench.training.module import TaskModule
from astbench_kernels import BlockLayout
from astbench_registry.block_selection import BlockSelectingAttention, Call
from astbench_registry.interface import Attention


@dataclass(frozen=True)
class Seen:
    """One call.

    Attributes:
        slot: Where in the model.
        call: What the attention was given.
        layout: The lists that it chose.
        rows: int64: the query rows that were looked at, the same of every sequence.
        facts: Of these rows.
        of_input: Self-attention over the input's tokens, not over those that a decoder behind an encoder reads.
    """

    slot: AttentionSlot
    call: Call
    layout: BlockLayout
    rows: Tensor
    facts: RowFacts
    of_input: bool

    @property
    def free(self) -> Tensor:
        """Bool `(batch or 1, 1, rows, blocks)`: blocks that compete for a row: visible, and not always kept.

        Of an attention that does not say which these are: all blocks.
        """
        attention = self.slot.attention
        if not isinstance(attention, BlockSelectingAttention):
            return torch.ones(1, 1, len(self.rows), self.layout.num_blocks, dtype=torch.bool, device=self.rows.device)
        selection = attention.selection(self.call.without_padding())
        return selection.free[:, :, self.rows // selection.query_group]


@contextmanager
def watching_choices(module: TaskModule, rows: int, see: Callable[[Seen], None]) -> Iterator[None]:
    """Within, `see` gets every call of more than one row.

    Args:
        module: In a trainer, its model built.
        rows: Query rows looked at in each sequence, at most.
        see: Called after each attention call.

    Raises:
        ConfigError: the attention chooses no blocks.
    """
    if not any(slot.attention.block_sparse for slot in module.swapped.slots):
        raise ConfigError(f"--attention={module.swapped.name} chooses no blocks; analyze is for attentions that do")

    def watch(slot: AttentionSlot) -> Any:
        def hook(attention: Attention, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            stats = output.stats
            if stats is None or stats.layout is None:
                return
            q, k, v, mask = given
            if q.shape[2] < 2:  # decoding
                return
            call = Call.of(attention.shape, q, k, v, mask, named.get("scale"), named.get("context"))
            at = sampled_rows(q.shape[2], rows, q.device)
            of_input = slot.pattern.endswith("_self") and not _in_a_decoder_behind_an_encoder(module, slot)
            facts = row_facts(call, stats.layout, at)
            see(Seen(slot, call, stats.layout, at, facts, of_input))

        return hook

    with ExitStack() as stack:
        for slot in stack.enter_context(module.swapped.collecting_stats()):
            stack.callback(slot.attention.register_forward_hook(watch(slot), with_kwargs=True).remove)
        yield


def _in_a_decoder_behind_an_encoder(module: TaskModule, slot: AttentionSlot) -> bool:
    """Whether it reads other tokens than the input's."""
    config = module.swapped.model.config
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder" in slot.path.split(".")
