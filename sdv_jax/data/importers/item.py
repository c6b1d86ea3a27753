"""What a data set is to the preparation: a row of items, each a caption, something to denoise and views of its subject.

An importer (one file per layout beside this one) knows where these things lie and decodes none of them; pixels are
`sdv_jax.data.decode`'s business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from sdv_jax.data.importers.masks import Mask

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive
_LONGEST_DETAIL = 500  # characters


@dataclass(frozen=True)
class Picture:
    """One image: a file, or the encoded bytes of one. `box` and `mask` are in pixels of the upright picture."""

    source: Path | bytes = field(repr=False)
    box: Box | None = None
    mask: Mask | None = None  # what is outside becomes white


@dataclass(frozen=True)
class Frame:
    """One frame of a video as a picture. `index` counts the file's frames in the order in which they are shown."""

    path: Path
    index: int
    box: Box | None = None
    mask: Mask | None = None


@dataclass(frozen=True)
class Clip:
    """A video or a part of one: its frames `start` to `end`, exclusive. `box` is in pixels of the upright frame."""

    path: Path
    start: int = 0
    end: int | None = None
    box: Box | None = None


@dataclass(frozen=True)
class Item:
    """One example.

    Attributes:
      key: the same in every run. Of several items with one key the first that can be used counts.
      views: gives `references`; called only where they are wanted, so that broken ones cost nobody else his item.
      provenance: where it comes from: file, row, address, licence.
    """

    key: str
    caption: str
    target: Picture | Clip
    views: Callable[[], tuple[Picture | Frame, ...]] = field(default=tuple, repr=False, compare=False)
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)

    @cached_property
    def references(self) -> tuple[Picture | Frame, ...]:
        """Other views of the subject; without any, frames of the target clip itself are taken. Raises Rejected."""
        return self.views()


class Rejected(Exception):
    """An item that cannot be used. The others can: the preparation sets this one aside and counts it.

    Attributes:
      reason: a few fixed words to count by, as "no caption".
      detail: one line: which file and what exactly. Whatever a file is called, it can be written as UTF-8.
    """

    def __init__(self, reason: str, detail: str):
        detail = plain(" ".join(detail.split()))[:_LONGEST_DETAIL]
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def plain(text: str) -> str:
    """`text`, with what UTF-8 cannot write (from names of files, or escapes in JSON) in backslashes."""
    return text.encode("utf-8", "backslashreplace").decode()


@runtime_checkable
class Importer(Protocol):
    """Random access to the items of one set: picklable, cheap to make, in an order that depends on the set only.

    Attributes:
      about: what the set is and what was chosen of it, for people: {"rows": 206841, "chosen": 112000, ...}.
    """

    about: Mapping[str, str | int | float]

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A name for item `index` even when it is rejected; equal to the item's key when it is not."""
        ...

    def __getitem__(self, index: int) -> Item:
        """Raises Rejected for an item that cannot be used whatever is wanted of it, IndexError past the end."""
        ...
