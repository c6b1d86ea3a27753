"""Rotary position embedding over (time, height, width)."""

import jax.numpy as jnp
import numpy as np

from sdv_jax.typing import Array, Float

Table = tuple[Float[Array, "*b n k"], Float[Array, "*b n k"]]


def table_3d(t: np.ndarray, h: np.ndarray, w: np.ndarray, head_dim: int, *, theta: float = 10000.0) -> Table:
    """(cos, sin), each [t·h·w, k], for tokens in row-major (t, h, w) order.

    `t`, `h`, `w` are positions along each axis; a quarter of the head dimension turns with time and three eighths with
    each of height and width, neighbouring channels forming a pair (diffusers `get_3d_rotary_pos_embed`).
    """
    angles = [_angles(positions, size, theta) for positions, size in zip((t, h, w), _split(head_dim), strict=True)]
    apart = [np.expand_dims(a, tuple({0, 1, 2} - {axis})) for axis, a in enumerate(angles)]
    grids = [np.broadcast_to(a, (len(t), len(h), len(w), a.shape[-1])) for a in apart]
    flat = np.concatenate(grids, -1).reshape(-1, head_dim)
    return jnp.asarray(np.cos(flat)), jnp.asarray(np.sin(flat))


def rotate(x: Float[Array, "b n heads k"], table: Table) -> Float[Array, "b n heads k"]:
    """Turns every pair of channels of each head by its token's angle, in float32. The table may have a batch axis."""
    cos, sin = (jnp.expand_dims(a, -2) for a in table)
    wide = x.astype(jnp.float32)
    pairs = wide.reshape(*wide.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(wide.shape)
    return (wide * cos + turned * sin).astype(x.dtype)


def _split(head_dim: int) -> tuple[int, int, int]:
    return head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3


def _angles(positions: np.ndarray, size: int, theta: float) -> np.ndarray:
    frequencies = (1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)
    return np.repeat(np.outer(positions.astype(np.float32), frequencies), 2, axis=-1)
