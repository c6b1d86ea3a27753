"""Subjects200K: parquet rows that hold two views of a subject side by side in one picture (Yuanshi, apache-2.0)."""

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from sdv_jax.data.images import opened
from sdv_jax.data.importers.item import Box, Item, Picture, Rejected
from sdv_jax.data.importers.parquet import NUMBERS, TEXTS, Kind, ParquetRows, structs
from sdv_jax.data.importers.reading import caption, checked
from sdv_jax.errors import UserError

SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
_BYTES = Kind("bytes", lambda t: types.is_binary(t) or types.is_large_binary(t) or types.is_binary_view(t))
_PICTURES = Kind("bytes, or structs with bytes", lambda t: _BYTES.fits(t) or structs(bytes=_BYTES).fits(t))
_COLUMNS = {
    "image": _PICTURES,
    "collection": TEXTS,
    "quality_assessment": structs(**dict.fromkeys(SCORES, NUMBERS)),
    "description": structs(),
}


@dataclass(frozen=True)
class Options:
    """
    Attributes:
      minimum_score: rows with one of the three scores below it are left out; OminiControl's 5 is also the best.
      collections: only rows of these, as ("collection_2",); () means all.
      both_directions: every row twice, with either view as the target.
      image_size, padding: of a view and of the margin around and between the two; 0 for the size means by the
        picture's own.
    """

    minimum_score: int = 5
    collections: tuple[str, ...] = ()
    both_directions: bool = True
    image_size: int = 0
    padding: int = 8


class Importer:
    """Items 2r and 2r + 1 are the two directions of the r-th chosen row: left from right, then right from left.

    Rows whose scores are null or NaN are rejected, rows whose scores are low are not there.
    """

    def __init__(self, path: Path, options: Options):
        self._options = options
        self._rows = ParquetRows(path, columns=_COLUMNS, what="Subjects200K")
        self._chosen = self._choose()
        if not self._chosen:
            raise UserError(
                f"Subjects200K {path}: none of its {len(self._rows)} rows has all scores >= {options.minimum_score}"
                f"{' in ' + ', '.join(options.collections) if options.collections else ''}; lower minimum_score"
            )
        self.about = {"rows": len(self._rows), "chosen": len(self._chosen), "files": len(self._rows.files)}

    def __len__(self) -> int:
        return len(self._chosen) * self._directions

    def key(self, index: int) -> str:
        row, direction = self._place(index)
        file, number = self._rows.place(row)
        return f"{file.stem}/{number:06d}/{('left', 'right')[direction]}"

    def __getitem__(self, index: int) -> Item:
        row, direction = self._place(index)
        file, number = self._rows.place(row)
        where = f"{file} row {number}"
        record = self._rows[row]
        if _scores(record) is None:
            raise Rejected("no scores", f"{where}: a score in quality_assessment is null or NaN")
        description = record["description"]
        if description is None:
            raise Rejected("no caption", f"{where}: description is null")
        text = caption(description.get(f"description_{direction}"), where=f"{where} description_{direction}")
        content = record["image"].get("bytes") if isinstance(record["image"], dict) else record["image"]
        if not content:
            raise Rejected("no picture", f"{where}: image is null")
        views = [Picture(content, box) for box in _views(content, self._options, where)]
        return checked(
            Item(
                key=self.key(index), caption=text, target=views[direction], views=lambda: (views[1 - direction],),
                provenance={
                    "set": "Subjects200K", "file": file.name, "row": number,
                    "collection": record["collection"] or "", "view": ("left", "right")[direction],
                    "item": str(description.get("item") or ""),
                },
            )
        )  # fmt: skip

    @property
    def _directions(self) -> int:
        return 2 if self._options.both_directions else 1

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._chosen[index // self._directions], index % self._directions

    def _choose(self) -> list[int]:
        """The rows that are not known to be bad: scores that are null or NaN stay, and are rejected by name."""
        keep = None
        for name in SCORES:
            scores = self._rows.column("quality_assessment", NUMBERS, field=name).combine_chunks()
            good = pc.or_(pc.greater_equal(scores, self._options.minimum_score), pc.is_nan(scores))
            good = pc.fill_null(good, True)
            keep = good if keep is None else pc.and_(keep, good)
        if self._options.collections:
            found = self._rows.column("collection", TEXTS).combine_chunks()
            keep = pc.and_(keep, pc.is_in(found, value_set=pa.array(list(self._options.collections), found.type)))
        return pc.indices_nonzero(keep).to_pylist()


def _scores(record: dict) -> list[int] | None:
    assessment = record["quality_assessment"] or {}
    scores = [assessment.get(name) for name in SCORES]
    return None if any(score is None or math.isnan(score) for score in scores) else scores


def _views(content: bytes, options: Options, where: str) -> tuple[Box, Box]:
    """The boxes of the left and the right view.

    A picture of two views of side s with a margin p around and between them is 2 s + 3 p wide and s + 2 p high.
    """
    try:
        with opened(content, name=f"{where}: the picture") as image:
            width, height = image.size
    except UserError as error:
        raise Rejected("unreadable picture", str(error)) from error
    side, margin = options.image_size, options.padding
    if not side:
        margin = 2 * height - width
        side = height - 2 * margin
    if margin < 0 or side < 8 * margin or width < 2 * (side + margin) or height < margin + side:
        raise Rejected("not two views", f"{where}: {width}x{height} is not two squares side by side")
    right = side + 2 * margin
    return (margin, margin, margin + side, margin + side), (right, margin, right + side, margin + side)
