"""Rows of parquet files by number, without reading the files as a whole."""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from sdv_jax.data.importers.item import Rejected
from sdv_jax.errors import UserError, of_the_machine, one_line

_GROUPS_KEPT = 2  # in memory: a reader that goes in order, in both of two threads, reads each group once


@dataclass(frozen=True)
class Kind:
    """What a column holds. A column without any value holds every kind.

    Attributes:
      words: for people, as "texts".
      fits: whether a type of values is of this kind.
      common: the type that the values of several files are made, which may differ by width and encoding.
    """

    words: str
    fits: Callable[[pa.DataType], bool]
    common: pa.DataType | None = None


TEXTS = Kind(
    "texts", lambda t: types.is_string(t) or types.is_large_string(t) or types.is_string_view(t), pa.large_string()
)
NUMBERS = Kind("numbers", lambda t: types.is_integer(t) or types.is_floating(t) or types.is_decimal(t), pa.float64())
ANYTHING = Kind("anything", lambda t: True)


def structs(**fields: Kind) -> Kind:
    """Structs that have these fields, in any order, and perhaps others."""
    return Kind(
        f"structs with {', '.join(f'{name} ({kind.words})' for name, kind in fields.items())}" if fields else "structs",
        lambda t: types.is_struct(t) and all(_holds(t, name, kind) for name, kind in fields.items()),
    )


class ParquetRows:
    """The rows of one or more parquet files with the same columns, one file after the other.

    Can be pickled and used by several threads. A row is read with its row group, and the last few groups are kept.
    """

    def __init__(self, path: Path, *, columns: Mapping[str, Kind], what: str):
        """`path` is a file, or a folder with `*.parquet` in it or in `data/`.

        Raises UserError: no file, not parquet, a column that is missing or of another kind, no rows.
        """
        self.columns, self._what = tuple(columns), what
        self.files = _files_of(path, what)
        self._groups: list[tuple[Path, int]] = []  # of all files: the file, and the number there
        rows, self._first = [], {}
        for file in self.files:
            metadata = self._metadata(file, columns)
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
        """One row's columns as Python values. Raises Rejected when its row group or one of its texts is damaged."""
        group = bisect.bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        values = self._read(group).slice(row - first, 1)
        try:
            return values.to_pylist()[0]
        except UnicodeDecodeError as error:
            file, number = self.place(row)
            raise Rejected("damaged parquet", f"{file} row {number}: a text is not UTF-8") from error

    def place(self, row: int) -> tuple[Path, int]:
        """The file of a row, and its number there."""
        file, _ = self._groups[bisect.bisect_right(self._ends, row)]
        return file, row - self._first[file]

    def column(self, name: str, kind: Kind, *, field: str = "") -> pa.ChunkedArray:
        """One column of all rows, or one field of its structs, of type `kind.common`; for columns that are small.

        Raises UserError when a file is damaged, or its values are of another kind.
        """
        chunks = []
        for file in self.files:
            try:
                with pq.ParquetFile(file) as opened:
                    values = opened.read(columns=[name]).column(name)
                if field and not types.is_null(values.type):
                    values = pc.struct_field(values, field)
                self._check(file, f"{name}.{field}" if field else name, values.type, kind)
                values = values.cast(kind.common, safe=False)
                values.validate(full=True)  # reading checks no text
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{self._what} {file} is damaged ({one_line(error)}); download it again") from error
            chunks += values.chunks
        return pa.chunked_array(chunks, kind.common)

    def _metadata(self, file: Path, columns: Mapping[str, Kind]) -> pq.FileMetaData:
        try:
            opened = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._what} {file} is damaged or not parquet ({one_line(error)}); replace it") from error
        with opened:
            schema = opened.schema_arrow
            missing = [name for name in columns if name not in schema.names]
            if missing:
                found = ", ".join(schema.names) or "none"
                raise UserError(f"{self._what} {file} has no column {', '.join(missing)}; it has: {found}")
            for name, kind in columns.items():
                if schema.names.count(name) > 1:
                    raise UserError(f"{self._what} {file} has column {name} more than once; rename the others")
                self._check(file, name, schema.field(name).type, kind)
            return opened.metadata

    def _check(self, file: Path, name: str, found: pa.DataType, kind: Kind) -> None:
        if not _is(found, kind):
            raise UserError(f"{self._what} {file}: column {name} is of type {str(found)[:200]}; expected {kind.words}")

    def _read(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._cache:
                file, number = self._groups[group]
                try:
                    with pq.ParquetFile(file) as opened:
                        self._cache[group] = opened.read_row_group(number, columns=list(self.columns))
                except (pa.ArrowException, OSError) as error:
                    if of_the_machine(error):
                        raise
                    raise Rejected("damaged parquet", f"{file}, row group {number} ({one_line(error)})") from error
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


def _is(found: pa.DataType, kind: Kind) -> bool:
    found = found.value_type if types.is_dictionary(found) else found
    return types.is_null(found) or kind.fits(found)


def _holds(struct: pa.StructType, name: str, kind: Kind) -> bool:
    return struct.get_field_index(name) >= 0 and _is(struct.field(name).type, kind)


def _files_of(path: Path, what: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{what} {path} does not exist; give a parquet file or a folder of them")
    files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    if not files:
        raise UserError(f"{what} {path} holds no .parquet file; give a parquet file or a folder of them")
    return files
