"""Safetensors files and folders of them, read and written one tensor at a time.

The format is an eight-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} and the raw
bytes. Reading goes through `pread`, not `mmap`: pages of a mapped file count as resident memory, and a 20 GB checkpoint
that was walked through once would look, and on a small machine act, like 20 GB in use.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from sdv_jax.checkpoints.packing import Buffers, packed
from sdv_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What a file of an adapter may hold besides: scalars of any kind, and weights of eight bits.
MORE_DTYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK_BYTES = 32 * 2**20
SHARD_BYTES = 5 * 10**9
STEMS = ("diffusion_pytorch_model", "model")
_MAX_HEADER = 100 * 2**20
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: bytes [start, start + nbytes) of `file`."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self, rows: slice | None = None, *, buffers: Buffers | None = None) -> np.ndarray:
        """The tensor, or some rows of its first axis, as a numpy array of its own dtype (bfloat16 through ml_dtypes).

        Made in `buffers`, if there are any, instead of new memory.
        """
        shape, start = self.shape, self.start
        if rows is not None:
            first, stop, _ = rows.indices(shape[0])
            start += first * (self.nbytes // shape[0])
            shape = (stop - first, *shape[1:])
        buffer = (buffers or Buffers(1)).empty(shape, self.dtype)
        view = memoryview(buffer.reshape(-1).view(np.uint8))
        with open(self.file, "rb", buffering=0) as f:
            f.seek(start)
            done = 0
            while done < len(view):
                got = f.readinto(view[done : done + BLOCK_BYTES])
                if not got:
                    raise UserError(
                        f"{self.file}: ends inside tensor {self.name}; the file is truncated, download it again"
                    )
                done += got
        return buffer

    def blocks(self) -> Iterator[np.ndarray]:
        """The tensor in pieces along its first axis, each of at most `BLOCK_BYTES` where a row fits.

        A piece stands until the next one is asked for.
        """
        if self.nbytes <= BLOCK_BYTES:
            yield self.read()
            return
        step, buffers = rows_per_block(self.shape, self.dtype.itemsize, BLOCK_BYTES), Buffers(1)
        for start in range(0, self.shape[0], step):
            yield self.read(slice(start, start + step), buffers=buffers)

    def expect(self) -> None:
        """Tells the system that the tensor is read next, so that the disk works meanwhile."""
        if hasattr(os, "posix_fadvise"):  # not everywhere
            with open(self.file, "rb", buffering=0) as f:
                os.posix_fadvise(f.fileno(), self.start, self.nbytes, os.POSIX_FADV_WILLNEED)


def read_header(file: Path, *, dtypes: Mapping[str, np.dtype] = DTYPES) -> dict[str, Tensor]:
    """The tensors of one file, checked against the file's size: no gap, no overlap, nothing missing at the end.

    Raises UserError for a truncated or corrupt file and for a dtype that is not one of `dtypes`: unless told otherwise
    the floating point ones of 16 to 64 bits.
    """
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise UserError(
                    f"{file}: not a safetensors file or truncated ({size} bytes, header of {length}); download it again"
                )
            raw = f.read(length)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _entry(file, name, item, 8 + length, dtypes) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file}: its safetensors header cannot be read ({type(error).__name__}); the file is corrupt"
        ) from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            raise UserError(
                f"{file}: tensor {tensor.name} starts at byte {tensor.start}, expected {end}; the file is corrupt"
            )
        end += tensor.nbytes
    if end != size:
        raise UserError(
            f"{file}: has {size} bytes, its header promises {end}; the file is truncated or corrupt, download it again"
        )
    return tensors


def _entry(file: Path, name: str, item: dict, base: int, dtypes: Mapping[str, np.dtype]) -> Tensor:
    if item["dtype"] not in dtypes:
        raise UserError(f"{file}: tensor {name} is stored as {item['dtype']}; supported are {', '.join(dtypes)}")
    start, stop = item["data_offsets"]
    tensor = Tensor(file, name, dtypes[item["dtype"]], tuple(int(n) for n in item["shape"]), base + int(start))
    if min(tensor.shape, default=0) < 0 or stop - start != tensor.nbytes:
        raise UserError(
            f"{file}: tensor {name} has {stop - start} bytes, its shape {tensor.shape} needs {tensor.nbytes}; "
            "the file is corrupt"
        )
    return tensor


# ---------------------------------------------------------------- a component's folder


def open_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component folder: one file, or shards with their index, with or without a variant (`.fp16`) in
    the name.

    Raises UserError where there are no weights, where several variants leave the choice open, and where index and files
    disagree.
    """
    file = weights_file(folder)
    return read_header(file) if file.suffix == ".safetensors" else _open_index(file)


def weights_file(folder: Path) -> Path:
    """The safetensors file or the index that holds the weights of `folder`; a name without a variant wins."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    indexes = [n for n in names if _is_weights(n) and n.endswith(".json")]
    singles = [n for n in names if _is_weights(n) and n.endswith(".safetensors") and not _SHARD.search(n)]
    candidates = indexes + singles
    chosen = [n for n in candidates if variant_of(n) is None] or candidates
    if len(chosen) > 1:
        raise UserError(f"{folder}: several sets of weights ({', '.join(chosen)}); keep the one to convert")
    if not chosen:
        shards = [n for n in names if _is_weights(n)]
        pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        why = (
            f"shards without their index ({shards[0]}, …)"
            if shards
            else f"only pickled weights ({pickled[0]}); save them again as safetensors"
            if pickled
            else f"no weights ({STEMS[0]}.safetensors or {STEMS[1]}.safetensors)"
        )
        raise UserError(f"{folder}: {why}")
    return folder / chosen[0]


def variant_of(name: str) -> str | None:
    """The variant in a weight file's name: "fp16" of model.fp16.safetensors, of model.safetensors.index.fp16.json."""
    for stem in STEMS:
        name = name.removeprefix(f"{stem}.")
    rest = [part for part in name.split(".") if part not in ("safetensors", "index", "json")]
    return rest[0] if rest else None


def _is_weights(name: str) -> bool:
    return name.startswith(tuple(f"{s}{c}" for s in STEMS for c in ".-")) and ".safetensors" in name


def _open_index(index: Path) -> dict[str, Tensor]:
    try:
        where = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not a readable index (JSON with a weight_map)") from None
    tensors, problems = {}, []
    for name in sorted(set(where.values())):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{index}: names {name}, which is not in the folder; the download is incomplete")
        held = read_header(file)
        listed = {tensor for tensor, shard in where.items() if shard == name}
        problems += [f"{t} (listed in {name}, not there)" for t in sorted(listed - held.keys())]
        problems += [f"{t} (in {name}, not listed)" for t in sorted(held.keys() - listed)]
        tensors |= {tensor: held[tensor] for tensor in listed & held.keys()}
    if problems:
        raise UserError(f"{index}: does not agree with its files: {listing(problems)}")
    return tensors


def listing(items: Sequence[str], limit: int = 8) -> str:
    """At most `limit` items on one line, then how many more there are."""
    rest = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Output:
    """A tensor to be written; `blocks` yields its bytes in order, only when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_folder(folder: Path, stem: str, outputs: Sequence[Output], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `outputs` as diffusers and transformers do: one file, or shards of at most `shard_bytes` with an index."""
    shards, size = [[]], 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {output.name: name for output in shard}
    index = {"metadata": {"total_size": sum(o.nbytes for o in outputs)}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_file(path: Path, outputs: Sequence[Output], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file: the header first, then each tensor's blocks; it bears its name only once complete.

    `metadata`: further entries of the header, all text.
    """
    header, offset = {"__metadata__": {"format": "pt"} | dict(metadata or {})}, 0
    for output in outputs:
        header[output.name] = {
            "dtype": CODES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.nbytes],
        }
        offset += output.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for output in outputs:
            written = sum(f.write(memoryview(_bytes(block))) for block in output.blocks)
            assert written == output.nbytes, f"{output.name}: wrote {written} of {output.nbytes} bytes"
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def _bytes(block: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(block).reshape(-1).view(np.uint8)


def rows_of(array: np.ndarray, limit: int = BLOCK_BYTES) -> Iterator[np.ndarray]:
    """Contiguous pieces of `array` along its first axis, in order, each of at most `limit` bytes where a row fits."""
    if array.ndim == 0 or array.size == 0:
        yield np.ascontiguousarray(array)
        return
    step = rows_per_block(array.shape, array.dtype.itemsize, limit)
    for start in range(0, array.shape[0], step):
        yield packed(array[start : start + step])


def rows_per_block(shape: Sequence[int], itemsize: int, limit: int = BLOCK_BYTES) -> int:
    """How many rows of the first axis one block takes: blocks about equal, none above `limit` unless one row is."""
    row = int(np.prod(shape[1:], dtype=np.int64)) * itemsize
    blocks = -(-shape[0] // max(1, limit // row))
    return -(-shape[0] // blocks)


def write_json(path: Path, content) -> None:
    """Readable JSON on disk, complete or absent."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as f:
        f.write(json.dumps(content, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
