"""A stack of equal blocks: one module whose parameters carry a leading layer axis, run by one `lax.scan`.

Compile time and program size do not grow with depth. Under a mesh the layer's weights are gathered here, inside the
scan body, and nowhere else: that is all of FSDP, because the transpose of the gather is the reduce-scatter of the
gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from flax import nnx

from sdv_jax.nn.attention import OUTPUT
from sdv_jax.sharding import reshard
from sdv_jax.typing import Array

_NAMED = jax.checkpoint_policies
_POLICIES = {
    "all": _NAMED.nothing_saveable,
    "attention": _NAMED.save_only_these_names(OUTPUT),
    "offload": _NAMED.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[OUTPUT], offload_src="device",
        offload_dst="pinned_host",
    ),
}  # fmt: skip
_POLICY: ContextVar[str] = ContextVar("remat", default="all")


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` blocks made by `make`, as one module whose leaves are [l, ...]."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


@contextmanager
def remat(policy: str) -> Iterator[None]:
    """Which activations of a block the programs traced inside keep for the backward pass.

    "all": none, everything is recomputed; "attention": the outputs of attention; "offload": those, in host memory.
    """
    token = _POLICY.set(policy)
    try:
        yield
    finally:
        _POLICY.reset(token)


def scan_blocks(blocks: nnx.Module, x, apply: Callable):
    """Feeds the carry `x` (any pytree) through the blocks in order: x = apply(block, x) for each.

    A block's activations are recomputed in the backward pass, but for those that `remat` keeps, so that training keeps
    one carry per layer. (Keeping them all was slower even for a 3 M-parameter model on a CPU, where writing them costs
    more than computing them again.)
    """

    def body(x, block):
        return apply(jax.tree.map(_gather, block), x), None

    return jax.lax.scan(jax.checkpoint(body, policy=_POLICIES[_POLICY.get()]), x, blocks)[0]


def _gather(leaf: Array) -> Array:
    return reshard(leaf, jax.P())
