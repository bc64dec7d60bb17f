"""Nyströmformer (Xiong et al. 2021, arXiv 2102.03902): softmax attention through landmarks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from astbench_registry.configs.nystrom import NystromConfig
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape
from astbench_registry.mask import AttentionMask


class NystromAttention(Attention):
    """Eq. 13: softmax(Q K~^T) A^+ (softmax(Q~ K^T) V), with A = softmax(Q~ K~^T), all logits over sqrt(d).

    Q~ and K~ are the means of `num_landmarks` consecutive segments (eq. 7). A^+ comes from `pinv_iterations` of
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, starting at Z = A^T / (|A|_1 |A|_inf) (eq. 14). With
    `conv_kernel_size` a depthwise convolution of the values along the length is added, one kernel per
    key/value head.

    Differs from the paper and from its packages:
    * The convolution is off by default, as a change of the values' path and not of the attention; the paper's
      models have it (33 tokens wide in the Long Range Arena).
    * Segments are cut over each sequence's real tokens, as evenly as their number allows; the paper pads until
      the length divides. Where padding is, and how much of it, changes nothing.
    * A sequence of at most `num_landmarks` real tokens gets dense attention, which A A^+ A V = A V is when every
      token is its own landmark; the authors' code does so where the length equals the landmarks.
    * The pseudo-inverse starts from each matrix's own norms; the packages' default divides by the largest of the
      batch, so that one sequence changes another.
    * All sums are in float32 at least: A^+ has large entries of both signs that half precision cannot cancel.

    The attention weights may be negative. Landmarks are means over the whole sequence: no causal form.
    """

    config: NystromConfig

    def __init__(self, config: NystromConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        size, heads = config.conv_kernel_size, shape.num_kv_heads
        if size:
            self.conv = nn.Conv2d(heads, heads, (size, 1), padding=(size // 2, 0), groups=heads, bias=False)

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
        """See the base class. Time and memory O(N landmarks), and O(landmarks^3) for the pseudo-inverse."""
        stats = self.all_pairs(q, k, mask, context)
        valid = mask.key_valid
        if valid is None:
            valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            out = self._attend(q, k, v, valid, self.shape.head_dim**-0.5 if scale is None else scale)
        return AttentionOutput(out.masked_fill(~valid.any(-1)[:, None, None, None], 0.0).to(v.dtype), stats=stats)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float) -> Tensor:
        dtype = torch.promote_types(v.dtype, torch.float32)
        q, k, v = (x.to(dtype).masked_fill(~valid[:, None, :, None], 0.0) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        segment, in_use = segments(valid, self.config.num_landmarks)  # (batch, landmarks, length), (batch, landmarks)
        share = (segment.to(dtype) / segment.sum(-1, keepdim=True).clamp(min=1))[:, None]
        q_marks, k_marks = share @ q, (share @ k).repeat_interleave(group, 1)

        # Landmarks that are not in use are rows and columns of zeros; they stay zero in the pseudo-inverse.
        slots = in_use[:, None, None, :]
        between = (q_marks @ k_marks.transpose(-1, -2) * scale).masked_fill(~slots, torch.finfo(dtype).min)
        between = between.softmax(-1) * slots * slots.transpose(-1, -2)
        seen = scaled_dot_product_attention(
            q_marks, k, v, attn_mask=visible(valid), scale=scale, enable_gqa=group > 1
        )  # (batch, heads, landmarks, head_dim)
        values = pseudo_inverse(between, self.config.pinv_iterations) @ seen
        every_token = (valid.sum(-1) <= self.config.num_landmarks)[:, None, None, None]
        values = torch.where(every_token, (share @ v).repeat_interleave(group, 1), values)
        out = scaled_dot_product_attention(q, k_marks, values, attn_mask=visible(in_use), scale=scale)
        if self.config.conv_kernel_size:
            out = out + self._convolved(v, valid).repeat_interleave(group, 1)
        return out

    def _convolved(self, v: Tensor, valid: Tensor) -> Tensor:
        """The convolution over the real tokens, moved together; zero where there is padding."""
        order = (~valid).to(torch.uint8).argsort(dim=-1, stable=True)  # the real tokens first
        back = order.argsort(dim=-1)

        def moved(x: Tensor, to: Tensor) -> Tensor:
            return x.gather(2, to[:, None, :, None].expand_as(x))

        weight = self.conv.weight.to(v.dtype)
        convolved = nn.functional.conv2d(moved(v, order), weight, padding=self.conv.padding, groups=v.shape[1])
        return moved(convolved, back).masked_fill(~valid[:, None, :, None], 0.0)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """Means, three softmax matrices with what they are applied to, the pseudo-inverse, the convolution."""
        heads, kv_heads, dim = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        marks = min(self.config.num_landmarks, key_length)
        means = 2 * (heads + 2 * kv_heads) * marks * key_length * dim
        attention = heads * (8 * key_length * marks * dim + 4 * marks * marks * dim)
        inverse = 8 * self.config.pinv_iterations * heads * marks**3
        convolution = 2 * kv_heads * key_length * dim * self.config.conv_kernel_size
        return batch * (means + attention + inverse + convolution)


def segments(valid: Tensor, num_landmarks: int) -> tuple[Tensor, Tensor]:
    """Which tokens each landmark is the mean of.

    The real tokens, n of them, are cut into min(n, num_landmarks) runs whose lengths differ by one at most.

    Args:
        valid: Bool `(batch, length)`.
        num_landmarks: Runs at most.

    Returns:
        Bool `(batch, landmarks, length)`: membership; bool `(batch, landmarks)`: the landmark has members. No
        landmark beyond `length` is returned.
    """
    real = valid.sum(-1, keepdim=True)  # (batch, 1)
    used = real.clamp(max=num_landmarks)
    rank = valid.cumsum(-1) - 1
    run = rank * used // real.clamp(min=1)  # (batch, length)
    index = torch.arange(min(num_landmarks, valid.shape[1]), device=valid.device)
    return (run[:, None, :] == index[:, None]) & valid[:, None, :], index < used


def visible(keys: Tensor) -> Tensor:
    """Bool `(batch, 1, 1, keys)`; where there is nothing to see, the first key, for a softmax of something."""
    first = torch.arange(keys.shape[1], device=keys.device) == 0
    return (keys | (first & ~keys.any(-1, keepdim=True)))[:, None, None, :]


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Eq. 14 for non-negative `(..., n, n)` whose rows sum to at most 1; every matrix by itself."""
    norms = matrix.sum(-2).amax(-1) * matrix.sum(-1).amax(-1)
    inverse = matrix.transpose(-1, -2) / norms.clamp(min=torch.finfo(matrix.dtype).tiny)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return inverse
