"""Pexels-400k: a parquet file of addresses and titles (jovianzm, MIT), and a folder of the videos that were fetched."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sdv_jax.data.importers.item import Clip, Item, Rejected
from sdv_jax.data.importers.parquet import ANYTHING, NUMBERS, TEXTS, ParquetRows
from sdv_jax.data.importers.reading import caption, check_folder, checked, kind_of, walk
from sdv_jax.errors import UserError

_COLUMNS = {"title": TEXTS, "video": TEXTS, "duration": ANYTHING}  # durations need be numbers only to choose by them


@dataclass(frozen=True)
class Options:
    """
    Attributes:
      videos: the folder of the files; "" means `videos` beside the parquet file, or else its own folder. A file is
        found by the last part of its address, or by the number in it: 857195.mp4.
      minimum_duration: seconds; shorter ones, and those of unknown length, are left out.
      count: draw so many rows; 0 means all. The draw depends on the seed and the addresses, not on their order.
      seed: of the draw.
      present_only: leave out rows whose file is not there, before the draw; else such rows are rejected.
    """

    videos: str = ""
    minimum_duration: float = 0.0
    count: int = 0
    seed: int = 0
    present_only: bool = False


class Importer:
    """One item for each chosen row; the caption is the title."""

    def __init__(self, path: Path, options: Options):
        if options.count < 0:
            raise UserError(f"option count is {options.count}; expected 0 for all rows, or how many to draw")
        self._rows = ParquetRows(path, columns=_COLUMNS, what="Pexels-400k")
        folder = self._rows.files[0].parent
        beside = folder / "videos"
        self._folder = Path(options.videos) if options.videos else beside if beside.is_dir() else folder
        self._files = _files_by_name(check_folder(self._folder, what="Pexels-400k videos"))
        self._addresses = self._rows.column("video", TEXTS).to_pylist()
        self._chosen = self._choose(options)
        self.about = {"rows": len(self._rows), "chosen": len(self._chosen), "files": len(self._files)}

    def __len__(self) -> int:
        return len(self._chosen)

    def key(self, index: int) -> str:
        row = self._chosen[index]
        return _identity(self._addresses[row]) or f"row/{row}"

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, address = self._chosen[index], self._addresses[self._chosen[index]]
        file, number = self._rows.place(row)
        where = f"{file} row {number}"
        if not address:
            raise Rejected("no file", f"{where}: the address is null")
        if not _name(address):
            raise Rejected("no file", f"{where}: the address {address} names none")
        found = self._file(address)
        if found is None:
            raise Rejected("file missing", f"{where}: {_name(address)} is not in {self._folder}")
        record = self._rows[row]
        return checked(
            Item(
                key=self.key(index), caption=caption(record["title"], where=f"{where} title"), target=Clip(found),
                provenance={"set": "Pexels-400k", "file": found.name, "row": number, "url": address},
            )
        )  # fmt: skip

    def urls(self) -> list[str]:
        """The addresses of the chosen rows, to be fetched."""
        return [address for address in (self._addresses[row] for row in self._chosen) if address]

    def _file(self, address: str) -> Path | None:
        name = _name(address)
        relative = self._files.get(name) or self._files.get(_identity(address))
        return None if relative is None else self._folder / relative

    def _choose(self, options: Options) -> list[int]:
        rows = list(range(len(self._rows)))
        if options.minimum_duration > 0:
            durations = self._rows.column("duration", NUMBERS).to_pylist()
            rows = [row for row in rows if (durations[row] or 0) >= options.minimum_duration]
        if options.present_only:
            rows = [row for row in rows if self._addresses[row] and self._file(self._addresses[row]) is not None]
        if options.count:
            drawn = sorted(rows, key=lambda row: (_lot(options.seed, self._addresses[row]), row))
            rows = sorted(drawn[: options.count])
        if len(rows) < max(1, options.count):
            raise UserError(
                f"Pexels-400k {self._rows.files[0]}: {len(rows)} of {len(self._rows)} rows are left, "
                f"{max(1, options.count)} are wanted; lower minimum_duration or count, or fetch more videos"
            )
        return rows


def _files_by_name(folder: Path) -> dict[str, str]:
    """Paths relative to `folder` of the videos in it, by file name and, where it begins with a number, by that."""
    files = {}
    for relative in walk(folder):
        name = os.path.basename(relative)
        if kind_of(Path(name)) == "video":
            files.setdefault(name, relative)
            number = re.match(r"\d+", name)
            if number:
                files.setdefault(number[0], relative)
    return files


def _path(address: str) -> str:
    """Without the slashes at its end; "" of what is no address."""
    try:
        return urlsplit(address).path.rstrip("/")
    except ValueError:
        return ""


def _name(address: str) -> str:
    return unquote(_path(address).rpartition("/")[2])


def _identity(address: str | None) -> str | None:
    """The number of a video, which its address names; else the last part of the address."""
    if not address:
        return None
    name = _name(address)
    number = re.match(r"\d+", name)
    if number:
        return number[0]
    folders = [part for part in _path(address).split("/") if part.isdigit()]
    return folders[-1] if folders else name or None


def _lot(seed: int, address: str | None) -> bytes:
    return hashlib.sha256(f"{seed}/{address}".encode(errors="replace")).digest()
