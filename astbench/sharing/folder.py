"""The folder that is pushed: written, looked through for what must not leave the machine, and loaded back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from astbench.backbones.adapters import load_adapter, save_adapter
from astbench.backbones.load import load_backbone
from astbench.backbones.presets import BackboneConfig
from astbench.backbones.swap import swap_attention
from astbench.errors import AstbenchError, ConfigError
from astbench.files.writing import write_text
from astbench.sharing.source import Source
from astbench.tables.defaults import flatten

CARD = "README.md"
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")
_NAMES = ("name_or_path", "_name_or_path")
"""Where transformers writes where something was loaded from."""


def write_model(source: Source, folder: Path) -> None:
    """Weights, configuration and tokenizer as `from_pretrained` takes them; the attention's own weights among them."""
    # The original format renames layers, and with them the attention's own weights, which then no swap would find.
    source.model.save_pretrained(folder, save_original_format=False)
    source.tokenizer.save_pretrained(str(folder))
    for file in folder.glob("*.json"):
        _forget_names(file)


def write_adapter(source: Source, folder: Path) -> None:
    """The attention's own weights alone, and what they go into."""
    save_adapter(source.handle, folder, backbone=source.base)


def _forget_names(file: Path) -> None:
    held = json.loads(file.read_text(encoding="utf-8"))
    if any(name in held for name in _NAMES):
        rest = {key: value for key, value in held.items() if key not in _NAMES}
        write_text(file, json.dumps(rest, indent=2, ensure_ascii=False) + "\n")


def check_loads(source: Source, folder: Path, *, adapter: bool) -> None:
    """Load what was written as its reader will, and compare every weight.

    Raises:
        AstbenchError: something is missing or another: a defect, and nothing may be pushed.
    """
    if adapter:
        model = load_backbone(source.backbone, source.head, tokenizer=source.tokenizer)
        load_adapter(model, folder)
    else:
        model = load_backbone(BackboneConfig(name=str(folder)), source.head)
        swap_attention(model, source.handle.name, source.handle.options, where=source.handle.where)
    there, here = model.state_dict(), source.model.state_dict()
    wrong = sorted(there.keys() ^ here.keys()) or [n for n in here if not torch.equal(there[n], here[n])]
    if wrong:
        raise AstbenchError(f"{wrong[0]} does not come back from the folder as it was trained; nothing was pushed")


def check_private(source: Source, folder: Path) -> None:
    """Refuse files that no reader needs, paths of this machine and tokens.

    Raises:
        ConfigError: naming the file, and what is in it.
    """
    known = ("README.md", ".json", ".safetensors", ".jinja", ".txt", ".model")
    paths = sorted(_paths(source), key=len, reverse=True)
    for file in sorted(folder.rglob("*")):
        if not file.name.endswith(known):
            raise ConfigError(f"{file.name} is no file that is pushed")
        if file.suffix == ".safetensors":
            continue
        held = file.read_bytes()
        if _TOKEN.search(held):
            raise ConfigError(f"{file.name} holds a token of the hub")
        for path in paths:
            if path.encode() in held:
                raise ConfigError(f"{file.name} holds {path}, a path of this machine")


def _paths(source: Source) -> set[str]:
    """Folders of this machine that the run knows."""
    options = flatten(source.run.record["config"])
    named = [value for value in options.values() if isinstance(value, str) and Path(value).is_absolute()]
    return {*named, str(source.run.folder.resolve()), *_long((os.path.expanduser("~"), os.getcwd()))}


def _long(paths: Iterable[str]) -> list[str]:
    """Those that no other text would hold by chance."""
    return [path for path in paths if path.count("/") > 1]
