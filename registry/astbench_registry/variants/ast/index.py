"""An index of tokens: queries and keys in few dimensions, by which blocks are scored token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from astbench_registry.interface import AttentionShape
from astbench_registry.toolbox.widening import widened


class _Moments(NamedTuple):
    """Sums over what was observed, float64: of q q^T `(heads, d, d)`, of k k^T, of k, and of the keys' number."""

    queries: Tensor
    keys: Tensor
    key_sum: Tensor
    number: Tensor


class TokenIndex(nn.Module):
    """q' = q A and k' = k B in `dim` dimensions, with q' . k' near q . k.

    A is a query head's, B a key/value head's, so that an index key is kept once for all heads that share its key. They
    start as random projections, right in the mean (Johnson and Lindenstrauss 1984). After :meth:`observe`,
    :meth:`start` makes them the best of this rank for the observed queries and keys:

        B = C_k^(-1/2) V,   A = C_k^(1/2) V,   V the first right singular vectors of C_q^(1/2) C_k^(1/2)

    which of all matrices of the rank has the least squared error of q . k over all pairs (Eckart and Young 1936, in the
    metrics of both covariances). C_k is centred: what all keys share moves all scores of a row alike, and no choice.
    """

    def __init__(self, shape: AttentionShape, dim: int) -> None:
        super().__init__()
        size, self.groups = shape.head_dim, shape.num_heads // shape.num_kv_heads
        if dim > size:
            raise ValueError(f"--attention.index_dim must be at most the heads' size, {size}, got {dim}")
        start = torch.randn(shape.num_kv_heads, size, dim) * dim**-0.5
        self.key_weight = nn.Parameter(start)
        self.query_weight = nn.Parameter(start.repeat_interleave(self.groups, 0))
        self._moments: _Moments | None = None

    def keys(self, k: Tensor, dtype: torch.dtype) -> Tensor:
        """`(batch, kv_heads, length, d)` -> `(batch, kv_heads, length, dim)`."""
        return torch.matmul(k.to(dtype), widened(self.key_weight, dtype))

    def queries(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """`(batch, heads, length, d)` -> `(batch, heads, length, dim)`."""
        return torch.matmul(q.to(dtype), widened(self.query_weight, dtype))

    @torch.no_grad()
    def observe(self, q: Tensor, k: Tensor, query_valid: Tensor | None, key_valid: Tensor | None) -> None:
        """Add up what :meth:`start` needs of a call; masks are bool `(batch, length)`, None where all is real."""
        rows, columns = _real_rows(q, query_valid), _real_rows(k, key_valid)
        found = _Moments(
            rows.transpose(1, 2) @ rows,
            columns.transpose(1, 2) @ columns,
            columns.sum(1),
            torch.tensor(float(columns.shape[1]), dtype=torch.float64, device=k.device),
        )
        known = self._moments
        self._moments = found if known is None else _Moments(*(a + b for a, b in zip(known, found, strict=True)))

    def forget(self) -> None:
        """Let go of what was observed."""
        self._moments = None

    @torch.no_grad()
    def start(self) -> bool:
        """Begin with the best projections for what was observed; False where nothing was."""
        if self._moments is None or not float(self._moments.number):
            return False
        moments, self._moments = self._moments, None
        mean = moments.key_sum / moments.number
        keys = moments.keys / moments.number - mean[:, :, None] * mean[:, None, :]
        queries = moments.queries.unflatten(0, (-1, self.groups)).sum(1)
        root, inverse = _roots(keys)
        right = torch.linalg.svd(_roots(queries)[0] @ root).Vh.transpose(1, 2)[..., : self.key_weight.shape[-1]]
        left, b = root @ right, inverse @ right
        balance = (left.square().sum((1, 2), keepdim=True) / b.square().sum((1, 2), keepdim=True)) ** 0.25
        self.key_weight.copy_(b * balance)
        self.query_weight.copy_((left / balance).repeat_interleave(self.groups, 0))
        return True


def _real_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """float64 `(heads, rows, d)`: the real rows of all sequences."""
    flat = x.double().transpose(0, 1).flatten(1, 2)
    return flat if valid is None else flat[:, valid.flatten()]


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its pseudo-inverse of symmetric matrices `(n, d, d)` without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0.0)
    real = values > 1e-10 * values.amax(-1, keepdim=True)
    roots = values.sqrt()
    inverse = torch.where(real, 1 / torch.where(real, roots, 1.0), 0.0)
    return (vectors * roots[:, None]) @ vectors.mT, (vectors * inverse[:, None]) @ vectors.mT
