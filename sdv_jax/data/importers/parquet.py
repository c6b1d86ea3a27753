"""Rows of parquet files by number, without reading the files as a whole."""

import bisect
import threading
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdv_jax.data.importers.item import Rejected
from sdv_jax.errors import UserError

_GROUPS_KEPT = 2  # in memory: a reader that goes in order, in both of two threads, reads each group once


class ParquetRows:
    """The rows of one or more parquet files of one schema, one file after the other.

    Can be pickled and used by several threads. A row is read with its row group, and the last few groups are kept.
    """

    def __init__(self, path: Path, *, columns: tuple[str, ...], what: str):
        """`path` is a file, or a folder with `*.parquet` in it or in `data/`.

        Raises UserError: no file, not parquet, a column that is missing, no rows.
        """
        self.columns, self._what = columns, what
        self.files = _files_of(path, what)
        self._groups: list[tuple[Path, int]] = []  # of all files: the file, and the number there
        rows, self._first = [], {}
        for file in self.files:
            metadata = self._metadata(file)
            self._first[file] = sum(rows)
            for group in range(metadata.num_row_groups):
                self._groups.append((file, group))
                rows.append(metadata.row_group(group).num_rows)
        self._ends = list(accumulate(rows))
        if not len(self):
            raise UserError(f"{what} {path} has no rows; give another file")
        self._start_cache()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> dict:
        """One row's columns as Python values. Raises Rejected when its row group is damaged."""
        group = bisect.bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        return self._read(group).slice(row - first, 1).to_pylist()[0]

    def place(self, row: int) -> tuple[Path, int]:
        """The file of a row, and its number there."""
        file, _ = self._groups[bisect.bisect_right(self._ends, row)]
        return file, row - self._first[file]

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows; for columns that are small. Raises UserError when a file is damaged."""
        chunks = []
        for file in self.files:
            try:
                chunks += pq.read_table(file, columns=[name]).column(name).chunks
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{self._what} {file} is damaged ({_line(error)}); download it again") from error
        return pa.chunked_array(chunks)

    def _metadata(self, file: Path) -> pq.FileMetaData:
        try:
            opened = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._what} {file} is damaged or not parquet ({_line(error)}); replace it") from error
        with opened:
            found = opened.schema_arrow.names
            missing = [name for name in self.columns if name not in found]
            if missing:
                raise UserError(
                    f"{self._what} {file} has no column {', '.join(missing)}; it has: {', '.join(found) or 'none'}"
                )
            return opened.metadata

    def _read(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._cache:
                file, number = self._groups[group]
                try:
                    with pq.ParquetFile(file) as opened:
                        self._cache[group] = opened.read_row_group(number, columns=list(self.columns))
                except (pa.ArrowException, OSError) as error:
                    raise Rejected("damaged parquet", f"{file}, row group {number} ({_line(error)})") from error
                while len(self._cache) > _GROUPS_KEPT:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]

    def _start_cache(self) -> None:
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_cache()


def _files_of(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{what} {path} does not exist; give a parquet file or a folder of them")
    files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not files:
        raise UserError(f"{what} {path} holds no .parquet file; give a parquet file or a folder of them")
    return files


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
