"""A stack of equal blocks: one module whose parameters carry a leading layer axis, run by one `lax.scan`.

Compile time and program size do not grow with depth. Under a mesh the layer's weights are gathered here, inside the
scan body, and nowhere else: that is all of FSDP, because the transpose of the gather is the reduce-scatter of the
gradients.
"""

from collections.abc import Callable

import jax
from flax import nnx

from sdv_jax.sharding import reshard
from sdv_jax.typing import Array


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` blocks made by `make`, as one module whose leaves are [l, ...]."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


def scan_blocks(blocks: nnx.Module, x, apply: Callable):
    """Feeds the carry `x` (any pytree) through the blocks in order: x = apply(block, x) for each.

    A block's activations are recomputed in the backward pass, so that training keeps one carry per layer. (Keeping them
    was slower even for a 3 M-parameter model on a CPU, where writing them costs more than computing them again.)
    """

    def body(x, block):
        return apply(jax.tree.map(_gather, block), x), None

    return jax.lax.scan(jax.checkpoint(body), x, blocks)[0]


def _gather(leaf: Array) -> Array:
    return reshard(leaf, jax.P())
