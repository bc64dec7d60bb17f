"""Pictures as a model takes them: cropped and flipped while training, normalised, of the size asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from astbench.tasks.generated import ProbeSet
from astbench.training.sampler import Draw
from astbench.training.seeds import derived_seed

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10's training pictures by colour, from 0 to 1, as CCT's published configuration has them."""

PADDING = 4
"""Black pixels on every side, that a picture is cropped from."""


class Pictures(Sequence[dict[str, Any]]):
    """Rows `pixels` `(3, height, width)`, uint8, and `label`.

    Args:
        pixels: `(pictures, 3, height, width)`, uint8.
        labels: As many.
    """

    def __init__(self, pixels: Tensor, labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return {"pixels": self.pixels[index], "label": self.labels[index]}


class PictureSet(ProbeSet):
    """Rows as examples of a model: `pixel_values` `(3, size, size)`, float32, `label` and `index`.

    Args:
        rows: `pixels` and `label`.
        count: The first so many are used.
        size: Side of the pictures, in pixels.
        augment: Crop and flip; a function of seed, epoch and picture alone.
        seed: Of the run.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], count: int, size: int, *, augment: bool, seed: int) -> None:
        super().__init__(rows, count)
        self.side, self.augment, self.seed = size, augment, seed

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        epoch, index = (key.epoch, key.example) if isinstance(key, Draw) else (0, key)
        row = self.rows[index]
        pixels = row["pixels"]
        if self.augment:
            pixels = augmented(pixels, derived_seed(self.seed, epoch, index))
        return {"index": index, "pixel_values": normalised(pixels, self.side), "label": row["label"]}


def augmented(pixels: Tensor, seed: int) -> Tensor:
    """A random crop of the padded picture, of the same size, mirrored every other time (He et al. 2016, section 4.2).

    Args:
        pixels: `(3, height, width)`.
        seed: The same crop for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    down, right = torch.randint(2 * PADDING + 1, (2,), generator=generator).tolist()
    mirror = int(torch.randint(2, (), generator=generator))
    height, width = pixels.shape[1:]
    crop = pad(pixels, (PADDING,) * 4)[:, down : down + height, right : right + width]
    return crop.flip(-1) if mirror else crop


def normalised(pixels: Tensor, size: int) -> Tensor:
    """Mean 0 and standard deviation 1 by colour, made larger or smaller where the size differs.

    Args:
        pixels: `(3, height, width)`, uint8.
        size: Side of the square that comes out, in pixels.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    values = (pixels.float() / 255 - mean) / std
    if values.shape[1:] == (size, size):
        return values
    return interpolate(values[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
