"""Hugging Face models as backbones: presets, pretrained weights, and the swap of their attention."""
