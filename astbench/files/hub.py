"""The Hugging Face hub. Imports nothing heavy before it is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from astbench.errors import ConfigError, DataError, MissingPackageError, SystemRefusal
from astbench.files.reading import one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


HUB = "hf://"
"""What a name on the hub begins with where a folder could be meant."""


def is_repository(text: str) -> bool:
    """Whether a text can name a repository on the hub: `owner/name`."""
    return _NAME.fullmatch(text) is not None


def fetched(name: str, files: Sequence[str]) -> Path:
    """A folder with files of a repository on the hub; from the cache where they are in it.

    Raises:
        DataError: it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises many kinds, its own and its transport's
        raise DataError(f"{name} cannot be had from the hub: {one_line(error)}") from error


def uploaded(folder: Path, name: str, *, private: bool, update: bool, message: str) -> str:
    """Put all files of a folder into a repository on the hub, in one commit; its address.

    Args:
        folder: What to put there.
        name: `owner/name`.
        private: For a repository that is made.
        update: It may be there already.
        message: Of the commit.

    Raises:
        ConfigError: it is there already, and `update` is False.
        SystemRefusal: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        there = hub.repo_exists(name)
        if not there:
            hub.create_repo(name, private=private)
        elif not update:
            raise ConfigError(f"{name} is on the hub already; --update adds a commit to it, or choose another name")
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message).commit_url)
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise SystemRefusal(
            f"{name} cannot be written on the hub: {one_line(error)}; `hf auth login` takes a token that may write"
        ) from error


def hub_rows(name: str, configuration: str, split: str, revision: str) -> Any:
    """Rows of a split from the Hugging Face hub at a pinned revision; its offline cache is honoured.

    Raises:
        MissingPackageError: without the `datasets` package.
        DataError: the hub cannot be reached and nothing is cached.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            "--data.source=hub needs the datasets package: pip install 'astbench[hub]'"
        ) from error
    try:
        return datasets.load_dataset(name, configuration, split=split, revision=revision)
    except Exception as error:  # the hub's client raises many kinds, its own and requests'
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name} ({configuration}, {split}) cannot be had from the hub: {reason}; fetch it once with network "
            "access, or use --data.source=local"
        ) from error
