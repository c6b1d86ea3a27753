"""Masks as COCO writes them: lengths of alternate runs of 0 and 1, down the columns, plain or packed into letters."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool
from PIL import Image


@dataclass(frozen=True)
class Mask:
    """A region of a picture, undecoded.

    Attributes:
      height, width: of the mask in pixels.
      counts: run lengths, or the string that pycocotools packs them into.
      left, top: where the mask's corner lies in the picture.
    """

    height: int
    width: int
    counts: str | tuple[int, ...] = field(repr=False)
    left: int = 0
    top: int = 0

    def decode(self) -> Bool[np.ndarray, "h w"]:
        """Raises ValueError when the runs are damaged or do not fill height x width, or that is too much or nothing."""
        if not 0 < self.height * self.width <= Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"a mask of {self.height}x{self.width}")
        try:
            runs = np.array(unpack(self.counts) if isinstance(self.counts, str) else self.counts, np.int64)
        except OverflowError as error:
            raise ValueError("a run of a mask is longer than any picture") from error
        if (runs < 0).any() or runs.sum() != self.height * self.width:
            raise ValueError(f"the runs of a mask make {runs.sum()} pixels, expected {self.height}x{self.width}")
        values = np.arange(len(runs)) % 2 == 1
        return np.repeat(values, runs).reshape(self.width, self.height).T


def unpack(counts: str) -> list[int]:
    """The run lengths in a packed string (pycocotools, `rleFrString`).

    A letter holds five bits of a number, lowest first, and a sixth that says whether more follow; the topmost bit is
    the sign. From the fourth run on, what is stored is the difference to the run before the last.

    Raises:
      ValueError: a letter that is not of the alphabet, or a string that ends within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{letter!r} is not a letter of a packed mask")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("a packed mask breaks off")
    return runs
