"""einops.rearrange for arrays whose first axis, the batch, may be cut over a mesh.

JAX refuses to guess how a reshape of several axes keeps the cut of another one. Here the first axis stays what it is.
"""

from collections.abc import Callable
from functools import partial

import einops
import jax

from sdv_jax.sharding import under_mesh
from sdv_jax.typing import Array


def rearrange(x: Array, pattern: str, **sizes: int) -> Array:
    """`einops.rearrange(x, pattern, **sizes)`, where both sides of the pattern begin with the batch axis."""
    return by_example(partial(einops.rearrange, pattern=pattern, **sizes), x)


def by_example(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(*arrays)`, which treats every example (row of the first axis) on its own, wherever the rows are."""
    if not under_mesh():
        return function(*arrays)
    rank = len(jax.eval_shape(function, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)).shape)
    rows = jax.P(jax.typeof(arrays[0]).sharding.spec[0], *(None,) * (rank - 1))
    return jax.sharding.auto_axes(function, out_sharding=rows)(*arrays)
