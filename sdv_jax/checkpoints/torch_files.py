"""State dicts saved by `torch.save` (.pth, .pt, .bin), read without torch: where each tensor lies in the file.

Since torch 1.6 such a file is an uncompressed zip archive: `data.pkl` holds the dict, in which a tensor stands as a
call of `_rebuild_tensor_v2` on the record `data/KEY` that has its numbers. Only the pickle is read here, by an
unpickler that knows nothing but those calls and so runs no code of the file's; the numbers are left to be read one
tensor at a time, as those of a safetensors file are. (`torch.load(mmap=True)` would do as much, but every page that was
once looked at would count as memory in use.)
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdv_jax.checkpoints.safetensors_io import DTYPES, Tensor
from sdv_jax.errors import UserError

_STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"}
_LOCAL_HEADER = 30  # bytes of a record's local header before its name


class _Storage(NamedTuple):
    """A record of numbers: its key and their dtype."""

    key: str
    dtype: np.dtype


class _View(NamedTuple):
    """A tensor as the pickle has it: numbers of a storage, from `offset` on."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_file(file: Path) -> dict[str, Tensor]:
    """Name -> tensor of the state dict in `file`; only the pickle is read.

    Raises UserError for a file that is missing, truncated or in the format before torch 1.6, that holds anything but a
    flat dict of floating point tensors, or a tensor whose numbers do not lie in order.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise UserError(f"{file}: not a state dict saved by torch (no data.pkl in it)")
            content = _Unpickler(archive.read(pickles[0]), file).load()
            records = {info.filename: info for info in archive.infolist()}
            return _tensors(file, content, records, pickles[0].removesuffix("data.pkl"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except zipfile.BadZipFile:
        why = "truncated, or saved by a torch before 1.6; download it again"
        raise UserError(f"{file}: not a zip archive as torch.save writes it ({why})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def _tensors(file: Path, content, records: dict[str, zipfile.ZipInfo], prefix: str) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file}: holds {type(content).__name__}, expected a dict of tensors")
    found = {}
    with open(file, "rb") as raw:
        for name, view in content.items():
            if not isinstance(name, str) or not isinstance(view, _View):
                raise UserError(f"{file}: {name!r} is no tensor; expected a flat state dict of tensors only")
            record = records.get(f"{prefix}data/{view.storage.key}")
            found[name] = _locate(file, raw, name, view, record)
    return found


def _locate(file: Path, raw: io.BufferedReader, name: str, view: _View, record: zipfile.ZipInfo | None) -> Tensor:
    where = f"{file}: tensor {name}"
    if not _in_order(view.shape, view.strides):
        raise UserError(f"{where} is stored with strides {view.strides}; save it again as a contiguous tensor")
    if view.offset < 0 or any(n < 0 for n in view.shape):
        raise UserError(f"{where} has shape {view.shape} at offset {view.offset}; the file is damaged")
    size = view.storage.dtype.itemsize
    if record is None or (view.offset + math.prod(view.shape)) * size > record.file_size:
        raise UserError(f"{where} has no numbers in the file, or too few; the file is damaged, download it again")
    if record.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{where} is compressed, which torch.save never does; save it again")
    raw.seek(record.header_offset)
    header = raw.read(_LOCAL_HEADER)
    # The record's name and its padding to a multiple of 64 bytes lie between the header and the numbers.
    start = record.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return Tensor(file, name, view.storage.dtype, view.shape, start + view.offset * size)


def _in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the numbers lie in C order without gaps; the stride of an axis of length 1 does not matter."""
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return all(n == 1 or s == e for n, s, e in zip(shape, strides, expected, strict=True)) or 0 in shape


class _Unpickler(pickle.Unpickler):
    """Reads a state dict's pickle: dicts, strings and numbers, and the few calls that stand for a tensor."""

    def __init__(self, raw: bytes, file: Path):
        super().__init__(io.BytesIO(raw))
        self._file = file

    def load(self):
        try:
            return super().load()
        except UserError:
            raise
        except Exception as error:  # whatever a damaged pickle makes of the machine that runs it
            why = type(error).__name__
            raise UserError(f"{self._file}: its pickle cannot be read ({why}); the file is damaged") from None

    def find_class(self, module: str, name: str):
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) in known:
            return known[module, name]
        raise UserError(f"{self._file}: holds {module}.{name}, expected a dict of tensors only; nothing of it was run")

    def persistent_load(self, pid) -> _Storage:
        kind, storage, key = pid[:3]
        if kind != "storage" or storage not in _STORAGES:
            raise UserError(f"{self._file}: holds numbers of kind {storage}; supported are {', '.join(DTYPES)}")
        return _Storage(str(key), DTYPES[_STORAGES[storage]])


def _rebuild_tensor(storage: _Storage, offset: int, shape, strides, *_) -> _View:
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(data: _View, *_) -> _View:
    return data
