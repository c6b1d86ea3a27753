"""Pexels-400k: a parquet file of addresses and titles (jovianzm, MIT), and a folder of the videos that were fetched."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sdv_jax.data.importers.item import Clip, Item, Rejected
from sdv_jax.data.importers.parquet import ANYTHING, NUMBERS, TEXTS, ParquetRows
from sdv_jax.data.importers.reading import caption, check_folder, checked, kind_of, walk
from sdv_jax.errors import UserError

_NUMBER = re.compile(r"\d+(?=[-_.]|$)")  # at the beginning of a name: 857195-hd.mp4, but not 4k-sunset.mp4
_COLUMNS = {"title": TEXTS, "video": TEXTS, "duration": ANYTHING}  # durations need be numbers only to choose by them


@dataclass(frozen=True)
class Options:
    """
    Attributes:
      videos: the folder of the files; "" means `videos` beside the parquet file, or else its own folder. A file is
        found by the last part of its address, or by the clip's number: 857195.mp4.
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
        self._addresses = self._rows.column("video", TEXTS).to_pylist()
        self._files = _Files(check_folder(self._folder, what="Pexels-400k videos"), self._addresses)
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
        relative = self._files.of(address)
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


class _Files:
    """The videos in a folder, found for an address. A caption beside another clip is worse than no clip: of a name that
    several clips have, the folder tells whose it is, and a number counts only in a name that is no address's.
    """

    def __init__(self, folder: Path, addresses: Iterable[str | None]):
        self._named: dict[str, str] = {}
        self._placed: dict[tuple[str, str], str] = {}
        self._numbered: dict[str, str] = {}
        owners: dict[str, set[str | None]] = {}
        for address in filter(None, addresses):
            owners.setdefault(_name(address), set()).add(_identity(address))
        self._shared = {name for name, clips in owners.items() if len(clips) > 1}
        count = 0
        for relative in filter(lambda path: kind_of(Path(path)) == "video", walk(folder)):
            place, name = os.path.split(relative)
            self._named.setdefault(name, relative)
            self._placed.setdefault((os.path.basename(place), name), relative)
            number = _NUMBER.match(name)
            if number and name not in owners:
                self._numbered.setdefault(number[0], relative)
            count += 1
        self._count = count

    def __len__(self) -> int:
        return self._count

    def of(self, address: str) -> str | None:
        """The path of its file, relative to the folder."""
        name, clip = _name(address), _identity(address)
        named = self._placed.get((clip, name)) or (None if name in self._shared else self._named.get(name))
        return named or self._numbered.get(clip)


def _path(address: str) -> str:
    """Without the slashes at its end; "" of what is no address."""
    try:
        return urlsplit(address).path.rstrip("/")
    except ValueError:
        return ""


def _name(address: str) -> str:
    return unquote(_path(address).rpartition("/")[2])


def _identity(address: str | None) -> str | None:
    """The number of a clip: the folder in its address, or what the last part begins with; else that part itself."""
    if not address:
        return None
    folder, name = _path(address).split("/")[-2:-1], _name(address)
    if folder and folder[0].isdecimal():
        return folder[0]
    number = _NUMBER.match(name)
    return number[0] if number else name or None


def _lot(seed: int, address: str | None) -> bytes:
    return hashlib.sha256(f"{seed}/{address}".encode(errors="replace")).digest()
