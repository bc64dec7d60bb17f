"""The Adaptive Sparse Transformer's attention: its call, its predictor, and how the choice learns."""
