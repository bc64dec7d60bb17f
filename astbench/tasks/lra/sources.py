"""Readers of the Long Range Arena's data in the files that it is published in.

Rows are (inputs, label) with one input, or the two of a pair, as bytes: characters, grey levels or numbers of symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from os.path import isdir  # of names that the system refuses pathlib's own raise
from pathlib import Path

import torch

from astbench.errors import DataError
from astbench.files.images import read_image
from astbench.files.paths import asked_path, file_inside, in_turns, other_kind, shown
from astbench.files.text import lines, read_document
from astbench.tasks import cifar
from astbench.tasks.lra.base_data import Row
from astbench.tasks.lra.listops import SYMBOLS

_PIXELS = 32 * 32
_SPLIT_NAMES = {"train": ("train",), "validation": ("val", "eval", "valid"), "test": ("test",)}
_LISTOPS_IDS = {symbol: number for number, symbol in enumerate(SYMBOLS)}


def local_folder(path: str) -> Path:
    """The folder that `--data.path` names.

    Raises:
        DataError: none named, or no folder there.
    """
    if not path:
        raise DataError("--data.source=local needs --data.path=FOLDER")
    folder = asked_path(path)
    if not isdir(folder):
        raise DataError(f"--data.path={path[:200]} is not a folder{other_kind(folder)}")
    return folder


def read_listops(folder: Path, split: str, length: int) -> list[Row]:
    """`basic_<train|val|test>.tsv`: a header, then Source and Target; its round brackets are left out.

    Raises:
        DataError: missing or damaged file, an unknown symbol, a target that is no digit; with the line.
    """
    rows: list[Row] = []
    for where, (source, target) in _tsv(_split_file(folder, "basic_*.tsv", split), columns=2):
        if not rows and (source.strip(), target.strip()) == ("Source", "Target"):
            continue
        target = target.strip()
        symbols = [symbol for symbol in source.split() if symbol not in "()"]
        unknown = [symbol for symbol in symbols if symbol not in _LISTOPS_IDS]
        if unknown or not symbols:
            raise DataError(f"{where}: unknown symbol {unknown[0]!r}" if unknown else f"{where}: no expression")
        if target not in SYMBOLS[:10]:
            raise DataError(f"{where}: the target must be a digit, got {target[:40]!r}")
        rows.append(((bytes(_LISTOPS_IDS[symbol] for symbol in symbols[:length]),), int(target)))
    return rows


def read_aan(folder: Path, split: str, length: int) -> list[Row]:
    """`*.<train|eval|test>.tsv` of ACL Anthology Network pairs: label, two ids, two texts, no header, no quotes.

    Raises:
        DataError: missing or damaged file, a label other than 0 and 1, an empty text; with the line.
    """
    rows: list[Row] = []
    for where, (label, _, _, one, two) in _tsv(_split_file(folder, "*.tsv", split), columns=5):
        if label.strip() not in ("0", "1", "0.0", "1.0"):
            raise DataError(f"{where}: the label must be 0 or 1, got {label[:40]!r}")
        if not (one.strip() and two.strip()):
            raise DataError(f"{where}: one of the two texts is empty")
        rows.append(((one.encode()[:length], two.encode()[:length]), int(float(label))))
    return rows


def read_imdb(folder: Path, split: str, length: int) -> list[Row]:
    """`aclImdb/<train|test>/<neg|pos>/*.txt`, the classes in turns: 0 negative, 1 positive.

    Raises:
        DataError: missing folders, no reviews, one that is empty or not UTF-8; names the file.
    """
    if (folder / "aclImdb").is_dir():
        folder = folder / "aclImdb"
    picks = in_turns(folder / split, ("neg", "pos"), "*.txt")
    return [((_review(file, length),), label) for file, label in picks]


def read_cifar(folder: Path, split: str) -> list[Row]:
    """CIFAR-10 in grey, as :func:`astbench.tasks.cifar.read_cifar` finds it.

    Raises:
        DataError: nothing of it there, or a damaged file; names it.
    """
    pixels, labels = cifar.read_cifar(folder, split)
    parts = pixels.view(-1, 3, _PIXELS).transpose(1, 2).split(1000)  # all of them in float32 would be 600 MB
    greys = [grey for part in parts for grey in _grey(part.contiguous())]
    return [((grey,), label) for grey, label in zip(greys, labels, strict=True)]


def read_pathfinder(folder: Path, contour_length: int) -> list[Row]:
    """Every image of one difficulty of `pathfinder32/`: `curv_*/metadata/*.npy` (text) and `curv_*/imgs/`.

    Raises:
        DataError: missing or damaged files; names them.
    """
    name = "curv_baseline" if contour_length == 6 else f"curv_contour_length_{contour_length}"
    for top in (folder, folder / "pathfinder32"):
        lists = sorted((top / name / "metadata").glob("*.npy"), key=lambda file: (len(file.name), file.name))
        if lists:
            return [row for file in lists for row in _pathfinder_file(file, top / name)]
    raise DataError(f"--data.path={folder} holds no {name}/metadata/*.npy")


def _pathfinder_file(file: Path, folder: Path) -> Iterator[Row]:
    for number, line in lines(file):
        words = line.split()
        if not words:
            continue
        if len(words) < 4 or words[3] not in ("0", "1"):
            raise DataError(f"{file}:{number}: expected folder, image, number and label 0 or 1, got {line[:60]!r}")
        # The name comes from a file: it may not lead out of the folder.
        image = file_inside(folder, f"{words[0]}/{words[1]}")
        if image is None:
            raise DataError(f"{file}:{number}: image {shown(f'{words[0]}/{words[1]}')} does not exist in {folder}")
        if image.stat().st_size:  # some of the published images are empty files, which its authors skip too
            yield (_grey_image(image),), int(words[3])


def _split_file(folder: Path, pattern: str, split: str) -> Path:
    """The one table of a split: its name without the ending ends with the split's."""
    names = _SPLIT_NAMES[split]
    found = sorted(
        file
        for ending in ("", ".gz")
        for file in folder.glob(pattern + ending)
        if file.name.removesuffix(".gz").removesuffix(".tsv").endswith(names)
    )
    if len(found) != 1:
        wanted = pattern.replace("*", f"*{'|'.join(names)}")
        raise DataError(f"--data.path={folder} must hold one {wanted} (also .gz), found {len(found)}")
    return found[0]


def _tsv(file: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """(where it stands, cells) of each line that is not blank; blank cells after the last column are none."""
    for number, line in lines(file):
        cells = line.split("\t")
        while len(cells) > columns and not cells[-1].strip():
            cells.pop()
        if not line.strip():
            continue
        if len(cells) != columns:
            raise DataError(f"{file}:{number}: expected {columns} columns, got {len(cells)}")
        yield f"{file}:{number}", cells


def _review(file: Path, length: int) -> bytes:
    text = read_document(file)
    if not text.strip():
        raise DataError(f"{file} is empty")
    return text.encode()[:length]


def _grey_image(file: Path) -> bytes:
    """The 1,024 grey levels of an image, row by row."""
    image = read_image(file, (32, 32))
    if image.mode == "L":
        return image.tobytes()
    return _grey(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, _PIXELS, 3))[0]


def _grey(colours: torch.Tensor) -> list[bytes]:
    """Grey levels of uint8 RGB `(images, pixels, 3)`, weighted as by the arena's TensorFlow."""
    weights = torch.tensor([0.2989, 0.587, 0.114])
    return [bytes(row.tolist()) for row in (colours.float() @ weights).round().to(torch.uint8)]
