"""lm-eval's tasks by name: which there are, and loading those that are asked for."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from astbench import console
from astbench.errors import AstbenchError, ConfigError, DataError, MissingPackageError, NameOrPluginError
from astbench.files.paths import asked_path, other_kind
from astbench.files.writing import sha256
from astbench.tasks.harness.haystack import Haystack

OTHER_SEED = 1234
"""What lm-eval adds to nothing for NumPy, torch and few-shot examples; of Python's own generator it is 0."""


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        MissingPackageError: naming the extra.
    """
    missing = [package for package in ("lm_eval", "accelerate") if find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"--task=lm_eval needs {' and '.join(missing)}: pip install 'astbench[lmeval]'")


def load_tasks(
    names: Sequence[str],
    *,
    include: str,
    lengths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack | None,
    seed: int,
) -> Mapping[str, Any]:
    """What lm-eval's task manager makes of these names: `tasks`, `groups` and `group_map`.

    Generators draw as lm-eval's own command lets them: at seed 0 their examples are those it would make.

    Args:
        names: Of tasks, groups and tags.
        include: Folder with further tasks, whose Python code runs; empty for none.
        lengths: In tokens, of the tasks that generate their texts.
        tokenizer: What they count with.
        haystack: Text in place of RULER's essays.
        seed: Of what they draw.

    Raises:
        NameOrPluginError: a name that lm-eval does not know.
        DataError: a task whose data cannot be had.
        MissingPackageError: a task that needs another package.
        ConfigError: a task that runs what a model wrote, or needs pictures or sound.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    folder = asked_path(include) if include else None
    if folder is not None and not isdir(folder):
        raise DataError(f"--data.include={include} is not a folder{other_kind(folder)}")
    essays = haystack.in_place_of_essays() if haystack else nullcontext()
    with tempfile.TemporaryDirectory(prefix="astbench-") as place, essays:
        metadata: dict[str, Any] = {"max_seq_lengths": list(lengths), "tokenizer": _on_disk(tokenizer, Path(place))}
        manager = TaskManager(include_path=folder, metadata=metadata)
        _check_names(names, manager.all_tasks)
        random.seed(seed)
        np.random.seed(OTHER_SEED + seed)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            with _loading(name), quiet():
                found = manager.load([name])
            for part in loaded:
                loaded[part].update(found.get(part) or {})
    for name, task in loaded["tasks"].items():
        _check_task(name, task)
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Within, lm-eval's own lines go nowhere, and its progress bars only to somebody who watches."""
    with redirect_stdout(StringIO()), nullcontext() if console.interactive() else redirect_stderr(StringIO()):
        yield


def _on_disk(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Where generators find the tokenizer, which they take by name only.

    They load it with `trust_remote_code`, so that what could name code on the hub is taken out.
    """
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    taken = set(known)
    for name in names:
        if name not in taken:  # lm-eval would take a path, and run the code that the file there names
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ";"
            raise NameOrPluginError(
                f"lm-eval has no task '{name}'{hint} `lm-eval ls tasks` lists its {len(known):,}; tasks of your own "
                "come with --data.include=FOLDER"
            )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Within, lm-eval loads a task, which may fetch data, generate it, or import what is not there."""
    try:
        yield
    except AstbenchError:
        raise
    except ImportError as error:
        raise MissingPackageError(
            f"lm-eval's task {name} needs a package: {_line(error)}; pip install 'astbench[lmeval]' brings those of "
            "RULER and LongBench"
        ) from error
    except Exception as error:  # the hub's client, its data sets and the generators raise many kinds
        raise DataError(
            f"lm-eval's task {name} cannot be had: {_line(error)}; fetch its data once with network access (RULER's "
            "essays: --data.haystack=FILE takes local text in their place)"
        ) from error


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"--data.tasks: {name} runs code that the model wrote, which astbench does not")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"--data.tasks: {name} shows pictures or sound, and the models here read text")


def described(loaded: Mapping[str, Any], include: str) -> dict[str, dict[str, Any]]:
    """Of each task its version, and where it comes from; of those in `--data.include` the sha256 of that folder."""
    ours = asked_path(include).resolve() if include else None
    found: dict[str, dict[str, Any]] = {}
    for name, task in loaded["tasks"].items():
        source = Path(str((task.config.metadata or {}).get("config_source", ""))).resolve()
        found[name] = {"version": task.VERSION, "from": f"lm-eval {version('lm_eval')}"}
        if ours is not None and source.is_relative_to(ours):
            found[name] |= {"from": "--data.include", "sha256": _digest(ours)}
    return found


def _digest(folder: Path) -> str:
    """Of the names and contents of a folder's tasks and code."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".yaml", ".py"))
    listed = "".join(f"{file.relative_to(folder)} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
