"""Sweeps: many runs from one file, each once. See docs/sweeps.md."""
