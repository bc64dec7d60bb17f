"""Kernels for compute capability 9.0 (Hopper) in Gluon. Importing this package imports neither triton nor Gluon.

:mod:`astbench_kernels.dispatch.hopper` says which calls they serve, :mod:`function` runs them.
"""
