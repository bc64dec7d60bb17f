"""The five data modules of the Long Range Arena (Tay et al. 2021, arXiv 2011.04006)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

from astbench.errors import ConfigError
from astbench.tasks.base import at_least
from astbench.tasks.cifar import JPEG_NOTE, has_jpegs
from astbench.tasks.lra import listops, pathfinder, sources
from astbench.tasks.lra.base_data import Row, SequenceClassificationData
from astbench.tasks.lra.sources import local_folder

PIXELS = 32 * 32


class ListOpsData(SequenceClassificationData):
    """ListOps: ten classes.

    Args:
        source: generated, by the published grammar, or local.
        path: For `local`: the folder with basic_train.tsv, basic_val.tsv and basic_test.tsv.
        max_length: Expressions have fewer symbols; those of `local` files are cut.
        min_length: For `generated`: expressions have more symbols.
        num_train: For `generated`: training expressions.
        num_eval: For `generated`: expressions of the validation and of the test split.
        data_seed: For `generated`: of the expressions.
    """

    task = "lra_listops"
    pads = True
    num_classes = 10
    num_ids = len(listops.SYMBOLS)
    what = "LRA ListOps"

    def __init__(
        self,
        source: Literal["generated", "local"] = "generated",
        path: str = "",
        max_length: int = 2000,
        min_length: int = 500,
        num_train: int = 96_000,
        num_eval: int = 2000,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(source, path, max_length, **options)
        at_least(1, num_train=num_train, num_eval=num_eval)
        at_least(0, min_length=min_length, data_seed=data_seed)
        if min_length > max_length // 2:
            raise ConfigError(
                f"--data.min_length must be at most half of max_length={max_length} symbols, got {min_length}"
            )
        self.min_length, self.num_train, self.num_eval = min_length, num_train, num_eval
        self.data_seed = data_seed

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        if self.source == "local":
            return sources.read_listops(local_folder(self.path), split, self.length)
        return self.generated(split, self.num_train, self.num_eval, self.data_seed, self._make, keep=True)

    def _make(self, index: int, seed: int) -> Row:
        expression = listops.generate(random.Random(seed), self.min_length, self.length)
        ids = bytes(listops.SYMBOLS.index(symbol) for symbol in expression)
        return (ids,), listops.evaluate(expression)


class TextData(SequenceClassificationData):
    """IMDb reviews as bytes: negative or positive.

    The data set has no validation split (the arena's own code validates on the test split): the last tenth of the
    training reviews of each class is held out.

    Args:
        source: local.
        path: Folder with train/ and test/, or with aclImdb/.
        max_length: Bytes of a review; longer ones are cut.
    """

    task = "lra_text"
    pads = True
    num_classes = 2
    what = "LRA text (IMDb)"
    _training: list[Row] | None = None

    def __init__(
        self,
        source: Literal["local"] = "local",
        path: str = "",
        max_length: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(source, path, max_length, **options)

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        if split == "test":
            return sources.read_imdb(local_folder(self.path), "test", self.length)
        if self._training is None:
            self._training = sources.read_imdb(local_folder(self.path), "train", self.length)
        return _held_out(self._training, split)


class RetrievalData(SequenceClassificationData):
    """Pairs of papers of the ACL Anthology Network as bytes: does one cite the other?

    Args:
        source: local.
        path: Folder with the tables *.train.tsv, *.eval.tsv and *.test.tsv.
        max_length: Bytes of each text; longer ones are cut.
    """

    task = "lra_retrieval"
    pads = True
    paired = True
    num_classes = 2
    what = "LRA retrieval (AAN)"

    def __init__(
        self, source: Literal["local"] = "local", path: str = "", max_length: int = 4000, **options: Any
    ) -> None:
        super().__init__(source, path, max_length, **options)

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        return sources.read_aan(local_folder(self.path), split, self.length)


class _ImageData(SequenceClassificationData):
    """Base: 32 x 32 grey levels, row by row."""

    def __init__(self, source: str, path: str, max_length: int, **options: Any) -> None:
        super().__init__(source, path, max_length, **options)
        if max_length > PIXELS:
            raise ConfigError(f"--data.max_length must be at most {PIXELS} pixels, got {max_length}")

    def cut(self, rows: list[Row]) -> list[Row]:
        """Rows of the pixels asked for."""
        return [((image[: self.length],), label) for (image,), label in rows]


class ImageData(_ImageData):
    """CIFAR-10 in grey, pixel by pixel: ten classes. As in the arena, the last tenth of the training set validates.

    Args:
        source: local.
        path: Folder with cifar-10-batches-bin/ or cifar-10-batches-py/, or with train/CLASS/ and test/CLASS/ images.
        max_length: Pixels of an image that are read, row by row; the arena's task is all of them.
    """

    task = "lra_image"
    num_classes = 10
    what = "LRA image (CIFAR-10)"
    _training: list[Row] | None = None

    def __init__(
        self, source: Literal["local"] = "local", path: str = "", max_length: int = PIXELS, **options: Any
    ) -> None:
        super().__init__(source, path, max_length, **options)

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class."""
        folder = local_folder(self.path)
        if has_jpegs(folder) and JPEG_NOTE not in self.notes:
            self.notes.append(JPEG_NOTE)
        if split == "test":
            return self.cut(sources.read_cifar(folder, "test"))
        if self._training is None:
            self._training = self.cut(sources.read_cifar(folder, "train"))
        return _held_out(self._training, split)


class PathfinderData(_ImageData):
    """Pathfinder at 32 x 32: are the two marked ends those of one curve?

    Args:
        source: generated (a reimplementation, see `pathfinder.generate`: no published numbers to compare
            with), or local.
        path: For `local`: the folder pathfinder32, or the one that holds it.
        max_length: Pixels of an image that are read, row by row; the arena's task is all of them.
        difficulty: Curves of 6, 9 or 14 paddles; the arena reports hard.
        num_train: For `generated`: training images.
        num_eval: For `generated`: images of the validation and of the test split.
        data_seed: For `generated`: of the images.
    """

    task = "lra_pathfinder"
    num_classes = 2
    what = "LRA Pathfinder"
    _published: list[Row] | None = None

    def __init__(
        self,
        source: Literal["generated", "local"] = "generated",
        path: str = "",
        max_length: int = PIXELS,
        difficulty: Literal["easy", "intermediate", "hard"] = "hard",
        num_train: int = 160_000,
        num_eval: int = 2000,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(source, path, max_length, **options)
        at_least(1, num_train=num_train, num_eval=num_eval)
        at_least(0, data_seed=data_seed)
        self.paddles = pathfinder.CONTOURS[difficulty]
        self.num_train, self.num_eval, self.data_seed = num_train, num_eval, data_seed
        self.signature = f"{self.what} accuracy (%), {source}, {difficulty} (curves of {self.paddles} paddles)"

    def rows(self, split: str) -> Sequence[Row]:
        """See the base class. The published images: the first 80% train, then 10% each."""
        if self.source == "local":
            if self._published is None:
                self._published = self.cut(sources.read_pathfinder(local_folder(self.path), self.paddles))
            rows = self._published
            low, high = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}[split]
            return rows[len(rows) * low // 10 : len(rows) * high // 10]
        return self.generated(split, self.num_train, self.num_eval, self.data_seed, self._make, keep=True)

    def _make(self, index: int, seed: int) -> Row:
        image, label = pathfinder.generate(random.Random(seed), self.paddles)
        return (bytes(image.flatten().tolist())[: self.length],), label


def _held_out(rows: list[Row], split: str) -> list[Row]:
    """The last tenth for validation, what comes before it to train on."""
    begin = len(rows) * 9 // 10
    return rows[begin:] if split == "validation" else rows[:begin]
