"""A variant's own weights alone: a small safetensors file that loads onto the same backbone later."""

from __future__ import annotations

import hashlib
import json
from os.path import isfile
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from astbench.backbones.swap import SwapHandle, swap_attention
from astbench.errors import CheckpointError
from astbench.files.hub import HUB, fetched, is_repository
from astbench_registry import CapabilityError, registered
from astbench_registry.registry import config_class

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"

_DIGEST = "sha256"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "attention": str,
    "options": dict,
    "where": list,
    "layers": (list, type(None)),
    "backbone": str,
}


def save_adapter(handle: SwapHandle, folder: str | Path, *, backbone: str = "") -> None:
    """Write `adapter.safetensors` (the variant's parameters only) and `adapter.json` (name, options, sha256).

    Args:
        handle: Of the swapped attention.
        folder: Where to; made if it is not there.
        backbone: What to say it was trained on; the model's own name if not given.
    """
    from astbench.files.writing import write_atomic, write_json

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: w.detach().contiguous().cpu() for name, w in handle.state_dict().items()})
    description = {
        "attention": handle.slots[0].attention.name,  # what it is registered as, also for ./mine.py:Mine
        "options": handle.options,
        "where": list(handle.where),
        "layers": handle.layers,
        "backbone": backbone or handle.model.config.name_or_path or handle.model.config.model_type,
    }
    write_atomic(folder / WEIGHTS, lambda file: file.write(weights))
    write_json(folder / DESCRIPTION, {**description, _DIGEST: _digest(description, weights)})


def adapter_folder(place: str | Path) -> Path | None:
    """The folder of an adapter: one here, or of `hf://owner/name`; None for a folder that holds none.

    Raises:
        CheckpointError: no name of the hub, or nothing of an adapter under it.
        DataError: it cannot be had from the hub.
    """
    name = str(place).removeprefix(HUB)
    if name == str(place):
        folder = Path(place).expanduser()
        return folder if isfile(folder / DESCRIPTION) else None
    if not is_repository(name):
        raise CheckpointError(f"{place} is no name on the hub, which is {HUB}OWNER/NAME")
    folder = fetched(name, (WEIGHTS, DESCRIPTION))
    if not isfile(folder / DESCRIPTION):
        raise CheckpointError(
            f"{place} holds no {DESCRIPTION}, and is no adapter; a whole model is a --backbone={name}"
        )
    return folder


def load_adapter(model: PreTrainedModel, folder: str | Path) -> SwapHandle:
    """Swap the attention that an adapter describes into `model` and load its weights.

    An adapter of before, which holds no sha256, is loaded with a note on the handle that says so.

    Args:
        model: The backbone that it was trained on.
        folder: Of the adapter, or its name on the hub, `hf://owner/name`.

    Raises:
        CheckpointError: files missing or damaged, an attention that is not registered, or weights that do not fit this
            backbone.
        CapabilityError: the attention cannot serve this model.
        DataError: a name on the hub that cannot be had.
    """
    folder = adapter_folder(folder) or Path(folder)
    description, weights, verified = _read(folder)
    name, options, where, layers = (description[key] for key in ("attention", "options", "where", "layers"))
    if name not in registered():  # a name such as ./mine.py:Mine would run that file
        raise CheckpointError(
            f"adapter in {folder} is of the attention {name[:80]!r}, which is not registered; load its plugin first: "
            "astbench_registry.load_plugin('./mine.py')"
        )
    try:
        handle = swap_attention(model, name, options, where=where, layers=layers)
    except CapabilityError:
        raise
    except ValueError as error:
        raise CheckpointError(f"adapter in {folder} does not fit {type(model).__name__}: {error}") from error
    try:
        _load(handle, weights, folder)
    except CheckpointError:
        handle.undo()
        raise
    if not verified:
        handle.notes.append(f"the adapter in {folder} is unverified: its {DESCRIPTION} holds no {_DIGEST}")
    return handle


def start_from_adapter(handle: SwapHandle, folder: Path) -> None:
    """Load an adapter's weights into an attention that is swapped in already, by the same options.

    Raises:
        CheckpointError: as :func:`load_adapter`, or an adapter of other options.
    """
    description, weights, verified = _read(folder)
    name = handle.slots[0].attention.name
    if description["attention"] != name:
        raise CheckpointError(
            f"adapter in {folder} is of attention {description['attention'][:80]!r}, and --attention is {name}"
        )
    given = config_class(name).current(description["options"])
    for option, value in handle.options.items():
        if option != "backend" and option in given and given[option] != value:
            raise CheckpointError(
                f"adapter in {folder} has --attention.{option}={given[option]}, and {value} is given; give it the same"
            )
    _load(handle, weights, folder)
    if not verified:
        handle.notes.append(f"the adapter in {folder} is unverified: its {DESCRIPTION} holds no {_DIGEST}")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Description, weights, and whether a digest says that both are whole."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"), parse_constant=_no_number)
        data = (folder / WEIGHTS).read_bytes()
        weights = load(data)
        digest = _taken(description)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"adapter in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if digest is not None and digest != _digest(description, data):
        raise CheckpointError(f"adapter in {folder} does not match its {_DIGEST} in {DESCRIPTION}: a damaged file")
    return description, weights, digest is not None


def _load(handle: SwapHandle, weights: dict[str, Tensor], folder: Path) -> None:
    """Put the weights in, if they are the attention's."""
    wanted = handle.state_dict()
    wrong = sorted(set(wanted) ^ set(weights)) or sorted(
        n
        for n, w in weights.items()
        if w.shape != wanted[n].shape or w.is_floating_point() != wanted[n].is_floating_point()
    )
    if wrong:
        model = type(handle.model).__name__
        raise CheckpointError(f"adapter in {folder} does not fit {model}: {wrong[0]} and others differ")
    handle.model.load_state_dict(weights, strict=False)


def _taken(description: dict[str, Any]) -> str | None:
    """Take the digest out of a description, and see that the rest is one; None for one of before."""
    digest: str | None = description.pop(_DIGEST, None) if description.get(_DIGEST, "") is not None else ""
    if unknown := sorted(set(description) - set(_FIELDS)):
        raise ValueError(f"{DESCRIPTION} holds an unknown {unknown[0]!r}")
    for key, kind in _FIELDS.items():
        if not isinstance(description[key], kind):
            raise ValueError(f"{DESCRIPTION}: {key} is of the wrong kind: {str(description[key])[:60]!r}")
    if not all(isinstance(place, str) for place in description["where"]):
        raise ValueError(f"{DESCRIPTION}: where must be a list of names")
    return digest


def _digest(description: dict[str, Any], weights: bytes) -> str:
    """Of all that decides what is loaded, however the JSON is laid out."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode() + weights).hexdigest()


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number that an option can have")
