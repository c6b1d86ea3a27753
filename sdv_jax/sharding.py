"""Where arrays live: an ordered path table gives each parameter its sharding; without a mesh this is the identity.

A family's `SHARDING` is a tuple of (pattern, PartitionSpec). Patterns are searched in the dotted parameter path, the
first hit wins, and a parameter that no row names is an error, so that a new layer cannot silently end up replicated.
"""

import re
from collections.abc import Sequence

import jax
from flax import nnx

from sdv_jax.typing import Array

Table = Sequence[tuple[str, jax.P]]
REPLICATED: Table = ((r"", jax.P()),)  # for modules that are small beside a denoiser, such as a VAE


def under_mesh() -> bool:
    """Whether arrays are cut over a mesh here; inside a `shard_map`, which sees one device's part, they are not."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def reshard(x: Array, spec: jax.P) -> Array:
    """`jax.reshard` under a mesh, the identity without one, so that one code path serves one device and many."""
    return jax.reshard(x, spec) if under_mesh() else x


def like(x: Array, other: Array) -> Array:
    """`x` with its first axis cut as that of `other` is; fresh random numbers, which are on every device, need it."""
    if not under_mesh():
        return x
    return jax.reshard(x, jax.P(jax.typeof(other).sharding.spec[0], *(None,) * (x.ndim - 1)))


def spec_of(path: str, table: Table) -> jax.P:
    """The first row of `table` whose pattern is found in `path`; raises `KeyError` where none is."""
    for pattern, spec in table:
        if re.search(pattern, path):
            return spec
    raise KeyError(f"no sharding rule names the parameter {path!r}")


def dotted(path: Sequence) -> str:
    """An NNX state path as text: ('blocks', 'attn1', 'to_q', 'kernel') -> 'blocks.attn1.to_q.kernel'."""
    return ".".join(map(str, path))


def shardings(state: nnx.State, table: Table, mesh: jax.sharding.Mesh | None):
    """The tree of `state` with each leaf replaced by its `NamedSharding` on `mesh`, or by None without a mesh."""
    flat = [(path, jax.NamedSharding(mesh, spec_of(dotted(path), table)) if mesh is not None else None)
            for path, _ in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)
