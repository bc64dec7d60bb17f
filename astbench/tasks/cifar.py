"""CIFAR-10 (Krizhevsky 2009) in the files that it is published in, and as folders of images."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch
from torch import Tensor

from astbench.errors import DataError
from astbench.files.images import read_image
from astbench.files.paths import in_turns
from astbench.files.reading import UNREADABLE, open_bytes, read_bytes, unreadable
from astbench.tasks.cifar_pickle import read_pickle

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
"""Bytes of an image in the binary version: its label, then red, green and blue, each row by row."""

JPEG_NOTE = "these images are JPEG files, which CIFAR-10's originals are not: some detail is lost"

BINARY, PICKLED = "cifar-10-batches-bin", "cifar-10-batches-py"
_FILES = {
    BINARY: {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
    PICKLED: {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]},
}
_MOST_BYTES = 1 << 28
"""Of one file; the published ones have 31 MB."""


def read_cifar(path: Path, split: str) -> tuple[Tensor, list[int]]:
    """The images of a split, train or test.

    Args:
        path: Folder with the binary version, with the one for Python, or with `train/CLASS/` and `test/CLASS/` of
            images; or one of the published archives (.tar.gz).
        split: Which.

    Returns:
        Pixels `(images, 3, 32, 32)`, uint8, and labels. From folders of images one of each class in turns.

    Raises:
        DataError: none of these there, or a damaged file; names it.
    """
    if path.is_file():
        return _joined(_from_archive(path, split))
    for name, files in _FILES.items():
        for folder in (path, path / name):
            found = [folder / file for file in files[split]]
            if any(file.is_file() for file in found):
                return _joined([_batch(name, read_bytes(file, _MOST_BYTES), str(file)) for file in found])
    if (path / split).is_dir():
        picks = in_turns(path / split, CLASSES, "*.*")
        pixels = np.stack([np.asarray(read_image(file, (SIDE, SIDE)).convert("RGB")) for file, _ in picks])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [label for _, label in picks]
    raise DataError(
        f"--data.path={path} holds none of {_FILES[BINARY][split][0]}, {_FILES[PICKLED][split][0]} and "
        f"{split}/{CLASSES[0]}/"
    )


def has_jpegs(folder: Path) -> bool:
    """Whether a folder of image folders holds JPEG files: CIFAR-10 is not published so."""
    return any(True for ending in ("jpg", "jpeg", "JPG", "JPEG") for _ in folder.glob(f"*/*/*.{ending}"))


def _from_archive(file: Path, split: str) -> list[tuple[Tensor, list[int]]]:
    """The batches of a split, in the order of their names; nothing is unpacked onto the disk."""
    found = {name.name: _batch(name.parent.name, data, f"{file}: {name}") for name, data in _members(file, split)}
    version = PICKLED if any(name in found for name in _FILES[PICKLED][split]) else BINARY
    wanted = _FILES[version][split]
    if missing := [name for name in wanted if name not in found]:
        raise DataError(f"--data.path={file} holds no {version}/{missing[0]}, and is not one of CIFAR-10's archives")
    return [found[name] for name in wanted]


def _members(file: Path, split: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Names and bytes of a split's files, of either version, in an archive."""
    try:
        with open_bytes(file) as source, tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isreg() or name.name not in _FILES.get(name.parent.name, {split: []})[split]:
                    continue
                if member.size > _MOST_BYTES:
                    raise DataError(f"{file}: {member.name[:80]} has {member.size:,} bytes, more than CIFAR-10 has")
                content: IO[bytes] | None = archive.extractfile(member)
                assert content is not None, "a plain file has a content"
                yield name, content.read()
    except tarfile.TarError as error:
        raise DataError(f"{file} is no .tar.gz, or a damaged one: {error}") from error
    except UNREADABLE as error:
        raise unreadable(file, error) from error


def _batch(version: str, data: bytes, place: str) -> tuple[Tensor, list[int]]:
    pixels, labels = _binary(data, place) if version == BINARY else read_pickle(data, place)
    wrong = next((number for number, label in enumerate(labels) if not 0 <= label < len(CLASSES)), None)
    if wrong is not None:
        raise DataError(f"{place}: image {wrong + 1} has the label {labels[wrong]}, expected 0 to 9")
    return pixels.view(-1, 3, SIDE, SIDE), labels


def _binary(data: bytes, place: str) -> tuple[Tensor, list[int]]:
    if not data or len(data) % RECORD:
        raise DataError(f"{place} holds {len(data)} bytes, expected a multiple of {RECORD} (label and image)")
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, RECORD)
    return records[:, 1:].contiguous(), records[:, 0].tolist()


def _joined(parts: list[tuple[Tensor, list[int]]]) -> tuple[Tensor, list[int]]:
    return torch.cat([pixels for pixels, _ in parts]), [label for _, labels in parts for label in labels]
