"""Triton kernels that sum up key blocks and choose among them."""
