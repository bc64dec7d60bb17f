"""Adaptive depth: policies that choose which layers of a model an input goes through.

One policy, one file. What its author needs is importable from :mod:`astbench_registry`.
"""
