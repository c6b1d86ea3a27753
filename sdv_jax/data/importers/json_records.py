"""The records of a large JSON object {key: {...}, ...}, one at a time: the file is scanned once and never held."""

import json
import mmap
import re
import reprlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdv_jax.data.importers.item import Rejected
from sdv_jax.errors import UserError

_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKENS = re.compile(_STRING + rb"|[{}\[\]]", re.DOTALL)
_SCALAR = re.compile(rb"\s*:\s*(" + _STRING + rb'|[^\s"{}\[\],]+)', re.DOTALL)  # behind a key: no record, but counted


class JsonRecords:
    """The values of the outermost object, in the order of the file. Can be pickled."""

    def __init__(self, path: Path, *, what: str):
        """Raises UserError: no file, not an object of objects, or one that breaks off."""
        self.path = path
        try:
            with (
                open(path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
                tqdm(total=len(content), desc=path.name, unit="B", unit_scale=True, delay=3) as bar,
            ):
                self.keys, self._spans = _scan(content, bar)
        except OSError as error:
            raise UserError(f"{what} {path} cannot be read: {error.strerror}; check the path") from error
        except ValueError as error:
            raise UserError(f"{what} {path} is not a JSON object of records ({error}); download it again") from error

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict:
        """Raises Rejected for a record that is not JSON, or no object."""
        start, end = self._spans[index].tolist()
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                record = json.loads(file.read(end - start))
        except (ValueError, RecursionError, OSError) as error:
            raise Rejected("damaged record", f"{self.path}, {self.keys[index]}: not JSON") from error
        if not isinstance(record, dict):
            raise Rejected("damaged record", f"{self.path}, {self.keys[index]}: {reprlib.repr(record)} is no record")
        return record


def _scan(content: mmap.mmap, bar: tqdm) -> tuple[list[str], np.ndarray]:
    """Keys, and first and last byte of each record. Raises ValueError."""
    keys, spans, records, depth, start, key, past = [], [], 0, 0, 0, None, 0
    for token in _TOKENS.finditer(content):
        text = token[0]
        if token.start() < past:
            continue
        if text in (b"{", b"["):
            if depth == 0 and text == b"[":
                raise ValueError("it is a list")
            depth += 1
            if depth == 2:
                start = token.start()
        elif text in (b"}", b"]"):
            depth -= 1
            if depth == 1 and key is not None:
                keys.append(key)
                spans.append((start, token.end()))
                records += 1
                bar.update(token.end() - bar.n)
                key = None
        elif depth == 1:
            key = json.loads(text)
            if scalar := _SCALAR.match(content, token.end()):
                keys.append(key)
                spans.append(scalar.span(1))
                key, past = None, scalar.end()
    if depth or not records:
        raise ValueError("it breaks off" if depth else "it has no records")
    return keys, np.array(spans, np.int64)
