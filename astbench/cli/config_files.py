"""Configuration files as the chosen attention and task can read them, and what a command line says of an option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yaml import safe_dump, safe_load

from astbench import console
from astbench.cli.names import Selection
from astbench.tasks import Task


def fit_configs(found: Selection, task: Task, folder: Path) -> list[str]:
    """Replace configs by ones, in `folder`, of what the chosen attention and task know, with a note on the rest."""
    argv = []
    for word in found.argv:
        path = word.removeprefix("--config=")
        if word == path:
            argv.append(word)
            continue
        config = safe_load(Path(path).read_text(encoding="utf-8")) or {}
        for kind, name in (("attention", found.attention), ("task", task.name)):
            group = config.get(kind)
            if isinstance(group, str):
                config[kind] = group = {"name": group}
            if isinstance(group, dict) and group.get("name") not in (None, name):
                console.say(
                    f"{kind} {name} replaces {group['name']} of {path}: the options of {group['name']} are dropped"
                )
                config.pop(kind)
                if kind == "task":
                    config.pop("data", None)
        if isinstance(config.get("backbone"), str):
            config["backbone"] = {"name": config["backbone"]}
        if "seed" in config:
            config["seed_everything"] = config.pop("seed")
        for key in ("plugins", "run_dir"):
            config.pop(key, None)
        fitted = folder / f"{len(argv)}.yaml"
        fitted.write_text(safe_dump(config), encoding="utf-8")
        argv.append(f"--config={fitted}")
    return argv


def said(found: Selection, key: str) -> str | None:
    """The value of an option GROUP.OPTION in argv or the configs, the last one."""
    value = None
    group, _, option = key.partition(".")
    for word in found.argv:
        if word.startswith("--config="):
            config: Any = safe_load(Path(word.removeprefix("--config=")).read_text(encoding="utf-8"))
            for part in key.split("."):
                config = config.get(part) if isinstance(config, dict) else None
            value = str(config) if config else value
        elif word.startswith(f"--{key}="):
            value = word.partition("=")[2]
        elif word.startswith(f"--{group}="):
            value = _in_group(word.partition("=")[2], option) or value
    for flag, following in zip(found.argv, found.argv[1:], strict=False):
        if flag == f"--{key}":
            value = following
        elif flag == f"--{group}":
            value = _in_group(following, option) or value
    return value


def _in_group(text: str, option: str) -> str | None:
    """The value of an option in `{option: value, ...}`."""
    given = safe_load(text)
    return str(given[option]) if isinstance(given, dict) and given.get(option) else None
