"""What runs a path, made once and kept: few paths are in use, and their number is bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from torch import Tensor

from astbench import console

Program = Callable[..., Tensor]


def bucket(size: int) -> int:
    """The power of two that a size belongs to: sizes up to it share a program."""
    return 1 << max(0, size - 1).bit_length()


class Programs:
    """The programs of paths by (path, shape bucket), at most so many; the one that was not used for longest goes first.

    Args:
        most: How many are kept.
        make: Makes the program of a path, its layers' numbers.

    Attributes:
        hits: Times that a program was there.
        misses: Times that one was made.
        dropped: Programs that had to go for others.
    """

    def __init__(self, most: int, make: Callable[[tuple[int, ...]], Program]) -> None:
        self.most, self._make = most, make
        self.hits = self.misses = self.dropped = 0
        self._kept: OrderedDict[Hashable, Program] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, path: tuple[int, ...], shape: tuple[int, ...]) -> Program:
        """The program of a path for inputs of a shape."""
        key = (path, tuple(map(bucket, shape)))
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        if len(self._kept) == self.most:
            self._kept.popitem(last=False)
            if not self.dropped:
                console.say(
                    f"note: paths and sizes of batches need more than {self.most} programs; the one used longest ago "
                    "is dropped and made again when it is needed: raise --depth.programs"
                )
            self.dropped += 1
        self._kept[key] = self._make(path)
        return self._kept[key]

    def facts(self) -> dict[str, int]:
        """For the record."""
        return {"hits": self.hits, "misses": self.misses, "dropped": self.dropped, "kept": len(self), "most": self.most}
