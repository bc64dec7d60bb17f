"""The Hugging Face hub. Imports nothing heavy before it is asked."""

from __future__ import annotations

from typing import Any

from astbench.errors import DataError, MissingPackageError


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
