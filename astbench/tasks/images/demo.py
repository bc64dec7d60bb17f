"""Generated pictures: which shape has the colour of the mark in the corner?

Two shapes of different colours lie anywhere on a noisy ground, and a mark in the top left corner has the colour of one
of them, whose kind is the class. Kind and place are found locally; which of the two is asked for is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SIDE = 32
"""Pixels of a side, as CIFAR's."""

CLASSES = ("disc", "square", "triangle", "cross", "ring")

COLOURS = ((220, 40, 40), (40, 200, 60), (60, 80, 230), (230, 210, 50))

MARK = 6
"""Pixels of the mark's sides."""

SMALLEST, LARGEST = 4.0, 5.5
"""Half of a shape's height, in pixels."""

NOISE = 40
"""The ground's grey levels lie below this, and everything is lightened by as much at most."""


def generate(seed: int) -> tuple[Tensor, int]:
    """A picture `(3, 32, 32)`, uint8, and its class; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def below(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    picture = torch.randint(NOISE, (3, SIDE, SIDE), generator=generator)
    first, second = torch.randperm(len(COLOURS), generator=generator)[:2].tolist()
    kinds = (below(len(CLASSES)), below(len(CLASSES)))
    for kind, colour, centre in zip(kinds, (first, second), _two_places(generator), strict=True):
        half = SMALLEST + (LARGEST - SMALLEST) * float(torch.rand((), generator=generator))
        picture += _shape(kind, centre, half) * torch.tensor(COLOURS[colour])[:, None, None]
    asked = below(2)
    mark = torch.tensor(COLOURS[(first, second)[asked]])[:, None, None]
    picture[:, :MARK, :MARK] += mark
    return picture.clamp(max=255).to(torch.uint8), kinds[asked]


def _two_places(generator: torch.Generator) -> Tensor:
    """Centres `(2, 2)` of shapes that lie inside the picture, beside the mark and beside one another."""
    edge = math.ceil(LARGEST)
    while True:
        centres = edge + (SIDE - 1 - 2 * edge) * torch.rand(2, 2, generator=generator)
        apart = float((centres[0] - centres[1]).abs().max())
        if apart > 2 * LARGEST and bool((centres.amax(1) > MARK + edge).all()):
            return centres


_ROWS, _COLUMNS = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")


def _shape(kind: int, centre: Tensor, half: float) -> Tensor:
    """Bool `(32, 32)`: the pixels of a shape."""
    down, right = _ROWS - centre[0], _COLUMNS - centre[1]
    radius = (down**2 + right**2).sqrt()
    box = torch.maximum(down.abs(), right.abs())
    if CLASSES[kind] == "disc":
        return radius <= half
    if CLASSES[kind] == "ring":
        return (radius <= half) & (radius > half - 2)
    if CLASSES[kind] == "square":
        return box <= half
    if CLASSES[kind] == "cross":
        return (box <= half) & (torch.minimum(down.abs(), right.abs()) <= 1)
    return (box <= half) & (right.abs() <= (down + half) / 2)  # a triangle that stands on its side
