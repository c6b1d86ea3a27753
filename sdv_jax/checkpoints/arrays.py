"""Orbax checkpoints whose arrays are written block by block, so that a stack of layers never exists in memory.

Orbax saves whole arrays; it is told here, through its own type registry, how to save a `Streamed` one: open a zarr
array of the final shape and write the blocks as they come. Everything around the arrays (tree metadata, commit marks)
is orbax's, and any orbax reader restores the result, into any sharding. Each block carries a CRC-32C, so that damaged
bytes are an error and not a weight.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from sdv_jax.checkpoints.engine import Index, checksum
from sdv_jax.checkpoints.safetensors_io import BLOCK_BYTES
from sdv_jax.errors import UserError, one_line


@dataclass(frozen=True)
class Streamed:
    """An array yet to be produced: `blocks` yields (where, values) in C order, one chunk of shape `chunk` each.

    A block must stand until the next but one is asked for.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    blocks: Callable[[], Iterator[tuple[Index, np.ndarray]]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class _StreamedHandler(ocp.type_handlers.TypeHandler):
    """Writes `Streamed` leaves one after the other. On disk they are plain arrays, which orbax's own handlers read."""

    def __init__(self, done: Callable[[str, int], None]):
        self._done = done
        # One sync when the whole folder is complete, not one per block: thousands of files would wait for the disk.
        self._context = ts.Context({"file_io_sync": False})

    def typestr(self) -> str:
        return "np.ndarray"

    async def serialize(self, values, infos, args=None):
        group, size = [], 0
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            # Small arrays wait for the disk together; a large one is alone, so that memory holds two blocks of it.
            if size + value.nbytes > BLOCK_BYTES:
                await _all(group)
                group, size = [], 0
            group.append(self._write(value, Path(info.parent_dir), info.name))
            size += value.nbytes
        await _all(group)
        return []

    async def _write(self, value: Streamed, folder: Path, name: str) -> None:
        metadata = {
            "shape": list(value.shape),
            "data_type": value.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(value.chunk)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }
        spec = _spec(folder / name) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        store = await ts.open(spec, create=True, open=True, context=self._context)
        crc, written, summed = 0, None, None
        with ThreadPoolExecutor(1) as pool:
            for index, block in value.blocks():
                # One block is written and summed while the next is made: memory holds two of them.
                if written is not None:
                    await written
                    crc = summed.result()
                written, summed = store[index].write(block), pool.submit(checksum, block, crc)
            await written
        self._done(name, summed.result())

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("arrays are read by orbax's own handlers")

    async def metadata(self, infos):
        raise NotImplementedError("arrays are read by orbax's own handlers")


async def _all(group: list) -> None:
    """Waits for everything in `group`, also when part of it fails; then raises the first failure."""
    for result in await asyncio.gather(*group, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def save(folder: Path, arrays: Mapping[str, Streamed], *, done: Callable[[], None]) -> dict[str, int]:
    """Writes `arrays` (by dotted path) as one orbax checkpoint in the new `folder`; returns their CRC-32 sums.

    `done` is called after each array. The tree that orbax stores is nested dictionaries keyed by the parts of the
    paths.
    """
    sums = {}

    def finished(name: str, crc: int) -> None:
        sums[name] = crc
        done()

    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _StreamedHandler(finished)))
    with _quiet():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), _nested(arrays))
    return sums


def open_arrays(folder: Path, names: Iterable[str]) -> dict[str, ts.TensorStore]:
    """Arrays of a saved folder by path, unread. Raises UserError if one is missing or its description is damaged."""
    # All are asked for before the first is waited for: a VAE has hundreds.
    opening = {
        name: ts.open(_spec(folder / name) | {"fill_missing_data_reads": False}, open=True, read=True) for name in names
    }
    return {name: _result(future, folder, name) for name, future in opening.items()}


def read(folder: Path, path: str, store: ts.TensorStore, index: Index, dtype: np.dtype) -> np.ndarray:
    """Part of an array, as `dtype`. Raises UserError where blocks are missing or fail their checksum."""
    return _result(ts.cast(store, dtype)[index].read(), folder, path)


def paths(folder: Path) -> set[str]:
    """The dotted paths of the arrays in `folder`. Raises UserError if orbax never finished writing it."""
    if not (folder / "_METADATA").is_file():
        raise UserError(f"{folder}: not a complete set of arrays (no _METADATA); convert the model again")
    return {entry.name for entry in folder.iterdir() if (entry / "zarr.json").is_file()}


def _spec(folder: Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder.absolute()}/"}}


def _nested(flat: Mapping[str, Streamed]) -> dict:
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _result(future: ts.Future, folder: Path, path: str):
    try:
        return future.result()
    except ValueError as error:
        raise UserError(
            f"{folder}: array {path} is incomplete or damaged ({one_line(error)}); convert the model again"
        ) from None


@contextmanager
def _quiet():
    """Orbax warns that arrays lie in plain files and carry no shardings, which is what is wanted here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
