"""Matches a checkpoint's tensors with a model's leaves, strictly, and moves values one block at a time.

Nothing here knows a family: a component's rules say what is called what, the model built abstractly says which leaves
there are. Every tensor is used exactly once or named as ignored, every leaf is filled, shapes are equal; all that is
wrong is collected and reported together.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flax import nnx

from sdv_jax.checkpoints.packing import Buffers, all_finite, packed
from sdv_jax.checkpoints.rules.table import SAME, Rule, Rules
from sdv_jax.checkpoints.safetensors_io import BLOCK_BYTES, Tensor, listing, rows_per_block
from sdv_jax.errors import UserError
from sdv_jax.sharding import dotted

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

    def read(self, leaf: Leaf, index: Index, dtype: np.dtype) -> np.ndarray:
        """The part `index` of `leaf` as `dtype`. Holds one tensor at a time; raises UserError at a NaN or infinity."""
        if not leaf.rule.stacked:
            return self._block(leaf, 0, self._values(leaf, 0, index), dtype)
        layers = range(*index[0].indices(leaf.shape[0]))
        out = None
        for place, number in enumerate(layers):
            part = self._block(leaf, number, self._values(leaf, number, index[1:]), dtype)
            out = np.empty((len(layers), *part.shape), dtype) if out is None else out
            out[place] = part
        return out

    def blocks(self, leaf: Leaf, dtype: np.dtype) -> Iterator[tuple[Index, np.ndarray]]:
        """(where, values as `dtype`) of each block of `leaf`, in C order.

        A block stands until the next but one is asked for. Raises UserError at a NaN or infinity.
        """
        chunk = leaf.chunk(dtype)
        if chunk == leaf.shape:
            whole = tuple(slice(0, n) for n in leaf.shape)
            yield whole, self.read(leaf, whole, dtype)
            return
        held, values, memory, buffers = None, None, Buffers(1), Buffers(2)
        for index in leaf.blocks(chunk):
            number, inside = (index[0].start, index[1:]) if leaf.rule.stacked else (0, index)
            if leaf.rule.transform is SAME:
                part = self._values(leaf, number, inside, buffers)
            else:
                if held != number:
                    held, values = number, self._values(leaf, number, (), memory)
                    for name in leaf.names[number + 1 : number + 2]:
                        self.tensors[name].expect()
                part = values[inside]
                if part.flags.c_contiguous:  # it would be no copy, and not stand when the next tensor is read
                    part = part.copy()
            block = self._block(leaf, number, part, dtype, buffers)
            yield index, block[None] if leaf.rule.stacked else block

    def _values(self, leaf: Leaf, number: int, inside: Index, buffers: Buffers | None = None) -> np.ndarray:
        """Part `inside` of layer `number` in our layout and the file's dtype; of what is kept as it is, no more rows
        are read than that."""
        tensor = self.tensors[leaf.names[number]]
        if inside and leaf.rule.transform is SAME:
            return tensor.read(inside[0], buffers=buffers)[(slice(None), *inside[1:])]
        return leaf.rule.transform.to_ours(tensor.read(buffers=buffers))[inside]

    def _block(
        self, leaf: Leaf, number: int, values: np.ndarray, dtype: np.dtype, buffers: Buffers | None = None
    ) -> np.ndarray:
        values = packed(values, buffers).astype(dtype, copy=False)
        if not all_finite(values):
            name = self.tensors[leaf.names[number]].name
            raise UserError(f"{self.where}: tensor {name} holds NaN or infinite values; the checkpoint is damaged")
        return values

    def check_tied(self) -> None:
        """Raises UserError where a tied tensor is stored under several names with different values."""
        for first, *others in self.tied.values():
            for other in others:
                if (first.dtype, first.shape) != (other.dtype, other.shape) or _sum(first) != _sum(other):
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


def _sum(tensor: Tensor) -> int:
    crc = 0
    for block in tensor.blocks():
        crc = checksum(block, crc)
    return crc


def checksum(block: np.ndarray, before: int = 0) -> int:
    """CRC-32 of the bytes of `block` in C order, continued from `before`."""
    return zlib.crc32(np.ascontiguousarray(block).reshape(-1).view(np.uint8), before)
