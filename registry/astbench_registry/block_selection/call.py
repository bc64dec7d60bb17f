"""One call of a layer as an object, so that what belongs together is handed on together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from astbench_kernels import BlockLayout, block_sparse_attention, choose_backend, what_runs
from astbench_registry.interface import AttentionContext, AttentionShape
from astbench_registry.mask import AttentionMask


@dataclass(frozen=True)
class Call:
    """What :meth:`astbench_registry.interface.Attention.forward` was given, defaults filled in.

    Attributes:
        q: Queries, `(batch, num_heads, query_length, head_dim)`.
        k: Keys, `(batch, num_kv_heads, key_length, head_dim)`.
        v: Values, `(batch, num_kv_heads, key_length, value_dim)`.
        mask: What may be seen.
        scale: Factor on q . k.
        context: Step, whether statistics are wanted, hidden states.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: AttentionMask
    scale: float
    context: AttentionContext

    @classmethod
    def of(
        cls,
        shape: AttentionShape,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> Call:
        """The call of a layer of this shape; scale 1/sqrt(head_dim) and an empty context by default."""
        return cls(q, k, v, mask, shape.head_dim**-0.5 if scale is None else scale, context or AttentionContext())

    @property
    def compute_dtype(self) -> torch.dtype:
        """float32, or more where the inputs have more: what scores are computed in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def without_padding(self) -> Call:
        """The same with zeros where there is padding; see :meth:`AttentionMask.without_padding`."""
        q, k, v = self.mask.without_padding(self.q, self.k, self.v)
        return replace(self, q=q, k=k, v=v)

    def detached(self) -> Call:
        """The same, without a gradient to queries, keys and values."""
        return replace(self, q=self.q.detach(), k=self.k.detach(), v=self.v.detach())

    def queries_between(self, start: int, stop: int) -> Call:
        """Of a causal call that of the queries at positions from `start` on, before `stop`, with the keys before it."""
        mask, keys = self.mask, min(stop, self.k.shape[2])
        rows = slice(start - mask.query_offset, stop - mask.query_offset)
        part = replace(
            mask,
            query_offset=start,
            key_valid=None if mask.key_valid is None else mask.key_valid[:, :keys],
            query_valid=None if mask.query_valid is None else mask.query_valid[:, rows],
        )
        return replace(self, q=self.q[:, :, rows], k=self.k[:, :, :keys], v=self.v[:, :, :keys], mask=part)

    def backend(self, wanted: str) -> str:
        """The kernel that `--attention.backend=wanted` stands for here.

        Raises:
            ValueError: it cannot serve this call; all reasons.
        """
        head_dim = max(self.q.shape[-1], self.v.shape[-1])
        return choose_backend(wanted, self.q.device, dtype=self.q.dtype, head_dim=head_dim)

    def attend(self, layout: BlockLayout, backend: str, block_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of attention to the listed blocks; see :func:`block_sparse_attention`."""
        return block_sparse_attention(
            self.q,
            self.k,
            self.v,
            layout,
            block_bias=block_bias,
            scale=self.scale,
            causal=self.mask.causal,
            key_valid=self.mask.key_valid,
            backend=backend,
        )

    def ran(self, layout: BlockLayout, backend: str, block_bias: Tensor | None = None) -> str:
        """Name of the kernel and schedule that :meth:`attend` runs, for the record."""
        return what_runs(
            backend,
            self.q,
            self.k,
            self.v,
            layout,
            causal=self.mask.causal,
            block_bias=block_bias,
            key_valid=self.mask.key_valid,
        )
