"""A variant's weights in a folder that `save_pretrained` wrote: found again after `from_pretrained`.

`from_pretrained` knows nothing of a swap: it leaves the variant's weights in the file. The configuration beside them
says that there was one.
"""

from __future__ import annotations

import json
from os.path import isdir
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from astbench.backbones.hooks import IMPLEMENTATION
from astbench.files.hub import is_repository

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def restore(model: PreTrainedModel, name: str, own: dict[str, Tensor]) -> list[str]:
    """Load the variant's weights where the model was saved with the same attention; otherwise say that they are new.

    Args:
        model: With the attention swapped in, its configuration as it was loaded.
        name: The attention's.
        own: The variant's weights by their names in the model's state dict.

    Returns: Notes for the user; none for a model that was never saved with a swapped attention.
    """
    saved = getattr(model.config, IMPLEMENTATION, None)
    if not isinstance(saved, dict) or not own:
        return []
    folder = str(getattr(model.config, "_name_or_path", ""))
    revision = getattr(model.config, "_commit_hash", None)
    again = "weights saved apart come with astbench.backbones.adapters.load_adapter"
    if saved.get("attention") != name:
        return [f"this model was saved with attention '{saved.get('attention')}'; the weights of '{name}' start anew"]
    try:
        found = _read(_where(folder, revision), own)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return [
            f"the weights of '{name}' that {folder} was saved with cannot be read ({error}); they start anew; {again}"
        ]
    fitting = {key: x for key, x in found.items() if x.shape == own[key].shape}
    if len(fitting) < len(own):
        missing = f"{len(own) - len(fitting)} of its {len(own)} tensors"
        return [
            f"this model was saved with attention '{name}', but {missing} are not in {folder or 'a folder'}, or of "
            f"another shape: all of them start anew; {again}"
        ]
    model.load_state_dict(fitting, strict=False)
    return [f"the {len(own)} tensors of attention '{name}' come from {folder}, where the model was saved with them"]


def _where(name: str, revision: str | None) -> Path:
    """The folder that the model was loaded from; of one on the hub the cache's, which has its files by now."""
    if isdir(name) or not is_repository(name):
        return Path(name)
    for file in (INDEX, SINGLE):
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found).parent
    raise OSError(f"{name} holds neither {SINGLE} nor {INDEX}")


def _read(folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the wanted tensors that the folder's safetensors files hold."""
    if (folder / INDEX).is_file():
        index: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict):
            raise ValueError(f"{INDEX} holds no weight_map")
        files = sorted({str(names[key]) for key in own if key in names})
        if any(Path(file).name != file for file in files):
            raise ValueError(f"{INDEX} names a file outside of its folder")
    else:
        files = [SINGLE] if (folder / SINGLE).is_file() else []
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            found.update({key: tensors.get_tensor(key) for key in tensors.keys() if key in own})  # noqa: SIM118
    return found
