"""Model families whose attention can be swapped. Imports nothing."""

FAMILIES = (
    "bart bert cct distilbert electra esm gpt2 gpt_neox llama marian mbart mistral modernbert opt pegasus qwen3 "
    "roberta vit"
).split()
"""Model types known to call the attention interface (where windows are an option, configured without); others may
too, and are probed."""
