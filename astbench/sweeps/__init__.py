"""Sweeps: many runs from one file, run once each, and gone on with where they stopped. See docs/sweeps.md."""
