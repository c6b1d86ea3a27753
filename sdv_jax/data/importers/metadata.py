"""A table of files and captions: metadata.csv, .json or .jsonl (DiffSynth, VideoX-Fun, finetrainers, VideoFolder)."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdv_jax.data.importers.item import Item, Picture, Rejected, plain
from sdv_jax.data.importers.reading import (
    JSON_ERRORS,
    caption,
    check_folder,
    checked,
    file_inside,
    first_of,
    first_text,
    json_mistake,
    kind_of,
    path_key,
    read_json,
    read_lines,
    read_text,
    target,
)
from sdv_jax.errors import UserError

SUFFIXES = (".csv", ".jsonl", ".json")
# In this order: what the peers write, then what people write by hand.
TARGETS = ("video", "file_path", "file_name", "video_path", "path", "file", "image", "image_path", "target")
CAPTIONS = ("prompt", "text", "caption", "description")
REFERENCES = ("reference_image", "reference", "vace_reference_image", "references", "reference_images", "ref_image",
              "subject_image", "object_file_path")  # fmt: skip
_LONGEST_FIELD = 2**24  # characters of a CSV; Python's own limit of 2**17 is short of some captions


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
    """One item for each row, whose file is in the first column of files that the row fills.

    A column `type` ("video" or "image", VideoX-Fun) goes before the file's suffix.
    """

    def __init__(self, path: Path, options: Options):
        self._file, self._options = _table_of(path), options
        self._media = check_folder(Path(options.media), what="option media") if options.media else self._file.parent
        self._rows = _READERS[self._file.suffix.lower()](self._file)
        if not self._rows:
            raise UserError(f"table {self._file} has no rows; add some")
        columns = {name: None for row in self._rows if isinstance(row, Mapping) for name in row}
        if not columns:
            first = str(self._rows[0])[:200]
            raise UserError(f"table {self._file}: none of its {len(self._rows)} rows can be read; the first: {first}")
        self._targets = self._columns(options.target, TARGETS, columns, "of files, option target")
        self._caption = self._columns(options.caption, CAPTIONS, columns, "of captions, option caption")[0]
        self._reference = first_of(columns, REFERENCES)
        if options.reference or options.require_reference:
            what = "of references, option reference"
            self._reference = self._columns(options.reference, REFERENCES, columns, what)[0]
        used = {self._target(row): None for row in self._rows if isinstance(row, Mapping)}
        self.about = {"rows": len(self._rows), "chosen": len(self._rows), "target column": ", ".join(used),
                      "caption column": self._caption, "reference column": self._reference or ""}  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """The target's path; with those of the references where there are any."""
        row = self._rows[index]
        if not isinstance(row, Mapping) or not (file := _text(row.get(self._target(row)))):
            return f"row/{index + 1}"
        names = [file, *_names(row.get(self._reference))]
        return plain(" + ".join(path_key(self._media, text) if (text := _text(name)) else str(name) for name in names))

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, where = self._rows[index], f"{self._file} row {index + 1}"
        if not isinstance(row, Mapping):
            raise Rejected("damaged row", f"{where}: {row}")
        name = _text(row.get(self._target(row)))
        file = file_inside(self._media, name, where=where)
        if self._options.require_reference and not _names(row.get(self._reference)):
            raise Rejected("no reference", f"{where}: column {self._reference} is empty")
        return checked(
            Item(
                key=self.key(index), caption=caption(first_text(row.get(self._caption)), where=where),
                target=target(file, kind=_text(row.get("type")).lower() or None),
                views=partial(self._references, row, where),
                provenance={"set": self._file.parent.name, "table": self._file.name, "row": index + 1, "file": name},
            )
        )  # fmt: skip

    def _target(self, row: Mapping) -> str:
        return next((name for name in self._targets if _text(row.get(name))), self._targets[0])

    def _references(self, row: Mapping, where: str) -> tuple[Picture, ...]:
        return tuple(self._picture(_text(name), where) for name in _names(row.get(self._reference)))

    def _picture(self, name: str, where: str) -> Picture:
        file = file_inside(self._media, name, where=f"{where} {self._reference}")
        if kind_of(file) == "video":
            raise Rejected("unknown file type", f"{where}: {name} is given as a picture and is a video by its name")
        return Picture(file)

    def _columns(self, named: str, usual: tuple[str, ...], columns: Mapping, what: str) -> list[str]:
        """Those of the usual columns that are there, or the one that is named."""
        present = [name for name in ([named] if named else usual) if name in columns]
        if not present:
            near = [name for name in columns if str(name).lower() in ([named.lower()] if named else usual)]
            hint = f"; write {near[0]} as {near[0].lower()}, or name it by the option" if near and not named else ""
            raise UserError(
                f"table {self._file} has no column {what}: expected {named or ' or '.join(usual)}, found "
                f"{', '.join(map(str, columns)) or 'none'}{hint}"
            )
        return present


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
    """Rows by the names of the first one; one of another length, or badly quoted, becomes a message."""
    head, *lines = _csv_lines(path) or [[]]
    if not head and lines:
        raise UserError(f"table {path}: its first line, which names the columns, is empty; remove the line")
    if isinstance(head, str):
        raise UserError(f"table {path} has a damaged head: {head}; repair the file")
    names = [name.strip() for name in head]
    if len(set(names)) != len(names):
        raise UserError(f"table {path} names a column twice: {', '.join(names)}; rename one")
    rows = []
    for values in lines:
        if isinstance(values, str):
            rows.append(values)
        elif len(values) == len(names):
            rows.append(dict(zip(names, values, strict=True)))
        elif values:  # a line that is quite empty is none
            rows.append(f"it has {len(values)} fields, the head of the table {len(names)}")
    return rows


def _csv_lines(path: Path) -> list[list[str] | str]:
    """The fields of each row, or what is wrong with its quotation marks. Raises UserError when they never end."""
    reader = csv.reader(io.StringIO(read_text(path, what="table"), newline=""), strict=True)
    limit, lines = csv.field_size_limit(_LONGEST_FIELD), []
    try:
        while True:
            first = reader.line_num + 1
            try:
                lines.append(next(reader))
            except StopIteration:
                return lines
            except csv.Error as error:
                if "expected after" not in str(error):  # the reader goes on behind the line, in no other case
                    raise UserError(
                        f"table {path}: a quotation in the row of line {first} never ends; repair the file"
                    ) from error
                last = f" to {reader.line_num}" if reader.line_num > first else ""
                lines.append(f"badly quoted in line {first}{last} ({error}); write a quotation mark in a text twice")
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(path: Path) -> list:
    rows = []
    for line in read_lines(path, what="table"):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except JSON_ERRORS as error:
                rows.append(f"not JSON ({json_mistake(error)})")
    return [row if isinstance(row, (Mapping, str)) else "not a table of names and values" for row in rows]


def _read_json(path: Path) -> list:
    try:
        rows = read_json(path, what="table")
    except UserError as error:
        if [isinstance(row, Mapping) for row in _read_jsonl(path)[:2]] == [True, True]:
            raise UserError(f"table {path} holds a row in each line, which is JSON lines: name it .jsonl") from error
        raise
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
        except JSON_ERRORS:
            return [value]
    if isinstance(value, list):
        return value
    return [value] if _text(value) else []
