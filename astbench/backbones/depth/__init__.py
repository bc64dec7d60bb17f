"""Adaptive depth at work in a Hugging Face model: its layers found, folded by path, counted."""
