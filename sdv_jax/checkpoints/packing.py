"""Blocks of numbers on their way from one layout to another: gathered into C order, and searched for what is no number.

Both are most of the arithmetic of a conversion, and numpy's plain forms of them run at a fraction of a disk's rate.
So does memory that is new for every block: getting pages from the system takes as long as filling them.
"""

import math

import ml_dtypes
import numpy as np

# Exponent bits all set = infinite or not a number. Testing bits needs no conversion and serves every width alike.
_EXPONENT = {
    np.dtype(np.float64): (np.uint64, 0x7FF0000000000000),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}
# Of a transposed matrix numpy reads one number per cache line; a tile of this side keeps those lines until they are
# used up. 2.5 times as fast for bfloat16, about as much for float32 and the kernels of convolutions.
_TILE = 256
_PIECE = 2**17  # numbers tested at once, so that what is made of them stays in the cache


class Buffers:
    """Memory that arrays are made in by turns: each one stands until `count` more were asked for."""

    def __init__(self, count: int):
        self._held, self._next = [np.empty(0, np.uint8)] * count, 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of that kind, of whatever values."""
        size, place = math.prod(shape) * dtype.itemsize, self._next
        self._next = (place + 1) % len(self._held)
        if self._held[place].size < size:
            self._held[place] = np.empty(size, np.uint8)
        return self._held[place][:size].view(dtype).reshape(shape)


def packed(values: np.ndarray, buffers: Buffers | None = None) -> np.ndarray:
    """`values` in C order: itself if it is so already, else a copy, made in `buffers` if there are any."""
    if values.flags.c_contiguous:
        return values
    if values.ndim < 2:
        return values.copy()
    out = (buffers or Buffers(1)).empty(values.shape, values.dtype)
    for i in range(0, values.shape[-2], _TILE):
        for j in range(0, values.shape[-1], _TILE):
            tile = (..., slice(i, i + _TILE), slice(j, j + _TILE))
            out[tile] = values[tile]
    return out


def all_finite(values: np.ndarray) -> bool:
    """Whether an array in C order holds neither NaN nor infinity."""
    kind, mask = _EXPONENT[values.dtype]
    bits = values.reshape(-1).view(kind)
    return not any((bits[start : start + _PIECE] & kind(mask)).max() == mask for start in range(0, bits.size, _PIECE))
