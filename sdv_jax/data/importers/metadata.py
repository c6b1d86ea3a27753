"""A table of files and captions: metadata.csv, .json or .jsonl (DiffSynth, VideoX-Fun, finetrainers, VideoFolder)."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdv_jax.data.importers.item import Item, Picture, Rejected, plain
from sdv_jax.data.importers.reading import (
    caption,
    check_folder,
    checked,
    file_inside,
    first_of,
    kind_of,
    read_json,
    read_lines,
    read_text,
    repeated,
    target,
)
from sdv_jax.errors import UserError

SUFFIXES = (".csv", ".jsonl", ".json")
# In this order: what the peers write, then what people write by hand.
TARGETS = ("video", "file_path", "file_name", "video_path", "path", "file", "image", "image_path", "target")
CAPTIONS = ("prompt", "text", "caption", "description")
REFERENCES = ("reference_image", "reference", "vace_reference_image", "references", "reference_images", "ref_image",
              "subject_image")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """
    Attributes:
      target, caption, reference: names of columns; "" means the usual ones.
      media: the folder that paths are relative to; "" means the folder of the table.
      require_reference: reject rows without a reference picture.
    """

    target: str = ""
    caption: str = ""
    reference: str = ""
    media: str = ""
    require_reference: bool = False


class Importer:
    """One item for each row. A column `type` ("video" or "image", VideoX-Fun) goes before the file's suffix."""

    def __init__(self, path: Path, options: Options):
        self._file, self._options = _table_of(path), options
        self._media = check_folder(Path(options.media), what="option media") if options.media else self._file.parent
        self._rows = _READERS[self._file.suffix.lower()](self._file)
        if not self._rows:
            raise UserError(f"table {self._file} has no rows; add some")
        columns = {name: None for row in self._rows if isinstance(row, Mapping) for name in row}
        self._target = self._column(options.target, TARGETS, columns, "of files, option target")
        self._caption = self._column(options.caption, CAPTIONS, columns, "of captions, option caption")
        self._reference = first_of(columns, REFERENCES)
        if options.reference or options.require_reference:
            self._reference = self._column(options.reference, REFERENCES, columns, "of references, option reference")
        self._repeated = repeated(self.key(index) for index in range(len(self)))
        self.about = {"rows": len(self._rows), "chosen": len(self._rows), "target column": self._target,
                      "caption column": self._caption, "reference column": self._reference or ""}  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The target's path as the table writes it; with those of the references where there are any."""
        row = self._rows[index]
        if not isinstance(row, Mapping) or not _text(row.get(self._target)):
            return f"row/{index + 1}"
        return plain(" + ".join([_text(row[self._target]), *map(str, _names(row.get(self._reference)))]))

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, where = self._rows[index], f"{self._file} row {index + 1}"
        if not isinstance(row, Mapping):
            raise Rejected("damaged row", f"{where}: {row}")
        file = file_inside(self._media, row.get(self._target), where=where)
        if index in self._repeated:
            raise Rejected("duplicate key", f"{where}: {self.key(index)} was there before")
        references = tuple(self._picture(name, where) for name in _names(row.get(self._reference)))
        if self._options.require_reference and not references:
            raise Rejected("no reference", f"{where}: column {self._reference} is empty")
        return checked(
            Item(
                key=self.key(index), caption=caption(row.get(self._caption), where=where),
                target=target(file, kind=_text(row.get("type")) or None), references=references,
                provenance={"set": self._file.parent.name, "table": self._file.name, "row": index + 1,
                            "file": _text(row[self._target])},
            )
        )  # fmt: skip

    def _picture(self, name, where: str) -> Picture:
        file = file_inside(self._media, name, where=f"{where} {self._reference}")
        if kind_of(file) == "video":
            raise Rejected("unknown file type", f"{where}: {name} is given as a picture and is a video by its name")
        return Picture(file)

    def _column(self, named: str, usual: tuple[str, ...], columns: Mapping, what: str) -> str:
        column = first_of(columns, [named] if named else usual)
        if column is None:
            raise UserError(
                f"table {self._file} has no column {what}: expected {named or ' or '.join(usual)}, found "
                f"{', '.join(map(str, columns)) or 'none'}"
            )
        return column


def _table_of(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"table {path} is none of {', '.join(SUFFIXES)}; give such a file")
        return path
    found = [path / f"metadata{suffix}" for suffix in SUFFIXES if (path / f"metadata{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"folder {path} has {' and '.join(file.name for file in found)}; give one of the files")
    if not found:
        names = ", ".join(f"metadata{suffix}" for suffix in SUFFIXES)
        raise UserError(f"{path} is not a table and has none of {names} in it; give the file")
    return found[0]


def _read_csv(path: Path) -> list:
    """Rows by the names of the first one; one that is longer or shorter than that becomes a message."""
    lines = csv.reader(io.StringIO(read_text(path, what="table"), newline=""), strict=True)
    rows = []
    try:
        names = [name.strip() for name in next(lines, [])]
        for values in lines:
            if len(values) == len(names):
                rows.append(dict(zip(names, values, strict=True)))
            elif values:  # a line that is quite empty is none
                rows.append(f"it has {len(values)} fields, the head of the table {len(names)}")
    except csv.Error as error:
        raise UserError(f"table {path} is damaged in line {lines.line_num}: {error}; repair the file") from error
    if len(set(names)) != len(names):
        raise UserError(f"table {path} names a column twice: {', '.join(names)}; rename one")
    return rows


def _read_jsonl(path: Path) -> list:
    rows = []
    for line in read_lines(path, what="table"):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                rows.append(f"not JSON ({str(error).splitlines()[0]})")
    return [row if isinstance(row, (Mapping, str)) else "not a table of names and values" for row in rows]


def _read_json(path: Path) -> list:
    rows = read_json(path, what="table")
    if not isinstance(rows, list):
        raise UserError(f"table {path} holds a {type(rows).__name__}; expected a list of rows")
    return [row if isinstance(row, Mapping) else "not a table of names and values" for row in rows]


_READERS = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}


def _text(value) -> str:
    return value.strip() if isinstance(value, str) else ""


def _names(value) -> list:
    """One path, or a list of them; a CSV holds a list as JSON."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    if isinstance(value, list):
        return value
    return [value] if _text(value) else []
