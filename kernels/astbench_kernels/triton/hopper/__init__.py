"""Kernels for compute capability 9.0 (Hopper) in Gluon. Importing this package imports neither triton nor Gluon.

:mod:`served` says which calls they take, :mod:`function` runs them.
"""
