"""Performer: softmax attention estimated with random features (Choromanski et al. 2021, arXiv 2009.14794)."""

from __future__ import annotations

import contextlib
import hashlib
import io
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from astbench_registry.configs.performer import PerformerConfig
from astbench_registry.errors import CapabilityError
from astbench_registry.interface import Attention, AttentionContext, AttentionOutput, AttentionShape
from astbench_registry.mask import AttentionMask
from astbench_registry.toolbox.linear import Features, linear_attention_flops, normalised_linear_attention


class PerformerAttention(Attention):
    """FAVOR+: weights are products of m random features, w_1 .. w_m ~ N(0, I), orthogonal in blocks of head_dim.

        out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)    (j <= i when causal)
        softmax: phi(x) = exp(w x' - |x'|^2 / 2) / sqrt(m),  x' = sqrt(scale) x;  E phi(q) . phi(k) = exp(scale q . k)
        relu:    phi(x) = relu(w x') + kernel_epsilon

    Differences from the paper and its code:

    - Its code adds 1e-6 to the softmax features, after dividing them by their maximum over keys that a causal
      query may not see. Here nothing is added, and each row is computed relative to the largest key it sees.
      Where |q| and |k| are so large (dozens of times what the estimate can serve) that all of a row's weights
      underflow, the row is zero.
    - One set of features per layer, for all heads, as its code has it; drawn from (seed, layer, redraw), in
      float64 on the CPU, so that any device, a resumed run and a decoder that is evaluated all have the same.
    - Redraws happen while training, at multiples of `redraw_interval` steps; evaluation has the last ones.
    - Decoding is given all keys and sums them anew: its constant cost per token is not had here.
    """

    config: PerformerConfig

    def __init__(self, config: PerformerConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.redraw = 0
        self._drawn: tuple[tuple[object, ...], Tensor] | None = None
        # In a tuple, to stay out of the state dict: its features are set at every call.
        self._package: tuple[Any, ...] = ()
        if config.backend == "performer_pytorch":
            self._package = (_fast_attention(config, shape),)

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
        """See the base class. Time O((N + M) num_features head_dim) per head; sums in float32 at least."""
        if self.training and context is not None and self.config.redraw_interval:
            self.redraw = context.step // self.config.redraw_interval
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if self._package:
            stats = self.all_pairs(q, k, mask, context, "performer_pytorch")
            return AttentionOutput(self._run_package(q, k, v, mask, scale), stats=stats)
        stats = self.all_pairs(q, k, mask, context)
        dtype, compute = q.dtype, torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = q.to(compute) * scale**0.5, k.to(compute) * scale**0.5, v.to(compute)
            projection = self.projection(q.device, compute)
            features: Features = partial(_exponentials, projection)
            if self.config.kernel == "relu":
                features = partial(_rectified, projection, self.config.kernel_epsilon)
            out = normalised_linear_attention(q, k, v, mask, features, self.config.num_features)
        return AttentionOutput(out.to(dtype), stats=stats)

    def projection(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The features w in use, `(num_features, head_dim)`."""
        key = (self.redraw, device, dtype)
        if self._drawn is None or self._drawn[0] != key:
            config, shape = self.config, self.shape
            label = f"{config.seed}/{shape.layer_index}/{self.redraw}".encode()
            seed = int.from_bytes(hashlib.blake2b(label, digest_size=4).digest())
            # Drawn for a validation pass, they must still serve the training step that follows.
            with torch.inference_mode(False):
                generator = torch.Generator().manual_seed(seed)
                drawn = draw_features(config.num_features, shape.head_dim, generator, orthogonal=config.orthogonal)
                self._drawn = key, drawn.to(device, dtype)
        return self._drawn[1]

    def get_extra_state(self) -> Tensor:
        """What a state dict keeps: which redraw is in use. Not the features: half precision would round them."""
        return torch.tensor(self.redraw)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the redraw of a saved module."""
        self.redraw = int(state)

    def flops(self, batch: int, query_length: int, key_length: int, mask: AttentionMask) -> int:
        """The projections, the sums over keys and what the queries read; causal: inside the chunks too."""
        features, lengths = self.config.num_features, (query_length, key_length)
        projection = 2 * features * self.shape.head_dim
        return batch * linear_attention_flops(self.shape, features, lengths, mask, per_vector=projection)

    def state_size(self, key_length: int) -> int:
        """Per key/value head the sums of phi(k) v^T and of phi(k) and their log scale, whatever the length."""
        scales = 1 if self.config.kernel == "softmax" else 0
        return self.shape.num_kv_heads * (self.config.num_features * (self.shape.head_dim + 1) + scales)

    def _run_package(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
        """The published package on our features; it divides q and k by head_dim^(1/4) itself."""
        if mask.query_offset or (mask.key_valid is not None and not bool(mask.key_valid.all())):
            raise CapabilityError(
                "attention 'performer' with --attention.backend=performer_pytorch takes neither padding nor decoding "
                "steps; use --attention.backend=auto"
            )
        (package,) = self._package
        package.projection_matrix = self.projection(q.device, q.dtype)
        package.causal = mask.causal
        factor = (scale * q.shape[-1] ** 0.5) ** 0.5
        return package(q * factor, k * factor, v)


def draw_features(num_features: int, head_dim: int, generator: torch.Generator, *, orthogonal: bool = True) -> Tensor:
    """Directions w ~ N(0, I), float64 `(num_features, head_dim)`, orthogonal within blocks of head_dim if asked.

    An orthogonal block is uniform over all rotations and reflections only if R of the QR decomposition has a
    positive diagonal, which LAPACK does not see to; without it the features are biased. Lengths are those of
    Gaussian vectors, so that each row by itself is exactly N(0, I).
    """
    gaussian = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return gaussian
    blocks = -(-num_features // head_dim)
    square = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    rotation, r = torch.linalg.qr(square)
    rotation = rotation * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return rotation.flatten(0, 1)[:num_features] * gaussian.norm(dim=-1, keepdim=True)


def _exponentials(projection: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(w x - |x|^2 / 2) as exp(w x - largest) and the logarithm of the rest; the largest is a constant."""
    exponents = x @ projection.T
    largest = exponents.detach().amax(-1, keepdim=True)
    return exponents.sub_(largest).exp_(), largest.squeeze(-1) - x.square().sum(-1) / 2


def _rectified(projection: Tensor, epsilon: float, x: Tensor) -> tuple[Tensor, None]:
    return torch.relu(x @ projection.T) + epsilon, None


def _fast_attention(config: PerformerConfig, shape: AttentionShape) -> Any:
    """The published package's module."""
    # It imports distutils, which Python 3.12 has only from setuptools.
    for package, module in (("performer-pytorch", "performer_pytorch"), ("setuptools", "distutils")):
        if find_spec(module) is None:
            raise ValueError(
                f"attention 'performer' with --attention.backend=performer_pytorch cannot run here: package {package} "
                "is not installed; pip install 'astbench[baselines]'"
            )
    from performer_pytorch import FastAttention

    # It draws features of its own, from the global state, and prints that it lacks a CUDA kernel.
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        return FastAttention(
            shape.head_dim, config.num_features, causal=True, generalized_attention=config.kernel == "relu"
        )
