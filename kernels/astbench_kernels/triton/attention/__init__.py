"""Triton kernels of attention over listed blocks, forward, backward and decoding."""
