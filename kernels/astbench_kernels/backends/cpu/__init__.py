"""The CPU path: gathered by query rows, by key blocks, or all pairs under a mask."""
