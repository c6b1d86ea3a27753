"""Running a function of clips over tiles that overlap, with blended seams, as diffusers' autoencoders do it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdv_jax.errors import UserError
from sdv_jax.typing import Array, Float


def run_tiled(
    run: Callable[[Array], Array],
    x: Float[Array, "b t h w c"],
    *,
    tile: tuple[int, int],
    stride: tuple[int, int],
    out_tile: tuple[int, int],
    out_stride: tuple[int, int],
    smallest: int,
) -> Float[Array, "b s i j d"]:
    """Runs `run` on overlapping tiles of x, [b, t, h, w, c] -> [b, s, i, j, d], and blends the results.

    Args:
      run: encodes or decodes a whole clip of any size.
      x: the clip.
      tile, stride: size (height, width) of tiles in x, and how far it is from one to the next.
      out_tile, out_stride: the same in the output; what a tile has beyond the stride is blended into the next one.
      smallest: the least height and width that `run` can take.

    Raises:
      UserError: when a tile at the edge is too small.
    """
    blend = [size - step for size, step in zip(out_tile, out_stride, strict=True)]
    tops, lefts = (range(0, size, step) for size, step in zip(x.shape[2:4], stride, strict=True))
    if min(x.shape[2] - tops[-1], x.shape[3] - lefts[-1]) < smallest:
        raise UserError(
            f"VAE tiling: {x.shape[2]}x{x.shape[3]} in steps of {list(stride)} leaves an edge tile smaller than "
            f"{smallest}; use another tile size"
        )
    tiles = _map_tiles(run, x, tops, lefts, tile)
    # Tiles are blended in reading order with neighbours that are already blended themselves.
    rows = []
    for i in range(len(tops)):
        for j in range(len(lefts)):
            if i > 0:
                tiles[i, j] = _blend(tiles[i - 1, j], tiles[i, j], blend[0], axis=2)
            if j > 0:
                tiles[i, j] = _blend(tiles[i, j - 1], tiles[i, j], blend[1], axis=3)
        kept = [tiles[i, j][:, :, : out_stride[0], : out_stride[1]] for j in range(len(lefts))]
        rows.append(jnp.concatenate(kept, axis=3))
    return jnp.concatenate(rows, axis=2)


def _map_tiles(run, x: Array, tops, lefts, tile) -> dict[tuple[int, int], Array]:
    """{(row, column): run(tile)}; tiles of one shape share one loop, so programs do not grow with their number."""
    groups = {}
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            shape = min(tile[0], x.shape[2] - top), min(tile[1], x.shape[3] - left)
            groups.setdefault(shape, []).append(((i, j), (top, left)))
    tiles = {}
    for (height, width), members in groups.items():

        def one(start, height=height, width=width):
            part = jax.lax.dynamic_slice_in_dim(x, start[0], height, axis=2)
            return run(jax.lax.dynamic_slice_in_dim(part, start[1], width, axis=3))

        outputs = jax.lax.map(one, jnp.array([start for _, start in members]))
        tiles.update({index: outputs[n] for n, (index, _) in enumerate(members)})
    return tiles


def _blend(a: Array, b: Array, extent: int, axis: int) -> Array:
    """b with its first `extent` lines along `axis` faded in from the last lines of a."""
    extent = min(a.shape[axis], b.shape[axis], extent)
    if extent == 0:
        return b
    shape = [1] * b.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent) / extent).reshape(shape).astype(b.dtype)
    tail = jax.lax.slice_in_dim(a, a.shape[axis] - extent, a.shape[axis], axis=axis)
    head = jax.lax.slice_in_dim(b, 0, extent, axis=axis)
    rest = jax.lax.slice_in_dim(b, extent, b.shape[axis], axis=axis)
    return jnp.concatenate([tail * (1 - weight) + head * weight, rest], axis=axis)
