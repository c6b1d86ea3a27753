"""Sinusoidal embeddings of time steps and of positions, and the small network that lifts a time step to the model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdv_jax.nn.linear import Linear
from sdv_jax.typing import Array, Float, Int


def timestep_sinusoid(timesteps: Int[Array, " b"] | Float[Array, " b"], width: int, *, flip_sin_to_cos: bool,
                      freq_shift: float) -> Float[Array, "b d"]:
    """sin and cos of the time step at width/2 frequencies from 1 to 1/10000 (diffusers `get_timestep_embedding`)."""
    half = width // 2
    frequencies = jnp.exp(-np.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(parts, -1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, fan_in: int, width: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.linear_1 = Linear(fan_in, width, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


def sincos_3d(t: np.ndarray, h: np.ndarray, w: np.ndarray, width: int) -> Float[Array, "n d"]:
    """Absolute embedding of tokens in (t, h, w) order: a quarter of the width for time, three eighths each for w and h.

    The order (width before height) is diffusers' `get_3d_sincos_pos_embed`; checkpoints depend on it.
    """
    shape = (len(t), len(h), len(w))
    spatial = 3 * width // 4
    parts = ((t, width // 4, (1, 2)), (w, spatial // 2, (0, 1)), (h, spatial // 2, (0, 2)))
    # Only the axes' own tables are constants: the whole one has hundreds of megabytes in a model of real size.
    grids = [jnp.broadcast_to(np.expand_dims(_sincos(x, size), axes), (*shape, size)) for x, size, axes in parts]
    return jnp.concatenate(grids, -1).reshape(-1, width)


def _sincos(positions: np.ndarray, size: int) -> np.ndarray:
    frequencies = 1.0 / 10000 ** (np.arange(size // 2, dtype=np.float64) / (size / 2.0))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1).astype(np.float32)
