"""LSH attention of the Reformer (Kitaev et al. 2020, arXiv 2001.04451)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from astbench_kernels.layout import ceil_div
from astbench_registry.configs.reformer import ReformerConfig
from astbench_registry.errors import CapabilityError
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape, AttentionStats
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.randomness import generator

SELF_LOGIT = -5e4
"""Logit of a token with itself (the paper subtracts 1e5): zero weight beside any other key, all of it if alone."""

ROTATIONS_PER_DRAW = 64
"""Rotation columns drawn at once: the first n columns must be the same whatever the longest sequence needs."""


class ReformerAttention(Attention):
    """Tokens with similar queries meet: hash, sort, cut into chunks, attend within a chunk and to the one before.

    Round r hashes by random rotations, h(x) = argmax([x R; -x R]), and sorts the tokens by (bucket, position); s_i
    is token i's place, m the chunk length. With the self pair left out unless it is the only one,

        P_i^r = {j : floor(s_i / m) - 1 <= floor(s_j / m) <= floor(s_i / m)}      (causal: and j <= i)
        k_j = sqrt(d) q_j / |q_j|,   z_i^r = log sum_{j in P_i^r} exp(scale q_i . k_j - log N_ij)
        o_i = sum_r exp(z_i^r - z_i) sum_{j in P_i^r} exp(scale q_i . k_j - log N_ij - z_i^r) v_j

    with N_ij the number of rounds in which the pair meets: softmax attention over the union of the P_i^r.

    Queries are keys: q does the work of both, and the backbone's k is not read (its projection gets no gradient).
    Which tokens meet is chosen among all tokens, so under a causal mask it depends on later ones: no output reads
    a later value, but the mask of pairs is not causal, and the capability record says so.

    Differences. The paper's text writes k_j = q_j / |q_j| and leaves the factor 1 / sqrt(d) out "for clarity"; its
    authors' code (Trax) and transformers give keys the length sqrt(d), so that under that factor a logit is
    q . k / |k|, as here. reformer_pytorch has unit keys under 1 / sqrt(d): logits sqrt(d) times smaller.
    The paper's text keeps to j of the same bucket (`attend_across_buckets=False`); its authors' code and the
    published packages do not, and neither does the default. Buckets hold m tokens on average, as there (the paper's
    text: m / 2). Their number follows each sequence's own real length, and padding is sorted behind everything. A
    round's first chunk has no chunk before it; in the published code it looks into the last chunk of another round.
    All heads share the rotations. They are drawn anew at every training step and are those of step 0 outside of
    training, so that an evaluation repeats itself. Hashing multiplies N queries with N / (2 m) columns per round; the
    paper does not count that.
    """

    config: ReformerConfig

    def __init__(self, config: ReformerConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.package: Any = None if config.backend == "auto" else _package(config)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        scale: float | None = None,
        context: AttentionContext | None = None,
    ) -> AttentionOutput:
        """See the base class. Time and memory O(N bucket_size num_hashes), plus the hashing."""
        if mask.query_offset or q.shape[2] != k.shape[2]:
            raise ValueError(f"reformer needs all of the queries at once, got {q.shape[2]} of {k.shape[2]}")
        context = context or AttentionContext()
        scale = self.shape.head_dim**-0.5 if scale is None else scale
        step = context.step if self.training else 0
        # The package cannot reshape a batch of none.
        attend = self._packaged if self.package is not None and len(q) else self._own
        with torch.autocast(q.device.type, enabled=False):
            q, _, v = mask.without_padding(q, k, v)
            out, attended = attend(q, v, mask, scale, step, context.collect_stats)
        stats = None
        if attended is not None:
            backend = f"torch-{q.device.type}" if self.package is None else self.config.backend
            stats = AttentionStats(attended, mask.visible_pairs(q, k), backend)
        return AttentionOutput(out.to(q.dtype), stats=stats)

    def _own(
        self, q: Tensor, v: Tensor, mask: AttentionMask, scale: float, step: int, count: bool
    ) -> tuple[Tensor, Tensor | None]:
        compute = torch.promote_types(q.dtype, torch.float32)
        q, v = q.to(compute), v.to(compute)
        batch, _, length, _ = q.shape
        valid = mask.key_valid
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        pair = 2 * self.config.bucket_size  # a column makes two buckets, x R and -x R
        num_buckets = 2 * ((valid.sum(-1) + pair - 1) // pair).clamp(min=1)
        buckets = lsh_buckets(q, self.rotations(length, step).to(q), num_buckets)
        return bucketed_attention(
            q,
            v,
            buckets,
            valid=valid,
            bucket_size=self.config.bucket_size,
            causal=mask.causal,
            scale=scale,
            attend_across_buckets=self.config.attend_across_buckets,
            allow_duplicate_attention=self.config.allow_duplicate_attention,
            count=count,
        )

    def rotations(self, length: int, step: int) -> Tensor:
        """Random rotations for sequences of up to `length` tokens: `(num_hashes, head_dim, columns)`, float32."""
        columns = ceil_div(length, 2 * self.config.bucket_size)
        shape = (self.config.num_hashes, self.shape.head_dim, ROTATIONS_PER_DRAW)
        draws = [
            torch.randn(shape, generator=generator(self.config.seed, self.shape.layer_index, step, draw))
            for draw in range(ceil_div(columns, ROTATIONS_PER_DRAW))
        ]
        return torch.cat(draws, -1)[..., :columns]

    def _packaged(
        self, q: Tensor, v: Tensor, mask: AttentionMask, scale: float, step: int, count: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The package's LSHAttention, under a random state of its own; it takes heads as sequences."""
        multiple = 2 * self.config.bucket_size
        if q.shape[2] % multiple or (mask.key_valid is not None and not bool(mask.key_valid.all())):
            raise CapabilityError(
                f"attention 'reformer' with --attention.backend=reformer_pytorch takes no padding and lengths in "
                f"multiples of {multiple}, got {q.shape[2]}; use --attention.backend=auto"
            )
        self.package.causal = mask.causal  # one module for both patterns
        heads = q.shape[:2]
        q = q * (scale * self.shape.head_dim)  # its keys have length 1, its factor is 1 / sqrt(d); hashes see no length
        devices = [q.device] if q.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(generator(self.config.seed, self.shape.layer_index, step).initial_seed())
            out, _, buckets = self.package(q.flatten(0, 1), v.flatten(0, 1))
        attended = _package_pairs(buckets, q.shape[2], self.config.bucket_size, mask.causal) if count else None
        return out.unflatten(0, heads), None if attended is None else attended.unflatten(0, heads)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Per round: the rotations, and two matmuls of every chunk with two chunks."""
        chunk = min(self.config.bucket_size, query_length)
        columns = ceil_div(query_length, 2 * self.config.bucket_size)
        pairs = 2 * ceil_div(query_length, chunk) * chunk * 2 * chunk
        heads = batch * self.shape.num_heads * self.config.num_hashes
        return 2 * heads * self.shape.head_dim * (query_length * columns + pairs)


@torch.no_grad()
def lsh_buckets(q: Tensor, rotations: Tensor, num_buckets: Tensor) -> Tensor:
    """The bucket of every token in every round (section 2, "Locality sensitive hashing").

    Args:
        q: `(batch, heads, length, head_dim)`.
        rotations: `(num_hashes, head_dim, columns)`; a sequence with b buckets uses the first b / 2 columns.
        num_buckets: Even numbers `(batch,)`, at most twice the columns.

    Returns: int64 `(batch, heads, num_hashes, length)`, from 0 to num_buckets - 1.
    """
    half = num_buckets.view(-1, 1, 1) // 2
    unused = torch.arange(rotations.shape[-1], device=q.device) >= half[..., None]
    found = []
    for rotation in rotations:  # one round at a time: (batch, heads, length, columns) is large
        rotated = q @ rotation
        column = rotated.abs().masked_fill(unused, -1.0).argmax(-1)
        negative = rotated.gather(-1, column[..., None]).squeeze(-1) < 0
        found.append(column + half * negative)
    return torch.stack(found, 2)


@dataclass(frozen=True)
class Round:
    """One round's sorted order, cut into chunks.

    Attributes:
        token: Position of the token in each place, `(batch, heads, chunks, chunk)`; 0 where there is none.
        real: Whether the place holds a real token, same shape.
        place: Place of each token in the order, `(batch, heads, length)`.
        bucket: Bucket of each token, as `place`.
    """

    token: Tensor
    real: Tensor
    place: Tensor
    bucket: Tensor


def bucketed_attention(
    q: Tensor,
    v: Tensor,
    buckets: Tensor,
    *,
    valid: Tensor,
    bucket_size: int,
    causal: bool,
    scale: float,
    attend_across_buckets: bool = True,
    allow_duplicate_attention: bool = False,
    count: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention among tokens that meet in some round, given everyone's buckets.

    Args:
        q: Queries and, at length sqrt(head_dim), keys: `(batch, heads, length, head_dim)`, without NaN.
        v: As `q`.
        buckets: int64 `(batch, heads, num_hashes, length)`.
        valid: Bool `(batch, length)`, False for padding: sorted last, seen by nobody, zero in the output.
        bucket_size: Tokens per chunk.
        causal: Hide later positions.
        scale: Factor on q . k.
        attend_across_buckets: As in the options.
        allow_duplicate_attention: As in the options.
        count: Count the pairs too.

    Returns: `(batch, heads, length, head_dim)`, and float64 `(batch, heads)` distinct pairs or None.
    """
    rounds = [_sort(bucket, valid, min(bucket_size, q.shape[2])) for bucket in buckets.unbind(2)]
    keys = normalize(q, dim=-1) * q.shape[-1] ** 0.5
    outputs, totals, attended = [], [], None
    if count:
        attended = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    for this in rounds:
        token, seen = this.token, _with_chunk_before(this.token)
        allowed = this.real[..., :, None] & _with_chunk_before(this.real)[..., None, :]
        if causal:
            allowed &= seen[..., None, :] <= token[..., :, None]
        if not attend_across_buckets:
            allowed &= _same_bucket(this, this)
        logits = _take(q, token) @ _with_chunk_before(_take(keys, token)).transpose(-1, -2) * scale
        if count or not allow_duplicate_attention:
            meetings = _meetings(this, rounds, attend_across_buckets)
            if not allow_duplicate_attention:
                logits = logits - meetings.to(q.dtype).log()
            if attended is not None:
                attended += (allowed / meetings.double()).sum((2, 3, 4))
        logits = logits.masked_fill(token[..., :, None] == seen[..., None, :], SELF_LOGIT)
        logits = logits.masked_fill(~allowed, torch.finfo(q.dtype).min)
        total = logits.logsumexp(-1, keepdim=True)
        output = (logits - total).exp() @ _with_chunk_before(_take(v, token))
        outputs.append(_unsort(output, this.place))
        totals.append(_unsort(total, this.place))
    weights = torch.stack(totals).softmax(0)
    out = (weights * torch.stack(outputs)).sum(0)
    return out.masked_fill(~valid[:, None, :, None], 0.0), attended


def _sort(bucket: Tensor, valid: Tensor, chunk: int) -> Round:
    """Sort by (bucket, position), padding last."""
    length = bucket.shape[-1]
    behind = torch.iinfo(bucket.dtype).max
    order = bucket.masked_fill(~valid[:, None], behind).argsort(stable=True, dim=-1)
    places = torch.arange(length, device=bucket.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, places)
    chunks = ceil_div(length, chunk)
    token = pad(order, (0, chunks * chunk - length)).unflatten(-1, (chunks, chunk))
    real = torch.arange(chunks * chunk, device=bucket.device) < valid.sum(-1)[:, None, None]
    return Round(token, real.expand(-1, bucket.shape[1], -1).unflatten(-1, (chunks, chunk)), place, bucket)


def _with_chunk_before(x: Tensor) -> Tensor:
    """`(batch, heads, chunks, chunk, ...)` with the chunk before in front, zeros before the first."""
    before = torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
    return torch.cat([before, x], 3)


def _meetings(this: Round, rounds: list[Round], attend_across_buckets: bool) -> Tensor:
    """N_ij, int32 `(batch, heads, chunks, chunk, 2 chunk)`: in how many rounds pairs of this one meet; 1 at least."""
    chunk = this.token.shape[-1]
    number = torch.zeros(1, dtype=torch.int32, device=this.token.device)
    for other in rounds:
        mine = (other.place // chunk).int().gather(-1, this.token.flatten(2)).view_as(this.token)
        ahead = mine[..., :, None] - _with_chunk_before(mine)[..., None, :]
        meet = (ahead == 0) | (ahead == 1)
        number = number + (meet if attend_across_buckets else meet & _same_bucket(this, other))
    return number.clamp(min=1)


def _same_bucket(this: Round, other: Round) -> Tensor:
    """Which pairs of this round's chunks share a bucket in the other round."""
    bucket = other.bucket.gather(-1, this.token.flatten(2)).view_as(this.token)
    return bucket[..., :, None] == _with_chunk_before(bucket)[..., None, :]


def _take(x: Tensor, token: Tensor) -> Tensor:
    """`(batch, heads, length, d)` in sorted order: `(batch, heads, chunks, chunk, d)`."""
    index = token.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, index).unflatten(2, token.shape[2:])


def _unsort(x: Tensor, place: Tensor) -> Tensor:
    """`(batch, heads, chunks, chunk, d)` back to `(batch, heads, length, d)`."""
    return x.flatten(2, 3).gather(2, place[..., None].expand(-1, -1, -1, x.shape[-1]))


def _package(config: ReformerConfig) -> nn.Module:
    try:
        from reformer_pytorch import LSHAttention
    except ImportError as error:
        raise ValueError(
            "attention 'reformer' with --attention.backend=reformer_pytorch cannot run here: package reformer_pytorch "
            "is not installed; pip install 'astbench[baselines]'"
        ) from error
    return LSHAttention(
        bucket_size=config.bucket_size,
        n_hashes=config.num_hashes,
        attend_across_buckets=config.attend_across_buckets,
        allow_duplicate_attention=True,
    )


def _package_pairs(buckets: Tensor, length: int, chunk: int, causal: bool) -> Tensor:
    """float64 `(sequences,)`: distinct pairs, its first chunks' look into another round's last included."""
    ticker = torch.arange(buckets.shape[-1], device=buckets.device) % length
    token = ticker.expand_as(buckets).gather(-1, (buckets * length + ticker).argsort(-1)).unflatten(-1, (-1, chunk))
    seen = torch.cat([token, token.roll(1, 1)], -1)
    pair = token[..., :, None] * length + seen[..., None, :]
    hidden = torch.zeros_like(pair, dtype=torch.bool)
    if causal:
        hidden = seen[..., None, :] > token[..., :, None]
    ordered = pair.masked_fill(hidden, -1).flatten(1).sort(-1).values
    return ((ordered.diff(dim=-1) != 0) & (ordered[:, 1:] >= 0)).sum(-1).double() + (ordered[:, 0] >= 0)
