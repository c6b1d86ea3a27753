"""Rotary position embedding over (time, height, width)."""

import jax.numpy as jnp
import numpy as np

from sdv_jax.typing import Array, Float

Table = tuple[Float[Array, "*b n k"], Float[Array, "*b n k"]]


def table_3d(
    t: np.ndarray, h: np.ndarray, w: np.ndarray, head_dim: int, *, sizes: tuple[int, int, int] | None = None,
    theta: float = 10000.0, precision=np.float32,
) -> Table:  # fmt: skip
    """(cos, sin), each [t·h·w, k], for tokens in row-major (t, h, w) order.

    `t`, `h`, `w` are positions along each axis, `sizes` says how many channels of a head turn with each, neighbouring
    channels forming a pair; absent, a quarter turns with time and three eighths with each of height and width
    (diffusers `get_3d_rotary_pos_embed`). Angles are computed in `precision`.
    """
    sizes = sizes or _split(head_dim)
    angles = [_angles(at, size, theta, precision) for at, size in zip((t, h, w), sizes, strict=True)]
    apart = [np.expand_dims(a, tuple({0, 1, 2} - {axis})) for axis, a in enumerate(angles)]
    grids = [np.broadcast_to(a, (len(t), len(h), len(w), a.shape[-1])) for a in apart]
    flat = np.concatenate(grids, -1).reshape(-1, head_dim)
    return jnp.asarray(np.cos(flat), jnp.float32), jnp.asarray(np.sin(flat), jnp.float32)


def rotate(x: Float[Array, "b n heads k"], table: Table) -> Float[Array, "b n heads k"]:
    """Turns every pair of channels of each head by its token's angle, in float32. The table may have a batch axis."""
    cos, sin = (jnp.expand_dims(a, -2) for a in table)
    wide = x.astype(jnp.float32)
    pairs = wide.reshape(*wide.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(wide.shape)
    return (wide * cos + turned * sin).astype(x.dtype)


def _split(head_dim: int) -> tuple[int, int, int]:
    return head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3


def _angles(positions: np.ndarray, size: int, theta: float, precision) -> np.ndarray:
    frequencies = (1.0 / theta ** (np.arange(0, size, 2, dtype=precision) / size)).astype(precision)
    return np.repeat(np.outer(positions.astype(precision), frequencies), 2, axis=-1)
