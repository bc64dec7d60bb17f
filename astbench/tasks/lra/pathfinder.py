"""Pathfinder: are two marked ends those of one dashed curve? Generated at 32 x 32."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 32
PADDLE_LENGTH = 2.0
THICKNESS = 0.5
MARGIN = 1.0
SEED_DISTANCE = 7.0
MARKER_RADIUS = 1.5
PADDING = 1.0
DISTRACTOR_PADDLES = 20
DIRECTIONS = 36
RETRIES = 20

CONTOURS = {"easy": 6, "intermediate": 9, "hard": 14}
"""Paddles of a contour by difficulty."""

Point = tuple[float, float]
"""Row and column."""
Paddle = tuple[Point, Point]
"""A short stroke by its ends."""
Pixels = set[tuple[int, int]]


@dataclass
class Contour:
    """A dashed curve that grows.

    Attributes:
        paddles: From the seed on.
        pivot: Where the last paddle's stride began.
        angle: Direction of the last paddle, in radians.
    """

    paddles: list[Paddle]
    pivot: Point
    angle: float


def generate(rng: random.Random, contour_length: int) -> tuple[Tensor, int]:
    """One image, uint8 `(32, 32)`, and whether the marked ends belong together (1) or not (0).

    Source: Linsley et al. 2018, arXiv 1805.08315, section 3, with the settings of the Long Range Arena's
    Pathfinder32 (Tay et al. 2021, arXiv 2011.04006, and its code): two contours grow side by side from seeds
    `SEED_DISTANCE` apart, paddle by paddle; a turn by an angle d has a probability ~ cos(d)^2 (continuity 1); no
    contour comes near another; then distractors of a third of the length, `DISTRACTOR_PADDLES` paddles in all; a
    disc marks the seed of one contour and the end of the same or the other.

    A reimplementation of the description and not of the published program: directions come from a grid of
    `DIRECTIONS` (there: from the pixels of a circle), paddles and discs are drawn by their distance from a pixel's
    middle (there: rescaled from twice the size), all as bright as can be (there: the paddles a little darker than
    the discs), and what is near another contour is found by distance (there: by dilated masks). Numbers from these
    images cannot be compared with published ones; `--data.source=local` reads the published images.
    """
    contours = None
    while contours is None:
        contours = _two_contours(rng, contour_length)
    occupied = {pixel for contour in contours for paddle in contour.paddles for pixel in _near(paddle)}
    length = contour_length // 3
    distractors = [_distractor(rng, length, occupied) for _ in range(DISTRACTOR_PADDLES // length)]
    image = [[0] * SIZE for _ in range(SIZE)]
    for contour in (*contours, *(d for d in distractors if d is not None)):
        for paddle in contour.paddles:
            _draw(image, paddle, THICKNESS / 2)
    label, first = rng.randrange(2), rng.randrange(2)
    last = first if label else 1 - first
    for tip in (contours[first].paddles[0][0], contours[last].paddles[-1][1]):
        _draw(image, (tip, tip), MARKER_RADIUS)
    return torch.tensor(image, dtype=torch.uint8), label


def _two_contours(rng: random.Random, length: int) -> list[Contour] | None:
    """Two contours that grow in turns; None where one of them gets stuck."""
    inner = 2 * SEED_DISTANCE
    row, column = (rng.uniform(inner, SIZE - 1 - inner) for _ in range(2))
    around = rng.uniform(-math.pi, math.pi)
    seeds = [(row, column), _step((row, column), around, SEED_DISTANCE)]
    contours = [_seed(rng, seed) for seed in seeds]
    one, two = (c.paddles[0] for c in contours)
    if not all(_inside(end) for end in (*one, *two)) or _near(one) & _near(two):
        return None
    occupied: Pixels = set()
    for _ in range(length - 1):
        for contour, other in (contours, contours[::-1]):
            # A contour's own last paddle is no obstacle to its next one; the other contour's is.
            if not _extend(rng, contour, occupied | _near(other.paddles[-1])):
                return None
            occupied |= _near(contour.paddles[-2])
    return contours


def _distractor(rng: random.Random, length: int, occupied: Pixels) -> Contour | None:
    """A contour on free ground, which it marks as `occupied`; None after `RETRIES` failures."""
    for _ in range(RETRIES):
        contour = _seed(rng, (rng.uniform(0, SIZE - 1), rng.uniform(0, SIZE - 1)))
        if not _free(contour.paddles[0], occupied):
            continue
        taken = set(occupied)
        while len(contour.paddles) < length and _extend(rng, contour, taken):
            taken |= _near(contour.paddles[-2])
        if len(contour.paddles) == length:
            occupied |= taken | _near(contour.paddles[-1])
            return contour
    return None


def _seed(rng: random.Random, tail: Point) -> Contour:
    angle = rng.uniform(-math.pi, math.pi)
    head = _step(tail, angle, PADDLE_LENGTH)
    return Contour([(tail, head)], _step(head, angle, -PADDLE_LENGTH - MARGIN), angle)


def _extend(rng: random.Random, contour: Contour, occupied: Pixels) -> bool:
    """Add a paddle, if there is room for one."""
    pivot = _step(contour.pivot, contour.angle, PADDLE_LENGTH + 2 * MARGIN)
    choices: list[tuple[Paddle, float]] = []
    weights: list[float] = []
    for number in range(DIRECTIONS):
        turn = 2 * math.pi * number / DIRECTIONS - math.pi
        weight = max(0.0, math.cos(turn)) ** 2
        angle = contour.angle + turn
        head = _step(pivot, angle, PADDLE_LENGTH + MARGIN)
        paddle = (_step(head, angle, -PADDLE_LENGTH), head)
        if weight > 1e-9 and _free(paddle, occupied):
            choices.append((paddle, angle))
            weights.append(weight)
    if not choices:
        return False
    paddle, contour.angle = rng.choices(choices, weights)[0]
    contour.paddles.append(paddle)
    contour.pivot = pivot
    return True


def _step(start: Point, angle: float, length: float) -> Point:
    return start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)


def _inside(point: Point) -> bool:
    return all(PADDING <= x <= SIZE - 1 - PADDING for x in point)


def _free(paddle: Paddle, occupied: Pixels) -> bool:
    """Whether a paddle lies in the image and away from what is occupied."""
    (a, b), (c, d) = paddle
    points = [(a, b), ((a + c) / 2, (b + d) / 2), (c, d)]
    return all(_inside(p) for p in points) and not any((round(r), round(c)) in occupied for r, c in points)


def _near(paddle: Paddle) -> Pixels:
    """The pixels that other contours keep off: those up to `MARGIN` beside the paddle."""
    reach = THICKNESS / 2 + MARGIN
    return {pixel for pixel, distance in _around(paddle, reach) if distance <= reach}


def _draw(image: list[list[int]], paddle: Paddle, radius: float) -> None:
    """Draw a stroke as wide as twice `radius`, soft by a pixel; one without length is a disc."""
    for (row, column), distance in _around(paddle, radius + 0.5):
        light = round(255 * min(1.0, max(0.0, radius + 0.5 - distance)))
        image[row][column] = max(image[row][column], light)


def _around(paddle: Paddle, reach: float) -> Iterator[tuple[tuple[int, int], float]]:
    """Pixels around a paddle, and how far each one's middle is from it."""
    (row, column), (end_row, end_column) = paddle
    down, right = end_row - row, end_column - column
    squared = down**2 + right**2
    for r in range(max(0, math.floor(min(row, end_row) - reach)), min(SIZE, math.ceil(max(row, end_row) + reach) + 1)):
        for c in range(
            max(0, math.floor(min(column, end_column) - reach)),
            min(SIZE, math.ceil(max(column, end_column) + reach) + 1),
        ):
            along = ((r - row) * down + (c - column) * right) / squared if squared else 0.0
            along = min(1.0, max(0.0, along))
            yield (r, c), math.hypot(r - row - along * down, c - column - along * right)
