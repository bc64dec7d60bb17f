"""Selective hard attention (Nagarajan et al. 2020, AxFormer, arXiv 2010.03688), at inference alone."""

from __future__ import annotations

from torch import Tensor

from astbench_registry.transforms.configs.hard import HardConfig
from astbench_registry.transforms.interface import Transform


class Hard(Transform):
    """A row keeps its `top_k` largest weights and weighs nothing else, in the layers that `layers` names.

    With S the kept keys of a row and a its weights: a_j / sum_S a for j in S ("renormalised", which is a softmax over S
    alone), 1 / |S| ("uniform") or a_j ("raw"); 0 for all others.

    What was at hand of the paper is its abstract: hard attention "optimizes attention blocks in selected layers by
    eliminating irrelevant word aggregations". Left open there, and decided here:

    * What is irrelevant: all but a row's `top_k` largest weights. Ties with the last of them stay too, so that no
      result depends on an order.
    * What the kept weigh: the options above; none of them is known to be the paper's.
    * Which layers: the paper selects them by accuracy on the task, with fine-tuning. Here `layers` names them, and a
      sweep over it can look for them; nothing is trained.
    """

    config: HardConfig

    def __call__(self, weights: Tensor, visible: Tensor) -> Tensor:
        """See the base class. O(keys) a row beside the sorting of `top_k`."""
        last = weights.topk(min(self.config.top_k, weights.shape[-1]), -1).values[..., -1:]
        kept = (weights >= last) & (weights > 0)
        if self.config.weights == "uniform":
            return kept / kept.sum(-1, keepdim=True).clamp(min=1).to(weights.dtype)
        left = weights.masked_fill(~kept, 0.0)
        if self.config.weights == "raw":
            return left
        total = left.sum(-1, keepdim=True)
        return left / total.masked_fill(total == 0, 1.0)
