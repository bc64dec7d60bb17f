"""Transforms of attention weights: what changes probabilities before they sum values, at inference and untrained.

One transform, one file. What its author needs is importable from :mod:`astbench_registry`.
"""
