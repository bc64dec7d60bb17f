"""Ground floor of astbench: tensors in, tensors out.

Imports torch and nothing else of this project. Public names:

* :class:`BlockLayout`: which key blocks each group of queries attends to.
* :func:`block_sparse_attention`: attention over just those blocks, differentiable.
* :func:`block_sparse_attention_varlen`: the same of packed sequences of unequal lengths.
* :func:`merge_attention`: one softmax over several sets of keys, each attended to by itself.
* :func:`select_blocks`, :func:`soft_top_k`, :func:`log_mass`: from scores to lists, and their gradients.
* :func:`sparse_backends`: what can run here, and why the rest cannot; :func:`what_runs`: what a call runs.
* :func:`dense_attention`, :func:`dense_backends`: the same for dense attention.
"""

from astbench_kernels.attention import Backend, block_sparse_attention, choose_backend, sparse_backends, what_runs
from astbench_kernels.dense import DenseBackend, check_dense_backend, dense_attention, dense_backends
from astbench_kernels.layout import BlockLayout
from astbench_kernels.merge import merge_attention
from astbench_kernels.selection import log_mass, select_blocks, soft_top_k
from astbench_kernels.varlen import block_sparse_attention_varlen

__all__ = [
    "Backend",
    "BlockLayout",
    "DenseBackend",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "check_dense_backend",
    "choose_backend",
    "dense_attention",
    "dense_backends",
    "log_mass",
    "merge_attention",
    "select_blocks",
    "soft_top_k",
    "sparse_backends",
    "what_runs",
]
