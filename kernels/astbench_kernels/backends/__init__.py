"""Ways to compute block-sparse attention, one file each; :mod:`astbench_kernels.attention` names and checks them."""
