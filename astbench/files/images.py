"""Pictures in files: decoded, or one line on what is wrong, and no more pixels than there is room for."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from astbench.errors import DataError
from astbench.files.reading import one_line

MOST_PIXELS = 100_000_000
"""A picture of any size has at most so many; decoded, that is 300 MB."""


def read_image(file: Path, size: tuple[int, int] | None = None, place: str = "") -> Image.Image:
    """A picture in mode L (grey) or RGB.

    Args:
        file: Where it is.
        size: Width and height that it must have; any if not given.
        place: What to call the file in messages; its path if not given.

    Raises:
        DataError: no file, no picture, damaged, of another size, or too large.
    """
    place = place or str(file)
    if not file.is_file():
        raise DataError(f"{place} is no file")  # a pipe would be waited for
    try:
        with warnings.catch_warnings():
            # Nothing is unpacked before its size is known.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(file)
        with image:
            width, height = image.size
            if size is not None and (width, height) != size:
                raise DataError(f"{place} is {width} x {height} pixels, expected {size[0]} x {size[1]}")
            if width * height > MOST_PIXELS:
                raise DataError(f"{place} is {width} x {height} pixels, more than {MOST_PIXELS:,}")
            image.load()
            return image.copy() if image.mode in ("L", "RGB") else image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # what its many decoders raise on damaged files is anybody's guess
        raise DataError(f"{place} cannot be read as an image: {one_line(error)}") from error
