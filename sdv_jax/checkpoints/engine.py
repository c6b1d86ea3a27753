"""Matches a checkpoint's tensors with a model's leaves, strictly, and moves values one block at a time.

Nothing here knows a family: a component's rules say what is called what, the model built abstractly says which leaves
there are. Every tensor is used exactly once or named as ignored, every leaf is filled, shapes are equal; all that is
wrong is collected and reported together.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from flax import nnx

from sdv_jax.checkpoints.rules.table import Rule, Rules
from sdv_jax.checkpoints.safetensors_io import BLOCK_BYTES, Tensor, listing, rows_per_block
from sdv_jax.errors import UserError
from sdv_jax.sharding import dotted

# Exponent bits all set = infinite or not a number. Testing bits needs no conversion and serves every width alike.
_EXPONENT = {
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
_MOST_ELEMENTS = 2**48  # a config with a few zeros too many goes far beyond, where numpy itself gives up

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Leaf:
    """One leaf of the model and the names of the torch tensors behind it: one per layer if stacked, else one."""

    path: str
    shape: tuple[int, ...]
    rule: Rule
    names: tuple[str, ...]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape that each of `names` has in torch."""
        mine = self.shape[1:] if self.rule.stacked else self.shape
        # A broadcast scalar passes through the transform without memory for its elements.
        return self.rule.transform.to_torch(np.broadcast_to(np.int8(0), mine)).shape

    def chunk(self, dtype: np.dtype) -> tuple[int, ...]:
        """The shape of the blocks this leaf is stored in: everything if that is small, else some rows of one layer."""
        rest = self.shape[1:] if self.rule.stacked else self.shape
        if int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize <= BLOCK_BYTES:
            return self.shape
        rows = (rows_per_block(rest, dtype.itemsize, BLOCK_BYTES), *rest[1:])
        return (1, *rows) if self.rule.stacked else rows

    def blocks(self, chunk: tuple[int, ...]) -> Iterator[Index]:
        """Where the blocks of shape `chunk` lie, in C order; only the leading axes are ever divided."""
        corners = np.ndindex(*(-(-n // c) for n, c in zip(self.shape, chunk, strict=True)))
        for corner in corners:
            yield tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(corner, chunk, self.shape, strict=True))


def leaf_shapes(abstract: nnx.State) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of the leaves of an abstract module's state."""
    return {dotted(path): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(abstract)}


def leaves_of(shapes: Mapping[str, tuple[int, ...]], rules: Rules) -> tuple[Leaf, ...]:
    """The leaves with their rules and torch names; a leaf that no rule names is a mistake in the table."""
    found = []
    for path, shape in sorted(shapes.items()):
        rule = rules.of_path(path)
        assert rule is not None, f"no conversion rule names {path}"
        layers = range(shape[0]) if rule.stacked else (None,)
        found.append(Leaf(path, shape, rule, tuple(rule.torch_name(path, layer) for layer in layers)))
    return tuple(found)


def problems_between(leaves: Iterable[Leaf], shapes: Mapping[str, tuple[int, ...]], rules: Rules) -> list[str]:
    """What keeps tensors of these names and shapes (aliases resolved) from filling `leaves` exactly, if anything."""
    wanted = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    missing = [f"missing {name} {wanted[name]}" for name in sorted(wanted.keys() - shapes.keys())]
    extra = [
        f"unexpected {name} {shapes[name]}" for name in sorted(shapes.keys() - wanted.keys()) if not rules.ignored(name)
    ]
    wrong = [
        f"{name} has shape {shapes[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & shapes.keys())
        if shapes[name] != wanted[name]
    ]
    return missing + extra + wrong


@dataclass(frozen=True)
class Source:
    """A checkpoint that fits its model: the leaves, and the tensors by torch name.

    `tied` lists, for a tensor that goes by other names than its own, all tensors that the file holds of it.
    """

    where: str
    leaves: tuple[Leaf, ...]
    tensors: Mapping[str, Tensor]
    tied: Mapping[str, tuple[Tensor, ...]]

    def dtype_of(self, leaf: Leaf) -> np.dtype:
        """The file's dtype; where layers differ, the narrowest one that holds all of them exactly."""
        found = {self.tensors[name].dtype for name in leaf.names}
        return found.pop() if len(found) == 1 else np.result_type(np.float32, *(d for d in found if d.itemsize > 4))

    def layer(self, leaf: Leaf, index: int) -> np.ndarray:
        """Layer `index` of `leaf` in our layout and the file's dtype (the whole leaf, if it is not stacked)."""
        return leaf.rule.transform.to_ours(self.tensors[leaf.names[index]].read())

    def read(self, leaf: Leaf, index: Index, dtype: np.dtype) -> np.ndarray:
        """The part `index` of `leaf` as `dtype`. Holds one tensor at a time; raises UserError at a NaN or infinity."""
        if not leaf.rule.stacked:
            return self._checked(self.layer(leaf, 0)[index], leaf.names[0], dtype)
        layers = range(*index[0].indices(leaf.shape[0]))
        out = None
        for place, number in enumerate(layers):
            part = self._checked(self.layer(leaf, number)[index[1:]], leaf.names[number], dtype)
            out = np.empty((len(layers), *part.shape), dtype) if out is None else out
            out[place] = part
        return out

    def blocks(self, leaf: Leaf, dtype: np.dtype) -> Iterator[tuple[Index, np.ndarray]]:
        """(where, values as `dtype`) of each block of `leaf`, in C order. Raises UserError at a NaN or infinity."""
        chunk = leaf.chunk(dtype)
        if chunk == leaf.shape:
            whole = tuple(slice(0, n) for n in leaf.shape)
            yield whole, np.ascontiguousarray(self.read(leaf, whole, dtype))
            return
        held, values = None, None
        for index in leaf.blocks(chunk):
            number, inside = (index[0].start, index[1:]) if leaf.rule.stacked else (0, index)
            if held != number:
                values = None  # before the next one is read, so that two tensors are never held at once
                held, values = number, self.layer(leaf, number)
            block = np.ascontiguousarray(self._checked(values[inside], leaf.names[number], dtype))
            yield index, block[None] if leaf.rule.stacked else block

    def _checked(self, values: np.ndarray, name: str, dtype: np.dtype) -> np.ndarray:
        values = values.astype(dtype, copy=False)
        kind, mask = _EXPONENT[values.dtype]
        bits = values.view(kind) if values.ndim else values.reshape(1).view(kind)
        if np.any((bits & kind(mask)) == kind(mask)):
            raise UserError(f"{self.where}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
        return values

    def check_tied(self) -> None:
        """Raises UserError where a tied tensor is stored under several names with different values."""
        for first, *others in self.tied.values():
            for other in others:
                if (first.dtype, first.shape) != (other.dtype, other.shape) or checksum(first.read()) != checksum(
                    other.read()
                ):
                    raise UserError(
                        f"{self.where}: {first.name} and {other.name} differ, but are one tied tensor in this model"
                    )


def match(tensors: Mapping[str, Tensor], leaves: tuple[Leaf, ...], rules: Rules, *, where: str) -> Source:
    """Pairs tensors with leaves. Raises one UserError that lists every missing, unexpected and mis-shaped tensor."""
    for leaf in leaves:
        if math.prod(leaf.shape) > _MOST_ELEMENTS:
            raise UserError(f"{where}: the config asks for {leaf.path} of shape {leaf.shape}, which no file can hold")
    named, tied = dict(tensors), {}
    for alias, name in rules.aliases.items():
        if (tensor := named.pop(alias, None)) is not None:
            tied[name] = tuple(t for t in (tensors.get(name), tensor) if t is not None)
            named.setdefault(name, tensor)
    problems = problems_between(leaves, {name: tensor.shape for name, tensor in named.items()}, rules)
    if problems:
        raise UserError(f"{where}: the weights do not fit the config: {listing(problems)}")
    return Source(where, leaves, named, tied)


def checksum(block: np.ndarray, before: int = 0) -> int:
    """CRC-32 of the bytes of `block` in C order, continued from `before`."""
    return zlib.crc32(np.ascontiguousarray(block).reshape(-1).view(np.uint8), before)
