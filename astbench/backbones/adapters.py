"""A variant's own weights alone: a small safetensors file that loads onto the same backbone later."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from astbench.backbones.swap import SwapHandle, swap_attention
from astbench.errors import CheckpointError

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save_adapter(handle: SwapHandle, folder: str | Path) -> None:
    """Write `adapter.safetensors` (the variant's parameters only) and `adapter.json` (name and options)."""
    from astbench.files.writing import write_atomic, write_json

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: w.detach().contiguous().cpu() for name, w in handle.state_dict().items()})
    write_atomic(folder / WEIGHTS, lambda file: file.write(weights))
    write_json(
        folder / DESCRIPTION,
        {
            "attention": handle.name,
            "options": handle.options,
            "where": list(handle.where),
            "layers": handle.layers,
            "backbone": handle.model.config.name_or_path or handle.model.config.model_type,
        },
    )


def load_adapter(model: PreTrainedModel, folder: str | Path) -> SwapHandle:
    """Swap the attention that an adapter describes into `model` and load its weights.

    Raises:
        CheckpointError: files missing or damaged, or weights that do not fit this backbone.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        name, options, where, layers = (description[key] for key in ("attention", "options", "where", "layers"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"adapter in {folder} cannot be read: {error}") from error
    handle = swap_attention(model, name, options, where=where, layers=layers)
    wanted = handle.state_dict()
    wrong = sorted(set(wanted) ^ set(weights)) or sorted(n for n in wanted if wanted[n].shape != weights[n].shape)
    if wrong:
        handle.undo()
        raise CheckpointError(f"adapter in {folder} does not fit {type(model).__name__}: {wrong[0]} and others differ")
    model.load_state_dict(weights, strict=False)
    return handle
