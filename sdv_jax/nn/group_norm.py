"""Group normalisation over channels-last arrays."""

import jax
import jax.numpy as jnp
from flax import nnx

from sdv_jax.typing import Array, Float


class GroupNorm(nnx.Module):
    """Normalises groups of neighbouring channels over every axis between the batch and the channels.

    Source: Wu & He 2018; `torch.nn.GroupNorm`. Parameters: `scale` [c], `bias` [c]. Statistics are float32.
    """

    def __init__(self, channels: int, *, groups: int, eps: float, dtype=jnp.float32):
        self.groups = groups
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((channels,), dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))

    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        """Returns the normalised array in the dtype of x."""
        inner = tuple(range(1, x.ndim - 1))
        # Channels are reduced one by one first and grouped afterwards: the big array keeps its layout. The variance is
        # taken from centred values because E[x^2] - E[x]^2 cancels in float32 where a group's mean is large.
        centred = x.astype(jnp.float32)
        centred = centred - self._group_mean(centred.mean(inner, keepdims=True))
        variance = self._group_mean(jnp.square(centred).mean(inner, keepdims=True))
        scale = jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)
        return (centred * scale + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _group_mean(self, means: Array) -> Array:
        """[b, 1.., c] means of single channels -> the same shape holding each channel's group mean."""
        grouped = means.reshape(*means.shape[:-1], self.groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(means.shape)
